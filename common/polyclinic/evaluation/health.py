"""Has the encoder collapsed, and does it do what contrastive learning asks for? Figures that need no labels."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from polyclinic.augment import make_views
from polyclinic.cohort import Cohort
from polyclinic.evaluation.encoding import BATCH, encoded
from polyclinic.evaluation.labels import NotMeasurable
from polyclinic.seeding import torch_generator
from polyclinic.stages import Views
from polyclinic.study import Compute

COLLAPSED_RANK = 2.0
"""Effective rank below which features vary along hardly more than one direction; untrained encoders have 16 to 180."""
COLLAPSED_SPREAD = 0.01
"""Feature spread below which all images point the same way, at a mean cosine above 0.9999.

Untrained encoders have 0.09 to 0.36 on radiographs (measured: ResNet-18, ResNet-50, ViT-Ti; 200 images)."""
PAIRED = 1_024
"""Images that uniformity compares with each other, and VIEWED: of which alignment draws two views, at most."""
VIEWED = 128
MIN_IMAGES = 8
"""Fewer say nothing about hundreds of dimensions."""


def health(x: NDArray[np.floating]) -> dict[str, float]:
    """Effective rank, spread and uniformity of (images, dim) features.

    effective_rank: exp of the entropy of the singular values of the centred features, normalised to sum 1 (Roy and
        Vetterli, EUSIPCO 2007): how many directions they use, between 1 and min(images - 1, dim).
    feature_spread: mean over dimensions of the standard deviation of the features scaled to length 1, times sqrt(dim)
        (Chen and He, 2011.10566): 1 where they cover the sphere, 0 where all are the same.
    uniformity: -log of the mean over pairs of exp(-2 d^2), d the distance of features scaled to length 1 (Wang and
        Isola, ICML 2020, with the sign that grows as features spread): 0 where all are the same, below 4.

    Raises:
        NotMeasurable: too few images, or features that are not finite.
    """
    if len(x) < MIN_IMAGES:
        raise NotMeasurable(f"{len(x)} images: the spread of features needs at least {MIN_IMAGES}")
    if not np.isfinite(x).all():
        raise NotMeasurable("the encoder's features are not finite")
    features = np.asarray(x, np.float64)
    return {
        "effective_rank": _effective_rank(features - features.mean(axis=0)),
        "feature_spread": _spread(features),
        "uniformity": _uniformity(features[_evenly(len(features), PAIRED)]),
    }


def alignment(
    encoder: nn.Module, cohort: Cohort, views: Views, compute: Compute, device: torch.device, seed: int
) -> float:
    """Mean squared distance of the features, scaled to length 1, of two random views of an image (Wang and Isola).

    Between 0, where views change nothing, and 4; 2 where they are as far apart as strangers. Over at most 128 images.
    """
    chosen = _evenly(len(cohort), VIEWED)
    generator = torch_generator(seed, device)
    total = 0.0
    for start in range(0, len(chosen), BATCH):
        images = cohort.pixels(chosen[start : start + BATCH]).to(device).float() / 255
        first, second = (
            encoded(encoder, [make_views(images, views, generator)], compute, device).double() for _ in range(2)
        )
        unit = [x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in (first, second)]
        total += float((unit[0] - unit[1]).square().sum())
    return total / len(chosen)


def _evenly(n: int, most: int) -> NDArray[np.int64]:
    """At most `most` of n numbers, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))


def collapsed(values: Mapping[str, float]) -> bool:
    """Do these health figures say that the encoder gives every image nearly the same features?"""
    return values["effective_rank"] < COLLAPSED_RANK or values["feature_spread"] < COLLAPSED_SPREAD


def _effective_rank(centred: NDArray[np.float64]) -> float:
    # Singular values as roots of the smaller Gram matrix's eigenvalues: twice as fast as an SVD.
    gram = centred.T @ centred if len(centred) > centred.shape[1] else centred @ centred.T
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    if values.sum() == 0:
        return 1.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _uniformity(x: NDArray[np.float64]) -> float:
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    squared = np.clip(2 - 2 * unit @ unit.T, 0, None)[np.triu_indices(len(x), 1)]
    return float(max(-np.log(np.exp(-2 * squared).mean()), 0.0))


def _spread(x: NDArray[np.float64]) -> float:
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return float(unit.std(axis=0).mean() * np.sqrt(x.shape[1]))
