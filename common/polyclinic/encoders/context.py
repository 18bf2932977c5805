"""Context bottlenecks: attention over the channels and then over the places of a feature map.

Woo et al., CBAM, ECCV 2018, with the channels' hidden layer half as wide as the map (MLVICX, methods/mlvicx.py). They
are part of the encoder that learnt with them, and of the one that is exported.
"""

import torch
from torch import Tensor, nn


class ContextBottleneck(nn.Module):
    """x -> x * sigmoid(M(mean x) + M(max x)) over channels, then x * sigmoid(conv([mean x, max x])) over places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = nn.Sequential(nn.Linear(channels, channels // 2), nn.ReLU(), nn.Linear(channels // 2, channels))
        self.places = nn.Conv2d(2, 1, kernel_size=7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> the same."""
        weights = self.channels(x.mean(dim=(2, 3))) + self.channels(x.amax(dim=(2, 3)))
        x = x * weights.sigmoid()[:, :, None, None]
        seen = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)  # (n, 2, h, w)
        weighted: Tensor = x * self.places(seen).sigmoid()
        return weighted


def bottlenecks(widths: list[int], wanted: bool) -> nn.ModuleList:
    """One for each level of an encoder, or as many layers that do nothing."""
    return nn.ModuleList([ContextBottleneck(width) if wanted else nn.Identity() for width in widths])
