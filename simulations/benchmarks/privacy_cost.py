"""What DP-SGD of patients costs: images per second with and without it, and its memory by `privacy.physical_batch`.

All rows of a model compute in fp32 on the same images, one step of the loop each: views, gradients, optimizer. `plain`
is the loop's usual step, `private` that of `PatientRecipe`. Beside them stands the same recipe with gradients from
Opacus's own two ways: `hooks` keeps every patient's gradient, `ghost` goes backwards twice. They take turns; a figure
is the median of its turns. Memory is what steps add to a process at most, each in one of its own.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest.mock import patch

import torch
from machine import RESULTS, describe, keep
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from pydantic import TypeAdapter
from torch import Tensor, nn

from polyclinic.encoders import build_encoder
from polyclinic.methods import make_method
from polyclinic.methods.base import Batch, Method
from polyclinic.privacy import dpsgd
from polyclinic.seeding import forked
from polyclinic.stages import AnyStage, Stage, with_defaults
from polyclinic.study import Compute, Encoder, Images, PatientPrivacy
from polyclinic.training import PLAIN, Recipe, choose_attention, keep_freed_memory, make_optimizer

SIZE = 96
MODELS = {"mae, vit_tiny": ("mae", "vit_tiny"), "supervised, resnet18": ("supervised", "resnet18")}
CPU = torch.device("cpu")


class OpacusHooks:
    """In place of `Gradients`: every patient's gradient, as Opacus keeps it."""

    hooks = GradSampleHooks

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.opacus = self.hooks(module, loss_reduction="sum")
        self.losses = torch.empty(0)

    def norms(self, losses: Tensor) -> Tensor:
        """(n,) of (n,) losses."""
        torch.autograd.backward(losses.sum())
        return torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in self.parameters]).double().norm(dim=0)

    def sums(self, coefficients: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(number, sum) of each parameter."""
        for number, parameter in enumerate(self.parameters):
            yield number, torch.tensordot(coefficients.float(), parameter.grad_sample, 1)
            parameter.grad = parameter.grad_sample = None

    def close(self) -> None:
        """Remove the hooks."""
        self.opacus.cleanup()


class OpacusGhost(OpacusHooks):
    """In place of `Gradients`: norms, then a second pass."""

    hooks = GradSampleHooksFastGradientClipping

    def norms(self, losses: Tensor) -> Tensor:
        """As in OpacusHooks."""
        self.losses = losses
        torch.autograd.backward(losses.sum(), retain_graph=True)
        norms: Tensor = self.opacus.get_norm_sample().double()
        return norms

    def sums(self, coefficients: Tensor) -> Iterator[tuple[int, Tensor]]:
        """As in OpacusHooks."""
        self.opacus.disable_hooks()
        gradients = torch.autograd.grad((self.losses * coefficients).sum(), self.parameters)
        self.opacus.enable_hooks()
        for parameter in self.parameters:
            parameter.grad = None
        yield from enumerate(gradients)


GRADIENTS = {"private": dpsgd.Gradients, "hooks": OpacusHooks, "ghost": OpacusGhost}


def build(model: str, batch: int) -> tuple[Stage, Method, nn.Module, Batch]:
    """A model of `MODELS` and a batch for it."""
    name, encoder = MODELS[model]
    kind = "finetune" if name == "supervised" else "pretrain"
    values = {"kind": kind, "method": name, "rounds": 1, "batch_size": batch}
    stage: Stage = TypeAdapter(AnyStage).validate_python(with_defaults(values, 1))
    method = make_method(stage, classes=2)
    with forked(0):
        module = method.build(build_encoder(Encoder(name=encoder), Images(size=SIZE))).train()
        images = torch.rand(batch, 1, SIZE, SIZE)
    choose_attention(module, CPU)
    return stage, method, module, Batch(images, torch.arange(batch), torch.eye(2)[torch.arange(batch) % 2])


def prepare(way: str, model: str, batch: int, physical: int, stack: ExitStack) -> Callable[[], object]:
    """One step that way, to be called while the stack is open."""
    stage, method, module, images = build(model, batch)
    recipe: Recipe = PLAIN
    if way != "plain":
        private = dpsgd.PatientRecipe(PatientPrivacy(mode="patient", physical_batch=physical))
        with patch.object(dpsgd, "Gradients", GRADIENTS[way]):
            stack.enter_context(private.attached(module))
        private._expected = batch
        recipe = private
    optimizer, compute = make_optimizer(module, stage), Compute(threads=torch.get_num_threads(), precision="fp32")
    generator = torch.Generator().manual_seed(0)
    return lambda: recipe.step(module, method, images, optimizer, compute, generator)


def seconds(step: Callable[[], object]) -> float:
    """Of one step."""
    started = perf_counter()
    step()
    return perf_counter() - started


def speeds(model: str, batch: int, physical: int, repeats: int) -> dict[str, float]:
    """{way: images per second}, and by how many times each is slower than `plain`."""
    with ExitStack() as stack:
        steps = {way: prepare(way, model, batch, physical, stack) for way in ("plain", *GRADIENTS)}
        for step in steps.values():
            step()
        turns = [{way: seconds(step) for way, step in steps.items()} for _ in range(repeats)]
    found = {way: batch / median(turn[way] for turn in turns) for way in steps}
    slower = {f"{way}_times_slower": round(found["plain"] / found[way], 2) for way in GRADIENTS}
    return {way: round(rate, 1) for way, rate in found.items()} | slower


def memory_mb(way: str, model: str, batch: int, physical: int) -> float:
    """Most that two steps add to this process, which has done nothing else."""
    with ExitStack() as stack:
        step = prepare(way, model, batch, physical, stack)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
        before = peak_mb()
        step()
        step()
        return peak_mb() - before


def peak_mb() -> float:
    """Most that this process has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def memory_apart(way: str, model: str, batch: int, physical: int) -> int:
    """`memory_mb` in a process of its own."""
    options = ["--way", way, "--model", model, "--batch", str(batch), "--physical", str(physical)]
    done = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE)
    return round(json.loads(done.stdout))


def main() -> None:
    """Measure and keep; or, with --way, print the memory of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--physical", type=int, nargs="+", default=[16, 4, 64], help="the first one for speed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=RESULTS / "privacy_cost.json")
    parser.add_argument("--way", choices=["plain", *GRADIENTS], help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    torch.set_num_threads(wanted.threads)
    keep_freed_memory()
    if wanted.way:
        print(json.dumps(memory_mb(wanted.way, wanted.model, wanted.batch, wanted.physical[0])))
        return
    machine = describe()
    rows = []
    for model in wanted.models:
        found = speeds(model, wanted.batch, wanted.physical[0], wanted.repeats)
        taken = {
            way: {str(k): memory_apart(way, model, wanted.batch, k) for k in sorted(wanted.physical)}
            for way in GRADIENTS
        }
        plain = memory_apart("plain", model, wanted.batch, wanted.batch)
        memory = {"memory_mb_by_physical_batch": taken, "memory_mb_plain": plain}
        rows.append({"model": model, "images_per_s": found, **memory})
    settings = {"size": SIZE, "batch": wanted.batch, "physical_batch": wanted.physical[0], "threads": wanted.threads}
    keep(wanted.out, machine, {**settings, "goal_times_slower": 3, "rows": rows})


if __name__ == "__main__":
    main()
