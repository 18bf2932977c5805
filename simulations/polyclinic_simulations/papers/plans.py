"""Which rows the tables have, and with what settings each tier trains them.

Settings of the cpu tier are what two cores train in minutes, smaller still in all tables but the first: those over
sites have hundreds of rows. Every row of a table shares its encoder, its fine-tuning with as many labels and about the
time (not the number) of its pretraining steps, but for SSSD: it has MAE's number, whose steps take it 1.3 times as
long. Nothing here was chosen on a test patient.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from polyclinic.stages import TOKEN_METHODS
from polyclinic_simulations.holdout import FRACTIONS

SEEDS = (0, 1, 2)
METHODS = ("simclr", "mae", "sssd", "mlvicx")
LOCAL_EPOCHS = 3
"""Between two rounds of a consortium's pretraining."""
STARTS = {"simclr": "pretrained", "simclr joined": "joined", "scratch": "supervised"}
"""Table 4: the methods, and what `holdout` calls them."""


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
    """Settings by which a tier trains the rows of a table.

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

    @property
    def digest(self) -> str:
        """Of all of them: rows that were made with others are other rows.

        LOCAL_EPOCHS, PARTS, ALPHA, run.PASSES and the methods' defaults are not in it: who changes one begins a new
        papers.csv and --work, or takes the rows that it voids out of both.
        """
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]


CENTRAL = Tier(
    images={"size": 96},
    encoder={"name": "vit_tiny", "patch": 12},
    epochs={"mae": 300, "sssd": 300, "simclr": 54, "mlvicx": 48, "vicreg": 48},
    batch_size=64,
    finetune={"rounds": 40, "batch_size": 32, "learning_rate": 5e-4, "probe_rounds": 2, "warmup_rounds": 2.0},
    threads=1,
)
SITES = Tier(
    images={"size": 64},
    encoder={"name": "vit_tiny", "patch": 16},
    epochs={"mae": 72, "sssd": 72, "simclr": 30, "mlvicx": 24, "vicreg": 24},
    batch_size=64,
    finetune={"rounds": 12, "batch_size": 32, "learning_rate": 5e-4, "probe_rounds": 1, "warmup_rounds": 1.0},
    threads=1,
)
FULL = Tier(
    images={"size": 224},
    encoder={"name": "vit_small", "patch": 16},
    epochs={"mae": 800, "sssd": 800, "simclr": 300, "mlvicx": 300, "vicreg": 300},
    batch_size=256,
    finetune={"rounds": 60, "batch_size": 64, "learning_rate": 5e-4, "probe_rounds": 5, "warmup_rounds": 5.0},
    threads=8,
)
FEW = replace(SITES, finetune={**SITES.finetune, "probe_rounds": 6})
"""SITES for rows of few labels: an encoder that knows something is held still for half of the rounds."""
RESIDUAL, FULL_RESIDUAL = replace(SITES, encoder={"name": "resnet18"}), replace(FULL, encoder={"name": "resnet50"})
TIERS = {
    "cpu": {1: CENTRAL, 2: RESIDUAL, 3: RESIDUAL, 4: RESIDUAL, 5: FEW},
    "gpu": {1: FULL, 2: FULL_RESIDUAL, 3: FULL_RESIDUAL, 4: FULL_RESIDUAL, 5: FULL},
}
"""By table. Those of MICLe, MLVICX and REMEDIS have ResNets, as in their papers; masked methods need transformers."""


def settings_of(tier: str, encoder: str | None = None) -> dict[int, Tier]:
    """By table; with `encoder` in place of each table's own."""
    own = TIERS[tier]
    if encoder is None:
        return own
    if "resnet" in encoder:
        return {table: replace(at, encoder={"name": encoder}) for table, at in own.items()}
    patched = own[5].encoder  # for tables that have no transformer of their own
    return {table: replace(at, encoder={**patched, **at.encoder, "name": encoder}) for table, at in own.items()}


def trainable(plan: Plan, tier: Tier) -> bool:
    """Whether the tier's encoder is one that the row's method can use: masked methods skip tokens."""
    return plan.method not in TOKEN_METHODS or tier.encoder["name"].startswith("vit")


LABELS: dict[str, dict[str, list[str]]] = {
    "covid-ct": {"noncovid": ["NonCOVID"], "covid": ["COVID"]},
    "nih-chestxray8-subset": {"clear": ["No_findings"], "pneumonia": ["Pneumonia"]},
}
LABELS["covid-ct-border"] = LABELS["covid-ct"]
LABELS["ham10000-subset"] = {word: [word] for word in ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")}
PNEUMONIA = [
    "Pneumonia", "SARS", "Pneumocystis", "Streptococcus", "Klebsiella", "E.Coli", "Varicella", "Legionella", "Lipoid",
    "Mycoplasma Bacterial Pneumonia", "Bacterial", "Chlamydophila", "Influenza",
]  # fmt: skip
COVID = ["COVID-19", "COVID-19, ARDS"]
CLEAR = ["No_findings", "No Finding", "No finding"]
LABELS["covid-chestxray"] = {"covid": COVID, "other": [*PNEUMONIA, *CLEAR]}
CHEST = {"pneumonia": [*PNEUMONIA, *COVID], "clear": CLEAR, "ignore": ["todo", "Unknown", "ARDS"]}
"""Of the three hospitals of table 4."""
HOSPITALS = ("covid-chestxray", "nih-chestxray8-subset", "figure1-chestxray")
CHANNELS = {"ham10000-subset": 3}
"""Of the datasets that are not grey."""
PARTS, ALPHA = 5, 0.5
"""Sites to which a dataset is dealt where it is not trained on centrally: Dirichlet(ALPHA) over its classes."""
PARTS_OF_LABELS = (0.01, 0.05, 0.1, 1.0)
"""Of table 5."""
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


def plans() -> Iterator[Plan]:
    """All rows, in the order in which they are made: a run that ends early holds whole comparisons."""
    for methods in (("scratch", "mae", "sssd"), ("simclr", "mlvicx")):
        for seed in SEEDS:
            for method in methods:
                yield Plan(1, "covid-ct", "published", "central", method, "random", 1.0, seed)
    for seed in SEEDS:
        yield Plan(1, "covid-ct-border", "published", "central", "scratch", "random", 1.0, seed)
    for seed in SEEDS:
        yield from _leaving_one_out(seed)
    for seed in SEEDS:
        for method in ("scratch", "simclr", "simclr+micle"):
            for fraction in (0.1, 0.3, 1.0):
                yield Plan(2, "ham10000-subset", "patient", "federated", method, "random", fraction, seed)
            yield Plan(2, "covid-chestxray", "patient", "central", method, "random", 1.0, seed)
    for seed in SEEDS:
        for method in ("scratch", "simclr", "vicreg", "mlvicx"):
            yield Plan(3, "nih-chestxray8-subset", "patient", "central", method, "random", 1.0, seed)
    yield from _beside_pooled()
    for seed in SEEDS:
        for method in METHODS:
            yield Plan(1, "covid-ct", "published", "central", method, "outside", 1.0, seed)
    for seed in SEEDS:
        for method in ("scratch", *METHODS):
            yield Plan(1, "covid-ct", "document", "central", method, "random", 1.0, seed)
        for method in METHODS:
            yield Plan(1, "covid-ct", "document", "central", method, "outside", 1.0, seed)
    for seed in SEEDS:
        yield from _leaving_one_out(seed, "supervised")


def _beside_pooled() -> Iterator[Plan]:
    """Table 5: at every fraction of the labels, scratch, and each method in each regime; all seeds of one first."""
    taught = [(method, regime) for method in METHODS for regime in ("federated", "pooled", "alone")]
    for method, regime in [("scratch", "federated"), *taught]:
        for seed in SEEDS:
            for fraction in PARTS_OF_LABELS:
                yield Plan(5, "ham10000-subset", "patient", regime, method, "random", fraction, seed)


def _leaving_one_out(seed: int, init: str = "random") -> Iterator[Plan]:
    """Table 4 of one seed: every start at the other hospitals ("without X"), and at the one that took no part.

    From `supervised` weights, a file's that the user gives, it is REMEDIS as published: those weights, contrastive
    pretraining, fine-tuning, beside the same weights fine-tuned alone.
    """
    for hospital in HOSPITALS:
        for method in STARTS:
            yield Plan(4, f"without {hospital}", "patient", "federated", method, init, 1.0, seed)
            for fraction in FRACTIONS:
                yield Plan(4, hospital, "site", "federated", method, init, fraction, seed)


def pretraining(plan: Plan, tier: Tier) -> list[dict[str, Any]]:
    """The pretrain stages of a row. A method and the one that follows it share the epochs, about two to one.

    Central training has six rounds, for the checkpoints; sites meet after every LOCAL_EPOCHS.
    """
    methods = plan.method.split("+")
    epochs = tier.epochs[methods[0]]
    stages = []
    for method, share in zip(methods, (2 / 3, 1 / 3) if len(methods) == 2 else (1.0,), strict=True):
        rounds = 6 if plan.regime == "central" else max(round(share * epochs / LOCAL_EPOCHS), 1)
        local = max(round(share * epochs / 6), 1) if plan.regime == "central" else LOCAL_EPOCHS
        name, extra = ("mlvicx", {"weight": 0.0}) if method == "vicreg" else (method, {})
        stage = {"kind": "pretrain", "method": name, "rounds": rounds, "local_epochs": local}
        stages.append({**stage, "batch_size": tier.batch_size, **extra})
    return stages
