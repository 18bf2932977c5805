"""What else an encoder tells: how it serves each site, what few labels make of it, and whether it knows the sites.

All figures are AUC of linear probes on frozen features. They have no intervals of their own: a sweep reads them over
seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyclinic.evaluation import Probe, learn_probe
from polyclinic.seeding import seed_for
from polyclinic.study import Study

FRACTIONS = (0.01, 0.05, 0.1, 0.3)
"""Of the training patients' labels."""
SITE_STRENGTH = 0.1
"""Inverse penalty of the probe that tells sites apart: the same for all encoders, which are compared by it."""


class Half(NamedTuple):
    """One half of a site's patients, or of several sites': features (images, dim), classes and patients (images,)."""

    features: NDArray[np.float32]
    classes: NDArray[np.str_]
    patients: NDArray[np.int64]


@dataclass(frozen=True)
class Profile:
    """Of one row.

    Attributes:
        at_sites: {site: AUC on its test patients} of the probe that has learnt from all sites' training patients; at
            sites that are held out, on all of theirs.
        own: the same of a probe that has learnt from one site's alone; empty but for the row of a single site.
        labels: {part of all training patients whose labels the probe has learnt from: AUC on all test patients}.
        site_auc: of a probe that tells the sites' patients apart, macro one-vs-rest: 0.5 where features give no site
            away. None of a single site.
        patients: {site: those with a label that `at_sites` is measured on}; runs of earlier versions have none.
    """

    at_sites: dict[str, float]
    own: dict[str, float]
    labels: dict[str, float]
    site_auc: float | None
    patients: dict[str, int] = field(default_factory=dict)


def together(halves: Sequence[Half]) -> Half:
    """Several sites' as one; their patients stay apart."""
    starts = np.cumsum([0] + [half.patients.max(initial=-1) + 1 for half in halves])
    patients = [half.patients + start for half, start in zip(halves, starts, strict=False)]
    features, classes, _ = zip(*halves, strict=True)
    return Half(np.concatenate(features), np.concatenate(classes), np.concatenate(patients))


def profile(
    whole: Probe,
    encoded: Mapping[str, tuple[Half, Half]],
    held_out: Mapping[str, tuple[Half, Half]],
    study: Study,
    own: str,
) -> Profile:
    """The profile of an encoder from each site's (train, test).

    `whole` is the probe of all sites' training patients, `own` the site that alone has trained the encoder, if one has.
    """
    seed = seed_for(study.seed, "probe")
    train, test = (together([halves[k] for halves in encoded.values()]) for k in (0, 1))
    classes = whole.classes
    tested = {name: halves[1] for name, halves in encoded.items()}
    tested |= {name: together(halves) for name, halves in held_out.items()}
    curve = {"1": whole.auc(test.features, test.classes)}
    for fraction in FRACTIONS:
        some = _labelled(train, fraction, seed)
        if set(classes) <= set(some.classes):  # with fewer it would be another task
            curve[f"{fraction:g}"] = learn_probe(*some, classes, seed=seed).auc(test.features, test.classes)
    found = {name: whole.auc(half.features, half.classes) for name, half in tested.items()}
    alone = _own(encoded[own][0], tested, classes, seed) if own in encoded else {}
    patients = {
        name: len(np.unique(tested[name].patients[np.isin(tested[name].classes, classes)])) for name in _known(found)
    }
    return Profile(_known(found), _known(alone), _known(curve), _site_auc(encoded, seed), patients)


def _own(train: Half, tested: Mapping[str, Half], classes: list[str], seed: int) -> dict[str, float | None]:
    known = [name for name in classes if (train.classes == name).any()]
    if len(known) < 2:
        return {}
    learnt = learn_probe(*train, known, seed=seed)
    return {name: learnt.auc(half.features, half.classes) for name, half in tested.items()}


def _known(found: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in found.items() if value is not None}


def _labelled(half: Half, fraction: float, seed: int) -> Half:
    """The labelled images of this part of each class's patients, at least one; a larger part holds all of a smaller's.

    A patient of several classes goes by the first image's.
    """
    half = Half(*(part[half.classes != ""] for part in half))
    numbers, first = np.unique(half.patients, return_index=True)
    classes, rng = half.classes[first], np.random.default_rng(seed)
    chosen = [np.array([], np.int64)]
    for name in np.unique(classes):
        patients = rng.permutation(numbers[classes == name])
        chosen.append(patients[: max(1, round(fraction * len(patients)))])
    keep = np.isin(half.patients, np.concatenate(chosen))
    return Half(half.features[keep], half.classes[keep], half.patients[keep])


def _site_auc(encoded: Mapping[str, tuple[Half, Half]], seed: int) -> float | None:
    if len(encoded) < 2:
        return None
    train, test = (
        together(
            [halves[k]._replace(classes=np.full(len(halves[k].classes), name)) for name, halves in encoded.items()]
        )
        for k in (0, 1)
    )
    return learn_probe(*train, sorted(encoded), seed=seed, strength=SITE_STRENGTH).auc(test.features, test.classes)
