"""Residual networks with group normalisation.

He et al., Deep residual learning for image recognition, CVPR 2016; Wu & He, Group normalization, ECCV 2018.
Batch normalisation is left out: its statistics describe a site, disagree between sites, and are refused by
per-patient differential privacy.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # type: ignore[import-untyped]

from polyclinic.encoders.normalise import Normalise

GROUPS = 32
"""Of channels, in every normalisation layer: Wu & He's choice."""


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalisation layer of every residual network here."""
    return nn.GroupNorm(GROUPS, channels)


class Basic(BasicBlock):  # type: ignore[misc]  # torchvision carries no types
    """torchvision's two-layer block, changing nothing in place: per-sample gradients need every layer's output."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, s, s) -> (n, planes, s / stride, s / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + (x if self.downsample is None else self.downsample(x)))


class Deep(Bottleneck):  # type: ignore[misc]
    """torchvision's three-layer block, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, s, s) -> (n, 4 * planes, s / stride, s / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x)))


class GroupNormResNet(ResNet):  # type: ignore[misc]
    """torchvision's ResNet, its layers and their names, without batch statistics and without a classifier.

    Attributes:
        dim: length of a feature vector.
    """

    def __init__(self, block: type[Basic | Deep], layers: list[int], channels: int) -> None:
        super().__init__(block, layers, norm_layer=group_norm)
        if channels != 3:
            self.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.relu, self.fc = nn.ReLU(), nn.Identity()
        self.dim: int = 512 * block.expansion
        self.normalise = Normalise(channels)

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, s, s) in [0, 1] -> (n, dim) float32 features."""
        features: Tensor = super().forward(self.normalise(images))
        return features.float()


def resnet18(channels: int) -> GroupNormResNet:
    """11 M parameters, 512 features."""
    return GroupNormResNet(Basic, [2, 2, 2, 2], channels)


def resnet50(channels: int) -> GroupNormResNet:
    """24 M parameters, 2,048 features."""
    return GroupNormResNet(Deep, [3, 4, 6, 3], channels)
