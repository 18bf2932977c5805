"""What the tables are to show, and whether they do: means over seeds of rows that were run."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd

from polyclinic_simulations.holdout import FRACTIONS
from polyclinic_simulations.papers.plans import HOSPITALS, METHODS, PARTS_OF_LABELS, SEEDS, Plan

ROUNDING = 1e-9
"""By which floats may miss a goal: 1 - 0.33 is less than 0.67."""


class Means:
    """Means over all seeds of the rows in papers.csv that have one start, of those that Plan.init names.

    `unmade` are rows that have not been run; of others that are not in `results`, nothing could be measured.
    """

    def __init__(self, results: pd.DataFrame, init: str, unmade: Collection[Plan]) -> None:
        own = (
            results[results["init"] == init] if len(results) else pd.DataFrame(columns=[*_KEYS, "seed", "value", "low"])
        )
        found = (
            own.astype({"low": float})
            .groupby(_KEYS)
            .agg(value=("value", "mean"), low=("low", "mean"), seeds=("seed", "nunique"))
        )
        whole = found[found["seeds"] == len(SEEDS)]
        self._means, self._lows = whole["value"].to_dict(), whole["low"].to_dict()
        self._unmade = {
            (plan.dataset, plan.split, plan.regime, plan.method, plan.label_fraction)
            for plan in unmade
            if plan.init == init
        }

    def __call__(self, metric: str, dataset: str, split: str, regime: str, method: str, fraction: float = 1.0) -> float:
        """Of one group of rows.

        Raises:
            KeyError: they have not been run with every seed.
        """
        return float(self._means[metric, dataset, split, regime, method, fraction])

    def beyond_chance(self, *group: object) -> bool:
        """Whether the test patients are enough to tell: their intervals begin above an AUC of 0.5, on average."""
        return bool(self._lows[group] > 0.5)

    def has(self, metric: str, *group: object) -> bool:
        """Whether every seed of a group of rows could be measured.

        Raises:
            KeyError: they have not been run.
        """
        if group in self._unmade:
            raise KeyError(group)
        return (metric, *group) in self._means


_KEYS = ["metric", "dataset", "split", "regime", "method", "label_fraction"]


@dataclass(frozen=True)
class Goal:
    """A figure that should be at least so large."""

    table: int
    text: str
    figure: Callable[[Means], float]
    least: float
    init: str = "random"


def goals() -> Iterator[Goal]:
    """Every goal."""
    slices = ("covid-ct", "published", "central")
    yield Goal(1, "accuracy of SSSD from these images alone", lambda v: v("accuracy", *slices, "sssd"), 0.8176)
    yield Goal(
        1,
        "AUC of SSSD over that of the masked autoencoder",
        lambda v: v("auc", *slices, "sssd") - v("auc", *slices, "mae"),
        0.0,
    )
    skin = ("ham10000-subset", "patient", "federated")
    for place in (skin, ("covid-chestxray", "patient", "central")):
        yield Goal(
            2,
            f"accuracy of SimCLR, then MICLe over that of SimCLR on {place[0]}",
            lambda v, at=place: v("accuracy", *at, "simclr+micle") - v("accuracy", *at, "simclr"),  # type: ignore[misc]
            0.0,
        )
    yield Goal(
        2,
        "accuracy of SimCLR, then MICLe with 30 % of the labels over no pretraining with all",
        lambda v: v("accuracy", *skin, "simclr+micle", 0.3) - v("accuracy", *skin, "scratch"),
        0.0,
    )
    chest = ("nih-chestxray8-subset", "patient", "central")
    yield Goal(
        3,
        "AUC of MLVICX over the best of VICReg, SimCLR and no pretraining",
        lambda v: (
            v("auc", *chest, "mlvicx") - max(v("auc", *chest, method) for method in ("vicreg", "simclr", "scratch"))
        ),
        0.03,
    )
    for hospital in HOSPITALS:
        spared = partial(_spared, hospital)
        yield Goal(4, f"labels that pretraining spares {hospital}", spared, 0.67)
        yield Goal(4, f"the same, both from supervised weights, for {hospital}", spared, 0.67, "supervised")
    for method in METHODS:
        yield from _federated(method)


def _spared(hospital: str, value: Means) -> float:
    """The fraction of a hospital's labels beyond those with which the pretrained start does as well as the supervised
    one with all; below 0 where it never does. Fractions of so few labels that the supervised start has no figure in a
    seed do not count.

    Raises:
        KeyError: the test patients are too few to tell the supervised start from chance, or rows are not made yet.
    """
    here = ("auc", hospital, "site", "federated")
    if not value.beyond_chance(*here, "scratch", 1.0):
        raise KeyError(hospital)
    goal = value(*here, "scratch", 1.0)
    known = [fraction for fraction in FRACTIONS if value.has(*here, "scratch", fraction)]
    reached = [fraction for fraction in known if value(*here, "simclr", fraction) >= goal]
    return 1 - min(reached, default=2.0)


def _federated(method: str) -> Iterator[Goal]:
    def over(value: Means, regime: str, other: str, fraction: float) -> float:
        skin = ("ham10000-subset", "patient")
        return value("auc", *skin, "federated", method, fraction) - value("auc", *skin, regime, other, fraction)

    yield Goal(
        5,
        f"AUC of {method} over federated training without it, at 10 % of the labels or fewer",
        lambda v: min(over(v, "federated", "scratch", fraction) for fraction in PARTS_OF_LABELS if fraction <= 0.1),
        0.03,
    )
    for regime, words, least in (("pooled", "pooled", -0.01), ("alone", "the mean single site", 0.05)):
        yield Goal(
            5,
            f"AUC of {method} federated over {words}, at every fraction of the labels",
            lambda v, at=regime: min(over(v, at, method, fraction) for fraction in PARTS_OF_LABELS),  # type: ignore[misc]
            least,
        )


def verdicts(results: pd.DataFrame, unmade: Collection[Plan] = ()) -> dict[int, list[str]]:
    """Sentences by table: met, missed, or not measured; `unmade` are the rows that have not been run."""
    means = {init: Means(results, init, unmade) for init in ("random", "supervised")}
    said: dict[int, list[str]] = {}
    for goal in goals():
        try:
            found = goal.figure(means[goal.init])
            text = f"{'met' if found >= goal.least - ROUNDING else 'missed'}: {found:.3f}"
        except KeyError:
            text = "not measured"
        said.setdefault(goal.table, []).append(f"{goal.text}, at least {goal.least:g}: {text}")
    return said
