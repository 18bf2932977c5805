"""DP-SGD with the patient as its unit: a recipe of the training loop.

Abadi et al., Deep learning with differential privacy, CCS 2016; two cohorts are neighbours if one patient, with all
images, is in one of them only. A step draws every patient independently with probability q (Poisson sampling) and one
random image x_i of each that was drawn, and gives the optimizer

    ( sum over drawn i of g_i min(1, C / |g_i|)  +  noise C N(0, I) ) / (q patients),    g_i the gradient of loss(x_i)

over all trainable parameters together. q = batch_size / patients, so the sum is divided by batch_size, not by the
number that was drawn, which is private. The number of patients is taken as public.

What one patient may change must be that patient's term only. Hence views, masks, dropout and drop path are drawn from
generators that nobody knows the seed of: from those of the study, which are read in sequence, one patient more would
shift the known draws of all others. Patients and images are drawn by numpy's PCG64 and noise by torch's generator of
the device (Mersenne twister on a processor, Philox on CUDA), all seeded by the operating system, anew in every round.
None of them is a cryptographic generator: whoever sees enough of its bare output could foretell the rest. Noise is in
floating point, and what its lowest bits tell (Mironov, On significance of the least significant bits for differential
privacy, CCS 2012) is not defended. Nor is it that the last digits of a gradient depend on how many patients share its
pass: nothing that shows in ordinary weights, but in some made a thousand times larger one patient moved the sum by a
few per cent more than C. With `physical_batch = 1` nothing is shared.
"""

import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from polyclinic.cohort import Cohort
from polyclinic.errors import CohortError, StudyError
from polyclinic.methods.base import Batch, Method, ViewBatch
from polyclinic.privacy.gradients import Gradients
from polyclinic.stages import Stage
from polyclinic.study import Compute, PatientPrivacy

MARGIN = 1e-4
"""By which every norm is taken for larger than it came out: no rounding may carry a patient beyond the clip."""
WORDS = 624
"""Of 32 bits, the state of a Mersenne twister."""
MERSENNE = slice(24, 24 + WORDS * 8)
"""Bytes of a torch generator's state in which they stand, 8 bytes each."""


def sampling_rate(cohort_patients: int, batch_size: int) -> float:
    """q, with which a step draws every patient: `batch_size` of them are expected.

    Raises:
        CohortError: the site has fewer patients than that.
    """
    if cohort_patients < batch_size:
        raise CohortError(
            f"the site has {cohort_patients} patients and a step under privacy.mode 'patient' expects {batch_size}",
            f"set batch_size to at most {cohort_patients} in the study (a hundredth of them costs little privacy), or "
            "add patients",
        )
    return batch_size / cohort_patients


def steps_of_round(patients: int, stage: Stage) -> int:
    """Steps in which `local_epochs` times as many patients are expected as there are."""
    return stage.local_epochs * math.ceil(patients / stage.batch_size)


def secret_generator(device: torch.device) -> torch.Generator:
    """A generator in a state that nobody knows.

    Of a seed the one for processors heeds 32 bits, few enough to try them all, so its whole state is filled.
    """
    generator = torch.Generator(device)
    generator.manual_seed(secrets.randbits(63))
    if device.type == "cpu":
        state = generator.get_state()
        words = np.frombuffer(secrets.token_bytes(WORDS * 4), np.uint32).astype(np.int64)
        state[MERSENNE] = torch.from_numpy(words).view(torch.uint8)
        generator.set_state(state)
    return generator


@dataclass(frozen=True)
class _Round:
    """What hangs on a module while it trains, and the secret generators of the round."""

    gradients: Gradients
    views: torch.Generator
    noise: torch.Generator


class PatientRecipe:
    """DP-SGD as a recipe of the loop (see the module's docstring), for one round at a time.

    A round that is gone on with draws anew what is left of it; what was trained before it was killed stays as it is.
    """

    def __init__(self, privacy: PatientPrivacy) -> None:
        self.privacy = privacy
        self._round: _Round | None = None
        self._expected = 0

    @contextmanager
    def attached(self, module: nn.Module) -> Iterator[None]:
        """As in Recipe: hooks that see gradients of single patients, and secret generators.

        Raises:
            StudyError: a layer mixes the images of a batch, or nothing is trainable.
        """
        for name, layer in module.named_modules():
            if isinstance(layer, _BatchNorm):
                raise StudyError(
                    f"{name} normalises over the batch, where one patient changes the gradients of all others",
                    "use an encoder with group or layer normalisation: every one that encoder.name offers",
                )
        trainable = [p for p in module.parameters() if p.requires_grad]
        if not trainable:
            raise StudyError("all of the model is frozen", "set probe_rounds to 0, or train another stage")
        device = trainable[0].device
        torch.manual_seed(secrets.randbits(63))  # of dropout and drop path; the loop restores its own state afterwards
        gradients = Gradients(module)
        try:
            self._round = _Round(gradients, secret_generator(device), secret_generator(device))
            yield
        finally:
            self._round = None
            gradients.close()

    def steps(self, cohort: Cohort, stage: Stage, pairs: bool) -> int:
        """As in Recipe."""
        return steps_of_round(cohort.n_patients, stage)

    def indices(self, cohort: Cohort, stage: Stage, seed: int, pairs: bool) -> Iterator[NDArray[np.int64]]:
        """One random image of every patient drawn, who may be none; `seed` is the study's and is not used.

        Raises:
            CohortError: see `sampling_rate`.
        """
        patients = cohort.n_patients
        rate = sampling_rate(patients, stage.batch_size)
        self._expected = stage.batch_size
        generator = np.random.default_rng(secrets.randbits(128))
        starts = np.searchsorted(cohort.patients, np.arange(patients + 1))
        images = np.diff(starts)  # (patients,)

        def draw() -> NDArray[np.int64]:
            drawn = np.flatnonzero(generator.random(patients) < rate)
            return np.asarray(starts[drawn] + generator.integers(images[drawn]), np.int64)

        return (draw() for _ in range(steps_of_round(patients, stage)))

    def step(
        self,
        module: nn.Module,
        method: Method,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        generator: torch.Generator,
    ) -> Tensor:
        """As in Recipe, in fp32; `generator` is seeded from the study and is not used."""
        sums, losses = self.clipped_sums(module, method, batch)
        now, deviation = self._now, self.privacy.noise * self.privacy.clip
        for parameter, total in zip(now.gradients.parameters, sums, strict=True):
            noise = torch.randn(total.shape, generator=now.noise, device=total.device)
            parameter.grad = total.add_(noise, alpha=deviation).div_(self._expected)
        optimizer.step()
        return losses

    def loss(self, total: float, terms: int) -> float:
        """As in Recipe; 0 where no patient was drawn or none has a label: an error would tell that."""
        return total / terms if terms else 0.0

    def clipped_sums(self, module: nn.Module, method: Method, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """The clipped gradients of a batch of one image a patient, summed, without noise.

        Returns:
            A sum for each trainable parameter, in memory as that lies, and the losses of those who are part of it.

        Raises:
            StudyError: the method's loss is not separable.
        """
        if not method.separable:
            raise StudyError(
                "the method's loss is not separable: one patient changes the terms of all others",
                "train mae, sssd or supervised, or protect whole sites with privacy.mode 'site'",
            )
        if len(set(batch.patients.tolist())) < len(batch.patients):
            raise ValueError("two images of one patient in a batch")
        sums, losses = [torch.zeros_like(p) for p in self._now.gradients.parameters], [batch.images.new_zeros(0)]
        if len(batch.images):
            views = method.views(batch, self._now.views)  # of all at once: parts must not decide what is drawn
            for start in range(0, len(views.patients), self.privacy.physical_batch):
                rows = torch.arange(start, min(start + self.privacy.physical_batch, len(views.patients)))
                losses.append(self._add(sums, module, method, rows_of(views, rows)))
        return sums, torch.cat(losses)

    def _add(self, sums: list[Tensor], module: nn.Module, method: Method, views: ViewBatch) -> Tensor:
        """Add the clipped gradients of `views` to the sums; returns the losses.

        Whoever's gradient has no finite norm is left out, and the others are computed again, since infinity times a
        weight of 0 is no number in a sum over patients.
        """
        gradients = self._now.gradients
        losses = method.loss(module, views)
        if losses.shape != views.patients.shape:
            raise StudyError(
                f"{len(views.patients)} images gave losses of shape {tuple(losses.shape)}, not one each",
                "train with mae, sssd or supervised",
            )
        norms = gradients.norms(losses)
        fit = norms.isfinite().cpu()
        if not fit.all():
            others = rows_of(views, fit.nonzero().squeeze(1))
            return self._add(sums, module, method, others) if fit.any() else losses.new_zeros(0)
        coefficients = (self.privacy.clip / (norms * (1 + MARGIN))).clamp(max=1).to(losses)
        for number, added in gradients.sums(coefficients):
            sums[number] += added
        return losses.detach()

    @property
    def _now(self) -> _Round:
        return cast(_Round, self._round)


def rows_of(views: ViewBatch, rows: Tensor) -> ViewBatch:
    """Some rows, numbered on the CPU, of what a separable method has drawn."""
    extra = {name: value[rows] for name, value in views.extra.items()}
    return ViewBatch(tuple(view[rows] for view in views.views), views.patients[rows], extra)
