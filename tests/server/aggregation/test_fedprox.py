"""FedProx: its term against autograd's gradient of the loss as written, under notes and under privacy, and at sites."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polyclinic import training
from polyclinic.methods.base import Batch, Method
from polyclinic.model import build_stage, initial_tensors
from polyclinic.privacy.dpsgd import PatientRecipe
from polyclinic.study import Compute, PatientPrivacy, Study
from polyclinic.training import Plain, proximal, train
from polyclinic_server.rounds import run_study
from polyclinic_simulations.engines.local import LocalGrid

from ...tiny import SITES, events, in_memory, open_run, real, same_bits, tiny_study

SGD = {"kind": "pretrain", "method": "simclr", "rounds": 2, "batch_size": 8, "projection": 8, "optimizer": "sgd",
       "local_epochs": 2, "learning_rate": 0.05, "warmup_rounds": 0.0, "weight_decay": 0.0}  # fmt: skip
FP32 = Compute(threads=1, precision="fp32")
COHORT = in_memory(12)


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about the processor."""
    monkeypatch.setattr(training, "pick_device", lambda: torch.device("cpu"))


class Written(Plain):
    """The loss with the term in it, for autograd."""

    def __init__(self, start: dict[str, Tensor], mu: float) -> None:
        self._start, self._mu = start, mu

    def step(
        self,
        module: nn.Module,
        method: Method,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        generator: torch.Generator,
    ) -> Tensor:
        losses = method.loss(module, method.views(batch, generator))
        apart = sum(((value - self._start[name]) ** 2).sum() for name, value in module.named_parameters())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.mean() + self._mu / 2 * apart)
        optimizer.step()
        return losses.detach()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def distance(module: nn.Module, start: dict[str, Tensor]) -> float:
    return sum(float(((value - start[name]) ** 2).sum()) for name, value in values(module).items()) ** 0.5


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_round_is_that_of_the_loss_as_written(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CLIP", 1e9)  # the term is added after clipping, and autograd's before
    study = tiny_study(stages=[{**SGD, "optimizer": optimizer, "learning_rate": 0.01}])
    moved = {}
    for mu in (0.0, 0.5, 5.0):
        results = []
        for written in (False, True):
            method, module = build_stage(study, 0)
            start = values(module)
            recipe = Written(start, mu) if written else training.PLAIN
            term = None if written else proximal(module, method.shared(module), mu)
            train(module, method, COHORT, study.stages[0], FP32, stage_round=0, seed=1, recipe=recipe, before_step=term)
            results.append(values(module))
            moved[mu] = distance(module, start)
        for name, value in results[0].items():
            torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5)
    assert moved[5.0] < moved[0.0]


def test_only_what_is_shared_and_has_a_gradient_is_pulled() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    pull = proximal(module, ["0.weight", "0.bias"], 0.5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(2.0)
    for name in ("0.weight", "1.weight", "1.bias"):
        module.get_parameter(name).grad = torch.ones_like(module.get_parameter(name))
    pull()
    torch.testing.assert_close(module.get_parameter("0.weight").grad, torch.full((2, 2), 2.0))
    assert module.get_parameter("0.bias").grad is None
    assert (module.get_parameter("1.weight").grad == 1).all()  # type: ignore[union-attr]
    assert (module.get_parameter("1.bias").grad == 1).all()  # type: ignore[union-attr]


class Killed(BaseException):
    """Stands for kill -9."""


class Notes:
    """Of a round, in memory."""

    note: dict[str, Tensor] | None = None

    def load(self) -> dict[str, Tensor] | None:
        return self.note

    def save(self, note: dict[str, Tensor]) -> None:
        self.note = {name: value.clone() for name, value in note.items()}


def test_a_round_killed_midway_is_pulled_to_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MIDWAY_S", -1.0)  # every step is noted
    study = tiny_study(stages=[SGD])

    def run(notes: Notes, stop: int = 0) -> dict[str, Tensor]:
        def progress(done: int, of: int) -> None:
            if done == stop:
                raise Killed

        method, module = build_stage(study, 0)
        term = proximal(module, method.shared(module), 5.0)
        train(
            module, method, COHORT, study.stages[0], FP32,
            stage_round=0, seed=1, midway=notes, before_step=term, progress=progress,
        )  # fmt: skip
        return values(module)

    whole, notes = run(Notes()), Notes()
    with pytest.raises(Killed):
        run(notes, stop=3)
    assert notes.note is not None
    again = run(notes)
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_under_privacy_the_term_is_added_to_what_was_clipped_and_noised() -> None:
    """With next to nothing left of gradients and noise, weights go back to where the round began, in clipless steps."""
    study = tiny_study(
        stages=[{"kind": "finetune", "rounds": 1, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.5,
                 "warmup_rounds": 0.0, "schedule": "constant", "weight_decay": 0.0, "layer_decay": 1.0,
                 "probe_rounds": 0, "class_weights": "none"}],
        evaluation={"labels": {"clear": ["clear"], "spot": ["spot"]}},
    )  # fmt: skip
    method, module = build_stage(study, 0)
    start = values(module)
    pull = proximal(module, method.shared(module), 0.1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    targets = torch.eye(2)[torch.arange(8) % 2]
    recipe = PatientRecipe(PatientPrivacy(mode="patient", clip=1e-6, noise=1e-6))
    train(
        module, method, in_memory(8, images=1), study.stages[0], FP32,
        stage_round=0, seed=1, targets=targets, recipe=recipe, before_step=pull,
    )  # fmt: skip
    first = 0.5 * 0.1  # of two steps of SGD
    left = 1 - first - (training.MOMENTUM * first + 0.5 * 0.1 * (1 - first))
    for name, value in values(module).items():
        torch.testing.assert_close(value - start[name], torch.full_like(value, left), rtol=1e-5, atol=1e-6)


def study_of(rule: str, **keys: float) -> Study:
    return tiny_study(aggregation={"rule": rule, **keys}, stages=[SGD])


def test_sites_stay_nearer_to_the_global_tensors_the_larger_mu_is(tmp_path: Path) -> None:
    norms, results = [], []
    for number, study in enumerate((study_of("fedavg"), study_of("fedprox", mu=1e-30), study_of("fedprox", mu=20.0))):
        run = open_run(tmp_path / str(number), study)
        apps = {name: real(name, tmp_path / f"sites-{number}") for name in SITES}
        results.append(run_study(LocalGrid(apps), study, run, dict.fromkeys(SITES, 10)))
        norms.append(np.mean([line["norm"] for line in events(run, "update_accepted") if line["round"] == 1]))
    assert same_bits(results[0], results[1])  # else the seeds would tell the rules apart, not the term
    assert norms[2] < 0.9 * norms[0]
    assert not same_bits(results[2], initial_tensors(study_of("fedavg"), 0, None))
