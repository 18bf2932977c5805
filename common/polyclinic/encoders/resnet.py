"""Residual networks, with group normalisation or, to compare with, batch normalisation.

He et al., Deep residual learning for image recognition, CVPR 2016; Wu & He, Group normalization, ECCV 2018; Ioffe &
Szegedy, Batch normalization, ICML 2015.

Group normalisation is the default, since statistics of a batch describe a site and disagree between sites. With
`norm = "batch"` the running ones travel with the weights and are averaged like them: the mean of the sites' means, and
of their variances, which is not the variance over all sites where their means differ. Per-patient differential privacy
refuses them.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # type: ignore[import-untyped]

from polyclinic.encoders.context import bottlenecks
from polyclinic.encoders.normalise import Normalise
from polyclinic.study import Norm

GROUPS = 32
"""Of channels, in every layer of group normalisation: Wu & He's choice."""


def group_norm(channels: int) -> nn.GroupNorm:
    """A layer of group normalisation."""
    return nn.GroupNorm(GROUPS, channels)


class BatchNorm(nn.BatchNorm2d):
    """torch's layer, which uses its running statistics, and leaves them alone, wherever a batch has none to give.

    That is in evaluation as ever; while the layer is frozen, as in the first rounds of fine-tuning; and for a batch of
    one image, of which a map of 1 x 1 has no variance.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, s, s) -> the same."""
        assert self.running_mean is not None and self.running_var is not None
        if self.training and self.weight.requires_grad and len(x) > 1:
            return super().forward(x)
        variance = self.running_var.clamp(min=0)  # an average in fixed point may lie a rounding below
        return F.batch_norm(x, self.running_mean, variance, self.weight, self.bias, eps=self.eps)


NORMS = {"group": group_norm, "batch": BatchNorm}


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


class ResidualNetwork(ResNet):  # type: ignore[misc]
    """torchvision's ResNet, its layers and their names, without a classifier.

    Attributes:
        dim: length of a feature vector.
        widths: channels of each level: stem and four stages.
    """

    def __init__(
        self, block: type[Basic | Deep], layers: list[int], channels: int, context: bool, norm: Norm = "group"
    ) -> None:
        super().__init__(block, layers, norm_layer=NORMS[norm])
        if channels != 3:
            self.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.relu, self.fc = nn.ReLU(), nn.Identity()
        self.dim: int = 512 * block.expansion
        self.widths = [64, *(width * block.expansion for width in (64, 128, 256, 512))]
        self.normalise = Normalise(channels)
        self.context = bottlenecks(self.widths, context)

    def levels(self, images: Tensor) -> list[Tensor]:
        """(n, channels, s, s) in [0, 1] -> (n, width, t, t) maps of stem and stages, t from s / 2 to s / 32."""
        x = self.context[0](F.relu(self.bn1(self.conv1(self.normalise(images)))))
        found = [x]
        x = self.maxpool(x)
        for stage, context in zip((self.layer1, self.layer2, self.layer3, self.layer4), self.context[1:], strict=True):
            x = context(stage(x))
            found.append(x)
        return found

    def pool(self, last: Tensor) -> Tensor:
        """The last level -> (n, dim) float32 features."""
        pooled: Tensor = self.avgpool(last)
        return pooled.flatten(1).float()

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, s, s) in [0, 1] -> (n, dim) float32 features."""
        return self.pool(self.levels(images)[-1])


def resnet18(channels: int, context: bool = False, norm: Norm = "group") -> ResidualNetwork:
    """11 M parameters, 512 features."""
    return ResidualNetwork(Basic, [2, 2, 2, 2], channels, context, norm)


def resnet50(channels: int, context: bool = False, norm: Norm = "group") -> ResidualNetwork:
    """24 M parameters, 2,048 features."""
    return ResidualNetwork(Deep, [3, 4, 6, 3], channels, context, norm)
