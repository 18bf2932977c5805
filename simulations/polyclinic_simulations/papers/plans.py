"""Which rows the tables have, and with what settings each tier trains them.

Settings of the cpu tier are what two cores train in minutes; every row of a table shares its encoder, its fine-tuning
and the time (not the number) of its pretraining steps as far as whole epochs allow. Nothing here was chosen on a test
patient.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Plan:
    """One row: what is trained on what, and how. The field names are columns of papers.csv."""

    table: int
    dataset: str
    split: str
    regime: str
    method: str
    init: str
    label_fraction: float
    seed: int

    @property
    def name(self) -> str:
        """Fit for a folder, and different for every row."""
        parts = (self.dataset, self.split, self.regime, self.method, self.init, self.label_fraction, self.seed)
        return f"{self.table}-" + "-".join(str(part) for part in parts)


@dataclass(frozen=True)
class Tier:
    """Settings by which a tier trains.

    Attributes:
        images, encoder: of the study; `channels` is the dataset's.
        epochs: of pretraining, by method.
        finetune: the stage.
    """

    images: dict[str, Any]
    encoder: dict[str, Any]
    epochs: dict[str, int]
    batch_size: int
    finetune: dict[str, Any]
    threads: int


TIERS = {
    "cpu": Tier(
        images={"size": 64},
        encoder={"name": "vit_tiny", "patch": 8},
        epochs={"mae": 150, "sssd": 150, "simclr": 36, "mlvicx": 36, "vicreg": 36},
        batch_size=64,
        finetune={"rounds": 25, "batch_size": 32, "learning_rate": 5e-4, "probe_rounds": 2, "warmup_rounds": 2.0},
        threads=2,
    ),
    "gpu": Tier(
        images={"size": 224},
        encoder={"name": "vit_small", "patch": 16},
        epochs={"mae": 800, "sssd": 800, "simclr": 300, "mlvicx": 300, "vicreg": 300},
        batch_size=256,
        finetune={"rounds": 60, "batch_size": 64, "learning_rate": 5e-4, "probe_rounds": 5, "warmup_rounds": 5.0},
        threads=8,
    ),
}

LABELS: dict[str, dict[str, list[str]]] = {
    "covid-ct": {"noncovid": ["NonCOVID"], "covid": ["COVID"]},
    "nih-chestxray8-subset": {"clear": ["No_findings"], "pneumonia": ["Pneumonia"]},
}
LABELS["covid-ct-border"] = LABELS["covid-ct"]
OUTSIDE = {"covid-ct": "luna16-slices"}
"""Unlabelled images of the same kind, for init = "outside"."""

REFERENCES = {
    1: "SSSD-COVID's paper: accuracy 0.8176 from these images alone, 0.9527 with outside images. Its other table, "
    "SARS-COV-2-CT (0.9778), cannot be run: no images at hand.",
    2: "Big Self-Supervised Models: MICLe adds accuracy to SimCLR, and matches the baseline with 20 to 30 % of labels.",
    3: "MLVICX's paper: more than 3 points of AUC over other self-supervised methods.",
    4: "REMEDIS: 1 to 33 % of the labels match the supervised baseline at 100 %.",
    5: "SSL-FL: accuracy 0.915 against 0.771 from scratch, 0.958 pooled, over 12 sites.",
}
NOT_YET = {
    2: "needs the federated regime of this command, which it does not have yet",
    4: "is measured by `polyclinic simulate --leave-one-site-out`; this command does not make its rows yet",
    5: "needs the federated regime of this command, which it does not have yet",
}
"""Tables whose rows cannot be run, and why."""


def plans() -> Iterator[Plan]:
    """All rows that can be run, seed by seed, so that an interrupted run holds whole comparisons."""
    for seed in SEEDS:
        for method in ("scratch", "mae", "sssd", "simclr", "mlvicx"):
            yield Plan(1, "covid-ct", "published", "central", method, "random", 1.0, seed)
        yield Plan(1, "covid-ct-border", "published", "central", "scratch", "random", 1.0, seed)
    for seed in SEEDS:
        for method in ("scratch", "simclr", "vicreg", "mlvicx"):
            yield Plan(3, "nih-chestxray8-subset", "patient", "central", method, "random", 1.0, seed)
    for seed in SEEDS:
        for method in ("mae", "sssd", "simclr", "mlvicx"):
            yield Plan(1, "covid-ct", "published", "central", method, "outside", 1.0, seed)
    for seed in SEEDS:
        for method in ("scratch", "mae", "sssd", "simclr", "mlvicx"):
            yield Plan(1, "covid-ct", "document", "central", method, "random", 1.0, seed)
        for method in ("mae", "sssd", "simclr", "mlvicx"):
            yield Plan(1, "covid-ct", "document", "central", method, "outside", 1.0, seed)


def pretraining(plan: Plan, tier: Tier) -> dict[str, Any]:
    """The pretrain stage of a row: six rounds that share its epochs."""
    method, extra = ("mlvicx", {"weight": 0.0}) if plan.method == "vicreg" else (plan.method, {})
    rounds = 6
    return {
        "kind": "pretrain",
        "method": method,
        "rounds": rounds,
        "local_epochs": tier.epochs[plan.method] // rounds,
        "batch_size": tier.batch_size,
        **extra,
    }
