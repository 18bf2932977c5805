"""Has the encoder collapsed? Two figures that need no labels."""

import numpy as np
from numpy.typing import NDArray

from polyclinic.evaluation.labels import NotMeasurable

COLLAPSED_RANK = 2.0
"""Effective rank below which features vary along hardly more than one direction; untrained encoders have 16 to 180."""
COLLAPSED_SPREAD = 0.01
"""Feature spread below which all images point the same way, at a mean cosine above 0.9999.

Untrained encoders have 0.09 to 0.36 on radiographs (measured: ResNet-18, ResNet-50, ViT-Ti; 200 images)."""
MIN_IMAGES = 8
"""Fewer say nothing about hundreds of dimensions."""


def health(x: NDArray[np.floating]) -> dict[str, float]:
    """Effective rank and spread of (images, dim) features.

    effective_rank: exp of the entropy of the singular values of the centred features, normalised to sum 1 (Roy and
        Vetterli, EUSIPCO 2007): how many directions they use, between 1 and min(images - 1, dim).
    feature_spread: mean over dimensions of the standard deviation of the features scaled to length 1, times sqrt(dim)
        (Chen and He, 2011.10566): 1 where they cover the sphere, 0 where all are the same.

    Raises:
        NotMeasurable: too few images, or features that are not finite.
    """
    if len(x) < MIN_IMAGES:
        raise NotMeasurable(f"{len(x)} images: the spread of features needs at least {MIN_IMAGES}")
    if not np.isfinite(x).all():
        raise NotMeasurable("the encoder's features are not finite")
    features = np.asarray(x, np.float64)
    return {"effective_rank": _effective_rank(features - features.mean(axis=0)), "feature_spread": _spread(features)}


def collapsed(values: dict[str, float]) -> bool:
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


def _spread(x: NDArray[np.float64]) -> float:
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return float(unit.std(axis=0).mean() * np.sqrt(x.shape[1]))
