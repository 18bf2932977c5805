"""MICLe: pairs of one patient's images, and the same as SimCLR where there are none."""

import torch

from polyclinic import study
from polyclinic.encoders import build_encoder
from polyclinic.methods import make_method
from polyclinic.methods.base import Batch, ViewBatch
from polyclinic.methods.micle import MICLe
from polyclinic.methods.simclr import SimCLR
from polyclinic.seeding import forked
from polyclinic.stages import MICLeStage, SimCLRStage, Views

IMAGES = study.Images(size=32)
NOTHING = Views(crop=(1.0, 1.0), flip=False, rotation=0.0, jitter=0.0)
STAGE = MICLeStage(method="micle", rounds=1, views=NOTHING, projection=16)


def test_it_is_made_from_its_settings_and_asks_for_pairs() -> None:
    method = make_method(STAGE)
    assert isinstance(method, MICLe)
    assert method.pairs and not method.separable
    assert not SimCLR(SimCLRStage(method="simclr", rounds=1)).pairs


def test_views_are_of_a_patients_two_images() -> None:
    images = torch.rand(6, 1, 32, 32)
    patients = torch.tensor([4, 4, 0, 0, 9, 9])
    drawn = make_method(STAGE).views(Batch(images, patients), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.views[0], images[[0, 2, 4]], atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn.views[1], images[[1, 3, 5]], atol=1e-5, rtol=0)
    assert drawn.patients.tolist() == [4, 0, 9]


def test_views_of_a_single_image_differ_as_simclrs_do() -> None:
    stage = STAGE.model_copy(update={"views": Views()})
    twice = torch.rand(3, 1, 32, 32).repeat_interleave(2, dim=0)
    batch = Batch(twice, torch.arange(3).repeat_interleave(2))
    first, second = make_method(stage).views(batch, torch.Generator().manual_seed(0)).views
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_module_and_loss_are_simclrs() -> None:
    simclr = SimCLR(SimCLRStage(method="simclr", rounds=1, views=NOTHING, projection=16))
    micle = make_method(STAGE)
    with forked(0):
        module = micle.build(build_encoder(study.Encoder(), IMAGES))
    views = ViewBatch((torch.rand(4, 1, 32, 32), torch.rand(4, 1, 32, 32)), torch.arange(4), {})
    assert torch.equal(micle.loss(module, views), simclr.loss(module, views))
    assert micle.shared(module) == simclr.shared(module)
