"""Whether every shift is real: how well shifted patients are told from others, on the phantom and on radiographs.

Shifts of pixels: half of a cohort's patients, drawn by the seed, are shifted, and a classifier says of each image
whether it is of one of them. Its AUC is on patients that it has not learnt from (five folds, by patient); 0.5 is
chance. It is a logistic regression on the same histograms for all kinds and both cohorts: of greys, and of how much
greys differ over 1, 2 and 4 pixels, in the upper quarter of an image and in the rest.

Shifts of labels and of who comes change no image, and a classifier of images could only see who is missing. Measured
instead, with all patients at one site, is the share that each is about: of the labels that are changed (of one class,
where the shift is of one), and of the patients who come, those with the value that grows rare, or older than half of
the cohort. The radiographs come without view, sex and age, so the shifts of these are made on the phantom alone.

Figures are means over seeds with their 95 % interval by Student's t. Without --data only the phantom's half is made,
and what --out holds of the other stays. A few minutes on two cores.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from findings import in_words, over_seeds
from machine import RESULTS, describe, keep
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from polyclinic.cohort import Cohort, build_cohort
from polyclinic.seeding import numpy_generator, seed_for
from polyclinic.simulation import LabelShift, MixShift, PixelShift, Shift
from polyclinic.study import Images
from polyclinic_simulations.phantom import keep_site
from polyclinic_simulations.shift import MIXES, shift_patients, shift_pixels

PHANTOM, RADIOGRAPHS = "phantom", "nih-chestxray8-subset"
SITE = "shifted"
FOLDS = 5
SEVERITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
OTHERS: dict[str, list[dict[str, str]]] = {
    PHANTOM: [
        {"kind": "label_noise"},
        {"kind": "label_policy", "value": "effusion", "becomes": "consolidation"},
        {"kind": "prevalence", "value": "effusion"},
        {"kind": "view_mix", "value": "LATERAL"},
        {"kind": "sex_mix", "value": "F"},
        {"kind": "age_mix"},
    ],
    RADIOGRAPHS: [
        {"kind": "label_noise"},
        {"kind": "label_policy", "value": "Pneumonia", "becomes": "No_findings"},
        {"kind": "prevalence", "value": "Pneumonia"},
    ],
}
"""{cohort: shifts of labels and of who comes that can be made there, without their severity}."""
GREYS, STEPS = np.arange(256) // 16, np.digitize(np.arange(256), [1, 2, 4, 8, 16, 32, 64])
"""The bin of each grey, and of each difference of two: the larger, the wider."""
LAGS = (1, 2, 4)
"""Pixels."""

Pixels = NDArray[np.uint8]
Curve = dict[str, dict[str, Any]]
"""{severity: mean, 95 % half-width (None of one seed) and the seeds' own}."""


def domain_auc(images: Pixels, patients: NDArray[np.int32], kind: PixelShift, severity: float, seed: int) -> float:
    """How well the shifted half of the patients is told from the others.

    `images` (n, 1, size, size) are unshifted; `patients` (n,) says whose they are.
    """
    count = int(patients.max()) + 1
    turn = numpy_generator(seed_for(seed, "domains")).permutation(count)  # each fold has as many of both halves
    there, fold = (turn < count // 2)[patients], (turn % FOLDS)[patients]
    mixed, shift = images.copy(), Shift(kind=kind, severity=severity)
    mixed[there] = shift_pixels(images[there], np.flatnonzero(there), [shift], seed, SITE)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    scores = cross_val_predict(model, features(mixed), there, cv=PredefinedSplit(fold), method="decision_function")
    return float(roc_auc_score(there, scores))


def features(images: Pixels) -> NDArray[np.float64]:
    """(n, 1, size, size) -> (n, 128): square roots of counts, so that rare greys weigh too."""
    grey = images[:, 0].astype(np.int16)
    upper = grey.shape[1] // 4  # markers stand there
    counts = np.concatenate([_histograms(grey[:, :upper]), _histograms(grey[:, upper:])], axis=1)
    return counts**0.5


def _histograms(grey: NDArray[np.int16]) -> NDArray[np.int64]:
    """(n, height, width) -> (n, 64): 16 counts of greys, then 8 of differences for each lag, down and along."""
    found = [_counts(GREYS[grey], 16)]
    for lag in LAGS:
        for step in (grey[:, lag:] - grey[:, :-lag], grey[:, :, lag:] - grey[:, :, :-lag]):
            found.append(_counts(STEPS[np.abs(step)], 8))
    return np.concatenate(found, axis=1)


def _counts(codes: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    """(n, height, width) bin of each pixel -> (n, bins) how many pixels each bin has."""
    images = len(codes)
    flat = codes.reshape(images, -1) + bins * np.arange(images)[:, None]
    return np.bincount(flat.ravel(), minlength=bins * images).reshape(images, bins)


def share(cohort: Cohort, shift: Shift, seed: int) -> float:
    """Of the labels concerned, those changed; or of the patients who come, those with what grows rare."""
    made, patients = shift_patients(cohort, np.arange(cohort.n_patients), [shift], seed, SITE)
    if shift.kind in get_args(LabelShift):
        concerned = cohort.labels == shift.value if shift.value else cohort.labels != ""
        return float((made.labels != cohort.labels)[concerned].mean())
    rare = MIXES[cast(MixShift, shift.kind)](cohort, shift.value) > 0.5  # of ages, the rank
    return float(rare[patients].mean())


def curve(measure: Callable[[float, int], float], seeds: int) -> Curve:
    """What `measure`, of a severity and a seed, says at each severity."""
    return {f"{s:g}": over_seeds(measure(s, seed) for seed in range(seeds)) for s in SEVERITIES}


def measured(name: str, cohort: Cohort, seeds: int) -> dict[str, Any]:
    """The curves of all shifts that can be made on a cohort."""
    images = cohort.pixels(slice(None)).numpy()

    def auc(kind: PixelShift) -> Curve:
        return curve(lambda severity, seed: domain_auc(images, cohort.patients, kind, severity, seed), seeds)

    def shares(shift: dict[str, str]) -> Curve:
        return curve(lambda s, seed: share(cohort, Shift.model_validate({**shift, "severity": s}), seed), seeds)

    return {
        "patients": cohort.n_patients,
        "images": len(cohort),
        "size": images.shape[-1],
        "auc": {kind: auc(kind) for kind in get_args(PixelShift)},
        "share": {shift["kind"]: shares(shift) for shift in OTHERS[name]},
    }


def tables(shifts: dict[str, dict[str, Any]]) -> str:
    """In markdown, two tables a cohort, a column a severity: mean, and 95 % either way."""
    lines = []
    for cohort, found in shifts.items():
        for what in ("auc", "share"):
            lines += ["", f"| {cohort}, {what} | {' | '.join(f'{s:g}' for s in SEVERITIES)} |"]
            lines.append("|---|" + "---|" * len(SEVERITIES))
            for kind, points in found[what].items():
                lines.append(f"| {kind} | {' | '.join(in_words(point, '-') for point in points.values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=240, help=f"of the {PHANTOM}, at least 10")
    parser.add_argument("--size", type=int, default=96, help="side of an image, pixels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--state", type=Path, default=Path(".polyclinic"), help="where cohorts are built")
    parser.add_argument("--data", type=Path, help=f"the folder that holds {RADIOGRAPHS}")
    parser.add_argument("--out", type=Path, default=RESULTS / "shifts.json")
    options = parser.parse_args()
    machine = describe()
    shifts = json.loads(options.out.read_text())["shifts"] if options.out.exists() else {}
    sources = {PHANTOM: keep_site(options.state, PHANTOM, options.patients, 0)}
    if options.data:
        sources[RADIOGRAPHS] = options.data / RADIOGRAPHS
    for name, source in sources.items():
        cohort = build_cohort(source, Images(size=options.size), options.state)
        shifts[name] = measured(name, cohort, options.seeds)
    keep(options.out, machine, {"shifts": shifts})
    print(tables(shifts))


if __name__ == "__main__":
    main()
