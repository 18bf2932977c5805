"""Audits that would catch a lie: no attack does better than epsilon allows, and broken mechanisms are found out.

A bound is wrong in one audit of a thousand at most (audit.CONFIDENCE), so that is how often an honest mechanism fails
here. Noise and the drawing of patients come from the operating system and no seed repeats them; each broken mechanism
is so far beyond its claim that the test would miss it in fewer than one of a thousand runs.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyclinic.cohort import Cohort
from polyclinic.methods.base import Batch, Method, ViewBatch
from polyclinic.methods.nt_xent import nt_xent
from polyclinic.methods.simclr import SimCLR
from polyclinic.privacy.accounting import Event, epsilon
from polyclinic.privacy.dpsgd import PatientRecipe
from polyclinic.seeding import forked, torch_generator
from polyclinic.stages import SimCLRStage, Stage
from polyclinic.study import PatientPrivacy

from . import audit
from .audit import PATIENTS, SIDE, Setting, cohort_of, lower_bound, released


@pytest.mark.parametrize(
    "setting",
    [
        Setting(noise=1.0, batch_size=16),
        Setting(noise=2.0, batch_size=16, epochs=4),
        Setting(noise=0.7, batch_size=4),
        Setting(noise=0.7, batch_size=8, images=4),
    ],
    ids=["everybody", "more steps", "a quarter drawn", "several images"],
)
def test_no_attack_does_better_than_the_claim(setting: Setting) -> None:
    """It does well enough, though, to show that the test could fail: about 1.3 is measured, with a deviation of 0.2."""
    assert 0.3 < setting.audit(PatientRecipe, runs=500) <= setting.claim()


@pytest.mark.parametrize("honesty", [0.6, 0.75, 0.9])
def test_a_bound_is_near_an_epsilon_that_is_known_and_not_above(honesty: float) -> None:
    """That of true and false answers to whether a canary is there (Warner's randomised response)."""
    random = np.random.default_rng(0)
    answers = random.random((40, 2, 4000)) < np.array([[honesty], [1 - honesty]])
    bounds = [lower_bound(*pair) for pair in answers.astype(float)]
    known = np.log(honesty / (1 - honesty))
    assert known - 0.3 < np.median(bounds) <= max(bounds) < known


def test_a_bound_sees_presence_and_absence() -> None:
    told, silent = np.tile([0.0, 1.0], 500), np.zeros(1000)
    assert min(lower_bound(told, silent), lower_bound(silent, -told)) > 3
    assert lower_bound(told, told) == 0


class WithoutNoise(PatientRecipe):
    """Clips, and adds nothing."""

    def __init__(self, privacy: PatientPrivacy) -> None:
        super().__init__(privacy.model_copy(update={"noise": 0.0}))


def test_noise_left_out_is_found() -> None:
    setting = Setting(noise=2.0, batch_size=8, epochs=2)
    assert setting.audit(WithoutNoise, runs=25) > setting.claim()


class ClipsTheMean(PatientRecipe):
    """Bounds the mean gradient of a batch in place of each patient's."""

    def clipped_sums(self, module: nn.Module, method: Method, batch: Batch) -> tuple[list[Tensor], Tensor]:
        honest = self.privacy
        self.privacy = honest.model_copy(update={"clip": 1e6})
        sums, losses = super().clipped_sums(module, method, batch)
        self.privacy = honest
        mean = torch.stack([part.norm() for part in sums]).norm() / PATIENTS
        return [part * (honest.clip / mean.clamp(min=honest.clip)) for part in sums], losses


def test_clipping_after_averaging_is_found() -> None:
    setting = Setting(noise=2.0, batch_size=16, canaries=1)
    assert setting.audit(ClipsTheMean, runs=400) > setting.claim()


class TakesImagesForPatients(PatientRecipe):
    """Draws and clips every image by itself, whosever it is."""

    def steps(self, cohort: Cohort, stage: Stage, pairs: bool) -> int:
        return super().steps(self._images(cohort), stage, pairs)

    def indices(self, cohort: Cohort, stage: Stage, seed: int, pairs: bool) -> Iterator[NDArray[np.int64]]:
        return super().indices(self._images(cohort), stage, seed, pairs)

    def clipped_sums(self, module: nn.Module, method: Method, batch: Batch) -> tuple[list[Tensor], Tensor]:
        return super().clipped_sums(module, method, replace(batch, patients=torch.arange(len(batch.images))))

    def _images(self, cohort: Cohort) -> Cohort:
        return replace(cohort, patients=np.arange(len(cohort), dtype=np.int32))


def test_an_image_level_claim_for_patients_of_several_images_is_found() -> None:
    setting = Setting(noise=2.0, batch_size=64, images=8)
    assert setting.audit(TakesImagesForPatients, runs=80) > setting.claim(units=8 * PATIENTS)


def test_an_accountant_that_starts_anew_each_round_is_found() -> None:
    setting = Setting(noise=2.0, batch_size=16)
    assert setting.audit(PatientRecipe, runs=60, rounds=24) > setting.claim()


class AlwaysDrawsTheFirstFour(PatientRecipe):
    """Draws the other patients only; these are in every batch."""

    def indices(self, cohort: Cohort, stage: Stage, seed: int, pairs: bool) -> Iterator[NDArray[np.int64]]:
        return (np.union1d(drawn, np.arange(4)) for drawn in super().indices(cohort, stage, seed, pairs))


def test_canaries_that_are_in_every_batch_are_found() -> None:
    setting = Setting(noise=1.0, batch_size=2, canaries=4)
    assert setting.audit(AlwaysDrawsTheFirstFour, runs=300) > setting.claim()


class Contrast(SimCLR):
    """SimCLR with views that change nothing, so that a layer has a row for each image; it claims to be separable."""

    separable = True

    def loss(self, module: nn.Module, views: ViewBatch) -> Tensor:
        projected = module(views.views[0])
        return nt_xent(projected, projected, views.patients, self.temperature)


class Thumbnail(nn.Sequential):
    """An encoder that learns nothing: (n, 1, SIDE, SIDE) -> (n, dim) means over squares."""

    dim = 16

    def __init__(self) -> None:
        super().__init__(nn.AvgPool2d(SIDE // 4), nn.Flatten())


def contrast(images: NDArray[np.uint8], recipe: PatientRecipe, weights: int) -> Tensor:
    """What a step of `Contrast` on all (n, 1, SIDE, SIDE) images adds up, from weights of that number; one vector."""
    stage = SimCLRStage(kind="pretrain", method="simclr", batch_size=len(images), projection=4, **audit.PLAIN_SGD)
    method = Contrast(stage)
    with forked(weights):
        module = method.build(Thumbnail())
    found = released(module, method, cohort_of(images), stage, recipe)
    return torch.cat([part.flatten() for part in found.values()]) * len(images)


def odd_one_out(seed: int, patients: int = 32) -> NDArray[np.uint8]:
    """(patients, 1, SIDE, SIDE): a canary, and others who are nearly alike until there is somebody to differ from."""
    generator = torch_generator(seed)
    canary, alike = torch.rand(2, 1, 1, SIDE, SIDE, generator=generator)
    others = (alike + 0.02 * torch.rand(patients - 1, 1, SIDE, SIDE, generator=generator)).clamp(0, 1)
    return (torch.cat([canary, others]) * 255).byte().numpy()


def test_clipping_each_image_of_a_contrastive_loss_is_found() -> None:
    """Whoever is absent is not there at all; the score is along what a canary adds where nothing hides it."""
    privacy, runs = PatientPrivacy(mode="patient", noise=2.0, clip=1.0, physical_batch=32), 200
    exact, honest = WithoutNoise(privacy), PatientRecipe(privacy)
    added = [contrast(odd_one_out(k), exact, k) - contrast(odd_one_out(k)[1:], exact, k) for k in range(20)]
    worst = max(range(20), key=lambda k: float(added[k].norm()))
    assert added[worst].norm() > 3 * privacy.clip
    images = odd_one_out(worst)
    present, absent = (
        np.array([float(contrast(there, honest, worst) @ added[worst]) for _ in range(runs)])
        for there in (images, images[1:])
    )
    assert lower_bound(present, absent) > epsilon([Event(privacy.noise, 1.0, 1)], audit.DELTA)
