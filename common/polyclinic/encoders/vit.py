"""Vision Transformers that can look at some of the patches only.

Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021; sizes after Touvron et al., DeiT, ICML 2021.
No class token: features are the mean over patches, so nothing but patches enters or leaves. Positions are fixed
sines and cosines, kept as a buffer; no module holds both a buffer and a parameter of its own, which per-sample
gradients need.
"""

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

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
    """

    positions: Tensor

    def __init__(self, size: int, channels: int, patch: int, dim: int, heads: int, depth: int = 12) -> None:
        super().__init__()
        self.dim, self.patch, self.grid, self.channels = dim, patch, size // patch, channels
        self.normalise = Normalise(channels)
        self.patch_embed = PatchEmbed(size, patch, channels, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("positions", sincos_positions(self.grid, dim), persistent=False)
        self.apply(initialise)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as the matrix that it is
        nn.init.zeros_(self.patch_embed.proj.get_parameter("bias"))

    def tokens(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """(n, channels, s, s) in [0, 1] -> (n, k, dim): what the patches named by `kept` (n, k) become.

        Without `kept`, all patches in rows. Patches that are left out cost nothing beyond their embedding and are
        not seen by those that are kept.
        """
        x = self.patch_embed(self.normalise(images)) + self.positions  # (n, patches, dim)
        if kept is not None:
            x = pick(x, kept)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, s, s) in [0, 1] -> (n, dim) float32 features: the mean over patches."""
        return self.tokens(images).mean(dim=1).float()


def vit_tiny(size: int, channels: int, patch: int) -> VisionTransformer:
    """5.4 M parameters, 192 features."""
    return VisionTransformer(size, channels, patch, dim=192, heads=3)


def vit_small(size: int, channels: int, patch: int) -> VisionTransformer:
    """21 M parameters, 384 features."""
    return VisionTransformer(size, channels, patch, dim=384, heads=6)


def vit_base(size: int, channels: int, patch: int) -> VisionTransformer:
    """85 M parameters, 768 features."""
    return VisionTransformer(size, channels, patch, dim=768, heads=12)
