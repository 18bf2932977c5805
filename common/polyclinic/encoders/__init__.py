"""The encoders a study may name. A new one is a file with a builder and one line in ENCODERS."""

from collections.abc import Callable

from torch import nn

from polyclinic import study
from polyclinic.encoders import resnet, vit
from polyclinic.errors import StudyError

ENCODERS: dict[str, Callable[[study.Encoder, study.Images], nn.Module]] = {
    "resnet18": lambda encoder, images: resnet.resnet18(images.channels),
    "resnet50": lambda encoder, images: resnet.resnet50(images.channels),
    "vit_tiny": lambda encoder, images: vit.vit_tiny(images.size, images.channels, encoder.patch),
    "vit_small": lambda encoder, images: vit.vit_small(images.size, images.channels, encoder.patch),
    "vit_base": lambda encoder, images: vit.vit_base(images.size, images.channels, encoder.patch),
}


def build_encoder(encoder: study.Encoder, images: study.Images) -> nn.Module:
    """A module from (n, channels, size, size) in [0, 1] to (n, dim) float32 features, with `dim` as its attribute.

    Weights are drawn from torch's global state: call it inside `seeding.forked`.

    Raises:
        StudyError: no encoder has that name.
    """
    if encoder.name not in ENCODERS:
        raise StudyError(f"no encoder is called {encoder.name!r}", f"use one of {', '.join(ENCODERS)}")
    return ENCODERS[encoder.name](encoder, images)
