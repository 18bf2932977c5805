"""Whatever images a patient may have, that patient moves the clipped sum by no more than the clip.

A random search over batches made to break it: every method that may train under privacy, on every encoder it allows.
The control shows that the search finds what is wrong where there is something: SimCLR with its images clipped singly.
"""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from pydantic import TypeAdapter
from timm.layers.norm_act import GroupNormAct
from timm.layers.std_conv import StdConv2d
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from polyclinic.encoders.bit import BiT
from polyclinic.encoders.context import bottlenecks
from polyclinic.encoders.normalise import Normalise
from polyclinic.encoders.resnet import Basic, Deep, GroupNormResNet
from polyclinic.encoders.vit import VisionTransformer
from polyclinic.methods import make_method
from polyclinic.methods.base import Batch, Method, ViewBatch
from polyclinic.privacy import gradients
from polyclinic.privacy.dpsgd import PatientRecipe
from polyclinic.seeding import forked
from polyclinic.stages import SEPARABLE_METHODS, AnyStage, with_defaults
from polyclinic.study import PatientPrivacy

SIDE, CLIP, TRIES = 32, 0.7, 8
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: VisionTransformer(SIDE, 1, patch=8, dim=48, heads=3, depth=2),
    "resnet18": lambda: GroupNormResNet(Basic, [1, 1, 1, 1], 1, context=False),
    "resnet50": lambda: GroupNormResNet(Deep, [1, 1, 1, 1], 1, context=False),
    "bit": lambda: SmallBiT(),
}
"""Of each family that `encoder.name` offers, one of few layers."""
CASES = [("mae", "vit"), ("sssd", "vit"), *(("supervised", encoder) for encoder in ENCODERS)]


class SmallBiT(BiT):
    """Of BiT's parts, one block a stage and few channels."""

    def __init__(self) -> None:
        ResNetV2.__init__(
            self,
            layers=[1, 1, 1, 1],
            channels=(256, 256, 256, 256),
            num_classes=0,
            stem_chs=32,
            stem_type="fixed",
            conv_layer=partial(StdConv2d, eps=1e-8),
            norm_layer=partial(GroupNormAct, num_groups=32, inplace=False),
        )
        self.dim, self.widths = 256, [32, 256, 256, 256, 256]
        self.normalise, self.context = Normalise(3, ((0.5,) * 3, (0.5,) * 3)), bottlenecks(self.widths, False)


def batches(seed: int) -> Iterator[Tensor]:
    """(n, 1, SIDE, SIDE) images in [0, 1], two at least: the last is the patient who comes and goes."""
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)

    def noise(n: int) -> Tensor:
        return torch.rand(n, 1, SIDE, SIDE, generator=generator)

    board = (torch.arange(SIDE).view(-1, 1) + torch.arange(SIDE)) % 2
    cells = (torch.arange(SIDE).view(-1, 1) // 8 + torch.arange(SIDE) // 8) % 2
    kinds: list[Callable[[int], Tensor]] = [
        noise,
        lambda n: noise(n).round(),
        lambda n: noise(1).expand(n, -1, -1, -1),  # duplicates
        lambda n: torch.full((n, 1, SIDE, SIDE), float(random.random())),
        lambda n: torch.full((n, 1, SIDE, SIDE), float(random.integers(2))),
        lambda n: board.float().expand(n, 1, -1, -1) * noise(n).round()[:, :, :1, :1],
        lambda n: cells.float().expand(n, 1, -1, -1),
        lambda n: noise(n) * 1e-4,
        lambda n: (noise(n) > 0.999).float(),
    ]
    while True:
        others, last = (kinds[random.integers(len(kinds))] for _ in range(2))
        yield torch.cat([others(int(random.integers(2, 5))), last(1)])


def build(name: str, encoder: str, seed: int, scale: float) -> tuple[Method, nn.Module]:
    """A method and its module, each of its weights scaled up to `scale` times."""
    kind = "finetune" if name == "supervised" else "pretrain"
    small = {"decoder_width": 32, "decoder_depth": 1} if name in ("mae", "sssd") else {}
    values = {"kind": kind, "method": name, "rounds": 1, **small}
    method = make_method(TypeAdapter(AnyStage).validate_python(with_defaults(values, 1)), classes=2)
    with forked(seed), torch.no_grad():
        module = method.build(ENCODERS[encoder]()).train()
        for parameter in module.parameters():
            parameter *= scale ** float(torch.rand(()))
    return method, module


def views_of(name: str, images: Tensor, seed: int) -> ViewBatch:
    """The images as they are; what is drawn for one of them does not depend on how many there are."""
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(8, (SIDE // 8) ** 2, generator=generator).argsort(dim=1)
    labels = torch.eye(2)[torch.randint(2, (8,), generator=generator)]
    extra = {"targets": labels[: len(images)]} if name == "supervised" else {"order": orders[: len(images)]}
    return ViewBatch((images,), torch.arange(len(images)), extra)


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in pairs))


@pytest.mark.parametrize(
    ("name", "encoder", "smaller"),
    [(*case, 1.0) for case in CASES]
    + [("sssd", "vit", 0.0), ("sssd", "vit", math.inf), ("supervised", "resnet18", math.inf)],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_patient_moves_the_clipped_sum_by_no_more_than_the_clip(
    name: str, encoder: str, smaller: float, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether products or factors are kept; with patients in one pass, unless weights are so large that the rounding of
    the others' gradients, which depends on how many there are, would drown what is looked for.
    """
    monkeypatch.setattr(gradients, "SMALLER", smaller)
    recipe = PatientRecipe(PatientPrivacy(mode="patient", clip=CLIP, physical_batch=16 if together else 1))
    moved = []
    for seed, images in zip(range(TRIES), batches(0), strict=False):
        method, module = build(name, encoder, seed, 1.0 if together else 10.0 ** (seed % 4))
        with forked(0), recipe.attached(module):
            sums = []
            for n in (len(images), len(images) - 1):
                views = views_of(name, images[:n], seed)
                monkeypatch.setattr(method, "views", lambda batch, generator, views=views: views)
                sums.append(recipe.clipped_sums(module, method, Batch(images[:n], torch.arange(n)))[0])
        moved.append(distance(*sums))
    assert max(moved) <= CLIP * (1 + 1e-5)
    assert max(moved) > 0.99 * CLIP  # the search has reached the bound


def test_every_method_that_may_train_is_searched() -> None:
    assert {name for name, _ in CASES} == SEPARABLE_METHODS


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_images_clipped_singly_in_a_loss_over_pairs_are_found_out() -> None:
    """What a naive per-image DP-SGD of SimCLR does, and what the accountant would take for at most the clip."""
    stage = TypeAdapter(AnyStage).validate_python(with_defaults({"method": "simclr", "rounds": 1}, 1))
    method = make_method(stage)
    with forked(0):
        module = method.build(ENCODERS["vit"]())
    moved = []
    for _, images in zip(range(TRIES), batches(0), strict=False):
        sums = []
        for n in (len(images), len(images) - 1):
            wrapped = GradSampleModule(copy.deepcopy(module), loss_reduction="sum")
            first = images[:n] + 0.01 * torch.rand(images[:n].shape, generator=torch.Generator().manual_seed(0))
            method.loss(wrapped, ViewBatch((images[:n], first), torch.arange(n), {})).sum().backward()
            samples = [p.grad_sample.unflatten(0, (2, n)).sum(dim=0) for p in wrapped.parameters()]  # of both views
            norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples]).norm(dim=0)
            weights = (CLIP / norms).clamp(max=1)
            sums.append([torch.tensordot(weights, sample, 1) for sample in samples])
        moved.append(distance(*sums))
    assert max(moved) > 1.2 * CLIP
