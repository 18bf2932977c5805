"""Big Transfer's ResNet-50 v2: pre-activation, group normalisation, standardised weights.

Kolesnikov et al., Big Transfer (BiT), ECCV 2020: the network whose supervised weights REMEDIS starts from. timm's
parts and names, so that its weight files fit. It knows no batch statistics. Its first layer always sees three colours,
equal ones for a grey image: its weights are standardised over colours, so that they cannot be summed beforehand.
"""

from functools import partial

from timm.layers.norm_act import GroupNormAct
from timm.layers.std_conv import StdConv2d
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from polyclinic.encoders.context import bottlenecks
from polyclinic.encoders.normalise import Normalise


class BiT(ResNetV2):
    """timm's network without its classifier.

    Attributes:
        dim: length of a feature vector.
        widths: channels of each level: stem and four stages.
    """

    def __init__(self, context: bool = False) -> None:
        super().__init__(
            layers=[3, 4, 6, 3],
            num_classes=0,
            stem_type="fixed",
            conv_layer=partial(StdConv2d, eps=1e-8),
            norm_layer=partial(GroupNormAct, num_groups=32, inplace=False),
        )
        self.dim = self.num_features
        self.widths = [64, 256, 512, 1024, 2048]
        self.normalise = Normalise(3, ((0.5,) * 3, (0.5,) * 3))  # as its weights learnt
        self.context = bottlenecks(self.widths, context)

    def levels(self, images: Tensor) -> list[Tensor]:
        """(n, 1 or 3, s, s) in [0, 1] -> (n, width, t, t) maps of stem and stages, t from s / 4 to s / 32."""
        colours = images.expand(-1, 3, -1, -1)
        found = [self.context[0](self.stem(self.normalise(colours)))]
        for stage, context in zip(self.stages, self.context[1:], strict=True):
            found.append(context(stage(found[-1])))
        return found

    def pool(self, last: Tensor) -> Tensor:
        """The last level -> (n, dim) float32 features."""
        pooled: Tensor = self.norm(last).mean(dim=(2, 3))
        return pooled.float()

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1 or 3, s, s) in [0, 1] -> (n, dim) float32 features."""
        return self.pool(self.levels(images)[-1])


def bit_resnet50(context: bool = False) -> nn.Module:
    """24 M parameters, 2,048 features."""
    return BiT(context)
