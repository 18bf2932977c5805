"""Whatever images a patient may have, that patient moves the clipped sum by no more than the clip.

A random search over batches and weights made to break it: every method that may train under privacy, on every encoder
it allows; then weights by which a coordinator could have single precision fail. The control shows that the search finds
what is wrong where there is something: SimCLR with its images clipped singly.
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
from polyclinic.encoders.resnet import Basic, Deep, ResidualNetwork
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
    "resnet18": lambda: ResidualNetwork(Basic, [1, 1, 1, 1], 1, context=False),
    "resnet50": lambda: ResidualNetwork(Deep, [1, 1, 1, 1], 1, context=False),
    "bit": lambda: SmallBiT(),
    "wide": lambda: VisionTransformer(224, 1, patch=16, dim=384, heads=6, depth=2),
}
"""Of each family that `encoder.name` offers, one of few layers; and one whose matrices are larger than its factors."""
CASES = [("mae", "vit"), ("sssd", "vit"), *(("supervised", name) for name in ("vit", "resnet18", "resnet50", "bit"))]


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


def build(name: str, encoder: str, seed: int, scale: float, least: float = 0.0) -> tuple[Method, nn.Module]:
    """A method and its module, each of its tensors scaled by `scale` to a random power between `least` and 1."""
    kind = "finetune" if name == "supervised" else "pretrain"
    small = {"decoder_width": 32, "decoder_depth": 1} if name in ("mae", "sssd") else {}
    values = {"kind": kind, "method": name, "rounds": 1, **small}
    method = make_method(TypeAdapter(AnyStage).validate_python(with_defaults(values, 1)), classes=2)
    with forked(seed), torch.no_grad():
        module = method.build(ENCODERS[encoder]()).train()
        for parameter in module.parameters():
            parameter *= scale ** float(least + (1 - least) * torch.rand(()))
    return method, module


def views_of(name: str, images: Tensor, seed: int, rows: int = 8) -> ViewBatch:
    """The images as they are; what is drawn for one of at most `rows` does not depend on how many there are."""
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(rows, (SIDE // 8) ** 2, generator=generator).argsort(dim=1)
    labels = torch.eye(2)[torch.randint(2, (rows,), generator=generator)]
    extra = {"targets": labels[: len(images)]} if name == "supervised" else {"order": orders[: len(images)]}
    return ViewBatch((images,), torch.arange(len(images)), extra)


def hold(method: Method, views: ViewBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is drawn for a patient, it is this one's row of `views`, or an empty image in place of nobody's."""

    def held(batch: Batch, generator: torch.Generator) -> ViewBatch:
        extra = {name: value[batch.patients] for name, value in views.extra.items()}
        view = torch.where((batch.patients < 0).view(-1, 1, 1, 1), 0.0, views.views[0][batch.patients])
        return ViewBatch((view,), batch.patients, extra)

    monkeypatch.setattr(method, "views", held)


def moved_by_the_last(
    recipe: PatientRecipe, method: Method, module: nn.Module, views: ViewBatch, monkeypatch: pytest.MonkeyPatch
) -> float:
    """How far the clipped sum of all patients lies from that of all but the last."""
    images, sums = views.views[0], []
    hold(method, views, monkeypatch)
    with forked(0), recipe.attached(module):
        for n in (len(images), len(images) - 1):
            sums.append(recipe.clipped_sums(module, method, Batch(images[:n], torch.arange(n)))[0])
    return distance(*sums)


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in pairs))


@pytest.mark.parametrize(
    ("name", "encoder", "smaller"),
    [(*case, 1.0) for case in CASES]
    + [("sssd", "vit", 0.0), ("sssd", "vit", math.inf), ("supervised", "resnet18", math.inf)],
)
@pytest.mark.parametrize("physical", [1, 8])
def test_a_patient_moves_the_clipped_sum_by_no_more_than_the_clip(
    name: str, encoder: str, smaller: float, physical: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether products or factors are kept, in passes of one patient or all, with weights up to 1000 times larger."""
    monkeypatch.setattr(gradients, "SMALLER", smaller)
    recipe = PatientRecipe(PatientPrivacy(mode="patient", clip=CLIP, physical_batch=physical))
    moved = []
    for seed, images in zip(range(TRIES), batches(0), strict=False):
        method, module = build(name, encoder, seed, 10.0 ** (seed % 4))
        moved.append(moved_by_the_last(recipe, method, module, views_of(name, images, seed), monkeypatch))
    assert max(moved) <= CLIP
    assert max(moved) > 0.99 * CLIP  # the search has reached the bound


@pytest.mark.parametrize(("name", "encoder"), CASES)
def test_layers_of_very_different_size_hide_no_patient(
    name: str, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors scaled up and down apart, by up to 1e12 each way."""
    recipe = PatientRecipe(PatientPrivacy(mode="patient", clip=CLIP, physical_batch=8))
    moved = []
    for seed, images in zip(range(2 * TRIES), batches(1), strict=False):
        method, module = build(name, encoder, seed, 10.0 ** (1 + seed % 12), least=-1.0)
        moved.append(moved_by_the_last(recipe, method, module, views_of(name, images, seed), monkeypatch))
    assert max(moved) <= CLIP
    assert sum(one > 0.9 * CLIP for one in moved) > 1


@pytest.mark.parametrize("encoder", ["vit", "resnet18"])
@pytest.mark.parametrize("scale", [1e4, 1e6, 1e8])
def test_a_head_that_feeds_on_the_last_digits_tells_no_more(
    encoder: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the head nearly equal and large: logits differ by rounding alone, and so by the shape of a product."""
    method, module = build("supervised", encoder, 1, 1.0)
    with forked(1), torch.no_grad():
        rows = torch.randn(module.head.in_features) * scale  # type: ignore[union-attr, arg-type]
        module.head.weight[:] = torch.stack([rows, rows * (1 + 1e-7 * torch.randn_like(rows))])  # type: ignore[union-attr, index, operator]
    images = torch.rand(16, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    views = ViewBatch((images,), torch.arange(16), {"targets": torch.eye(2)[torch.arange(16) % 2]})
    recipe = PatientRecipe(PatientPrivacy(mode="patient", clip=CLIP))
    assert 0.99 * CLIP < moved_by_the_last(recipe, method, module, views, monkeypatch) <= CLIP


@pytest.mark.parametrize("clip", [1.0, 0.1, 0.01])
def test_factors_too_small_to_be_squared_are_clipped(clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters the last block's first matrix is 1e19 long, and the gradient of what leaves it 1e-23."""
    with forked(0):
        method, module = build("supervised", "wide", 0, 1.0)
    block = module.get_submodule("encoder.blocks.1")
    with torch.no_grad():
        for name, value in {"norm2.weight": 0, "norm2.bias": 8.7e17, "mlp.fc1.weight": 0, "mlp.fc1.bias": 1}.items():
            block.get_parameter(name).fill_(value)
        for name in ("mlp.fc2.weight", "mlp.fc2.bias"):
            block.get_parameter(name).zero_()
        module.head.bias.copy_(torch.tensor([5.0, 0.0]))  # type: ignore[union-attr, operator]
    left: list[Tensor] = []
    hook = block.get_submodule("mlp.fc2").register_full_backward_hook(lambda _, entered, gone: left.append(gone[0]))
    image, targets = torch.rand(1, 1, 224, 224, generator=torch.Generator().manual_seed(0)), torch.eye(2)[:1]
    views = ViewBatch((image,), torch.arange(1), {"targets": targets})
    method.loss(module, views).sum().backward()
    hook.remove()
    along = left[0][0].mean(dim=0)  # (dim,)
    along /= along.norm()
    tiny = 2e-23 / float((left[0][0] @ along).abs().max())
    with torch.no_grad():
        block.get_parameter("mlp.fc2.weight").copy_((tiny * along).unsqueeze(1))
    recipe = PatientRecipe(PatientPrivacy(mode="patient", clip=clip, physical_batch=1))
    assert 0.9 * clip < moved_by_the_last(recipe, method, module, views, monkeypatch) <= clip


@pytest.mark.parametrize("smaller", [0.0, 1.0, math.inf])
@pytest.mark.parametrize(("name", "encoder"), CASES)
def test_bits_of_a_patients_gradient_depend_on_nobody_else(
    name: str, encoder: str, smaller: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on the place in a pass of fixed size nor on who is in the others."""
    monkeypatch.setattr(gradients, "SMALLER", smaller)
    method, module = build(name, encoder, 0, 10.0)
    mine = views_of(name, torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)), 0)
    single = gradients.Gradients(module)
    for size in (2, 4, 16, 64):
        places, found = sorted({0, size // 2 - 1, size // 2, size - 1}), []
        for seed, held in ((0, places[::2]), (size - 1, places[1::2])):  # the others: images, and beyond all bounds
            images = torch.rand(size, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 10.0**seed
            images[held] = mine.views[0]
            drawn = views_of(name, images, seed, rows=size)
            for key, value in mine.extra.items():
                drawn.extra[key][held] = value[0]
            with forked(0):
                norms = single.norms(method.loss(module, drawn))
            kept = dict(single._parts)
            for place in held:
                single._parts.update(kept)  # which a sum takes
                alone = single.sums(torch.where(torch.arange(size) == place, 1.0, 0.0).double())
                found.append(torch.cat([norms[[place]], *(part.flatten() for _, part in alone)]))
        assert found[0].isfinite().all() and float(found[0].norm()) > 0
        assert all(torch.equal(found[0], one) for one in found)
    single.close()


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
