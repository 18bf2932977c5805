"""Residual networks with group normalisation.

He et al., Deep residual learning for image recognition, CVPR 2016; Wu & He, Group normalization, ECCV 2018.
Batch normalisation is left out: its statistics describe a site, disagree between sites, and are refused by
per-patient differential privacy.
"""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # type: ignore[import-untyped]

from polyclinic.encoders.normalise import Normalise

GROUPS = 32
"""Of channels, in every normalisation layer: Wu & He's choice."""


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalisation layer of every residual network here."""
    return nn.GroupNorm(GROUPS, channels)


class GroupNormResNet(ResNet):  # type: ignore[misc]  # torchvision carries no types
    """torchvision's ResNet, its layers and their names, without batch statistics and without a classifier.

    Attributes:
        dim: length of a feature vector.
    """

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: list[int], channels: int) -> None:
        super().__init__(block, layers, norm_layer=group_norm)
        if channels != 3:
            self.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.fc = nn.Identity()
        self.dim = 512 * block.expansion
        self.normalise = Normalise(channels)

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, s, s) in [0, 1] -> (n, dim) float32 features."""
        features: Tensor = super().forward(self.normalise(images))
        return features.float()


def resnet18(channels: int) -> GroupNormResNet:
    """11 M parameters, 512 features."""
    return GroupNormResNet(BasicBlock, [2, 2, 2, 2], channels)


def resnet50(channels: int) -> GroupNormResNet:
    """24 M parameters, 2,048 features."""
    return GroupNormResNet(Bottleneck, [3, 4, 6, 3], channels)
