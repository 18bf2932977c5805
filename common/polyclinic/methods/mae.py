"""Masked autoencoder: guess the hidden patches of an image from those that are left.

He et al., Masked autoencoders are scalable vision learners, CVPR 2022.

    loss of an image = mean over its masked patches i and their pixels of ( d(f(visible))_i - y_i )^2,
    y_i = (x_i - mean(x_i)) / sqrt(var(x_i) + 1e-6)

f, the encoder, sees the visible patches only; d, a light decoder, sees their encodings and one learnt token for every
masked patch. The targets y are normalised patch by patch with the unbiased variance, as in the authors' code. The loss
is a sum over images, which is what differential privacy needs; to that end the mask is drawn outside the module and
the mask token is an embedding. Encoder and decoder are federated while training, the encoder is shipped.
"""

from typing import cast

import torch
from torch import Tensor, nn

from polyclinic.augment import make_views
from polyclinic.encoders.vit import VisionTransformer, initialise, pick, sincos_positions, transformer_block
from polyclinic.errors import StudyError
from polyclinic.methods.base import Batch, ViewBatch
from polyclinic.stages import MAE_VIEWS, Masked

HEAD_WIDTH = 32
"""Of an attention head in the decoder."""


def patchify(images: Tensor, patch: int) -> Tensor:
    """(n, channels, s, s) -> (n, patches, channels * patch * patch), patches in rows."""
    n, channels, side, _ = images.shape
    grid = side // patch
    cut = images.reshape(n, channels, grid, patch, grid, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, grid * grid, channels * patch * patch)


def normalised(patches: Tensor) -> Tensor:
    """(n, patches, pixels) -> the same, every patch with mean 0 and variance 1; a flat one becomes 0."""
    centred = patches - patches.mean(dim=2, keepdim=True)
    return centred / (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()


class Decoder(nn.Module):
    """From the encodings of visible patches to the pixels of masked ones."""

    positions: Tensor

    def __init__(self, encoder: VisionTransformer, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder.dim, width)
        self.mask_token = nn.Embedding(1, width)
        self.blocks = nn.ModuleList([transformer_block(width, width // HEAD_WIDTH) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, encoder.channels * encoder.patch**2)
        self.register_buffer("positions", sincos_positions(encoder.grid, width), persistent=False)
        self.apply(initialise)
        nn.init.normal_(self.mask_token.weight, std=0.02)

    def tokens(self, visible: Tensor, order: Tensor) -> Tensor:
        """visible (n, k, dim) of patches order[:, :k] -> (n, patches, width), its last tokens of all, in rows."""
        k = visible.shape[1]
        hidden = self.mask_token(torch.zeros_like(order[:, k:]))  # (n, patches - k, width)
        embedded = self.embed(visible)
        shuffled = torch.cat([embedded, hidden.to(embedded.dtype)], dim=1)
        x = pick(shuffled, order.argsort(dim=1)) + self.positions  # back in rows
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, visible: Tensor, order: Tensor) -> Tensor:
        """visible (n, k, dim) of patches order[:, :k] -> (n, patches - k, pixels) of patches order[:, k:]."""
        guessed: Tensor = self.pixels(self.norm(pick(self.tokens(visible, order), order[:, visible.shape[1] :])))
        return guessed


class MaskedAutoencoder(nn.Module):
    """An encoder with its decoder."""

    def __init__(self, encoder: VisionTransformer, stage: Masked, kept: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(encoder, stage.decoder_width, stage.decoder_depth)
        self.kept = kept

    def forward(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """images (n, channels, s, s), order (n, patches), of which the first `kept` are seen.

        Returns:
            (n, masked, pixels) guesses, and (n, kept, dim) tokens of the encoder.
        """
        visible = self.encoder.tokens(images, order[:, : self.kept])
        return self.decoder(visible, order), visible


def reconstruction(predicted: Tensor, views: ViewBatch, patch: int) -> Tensor:
    """(images,) the masked autoencoder's loss, given (images, masked, pixels) guesses."""
    targets = pick(normalised(patchify(views.views[0], patch)), views.extra["order"][:, -predicted.shape[1] :])
    losses: Tensor = (predicted.to(targets.dtype) - targets).square().mean(dim=(1, 2))
    return losses


class MAE:
    """The method; see the module's docstring. One term an image: a sum over patients, so separable."""

    separable = True
    pairs = False

    def __init__(self, stage: Masked) -> None:
        self.stage = stage
        self.settings = stage.views or MAE_VIEWS
        self.patches = 0  # until `build` has seen the encoder

    def build(self, encoder: nn.Module) -> nn.Module:
        """The encoder with a fresh decoder.

        Raises:
            StudyError: the encoder cannot skip tokens, or its image is a single patch.
        """
        if not isinstance(encoder, VisionTransformer):
            raise StudyError(
                f"{self.stage.method} needs an encoder that can skip tokens", "use vit_tiny, vit_small or vit_base"
            )
        self.patches = encoder.grid**2
        if self.patches < 2:
            raise StudyError(
                f"{self.stage.method} needs at least two patches in an image", "make encoder.patch smaller"
            )
        kept = min(max(round(self.patches * (1 - self.stage.mask)), 1), self.patches - 1)
        return MaskedAutoencoder(encoder, self.stage, kept)

    def views(self, batch: Batch, generator: torch.Generator) -> ViewBatch:
        """One view of every image, and `order`: (images, patches) a random order of its patches; the first are seen."""
        view = make_views(batch.images, self.settings, generator)
        noise = torch.rand(len(view), self.patches, generator=generator, device=generator.device)
        return ViewBatch((view,), batch.patients, {"order": noise.argsort(dim=1)})

    def loss(self, module: nn.Module, views: ViewBatch) -> Tensor:
        """(images,) losses."""
        predicted, *_ = module(views.views[0], views.extra["order"])
        return reconstruction(predicted, views, cast(VisionTransformer, module.get_submodule("encoder")).patch)

    def shared(self, module: nn.Module) -> list[str]:
        """Encoder and decoder; the positions are constants and no part of the state."""
        return [name for name, tensor in module.state_dict().items() if tensor.is_floating_point()]
