"""The encoders a study may name. A new one is a file with a builder and one line in ENCODERS.

A file is imported when one of its encoders is first built: torchvision and timm take as long to import as torch
itself and 190 MB, and many commands and messages build no encoder.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from polyclinic import study
from polyclinic.errors import StudyError


def _file(name: str) -> ModuleType:
    return import_module(f"polyclinic.encoders.{name}")


def _patches(encoder: study.Encoder, images: study.Images) -> dict[str, Any]:
    return {"size": images.size, "channels": images.channels, "patch": encoder.patch, "context": encoder.context}


ENCODERS: dict[str, Callable[[study.Encoder, study.Images], nn.Module]] = {
    "resnet18": lambda encoder, images: _file("resnet").resnet18(images.channels, encoder.context, encoder.norm),
    "resnet50": lambda encoder, images: _file("resnet").resnet50(images.channels, encoder.context, encoder.norm),
    "bit_resnet50": lambda encoder, images: _file("bit").bit_resnet50(encoder.context),
    "vit_tiny": lambda encoder, images: _file("vit").vit_tiny(**_patches(encoder, images)),
    "vit_small": lambda encoder, images: _file("vit").vit_small(**_patches(encoder, images)),
    "vit_base": lambda encoder, images: _file("vit").vit_base(**_patches(encoder, images)),
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
