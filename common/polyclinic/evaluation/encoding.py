"""What an image looks like to a frozen encoder, and to no encoder at all."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.cohort import Cohort
from polyclinic.evaluation.labels import NotMeasurable
from polyclinic.study import Compute
from polyclinic.training import use_threads

BATCH = 64
"""Images at once: below 1 GB with a ResNet-50 at 224 pixels."""


def features(encoder: nn.Module, cohort: Cohort, compute: Compute, device: torch.device) -> NDArray[np.float32]:
    """(images, dim) features of the cohort's images as they are, without views; the encoder is left in its mode.

    Always in float32, whatever `compute.precision` says for training: a probe should move because the encoder did,
    not because one site's processor has bf16 units and another's has not.
    """
    return encoded(encoder, _batches(cohort), compute, device).numpy()


def encoded(encoder: nn.Module, batches: Iterable[Tensor], compute: Compute, device: torch.device) -> Tensor:
    """(images, dim) features, on the CPU, of batches of (n, channels, size, size) images in [0, 1].

    With the study's number of threads: others round otherwise, and on cores that are taken they wait spinning for each
    other.
    """
    layout = torch.channels_last if compute.layout == "channels_last" else torch.contiguous_format
    training = encoder.training
    encoder.to(device).eval()
    with use_threads(compute), torch.inference_mode():
        found = [encoder(images.to(device).contiguous(memory_format=layout)).float().cpu() for images in batches]
    encoder.train(training)
    return torch.cat(found)


def pixel_features(cohort: Cohort, side: int = 16) -> NDArray[np.float32]:
    """(images, channels * side * side) grey levels in [0, 1], averaged down to `side` pixels: no encoder."""
    return torch.cat([F.adaptive_avg_pool2d(images, side).flatten(1) for images in _batches(cohort)]).numpy()


def _batches(cohort: Cohort) -> Iterator[Tensor]:
    """(images, channels, size, size) float32 in [0, 1], in the cohort's order."""
    if not len(cohort):
        raise NotMeasurable("no images")
    for start in range(0, len(cohort), BATCH):
        yield cohort.pixels(np.arange(start, min(start + BATCH, len(cohort)))).float() / 255
