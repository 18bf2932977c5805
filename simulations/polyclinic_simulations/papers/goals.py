"""What the tables are to show, and whether they do: means over seeds of rows that were run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd

from polyclinic_simulations.holdout import FRACTIONS
from polyclinic_simulations.papers.plans import HOSPITALS, SEEDS

ROUNDING = 1e-9
"""By which floats may miss a goal: 1 - 0.33 is less than 0.67."""


class Means:
    """Means over all seeds of the rows in papers.csv that start from random weights."""

    def __init__(self, results: pd.DataFrame) -> None:
        own = results[results["init"] == "random"] if len(results) else pd.DataFrame(columns=[*_KEYS, "seed", "value"])
        found = own.groupby(_KEYS).agg(value=("value", "mean"), seeds=("seed", "nunique"))
        self._means = found.loc[found["seeds"] == len(SEEDS), "value"].to_dict()

    def __call__(self, metric: str, dataset: str, split: str, regime: str, method: str, fraction: float = 1.0) -> float:
        """Of one group of rows.

        Raises:
            KeyError: they have not been run with every seed.
        """
        return float(self._means[metric, dataset, split, regime, method, fraction])


_KEYS = ["metric", "dataset", "split", "regime", "method", "label_fraction"]


@dataclass(frozen=True)
class Goal:
    """A figure that should be at least so large."""

    table: int
    text: str
    figure: Callable[[Means], float]
    least: float


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
    skin = ("ham10000-subset", "patient")
    yield Goal(
        2,
        "accuracy of SimCLR, then MICLe over that of SimCLR",
        lambda v: v("accuracy", *skin, "federated", "simclr+micle") - v("accuracy", *skin, "federated", "simclr"),
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
        yield Goal(4, f"labels that pretraining spares {hospital}", partial(_spared, hospital), 0.67)
    for method in ("mae", "simclr", "sssd", "mlvicx"):
        yield from _federated(method)


def _spared(hospital: str, value: Means) -> float:
    """The fraction of a hospital's labels beyond those with which the pretrained start does as well as the supervised
    one with all; below 0 where it never does."""
    goal = value("auc", hospital, "site", "federated", "scratch", 1.0)
    reached = [f for f in FRACTIONS if value("auc", hospital, "site", "federated", "simclr", f) >= goal]
    return 1 - min(reached, default=2.0)


def _federated(method: str) -> Iterator[Goal]:
    def over(value: Means, regime: str, other: str, fraction: float) -> float:
        skin = ("ham10000-subset", "patient")
        return value("auc", *skin, "federated", method, fraction) - value("auc", *skin, regime, other, fraction)

    yield Goal(
        5,
        f"AUC of {method} over federated training without it, at 10 % of the labels or fewer",
        lambda v: min(over(v, "federated", "scratch", fraction) for fraction in (0.01, 0.05, 0.1)),
        0.03,
    )
    yield Goal(5, f"AUC of {method} federated over pooled", lambda v: over(v, "pooled", method, 1.0), -0.01)
    yield Goal(5, f"AUC of {method} federated over the mean single site", lambda v: over(v, "alone", method, 1.0), 0.05)


def verdicts(results: pd.DataFrame) -> dict[int, list[str]]:
    """Sentences by table: met, missed, or not measured."""
    value = Means(results)
    said: dict[int, list[str]] = {}
    for goal in goals():
        try:
            found = goal.figure(value)
            text = f"{'met' if found >= goal.least - ROUNDING else 'missed'}: {found:.3f}"
        except KeyError:
            text = "not measured"
        said.setdefault(goal.table, []).append(f"{goal.text}, at least {goal.least:g}: {text}")
    return said
