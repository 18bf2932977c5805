"""The training loop: schedule, moments, repeatability across processes, and that each loss falls."""

import hashlib
import math
import platform
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from timm.layers import DropPath
from torch import Tensor, nn

from polyclinic import study, training
from polyclinic.cohort import Cohort
from polyclinic.encoders.vit import VisionTransformer
from polyclinic.errors import CohortError, PolyclinicError
from polyclinic.methods import METHODS, make_method
from polyclinic.methods.base import Batch, Method, ViewBatch
from polyclinic.seeding import forked
from polyclinic.stages import AnyStage, Pretrain, Stage, Views, with_defaults
from polyclinic.study import Compute

SIDE = 32
IMAGES = study.Images(size=SIDE)
FP32 = Compute(threads=1, precision="fp32")
GENTLE = Views(crop=(0.7, 1.0), rotation=0.0, jitter=0.2)
CASES = [(method, precision) for method in METHODS if method != "supervised" for precision in ("fp32", "bf16")]


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about the processor; those of a GPU choose it themselves."""
    monkeypatch.setattr(training, "pick_device", lambda: torch.device("cpu"))


def cohort(patients: int = 24, each: int = 2) -> Cohort:
    """Waves whose direction and frequency belong to the patient, in the form that `open_cohort` gives."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    waves = random.uniform(1, 12, (patients, 3)).repeat(each, 0)
    values = np.stack([np.sin(a * x + b * y) * np.cos(c * x * y) for a, b, c in waves])
    images = ((values + 1) * 110 + random.normal(0, 6, values.shape)).clip(0, 255).astype(np.uint8)
    unknown: NDArray[np.str_] = np.full(len(images), "")
    numbers = np.arange(patients, dtype=np.int32).repeat(each)
    return Cohort(Path(), images[:, None], np.arange(len(images)), numbers, unknown, unknown, unknown, unknown)


def stage_of(name: str, **settings: object) -> Pretrain:
    values = {"method": name, "rounds": 4, "batch_size": 16, "views": GENTLE.model_dump(), **settings}
    made: Pretrain = TypeAdapter(AnyStage).validate_python(with_defaults(values, 1))
    return made


def build(stage: Pretrain) -> tuple[Method, nn.Module]:
    method = make_method(stage)
    with forked(0):
        return method, method.build(VisionTransformer(SIDE, 1, patch=8, dim=48, heads=3, depth=2))


def trained(stage: Pretrain, rounds: int, compute: Compute = FP32) -> tuple[list[float], dict[str, Tensor]]:
    """Losses by round, and weights and moments at the end."""
    method, module = build(stage)
    losses, moments = [], None
    for number in range(rounds):
        done, moments = training.train(
            module, method, cohort(), stage, compute, stage_round=number, seed=number, optimizer_state=moments
        )
        losses.append(done.loss)
    return losses, {**module.state_dict(), **(moments or {})}


class Killed(BaseException):
    """Stands for kill -9."""


class Notes:
    """Of a round, in memory."""

    def __init__(self) -> None:
        self.note: dict[str, Tensor] | None = None

    def load(self) -> dict[str, Tensor] | None:
        return self.note

    def save(self, note: dict[str, Tensor]) -> None:
        self.note = {name: value.clone() for name, value in note.items()}


@pytest.mark.parametrize("name", ["simclr", "micle", "mae", "sssd", "mlvicx"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_round_killed_midway_goes_on_to_the_same_bits(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MIDWAY_S", -1.0)  # every step is noted

    def run(notes: Notes, stop: int = 0) -> tuple[training.Trained, str, list[int]]:
        seen: list[int] = []

        def progress(done: int, of: int) -> None:
            seen.append(done)
            if done == stop:
                raise Killed

        stage = stage_of(name, local_epochs=3)
        method = make_method(stage)
        with forked(0):
            encoder = VisionTransformer(SIDE, 1, patch=8, dim=48, heads=3, depth=2)
            module = method.build(encoder)
        for block in encoder.blocks:
            block.drop_path1 = DropPath(0.3)  # takes torch's own random numbers
        done, moments = training.train(
            module, method, cohort(), stage, FP32, stage_round=1, seed=3, progress=progress, midway=notes
        )
        return done, digest({**module.state_dict(), **moments}), seen

    notes = Notes()
    with pytest.raises(Killed):
        run(notes, stop=steps + 1)  # its note is made before it is told of, so the next attempt starts behind it
    done, bits, seen = run(notes)
    assert seen[0] == steps + 2
    assert (done, bits) == run(Notes())[:2]


def digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize(
    ("name", "settings", "fall"),
    [
        ("simclr", {"learning_rate": 1e-3}, 0.6),
        ("simclr", {"learning_rate": 0.05, "optimizer": "sgd"}, 0.3),
        ("micle", {"learning_rate": 1e-3}, 0.3),
        ("mlvicx", {"learning_rate": 1e-3}, 2.0),
        ("mae", {"learning_rate": 2e-3}, 0.1),
        ("sssd", {"learning_rate": 2e-3}, 0.2),
    ],
)
def test_the_loss_falls(name: str, settings: dict[str, object], fall: float) -> None:
    losses, _ = trained(stage_of(name, rounds=8, local_epochs=3, **settings), rounds=8)
    assert losses[-1] < losses[0] - fall, losses


def test_a_round_says_what_it_did() -> None:
    stage = stage_of("simclr", local_epochs=2)
    method, module = build(stage)
    steps: list[tuple[int, int]] = []
    done, _ = training.train(
        module, method, cohort(10, 2), stage, FP32, stage_round=0, seed=0, progress=lambda *step: steps.append(step)
    )
    assert (done.images, done.steps) == (40, 4)  # batches of 16 and 4, twice
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert 0 < done.loss < 10


@dataclass
class Counting:
    """A method whose loss of an image is its mean times one parameter, to check what the loop feeds it."""

    separable: bool = True
    pairs: bool = False

    def build(self, encoder: nn.Module) -> nn.Module:
        return encoder

    def views(self, batch: Batch, generator: torch.Generator) -> ViewBatch:
        self.seen = [*getattr(self, "seen", []), batch]
        return ViewBatch((batch.images,), batch.patients, {})

    def loss(self, module: nn.Module, views: ViewBatch) -> Tensor:
        losses: Tensor = module(views.views[0].mean(dim=(1, 2, 3)).unsqueeze(1)).squeeze(1)
        return losses

    def shared(self, module: nn.Module) -> list[str]:
        return list(module.state_dict())


def scale(value: float = 1.0) -> nn.Linear:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def test_batches_hold_every_image_once_an_epoch_scaled_with_its_patient() -> None:
    method, images = Counting(), cohort(9, 3)
    stage = Stage(rounds=1, batch_size=8, local_epochs=2)
    training.train(scale(), method, images, stage, FP32, stage_round=0, seed=0)
    assert [len(batch.images) for batch in method.seen] == [7, 7, 7, 6] * 2
    for epoch in (method.seen[:4], method.seen[4:]):
        patients = torch.cat([batch.patients for batch in epoch])
        assert torch.equal(patients.sort().values, torch.arange(9).repeat_interleave(3))
        found = torch.cat([batch.images for batch in epoch])
        expected = torch.from_numpy(np.asarray(images.images)).float() / 255
        assert torch.equal(found.flatten(1).sum(1).sort().values, expected.flatten(1).sum(1).sort().values)
    assert not torch.equal(method.seen[0].patients, method.seen[4].patients)


def test_the_loss_is_the_mean_over_terms_not_over_batches() -> None:
    images = cohort(9, 1)
    stage = Stage(rounds=1, batch_size=8, learning_rate=1e-9)
    done, _ = training.train(scale(), Counting(), images, stage, FP32, stage_round=0, seed=0)
    expected = float(np.asarray(images.images).astype(np.float64).mean() / 255)
    assert math.isclose(done.loss, expected, rel_tol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_moments_carried_over_rounds_equal_one_longer_round(optimizer: str) -> None:
    """A constant rate, no views, whole-cohort batches: three rounds of one step are one round of three."""
    images = cohort(4, 1)
    settings = {"optimizer": optimizer, "schedule": "constant", "warmup_rounds": 0.0, "learning_rate": 1e-2}
    apart, together = scale(), scale()
    stage = Stage.model_validate({"rounds": 3, "batch_size": 4, **settings})
    moments = None
    for number in range(3):
        _, moments = training.train(
            apart, Counting(), images, stage, FP32, stage_round=number, seed=0, optimizer_state=moments
        )
    longer = stage.model_copy(update={"local_epochs": 3})
    _, expected = training.train(together, Counting(), images, longer, FP32, stage_round=0, seed=0)
    assert moments is not None
    torch.testing.assert_close(apart.weight, together.weight, atol=1e-7, rtol=1e-6)
    assert set(moments) == set(expected)
    for name, value in moments.items():
        torch.testing.assert_close(value, expected[name], atol=1e-7, rtol=1e-5)
    slots = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}[optimizer]
    assert set(moments) == {f"weight.{slot}" for slot in slots}


def test_the_moments_given_are_not_written_to() -> None:
    stage = Stage(rounds=2, batch_size=4)
    module = scale()
    _, moments = training.train(module, Counting(), cohort(4, 1), stage, FP32, stage_round=0, seed=0)
    before = {name: value.clone() for name, value in moments.items()}
    training.train(module, Counting(), cohort(4, 1), stage, FP32, stage_round=1, seed=1, optimizer_state=moments)
    assert all(torch.equal(moments[name], before[name]) for name in before)


def test_one_adamw_step_is_the_published_one() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, by hand, the rate taken in the middle of the step."""
    module, images = scale(2.0), cohort(4, 1)
    stage = Stage(rounds=1, batch_size=4, learning_rate=0.1, weight_decay=0.5, warmup_rounds=0.0, schedule="constant")
    training.train(module, Counting(), images, stage, FP32, stage_round=0, seed=0)
    expected = 2.0 * (1 - 0.1 * 0.5) - 0.1  # the first step of Adam is the rate times the gradient's sign
    assert math.isclose(module.weight.item(), expected, rel_tol=1e-4)


def test_gradients_are_clipped_and_weight_decay_spares_vectors() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    groups = training.make_optimizer(module, Stage(rounds=1, weight_decay=0.3)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.3), (3, 0.0)]
    steep, method = scale(), Counting()
    images = Batch(torch.full((2, 1, 4, 4), 1e4), torch.tensor([0, 1]))
    optimizer = torch.optim.SGD([{"params": steep.parameters(), "scale": 1.0}], lr=1.0)
    training.PLAIN.step(steep, method, images, optimizer, FP32, torch.Generator())
    assert math.isclose(steep.weight.item(), 1.0 - training.CLIP, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "warmup"), [("cosine", 1.0), ("cosine", 0.0), ("constant", 2.0), ("cosine", 50.0)]
)
def test_the_rate_rises_then_falls_over_all_rounds(schedule: str, warmup: float) -> None:
    stage = Stage.model_validate({"rounds": 20, "learning_rate": 0.5, "schedule": schedule, "warmup_rounds": warmup})
    rates = [training.learning_rate(stage, (k + 0.5) / 10) for k in range(200)]
    warm = round(min(warmup, 5.0) * 10)
    assert all(a < b for a, b in pairwise(rates[:warm]))
    assert math.isclose(max(rates), 0.5, rel_tol=0.02)
    if schedule == "constant":
        assert rates[warm:] == [0.5] * (200 - warm)
    else:
        assert all(a > b for a, b in pairwise(rates[warm:]))
        assert rates[-1] < 1e-3 * 0.5
        assert math.isclose(training.learning_rate(stage, (warm / 10 + 20) / 2), 0.25)  # half-way down


def test_empty_batches_are_passed_over() -> None:
    """Batches of 2 from pairs: some hold one patient and teach nothing, the round goes on."""
    stage = stage_of("simclr", batch_size=2)
    method, module = build(stage)
    done, _ = training.train(module, method, cohort(3, 4), stage, FP32, stage_round=0, seed=1)
    assert done.steps == 6 and math.isfinite(done.loss)


def test_a_site_of_one_patient_is_told_so() -> None:
    stage = stage_of("simclr")
    method, module = build(stage)
    with pytest.raises(CohortError, match="one patient only"):
        training.train(module, method, cohort(1, 5), stage, FP32, stage_round=0, seed=0)


def test_a_loss_that_is_no_number_ends_the_round() -> None:
    with pytest.raises(PolyclinicError, match="no longer a number"):
        training.train(
            scale(math.nan), Counting(), cohort(4, 1), Stage(rounds=1, batch_size=4), FP32, stage_round=0, seed=0
        )


def digests_of_cases() -> list[str]:
    """Of weights and moments after two rounds of each of CASES."""
    wanted = [(name, Compute.model_validate({"threads": 1, "precision": precision})) for name, precision in CASES]
    return [digest(trained(stage_of(name), 2, compute)[1]) for name, compute in wanted]


@pytest.fixture(scope="module")
def digests() -> list[list[str]]:
    """What this process and a new one, which share nothing but their arguments, make of every case."""
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True) as new:
        here = digests_of_cases()
        there = new.communicate(timeout=200)[0].splitlines()
    assert new.returncode == 0
    return [here, there]


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_the_same_bits_in_separate_processes(digests: list[list[str]], case: int) -> None:
    """Weights and moments after two rounds."""
    first, second = digests
    assert len(first) == len(CASES)
    assert len(set(first)) == len(CASES) // (
        1 if training.has_bf16(torch.device("cpu")) else 2
    )  # other cases, other bits
    assert first[case] == second[case]


def test_another_seed_gives_other_bits() -> None:
    stage = stage_of("mae")
    weights = []
    for seed in (0, 1):
        method, module = build(stage)
        training.train(module, method, cohort(), stage, FP32, stage_round=0, seed=seed)
        weights.append(digest(module.state_dict()))
    assert weights[0] != weights[1]


def test_training_leaves_the_processs_generators_and_threads_alone() -> None:
    stage = stage_of("simclr")
    method, module = build(stage)
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    training.train(module, method, cohort(), stage, FP32, stage_round=0, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_dropout_is_seeded() -> None:
    class Dropping(Counting):
        def loss(self, module: nn.Module, views: ViewBatch) -> Tensor:
            return nn.functional.dropout(super().loss(module, views))

    stage = Stage(rounds=1, batch_size=4)
    losses = [
        training.train(scale(), Dropping(), cohort(8, 1), stage, FP32, stage_round=0, seed=seed)[0].loss
        for seed in (3, 3, 4)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_layouts_agree() -> None:
    stage = stage_of("simclr")
    contiguous, _ = trained(stage, 1)
    channels_last, tensors = trained(stage, 1, FP32.model_copy(update={"layout": "channels_last"}))
    assert math.isclose(contiguous[0], channels_last[0], rel_tol=1e-3)
    assert all(value.is_contiguous() for name, value in tensors.items() if name.endswith("exp_avg"))


def test_moments_come_back_to_lie_in_memory_as_their_weights_do() -> None:
    """Fused optimizers walk both side by side: another order would give each weight another's moments."""
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = training.make_optimizer(module, stage_of("simclr"))
    module(torch.rand(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    moments = training.get_moments(optimizer, module)
    assert moments["weight.exp_avg"].is_contiguous()
    again = training.make_optimizer(module, stage_of("simclr"))
    training.set_moments(again, module, moments)
    for slot, value in again.state[module.weight].items():
        assert torch.equal(value, moments[f"weight.{slot}"])
    assert again.state[module.weight]["exp_avg"].stride() == module.weight.stride()
    assert module.weight.stride() != moments["weight.exp_avg"].stride()


def test_bf16_is_used_where_asked_for_and_there(monkeypatch: pytest.MonkeyPatch) -> None:
    device, matrix = torch.device("cpu"), torch.rand(2, 2)
    asked, spared = Compute(precision="bf16"), FP32
    monkeypatch.setattr(training, "has_bf16", lambda device: True)
    with training.autocast(asked, device):
        assert (matrix @ matrix).dtype == torch.bfloat16
    with training.autocast(spared, device):
        assert (matrix @ matrix).dtype == torch.float32
    monkeypatch.setattr(training, "has_bf16", lambda device: False)
    with training.autocast(asked, device):
        assert (matrix @ matrix).dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_the_processors_bf16_units_are_those_it_lists() -> None:
    words = set(Path("/proc/cpuinfo").read_text().split())
    assert training.has_bf16(torch.device("cpu")) == bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
    assert not training.has_bf16(torch.device("mps"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_blocks_come_from_the_heap_which_stays() -> None:
    code = """
import torch
from polyclinic.training import keep_freed_memory

def on_heap(block):
    line = next(line for line in open("/proc/self/maps") if line.endswith("[heap]\\n"))
    low, high = (int(end, 16) for end in line.split()[0].split("-"))
    return low <= block.data_ptr() < high

by_itself = torch.ones(6 << 20)  # 24 MB
print(on_heap(by_itself))
keep_freed_memory()
print(on_heap(torch.ones(6 << 20)))
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said == "False\nTrue\n"


def test_threads_are_the_studys_and_put_back() -> None:
    before = torch.get_num_threads()
    with training.use_threads(Compute(threads=before + 1)):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["simclr", "mae"])
def test_a_gpu_trains_and_repeats_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "pick_device", lambda: torch.device("cuda"))
    digests = []
    for _ in range(2):
        stage = stage_of(name)
        method, module = build(stage)
        done, moments = training.train(module, method, cohort(), stage, Compute(), stage_round=0, seed=0)
        assert math.isfinite(done.loss) and all(value.device.type == "cpu" for value in moments.values())
        digests.append(digest({key: value.cpu() for key, value in module.state_dict().items()}))
    assert digests[0] == digests[1]


if __name__ == "__main__":
    print(*digests_of_cases(), sep="\n")


def test_attention_on_a_processor_is_by_plain_products_with_the_fused_kernels_results() -> None:
    encoder = VisionTransformer(SIDE, 1, patch=8, dim=48, heads=3, depth=2)
    images = torch.rand(2, 1, SIDE, SIDE)
    training.choose_attention(encoder, torch.device("cuda"))
    fused = encoder(images)
    training.choose_attention(encoder, torch.device("cpu"))
    assert not any(block.attn.fused_attn for block in encoder.blocks)
    torch.testing.assert_close(encoder(images), fused)
