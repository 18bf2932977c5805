"""The one local training loop: what a site does between receiving global tensors and sending its update.

The same inputs, seed and number of threads give the same bits on one processor. On CUDA cuDNN is held to deterministic
kernels, which repeats bits in practice on one GPU; torch's stricter switch is not used, since it refuses whole
operations for the sake of a few that this loop calls in ways that are deterministic anyway.
"""

import ctypes
import math
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyclinic.cohort import Cohort
from polyclinic.cohort.sampling import epoch, pair_epoch
from polyclinic.errors import CohortError, PolyclinicError
from polyclinic.methods.base import Batch, Method
from polyclinic.seeding import forked, numpy_generator, seed_for, torch_generator
from polyclinic.stages import Finetune, Stage
from polyclinic.study import Compute

BETAS = (0.9, 0.95)
"""Of AdamW: MAE's; the shorter memory of the second moment suits rounds of few steps."""
MOMENTUM = 0.9
"""Of SGD."""
CLIP = 3.0
"""Largest norm of a step's gradient: several times the usual one, so that only outliers are cut (DINO's figure)."""
MIDWAY_S = 60.0
"""Seconds of a round between two of its notes: what a killed one loses at most."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers for what `mallopt` sets."""
_LAYER = re.compile(r"encoder\.(?:layer|blocks\.|stages\.)(\d+)")
_STEMS = ("encoder.conv1.", "encoder.bn1.", "encoder.stem.", "encoder.patch_embed.")


@dataclass(frozen=True)
class Trained:
    """What a round of training says of itself.

    Attributes:
        loss: mean over all terms of the round.
        images: read, repetitions counted.
        steps: of the optimizer.
    """

    loss: float
    images: int
    steps: int


class Midway(Protocol):
    """Where a round notes how far it has come, so that a killed one goes on from there to the same bits."""

    def load(self) -> dict[str, Tensor] | None:
        """The last note, or None."""
        ...

    def save(self, note: dict[str, Tensor]) -> None:
        """Replace the last note."""
        ...


class Recipe(Protocol):
    """How a round walks through a cohort, and what one step does. `PLAIN` is the usual one; privacy brings another."""

    def attached(self, module: nn.Module) -> AbstractContextManager[object]:
        """Whatever must hang on the module while it trains; nothing of it stays."""
        ...

    def steps(self, cohort: Cohort, stage: Stage, pairs: bool) -> int:
        """Of a round."""
        ...

    def indices(self, cohort: Cohort, stage: Stage, seed: int, pairs: bool) -> Iterator[NDArray[np.int64]]:
        """Image numbers of every step's batch; the same for the same seed, or else no round can be gone on with."""
        ...

    def step(
        self,
        module: nn.Module,
        method: Method,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        generator: torch.Generator,
    ) -> Tensor:
        """One step of the optimizer; returns the losses, detached, and none where the batch has taught nothing."""
        ...

    def loss(self, total: float, terms: int) -> float:
        """The round's loss, from the sum and the number of its terms; raises where the round has taught nothing."""
        ...


def pick_device() -> torch.device:
    """The accelerator that torch finds here, or the processor."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def use_threads(compute: Compute) -> Iterator[None]:
    """Compute with the study's number of torch threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(compute.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Have this process keep blocks of up to 32 MB that a step frees for the next one, where its allocator is glibc's.

    By itself that one gives them back to the system and then pays a page fault for every 4 KB, step after step: a
    fifth of the time of SimCLR with a ResNet-18 where it was measured. The process keeps about as much as it needed
    at most, until it ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest that is documented
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def choose_attention(module: nn.Module, device: torch.device) -> None:
    """Plain products for attention on a processor, torch's fused kernel elsewhere.

    Of the fused kernel for processors the backward pass takes longer than all matrices of a small transformer: with
    bf16, a step of a masked autoencoder at 64 tokens took 1.8 times as long, one of SimCLR at 196 tokens 1.4 times.
    """
    for part in module.modules():
        if hasattr(part, "fused_attn"):  # of timm, which only some encoders need
            part.fused_attn = device.type != "cpu"  # type: ignore[assignment]


def has_bf16(device: torch.device) -> bool:
    """Does the device multiply bf16 numbers in hardware? Where it only imitates that, fp32 is faster."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(unit, False) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def autocast(compute: Compute, device: torch.device) -> AbstractContextManager[object]:
    """The study's precision: bf16 where it is asked for and the device has it, else fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute.precision == "bf16" and has_bf16(device))


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Seed what takes no generator (dropout, drop path) and hold cuDNN to deterministic kernels."""
    with forked(seed_for(seed, "dropout")), torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        yield


def learning_rate(stage: Stage, rounds: float) -> float:
    """The rate after `rounds` of the stage, fractions counted: a linear warm-up, then half a cosine down to zero.

    The warm-up takes at most a quarter of the stage.
    """
    warmup = min(stage.warmup_rounds, stage.rounds / 4)
    if rounds < warmup:
        return stage.learning_rate * rounds / warmup
    if stage.schedule == "constant":
        return stage.learning_rate
    return stage.learning_rate * (1 + math.cos(math.pi * (rounds - warmup) / (stage.rounds - warmup))) / 2


def make_optimizer(module: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum, for what is not frozen.

    Weight decay spares biases and normalisation layers. Each group's `scale` is its share of the learning rate.
    """
    decay = stage.layer_decay if isinstance(stage, Finetune) else 1.0
    layers = layers_behind(module)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = decay ** layers[name], stage.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault(key, []).append(parameter)
    options = [{"params": p, "weight_decay": w, "scale": scale} for (scale, w), p in groups.items()]
    if stage.optimizer == "sgd":
        return torch.optim.SGD(options, lr=stage.learning_rate, momentum=MOMENTUM)
    return torch.optim.AdamW(options, lr=stage.learning_rate, betas=BETAS, fused=True)


def layers_behind(module: nn.Module) -> dict[str, int]:
    """{parameter: layers between it and the output}: 0 for heads, 1 for the encoder's last numbered layer, most for
    its stem. What is neither (the last normalisation, context bottlenecks) goes with the last layer.
    """
    names = [name for name, _ in module.named_parameters()]
    numbers = {name: int(found[1]) for name in names if (found := _LAYER.match(name))}
    first, last = min(numbers.values(), default=0), max(numbers.values(), default=0)
    numbers |= {name: first - 1 for name in names if name.startswith(_STEMS)}
    return {name: last + 1 - numbers.get(name, last) if name.startswith("encoder.") else 0 for name in names}


def get_moments(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as "<parameter>.<slot>", on the CPU and contiguous; not copied where it is both."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"{names[parameter]}.{slot}": value.detach().cpu().contiguous()
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def set_moments(optimizer: torch.optim.Optimizer, module: nn.Module, moments: dict[str, Tensor]) -> None:
    """Give a new optimizer copies of the state that `get_moments` took from another of its kind."""
    parameters = dict(module.named_parameters())
    for key, value in moments.items():
        name, slot = key.rsplit(".", 1)
        parameter = parameters[name]
        # A moment must lie in memory as its parameter does: fused optimizers walk both side by side.
        like = parameter.detach() if value.shape == parameter.shape else value
        optimizer.state[parameter][slot] = torch.empty_like(like, device=parameter.device).copy_(value)


def proximal(module: nn.Module, names: Collection[str], mu: float) -> Callable[[], None]:
    """FedProx [Li et al., 1812.06127]: adds to the gradients that of mu/2 |w - w_g|^2 over the parameters in `names`.

    w_g is what they are now. What it returns is the `before_step` of `train`: the term is added to what the recipe has
    made of the losses, after their gradient was clipped. Under DP-SGD that is after the noise too, and the term is
    computed from weights that the steps before have already released: post-processing, which costs no privacy.
    """
    shared = [parameter for name, parameter in module.named_parameters() if name in names]
    starts = [parameter.detach().clone() for parameter in shared]

    def pull() -> None:
        for parameter, start in zip(shared, starts, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start.to(parameter.device), alpha=mu)

    return pull


class Plain:
    """The usual recipe: `local_epochs` times every image, or two of every patient; down the mean of their losses."""

    def attached(self, module: nn.Module) -> AbstractContextManager[object]:
        """As in Recipe: nothing."""
        return nullcontext()

    def steps(self, cohort: Cohort, stage: Stage, pairs: bool) -> int:
        """As in Recipe."""
        return math.ceil((cohort.n_patients if pairs else len(cohort)) / stage.batch_size) * stage.local_epochs

    def indices(self, cohort: Cohort, stage: Stage, seed: int, pairs: bool) -> Iterator[NDArray[np.int64]]:
        """As in Recipe, in an order drawn from `seed`."""
        generator = numpy_generator(seed_for(seed, "batches"))
        draw = pair_epoch if pairs else epoch
        return (index for _ in range(stage.local_epochs) for index in draw(cohort, stage.batch_size, generator))

    def step(
        self,
        module: nn.Module,
        method: Method,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        generator: torch.Generator,
    ) -> Tensor:
        """As in Recipe."""
        views = method.views(batch, generator)
        with autocast(compute, batch.images.device):
            losses = method.loss(module, views)
        if len(losses) == 0:
            return losses
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.mean())
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        return losses.detach()

    def loss(self, total: float, terms: int) -> float:
        """As in Recipe."""
        if terms == 0:
            raise CohortError(
                "no batch teaches anything: every batch holds images of one patient only, or none with a label",
                "add patients or labels, or train with a method that looks at one image at a time, such as mae",
            )
        mean = total / terms
        if not math.isfinite(mean):
            raise PolyclinicError("the training loss is no longer a number", "lower the stage's learning_rate")
        return mean


PLAIN = Plain()


def batches(
    indices: Iterator[NDArray[np.int64]],
    cohort: Cohort,
    compute: Compute,
    device: torch.device,
    targets: Tensor | None = None,
) -> Iterator[Batch]:
    """The images of `indices`, one batch each, on the device."""
    layout = torch.channels_last if compute.layout == "channels_last" else torch.contiguous_format
    for index in indices:
        pixels = cohort.pixels(index)
        if device.type == "cuda":
            pixels = pixels.pin_memory()
        images = pixels.to(device, non_blocking=True).to(torch.float32, memory_format=layout).div_(255)
        patients = torch.from_numpy(cohort.patients[index].astype("int64"))
        yield Batch(images, patients, *([] if targets is None else [targets[torch.from_numpy(index)].to(device)]))


def train(
    module: nn.Module,
    method: Method,
    cohort: Cohort,
    stage: Stage,
    compute: Compute,
    *,
    stage_round: int,
    seed: int,
    targets: Tensor | None = None,
    optimizer_state: dict[str, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    midway: Midway | None = None,
    recipe: Recipe = PLAIN,
    before_step: Callable[[], None] | None = None,
) -> tuple[Trained, dict[str, Tensor]]:
    """Train `module` in place for one round of a stage; it is left on `pick_device()`.

    Args:
        stage_round: rounds of this stage that lie behind, for the learning rate.
        seed: of this study, site, stage and round; order, views and dropout are all drawn from it.
        targets: (images, classes) as in Batch, where the method needs them.
        optimizer_state: what the round before returned; None starts afresh.
        progress: called with (steps done, steps of the round).
        midway: what an earlier attempt at this round, from the same tensors, has noted there is gone on from.
        recipe: which images a step sees, and what it does with them.
        before_step: called when the gradients of a step stand, before the optimizer takes them.

    Returns:
        A summary, and the optimizer's state as "<parameter>.<slot>".

    Raises:
        CohortError: no batch holds anything that the method could learn from.
        PolyclinicError: the loss is no longer a number.
    """
    keep_freed_memory()
    device = pick_device()
    module.to(device).train()
    choose_attention(module, device)
    if compute.layout == "channels_last":
        module.to(memory_format=torch.channels_last)
    if isinstance(stage, Finetune):
        module.get_submodule("encoder").requires_grad_(stage_round >= stage.probe_rounds)
    optimizer = make_optimizer(module, stage)
    set_moments(optimizer, module, optimizer_state or {})
    if before_step is not None:
        optimizer.register_step_pre_hook(lambda *_: before_step())
    generator = torch_generator(seed_for(seed, "views"), device)
    steps = recipe.steps(cohort, stage, method.pairs)
    total, terms, images, start, noted = torch.zeros((), device=device), 0, 0, 0, time.monotonic()
    with use_threads(compute), repeatable(seed), recipe.attached(module):
        if midway is not None and (note := midway.load()) is not None:
            start, terms, images = note["counts"].tolist()
            total = note["total"].to(device)
            _go_on(note, module, optimizer, generator)
        indices = islice(recipe.indices(cohort, stage, seed, method.pairs), start, None)
        for step, batch in enumerate(batches(indices, cohort, compute, device, targets), start):
            rate = learning_rate(stage, stage_round + (step + 0.5) / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            losses = recipe.step(module, method, batch, optimizer, compute, generator)
            total += losses.sum()
            terms, images = terms + len(losses), images + len(batch.images)
            if midway is not None and time.monotonic() - noted > MIDWAY_S:
                counts = torch.tensor([step + 1, terms, images])
                midway.save({"counts": counts, "total": total.cpu(), **_note(module, optimizer, generator)})
                noted = time.monotonic()
            if progress is not None:
                progress(step + 1, steps)
    return Trained(recipe.loss(float(total), terms), images, steps), get_moments(optimizer, module)


def _note(module: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> dict[str, Tensor]:
    """All that the steps to come depend on, on the CPU."""
    note = {f"module.{name}": value.cpu().contiguous() for name, value in module.state_dict().items()}
    note |= {f"moments.{name}": value for name, value in get_moments(optimizer, module).items()}
    note |= {"random.views": generator.get_state(), "random.cpu": torch.get_rng_state()}
    return note | ({"random.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _go_on(
    note: dict[str, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """Put back what `_note` has taken."""

    def part(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(kind): value for name, value in note.items() if name.startswith(kind)}

    module.load_state_dict(part("module."))
    set_moments(optimizer, module, part("moments."))
    generator.set_state(note["random.views"])
    torch.set_rng_state(note["random.cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(note["random.cuda"])
