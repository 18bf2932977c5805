"""MLVICX's local branch: pooling before the convolution beside the order in which the paper writes it.

Both take the maps of a ResNet-18's levels at 96 pixels to 512 channels in 4 x 4 places, forwards and backwards; they
take turns, and each row is the median of its turns. That they give the same numbers is a test.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from machine import RESULTS, describe, keep
from torch import Tensor

from polyclinic.methods.mlvicx import Places

WIDTHS, SIDES, COMMON = [64, 64, 128, 256, 512], [48, 24, 12, 6, 3], 512


def literal(places: Places, levels: list[Tensor]) -> Tensor:
    """Resize to 64 x 64, convolve, sum, average down to 4 x 4."""
    resized = [F.interpolate(level, size=(64, 64), mode="bilinear", align_corners=False) for level in levels]
    maps = [convolve(level) for convolve, level in zip(places.common, resized, strict=True)]
    return F.adaptive_avg_pool2d(torch.stack(maps).sum(dim=0), 4)


def seconds(fuse: Callable[[list[Tensor]], Tensor], batch: int) -> float:
    """One pass forwards and backwards."""
    levels = [torch.randn(batch, c, s, s, requires_grad=True) for c, s in zip(WIDTHS, SIDES, strict=True)]
    started = perf_counter()
    torch.autograd.backward(fuse(levels).sum())
    return perf_counter() - started


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="views")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "pool_first.json")
    wanted = parser.parse_args()
    machine = describe()
    torch.set_num_threads(2)
    places = Places(WIDTHS, common=COMMON, width=8)
    rows: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "literal": lambda levels: literal(places, levels), "pool first": places.fused
    }  # fmt: skip
    turns = [{name: seconds(fuse, wanted.batch) for name, fuse in rows.items()} for _ in range(wanted.repeats)]
    found = {name: median(turn[name] for turn in turns) for name in rows}
    figures = {"seconds": {name: round(value, 4) for name, value in found.items()}}
    ratio = round(found["literal"] / found["pool first"], 1)
    keep(wanted.out, machine, {"batch": wanted.batch, "repeats": wanted.repeats, **figures, "ratio": ratio, "goal": 20})


if __name__ == "__main__":
    main()
