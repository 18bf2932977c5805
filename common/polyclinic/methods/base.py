"""The contract of a training method. A method knows nothing of Flower, files or devices."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Images of some patients.

    Attributes:
        images: (images, channels, size, size) float32 in [0, 1], on the device that trains.
        patients: (images,) int64; equal numbers are the same patient.
        targets: (images, classes) float32, 1 where the image is of the class, NaN where it has no label; no classes
            where the method needs none.
    """

    images: Tensor
    patients: Tensor
    targets: Tensor = field(default_factory=lambda: torch.empty(0, 0))


@dataclass(frozen=True)
class ViewBatch:
    """What a method's loss looks at.

    Attributes:
        views: one or more (images, channels, size, size) float32 tensors in [0, 1]: view k of each image.
        patients: (images,) int64, as in Batch.
        extra: what a method draws beside views (MAE: the order that masks patches), by name.
    """

    views: tuple[Tensor, ...]
    patients: Tensor
    extra: dict[str, Tensor]


class Method(Protocol):
    """One way to train, self-supervised or not, made from its stage's settings by `methods.make_method`."""

    separable: bool
    """Is the loss a sum over patients? Decides what differential privacy may do with it."""

    pairs: bool
    """Does a batch hold two images of every patient, side by side? Else it holds images, whosever they are."""

    def build(self, encoder: nn.Module) -> nn.Module:
        """A module whose attribute `encoder` is `encoder`, with the method's heads beside it."""
        ...

    def views(self, batch: Batch, generator: torch.Generator) -> ViewBatch:
        """Random views; every draw comes from `generator`, which lives on the batch's device."""
        ...

    def loss(self, module: nn.Module, views: ViewBatch) -> Tensor:
        """(terms,) losses, one a patient (or image, or group); training minimises their mean.

        An empty tensor means that the batch teaches nothing (a contrastive batch of one patient).
        """
        ...

    def shared(self, module: nn.Module) -> list[str]:
        """Names in `module.state_dict()` that leave the site."""
        ...
