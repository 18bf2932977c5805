"""SimCLR as a method: its module, views, losses and what it shares."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from polyclinic import study
from polyclinic.encoders import build_encoder
from polyclinic.methods import make_method
from polyclinic.methods.base import Batch, ViewBatch
from polyclinic.methods.nt_xent import nt_xent
from polyclinic.methods.simclr import SimCLR
from polyclinic.seeding import forked
from polyclinic.stages import RADIOGRAPH, Contrastive, MICLeStage, SimCLRStage

IMAGES = study.Images(size=32)
STAGE = SimCLRStage(method="simclr", rounds=1, views=RADIOGRAPH, projection=16, temperature=0.2)


@pytest.fixture
def module() -> torch.nn.Module:
    with forked(0):
        return make_method(STAGE).build(build_encoder(study.Encoder(), IMAGES))


def batch(patients: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.rand(len(patients), 1, 32, 32, generator=generator), torch.tensor(patients))


def test_it_is_made_from_its_settings() -> None:
    method = make_method(STAGE)
    assert isinstance(method, SimCLR)
    assert (method.temperature, method.projection, method.settings) == (0.2, 16, RADIOGRAPH)
    assert not method.separable


def test_the_head_has_one_hidden_layer_of_the_encoders_width(module: torch.nn.Module) -> None:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if name.startswith("head.")}
    assert shapes == {
        "head.0.weight": (512, 512),
        "head.0.bias": (512,),
        "head.2.weight": (16, 512),
        "head.2.bias": (16,),
    }


def test_encoder_and_head_are_shared(module: torch.nn.Module) -> None:
    shared = make_method(STAGE).shared(module)
    assert set(shared) == set(module.state_dict())
    assert {name.split(".")[0] for name in shared} == {"encoder", "head"}
    assert all(module.state_dict()[name].dtype == torch.float32 for name in shared)


def test_two_different_views_are_drawn_and_a_seed_repeats_them() -> None:
    method, images = make_method(STAGE), batch([0, 1, 2])
    views, again = (method.views(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert len(views.views) == 2 and all(view.shape == images.images.shape for view in views.views)
    assert not torch.equal(*views.views)
    assert all(torch.equal(a, b) for a, b in zip(views.views, again.views, strict=True))
    assert torch.equal(views.patients, images.patients)


def test_the_loss_is_nt_xent_of_the_projections(module: torch.nn.Module) -> None:
    method = make_method(STAGE)
    views = method.views(batch([0, 1, 1, 2]), torch.Generator().manual_seed(0))
    losses = method.loss(module, views)
    assert losses.shape == (4,) and losses.requires_grad
    features = module.get_submodule("encoder")(torch.cat(views.views)).double()
    standard = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
    first, second = module.get_submodule("head")(standard.float()).chunk(2)
    torch.testing.assert_close(losses, nt_xent(first, second, views.patients, 0.2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("patients", [[4], [4, 4, 4]])
def test_a_batch_of_one_patient_teaches_nothing(module: torch.nn.Module, patients: list[int]) -> None:
    method = make_method(STAGE)
    views = method.views(batch(patients), torch.Generator().manual_seed(0))
    assert method.loss(module, views).shape == (0,)


def test_views_of_images_that_agree_cost_less_than_of_images_that_do_not(module: torch.nn.Module) -> None:
    method, images = make_method(STAGE), batch([0, 1, 2, 3]).images
    patients = torch.arange(4)
    agree = method.loss(module, ViewBatch((images, images), patients, {})).mean()
    crossed = method.loss(module, ViewBatch((images, images.roll(1, 0)), patients, {})).mean()
    assert agree < crossed


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny"])
@pytest.mark.parametrize("stage", [STAGE, MICLeStage(method="micle", rounds=1, projection=16)], ids=["simclr", "micle"])
def test_its_gradient_and_micles_are_exact(stage: Contrastive, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the images and by a weight of the head."""
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)  # features leave an encoder in float32
    method = make_method(stage)
    with forked(0):
        module = method.build(build_encoder(study.Encoder.model_validate({"name": name}), IMAGES)).double()
    drawn = method.views(batch([4, 4, 0, 0, 9, 9]), torch.Generator().manual_seed(0))
    first, second = (view.double() for view in drawn.views)

    def loss(images: Tensor, weight: Tensor) -> Tensor:
        with_weight = Reweighted(module, {"head.0.weight": weight})
        return method.loss(with_weight, ViewBatch((images, second), drawn.patients, {}))

    weight = module.get_parameter("head.0.weight").detach().clone()
    assert torch.autograd.gradcheck(loss, (first.requires_grad_(), weight.requires_grad_()), fast_mode=True)


class Reweighted(torch.nn.Module):
    """A module with other values of some weights."""

    def __init__(self, module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.module, self.weights = module, weights

    def forward(self, images: Tensor) -> Tensor:
        projected: Tensor = functional_call(self.module, self.weights, (images,))
        return projected
