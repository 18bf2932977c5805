"""Fixed normalisation of pixels, the first thing that every encoder does."""

import torch
from torch import Tensor, nn

Constants = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel."""
GREY: Constants = ((0.5,), (0.25,))
"""Mean and standard deviation: round figures near those of windowed radiographs, the same at every site."""
COLOUR: Constants = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""ImageNet's, which weights from natural images expect."""


class Normalise(nn.Module):
    """`(x - mean) / std` per channel. The constants are never trained and never leave the site."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, constants: Constants | None = None) -> None:
        super().__init__()
        mean, std = constants or (GREY if channels == 1 else COLOUR)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, s, s) in [0, 1] -> the same shape, about zero mean and unit variance."""
        return (images - self.mean) / self.std
