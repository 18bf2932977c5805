"""MLVICX: VICReg of the whole image and of its places, at every level of the encoder at once.

Singh et al., MLVICX: multi-level variance-covariance exploration for chest X-ray self-supervised representation
learning, IEEE JBHI 2024.

    loss of a batch = VICReg(z, z') + weight * VICReg(d, d')          (vicreg.py)
    z = G(f(x)),   d = H(mean over 4 x 4 places of sum over levels l of W_l resize_64(a_l))

a_l are the maps at the encoder's levels, each behind a context bottleneck (encoders/context.py) that stays in the
encoder; W_l maps their channels to a common width; resize is bilinear, to 64 x 64. G and H have three layers and layer
norm: no batch statistics, and a hundredth of the paper's parameters (ours). All of it learns from the first step; G, H
and W are federated while training, the encoder is shipped with its bottlenecks.

Resizing, W and the mean are linear, so they are done in the order that costs least: with A_l the 4 x s matrix of
resizing a side and averaging it, d sees W_l (A_l a_l A_l^T), the same numbers from 1/256 of the products.

`weight` 0 and `encoder.context` false leave VICReg alone.
"""

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.augment import make_views
from polyclinic.methods.base import Batch, ViewBatch
from polyclinic.methods.vicreg import vicreg
from polyclinic.stages import MLVICXStage, Views

RESIZED = 64
"""Side to which every level's map is resized."""
PLACES = 4
"""Means along a side of the resized map."""


class Levelled(Protocol):
    """An encoder that shows its levels."""

    dim: int
    widths: list[int]

    def levels(self, images: Tensor) -> list[Tensor]:
        """(n, channels, s, s) -> a map of each level."""
        ...

    def pool(self, last: Tensor) -> Tensor:
        """The last level -> (n, dim)."""
        ...


def place_means(side: int) -> Tensor:
    """(4, side): resizing a line of `side` values to 64, bilinearly, and the means of its quarters, as one matrix."""
    resize = F.interpolate(torch.eye(side)[None], size=RESIZED, mode="linear", align_corners=False)[0]  # (side, 64)
    return resize.reshape(side, PLACES, RESIZED // PLACES).mean(dim=2).T


def projector(inputs: int, width: int) -> nn.Sequential:
    """Three layers, all but the last normalised."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU(),
        nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(),
        nn.Linear(width, width),
    )  # fmt: skip


class Places(nn.Module):
    """The local branch: maps of all levels -> (n, width)."""

    def __init__(self, widths: list[int], common: int, width: int) -> None:
        super().__init__()
        self.common = nn.ModuleList([nn.Conv2d(channels, common, kernel_size=1) for channels in widths])
        self.head = projector(common * PLACES**2, width)

    def fused(self, levels: list[Tensor]) -> Tensor:
        """(n, common, 4, 4), the sum over levels."""
        maps = []
        for level, convolve in zip(levels, self.common, strict=True):
            means = place_means(level.shape[-1]).to(level)
            maps.append(convolve(means @ level @ means.T))
        return torch.stack(maps).sum(dim=0)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """d of the module's docstring."""
        places: Tensor = self.head(self.fused(levels).flatten(1))
        return places


class MultiLevel(nn.Module):
    """An encoder with the two heads; no local one where its loss has no weight."""

    def __init__(self, encoder: nn.Module, stage: MLVICXStage) -> None:
        super().__init__()
        self.encoder = encoder
        shape = cast(Levelled, encoder)
        self.head = projector(shape.dim, stage.projection)
        self.places = Places(shape.widths, stage.common, stage.projection) if stage.weight else None

    def forward(self, images: Tensor) -> list[Tensor]:
        """(n, channels, s, s) -> z and, with a local branch, d: (n, projection) each."""
        encoder = cast(Levelled, self.encoder)
        levels = encoder.levels(images)
        whole = self.head(encoder.pool(levels[-1]))
        return [whole] if self.places is None else [whole, self.places(levels)]


class MLVICX:
    """The method; see the module's docstring. One term a batch, so not separable."""

    separable = False
    pairs = False

    def __init__(self, stage: MLVICXStage) -> None:
        self.stage = stage
        self.settings = stage.views or Views()

    def build(self, encoder: nn.Module) -> nn.Module:
        """The encoder with fresh heads."""
        return MultiLevel(encoder, self.stage)

    def views(self, batch: Batch, generator: torch.Generator) -> ViewBatch:
        """Two independent views of every image."""
        views = [make_views(batch.images, self.settings, generator) for _ in range(2)]
        return ViewBatch((views[0], views[1]), batch.patients, {})

    def loss(self, module: nn.Module, views: ViewBatch) -> Tensor:
        """(1,): of the batch; none where there are not two images to vary."""
        if len(views.patients) < 2:
            return views.views[0].new_zeros(0)
        terms = [vicreg(*both.chunk(2)) for both in module(torch.cat(views.views))]
        weights = (1.0, self.stage.weight)
        return torch.stack([weight * term for weight, term in zip(weights, terms, strict=False)]).sum(0, keepdim=True)

    def shared(self, module: nn.Module) -> list[str]:
        """Encoder and heads."""
        return [name for name, tensor in module.state_dict().items() if tensor.is_floating_point()]
