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
None of them is a cryptographic generator: whoever sees enough of its bare output could foretell the rest.

Nor may one patient more change the last digits of the others' gradients, from which weights made for that make whole
clips. How a product of matrices rounds depends on its shape. So views are drawn patient by patient, and every pass has
`physical_batch` rows, the last of them for nobody where patients do not fill it. That at a fixed shape a row's bits
depend neither on its place nor on the other rows is no promise of torch's: the tests show it on a processor, for whole
models and for powers of two as `physical_batch` (an odd number of rows is another matter); of CUDA it is assumed.

Norms, sums and noise are in double precision, in which noise reaches 8.6 standard deviations (in single precision 5.8,
too few for a small delta), and are rounded once, when the noise is in. What the lowest bits of the noise tell (Mironov,
On significance of the least significant bits for differential privacy, CCS 2012) is not defended.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
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
from polyclinic.privacy.accounting import Event
from polyclinic.privacy.gradients import Gradients
from polyclinic.stages import Stage
from polyclinic.study import Compute, PatientPrivacy

MARGIN = 1e-4
"""By which every norm is taken for larger than it came out: no rounding may carry a patient beyond the clip."""
NOBODY = -1
"""In place of a patient's number, in rows that only fill a pass."""
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
            f"the site has fewer patients than a step under privacy.mode 'patient' expects, which is {batch_size}",
            f"it has {cohort_patients}: set batch_size to that at most (a hundredth of them costs little privacy), or "
            "add patients",
        )
    return batch_size / cohort_patients


def steps_of_round(patients: int, stage: Stage) -> int:
    """Steps in which `local_epochs` times as many patients are expected as there are."""
    return stage.local_epochs * math.ceil(patients / stage.batch_size)


def event_of_round(privacy: PatientPrivacy, patients: int, stage: Stage) -> Event:
    """What a round of a stage costs each of the patients that a site trains on; raises as `sampling_rate`."""
    return Event(privacy.noise, sampling_rate(patients, stage.batch_size), steps_of_round(patients, stage))


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
                    "use an encoder with group or layer normalisation: leave encoder.norm out",
                )
        trainable = [p for p in module.parameters() if p.requires_grad]
        if not trainable:
            raise StudyError("all of the model is frozen", "set probe_rounds to 0, or train another stage")
        device = trainable[0].device
        if device.type == "mps":
            raise StudyError("this accelerator has no double precision, which the promise needs", "train elsewhere")
        # Of dropout and drop path; the loop restores its own states afterwards.
        torch.manual_seed(secrets.randbits(63))
        torch.set_rng_state(secret_generator(torch.device("cpu")).get_state())
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
            noise = torch.randn(total.shape, generator=now.noise, device=total.device, dtype=total.dtype)
            parameter.grad = total.add_(noise, alpha=deviation).div_(self._expected).to(parameter.dtype)
        optimizer.step()
        return losses

    def loss(self, total: float, terms: int) -> float:
        """As in Recipe; 0 where no patient was drawn or none has a label: an error would tell that."""
        return total / terms if terms else 0.0

    def clipped_sums(self, module: nn.Module, method: Method, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """The clipped gradients of a batch of one image a patient, summed, without noise.

        Returns:
            A float64 sum for each trainable parameter, in memory as that lies, and the losses of those who are part of
            it.

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
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in self._now.gradients.parameters]
        losses = [self._add(sums, module, method, views) for views in self._passes(method, batch)]
        return sums, torch.cat([batch.images.new_zeros(0), *losses])

    def _passes(self, method: Method, batch: Batch) -> Iterator[ViewBatch]:
        """Views of a batch, `physical_batch` rows each time; images that the method leaves out are in none of them."""
        size, generator = self.privacy.physical_batch, self._now.views
        drawn = [method.views(one, generator) for one in singly(batch)]
        rows = [one for one in drawn if len(one.patients)]
        nobody = Batch(torch.zeros_like(batch.images[:1]), torch.tensor([NOBODY]), torch.zeros_like(batch.targets[:1]))
        rows += [method.views(nobody, generator) for _ in range(-len(rows) % size)]
        return (together(rows[start : start + size]) for start in range(0, len(rows), size))

    def _add(self, sums: list[Tensor], module: nn.Module, method: Method, views: ViewBatch) -> Tensor:
        """Add the clipped gradients of `views` to the sums; returns the losses.

        Whoever's gradient has no finite norm is left out, and nothing changes for the others.
        """
        gradients = self._now.gradients
        losses = method.loss(module, views)
        if losses.shape != views.patients.shape:
            raise StudyError(
                f"{len(views.patients)} images gave losses of shape {tuple(losses.shape)}, not one each",
                "train with mae, sssd or supervised",
            )
        norms = gradients.norms(losses)
        fit = norms.isfinite() & (views.patients != NOBODY).to(norms.device)
        coefficients = torch.where(fit, (self.privacy.clip / (norms * (1 + MARGIN))).clamp(max=1), 0)
        for number, added in gradients.sums(coefficients):
            sums[number] += added
        return losses.detach()[fit]

    @property
    def _now(self) -> _Round:
        return cast(_Round, self._round)


def singly(batch: Batch) -> Iterator[Batch]:
    """Batches of one image each."""
    for n in range(len(batch.images)):
        row = slice(n, n + 1)
        yield Batch(batch.images[row], batch.patients[row], batch.targets[row])


def together(rows: Sequence[ViewBatch]) -> ViewBatch:
    """The views of some images as those of one batch."""
    views = tuple(map(torch.cat, zip(*(row.views for row in rows), strict=True)))
    extra = {name: torch.cat([row.extra[name] for row in rows]) for name in rows[0].extra}
    return ViewBatch(views, torch.cat([row.patients for row in rows]), extra)
