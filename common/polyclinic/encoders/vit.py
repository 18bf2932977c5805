"""Vision Transformers that can look at some of the patches only.

Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021; sizes after Touvron et al., DeiT, ICML 2021.
No class token: features are the mean over patches, so nothing but patches enters or leaves. Positions are fixed
sines and cosines, kept as a buffer; no module holds both a buffer and a parameter of its own, which per-sample
gradients need.
"""

import math
from collections.abc import Iterator

import torch
from timm.layers import attention
from timm.layers.config import use_fused_attn
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from polyclinic.encoders.context import bottlenecks
from polyclinic.encoders.normalise import Normalise


def sincos_positions(grid: int, dim: int) -> Tensor:
    """(grid * grid, dim) fixed positions of patches in rows: a quarter each of sin x, cos x, sin y, cos y (MAE's)."""
    if dim % 4:
        raise ValueError(f"positions need a width divisible by 4, not {dim}")
    frequencies = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.outer(torch.arange(grid, dtype=torch.float64), frequencies)  # (grid, dim / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim / 2)
    x = axis.repeat(grid, 1)  # row i * grid + j holds axis[j]
    y = axis.repeat_interleave(grid, dim=0)  # row i * grid + j holds axis[i]
    return torch.cat([x, y], dim=1).float()


def initialise(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform matrices, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Attention(attention.Attention):
    """timm's, without torch's fused kernel in bf16 on a CPU: on the way back it takes 3 to 10 times the plain products'
    time (64 and 16 tokens)."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(n, tokens, dim) -> the same."""
        self.fused_attn = use_fused_attn() and not torch.is_autocast_enabled("cpu")  # type: ignore[misc]  # final for TorchScript only
        attended: Tensor = super().forward(x, attn_mask, is_causal)
        return attended


def transformer_block(dim: int, heads: int) -> Block:
    """timm's pre-norm block."""
    return Block(dim, heads, qkv_bias=True, attn_layer=Attention)


def pick(tokens: Tensor, kept: Tensor) -> Tensor:
    """tokens (n, patches, dim), kept (n, k) indices -> (n, k, dim): those tokens, in that order."""
    return tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class VisionTransformer(nn.Module):
    """timm's patch embedding and pre-norm blocks.

    Attributes:
        dim: length of a token and of a feature vector.
        patch: side of a patch, pixels.
        grid: patches along a side of the image.
        channels: of the image.
        ends: the last block of each level, counted from 1: at a quarter, a half, three quarters and all of the depth.
        widths: channels of each level as a map.
    """

    positions: Tensor

    def __init__(
        self, size: int, channels: int, patch: int, dim: int, heads: int, depth: int = 12, context: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.patch, self.grid, self.channels = dim, patch, size // patch, channels
        self.normalise = Normalise(channels)
        self.patch_embed = PatchEmbed(size, patch, channels, dim)
        self.blocks = nn.ModuleList([transformer_block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("positions", sincos_positions(self.grid, dim), persistent=False)
        self.apply(initialise)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as the matrix that it is
        nn.init.zeros_(self.patch_embed.proj.get_parameter("bias"))
        self.ends = sorted({math.ceil(depth * quarter / 4) for quarter in (1, 2, 3, 4)})
        self.widths = [dim] * len(self.ends)
        self.context = bottlenecks(self.widths, context)

    def _through(self, x: Tensor) -> Iterator[Tensor]:
        """(n, k, dim) embedded patches -> the tokens at the end of each level."""
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number in self.ends:
                context = self.context[self.ends.index(number)]
                x = x if isinstance(context, nn.Identity) else self._tokens(context(self._map(x)))
                yield x

    def _map(self, tokens: Tensor) -> Tensor:
        """(n, patches, dim) in rows -> (n, dim, grid, grid)."""
        return tokens.transpose(1, 2).reshape(len(tokens), self.dim, self.grid, self.grid)

    def _tokens(self, image: Tensor) -> Tensor:
        """The inverse of `_map`."""
        return image.flatten(2).transpose(1, 2)

    def tokens(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """(n, channels, s, s) in [0, 1] -> (n, k, dim): what the patches named by `kept` (n, k) become.

        Without `kept`, all patches in rows. Patches that are left out cost nothing beyond their embedding and are
        not seen by those that are kept.
        """
        x = self.patch_embed(self.normalise(images)) + self.positions  # (n, patches, dim)
        if kept is not None:
            x = pick(x, kept)
        *_, last = self._through(x)
        normed: Tensor = self.norm(last)
        return normed

    def levels(self, images: Tensor) -> list[Tensor]:
        """(n, channels, s, s) in [0, 1] -> (n, dim, grid, grid) maps of the four levels."""
        embedded = self.patch_embed(self.normalise(images)) + self.positions
        return [self._map(tokens) for tokens in self._through(embedded)]

    def pool(self, last: Tensor) -> Tensor:
        """The last level -> (n, dim) float32 features."""
        normed: Tensor = self.norm(self._tokens(last))
        return normed.mean(dim=1).float()

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, s, s) in [0, 1] -> (n, dim) float32 features: the mean over patches."""
        return self.tokens(images).mean(dim=1).float()


def vit_tiny(size: int, channels: int, patch: int, context: bool = False) -> VisionTransformer:
    """5.4 M parameters, 192 features."""
    return VisionTransformer(size, channels, patch, dim=192, heads=3, context=context)


def vit_small(size: int, channels: int, patch: int, context: bool = False) -> VisionTransformer:
    """21 M parameters, 384 features."""
    return VisionTransformer(size, channels, patch, dim=384, heads=6, context=context)


def vit_base(size: int, channels: int, patch: int, context: bool = False) -> VisionTransformer:
    """85 M parameters, 768 features."""
    return VisionTransformer(size, channels, patch, dim=768, heads=12, context=context)
