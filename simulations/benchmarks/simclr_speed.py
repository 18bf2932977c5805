"""Images per second of one SimCLR site, beside lightly's documented loop on the same images.

Ours is a site's round as it is: cohort -> batched views -> step (`training.train`). Theirs is the loop that lightly's
documentation gives for SimCLR (docs.lightly.ai/examples/simclr.html): LightlyDataset of image files, SimCLRTransform,
torch's DataLoader, torchvision's ResNet-18, SimCLRProjectionHead, NTXentLoss, SGD. Alike on both sides: images,
ResNet-18, 96 pixels, batch, threads of torch, and what the views do (crop, flip, rotation up to 15 degrees, brightness
and contrast). Grey files become three channels on their side, which is how LightlyDataset opens them, and stay one on
ours.

`ratio` is ours over their loop as documented but with our normalisation (groups); `ratio_in_bf16` lets theirs compute
in bf16 as ours does, where the processor has it; `ratio_of_bests` also an allocator told to keep what a step frees, as
ours is, and takes the better of our normalisation and of batches normalised in channels_last. Each takes the better of
0 and 2 workers on their side, and each row runs in a process of its own. Both read from the page cache. Reading files
once (`build_cohort`) is not part of our figure; it stands beside it.
"""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from machine import RESULTS, describe, keep
from PIL import Image
from torch import nn

from polyclinic.cohort import build_cohort, open_cohort
from polyclinic.encoders import build_encoder
from polyclinic.encoders.resnet import group_norm
from polyclinic.methods import make_method
from polyclinic.seeding import forked
from polyclinic.stages import SimCLRStage, Views
from polyclinic.study import Compute, Encoder, Images, Precision
from polyclinic.training import has_bf16, keep_freed_memory, train

SIZE = 96
VIEWS = Views(crop=(0.3, 1.0), rotation=15.0, jitter=0.5)
WARM_UP = 3
"""Steps left out at the start: torch plans, workers start."""


def write_images(folder: Path, count: int) -> Path:
    """`count` grey PNG files of 320 x 260, with structure, grain and a black border as radiographs have."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    lines = ["image,patient"]
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 220, (9, 11), np.uint8))
        smooth = coarse.resize((320, 260), Image.Resampling.BICUBIC)
        grain = random.normal(0, 4, (260, 320))
        pixels = (np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)
        pixels[:, :40] = 0
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        lines.append(f"images/{number}.png,{number}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def rate(stamps: list[float], batch: int) -> float:
    """Images per second between the end of the warm-up and the last full batch."""
    return batch * (len(stamps) - WARM_UP) / (stamps[-1] - stamps[WARM_UP - 1])


def ours(folder: Path, batch: int, threads: int, precision: Precision) -> float:
    """One round of a site whose cohort is in `folder`, images per second."""
    cohort = open_cohort(folder)
    images, compute = Images(size=SIZE), Compute(threads=threads, precision=precision)
    stage = SimCLRStage(method="simclr", rounds=1, batch_size=batch, views=VIEWS)
    with forked(0):
        method = make_method(stage)
        module = method.build(build_encoder(Encoder(), images))
    stamps: list[float] = []
    train(
        module, method, cohort, stage, compute, stage_round=0, seed=0, progress=lambda *_: stamps.append(perf_counter())
    )
    return rate(stamps[: len(cohort) // batch], batch)


class TheirModel(nn.Module):
    """lightly's example, the normalisation of its encoder left open."""

    def __init__(self, norm: Callable[[int], nn.Module] | None) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18(norm_layer=norm)
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = SimCLRProjectionHead(512, 512, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, s, s) -> (n, 128)."""
        projected: torch.Tensor = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return projected


def theirs(
    folder: Path,
    batch: int,
    threads: int,
    workers: int,
    norm: Callable[[int], nn.Module] | None = None,
    bf16: bool = False,
    keep: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
) -> float:
    """One epoch of lightly's loop, images per second; `bf16` is used where the processor has it."""
    if keep:
        keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    transform = SimCLRTransform(
        input_size=SIZE, min_scale=VIEWS.crop[0], rr_prob=1.0, rr_degrees=VIEWS.rotation, random_gray_scale=0.0,
        cj_bright=VIEWS.jitter, cj_contrast=VIEWS.jitter, cj_sat=0.0, cj_hue=0.0, gaussian_blur=0.0,
    )  # fmt: skip
    dataset = LightlyDataset(str(folder / "images"), transform=transform)
    loader = torch.utils.data.DataLoader(dataset, batch, shuffle=True, drop_last=True, num_workers=workers)
    model = TheirModel(norm).to(memory_format=layout)
    return rate(list(their_steps(model, loader, bf16 and has_bf16(torch.device("cpu")))), batch)


def their_steps(model: nn.Module, loader: Any, bf16: bool) -> Iterator[float]:
    """The documented loop; the time after each step."""
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    for (x0, x1), *_ in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z0, z1 = model(x0), model(x1)
        loss = criterion(z0.float(), z1.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield perf_counter()


def measure(folder: Path, state: Path, batch: int, threads: int, repeats: int, loading: list[int]) -> dict[str, Any]:
    """Images per second of every row, the median of `repeats` passes over all rows in turn.

    Theirs stand once for each number of worker processes in `loading`.
    """
    started = perf_counter()
    cohort = build_cohort(folder, Images(size=SIZE), state, workers=threads)
    built = perf_counter() - started
    rows = {
        "polyclinic, group norm, as a study resolves it": partial(ours, cohort.folder, batch, threads, "bf16"),
        "polyclinic, group norm, fp32": partial(ours, cohort.folder, batch, threads, "fp32"),
    }
    for workers in loading:
        start = partial(theirs, folder, batch, threads, workers)
        rows[f"lightly, group norm, {workers} workers"] = partial(start, norm=group_norm)
        rows[f"lightly, group norm, {workers} workers, bf16"] = partial(start, norm=group_norm, bf16=True)
        start = partial(start, bf16=True, keep=True)
        rows[f"lightly, group norm, {workers} workers, bf16, memory kept"] = partial(start, norm=group_norm)
        rows[f"lightly, batch norm, {workers} workers, bf16, memory kept, channels_last"] = partial(
            start, layout=torch.channels_last
        )
    passes = [{name: _apart(row) for name, row in rows.items()} for _ in range(repeats)]
    found = {name: round(median(one[name] for one in passes), 1) for name in rows}

    def best(start: str, end: str = "") -> float:
        return max(value for name, value in found.items() if name.startswith(start) and name.endswith(end))

    us = best("polyclinic")
    return {
        "images_per_s": found,
        "ratio": round(us / best("lightly, group norm", "workers"), 2),
        "ratio_in_bf16": round(us / best("lightly, group norm", "bf16"), 2),
        "ratio_of_bests": round(us / best("lightly"), 2),
        "goal": 2.5,
        "goal_applies": "amx_bf16" in describe()["units"],
        "reading_files_once_s": round(built, 1),
    }


def _apart(row: Callable[[], float]) -> float:
    """A row in a new process, which begins with torch and lightly imported and nothing computed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightly.data", "lightly.transforms", "polyclinic.cohort", "polyclinic.training"])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(row).result()


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with labels.csv and images/ (files only); default: generated")
    parser.add_argument("--images", type=int, default=1280, help="how many to generate")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of torch, on either side")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--loading", type=int, nargs="+", default=[0, 2], help="worker processes on their side")
    parser.add_argument("--out", type=Path, default=RESULTS / "simclr_speed.json")
    wanted = parser.parse_args()
    machine = describe()
    machine["versions"].update({package: version(package) for package in ("lightly", "torchvision", "pillow")})
    size = {name: getattr(wanted, name) for name in ("batch", "threads", "repeats", "loading")}
    with TemporaryDirectory() as temporary:
        folder = wanted.data or write_images(Path(temporary) / "data", wanted.images)
        figures = measure(folder, Path(temporary) / "state", **size)
        files = {"images": wanted.data.name if wanted.data else f"{wanted.images} generated", "size": SIZE}
        keep(wanted.out, machine, {**files, **size, **figures})


if __name__ == "__main__":
    main()
