"""Consortia small enough for a test: invented patients, an encoder of a few hundred weights, nodes in this process."""

import csv
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from flwr.app import Context, Message, MessageType
from PIL import Image
from torch import Tensor, nn

from polyclinic import wire
from polyclinic.cohort import Cohort
from polyclinic.stages import AnyStage, Stage
from polyclinic.study import Study, resolve
from polyclinic_client.app import make_app
from polyclinic_client.site import Site
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.engines.local import LocalGrid, Node

METHOD_STAGES: dict[str, type[Stage]] = {
    get_args(model.model_fields["method"].annotation)[0]: model for model in get_args(get_args(AnyStage)[0])
}
"""Every method with the class of its settings."""
SIZE = 16
SITES = ("east", "north", "west")
SIMCLR = {"kind": "pretrain", "method": "simclr", "rounds": 2, "batch_size": 8, "projection": 8}


class TinyEncoder(nn.Module):
    """What stands in for an encoder of millions of weights where only the way of the tensors is tested."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 5, stride=4)
        self.norm = nn.GroupNorm(2, 4)
        self.out = nn.Linear(4 * 3 * 3, 8)
        self.dim = 8

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.out(torch.relu(self.norm(self.conv(images))).flatten(1)).float()
        return features


def tiny_study(**changes: Any) -> Study:
    """Two rounds of SimCLR on 16-pixel images; `changes` replace keys of tables, or whole lists."""
    plain: dict[str, Any] = {
        "study": {"name": "tiny", "seed": 3},
        "images": {"size": SIZE},
        "stages": [SIMCLR],
        "evaluation": {"rows": []},
        "aggregation": {"min_sites": 2, "round_deadline_s": 30.0},
        "compute": {"threads": 1, "precision": "fp32"},
    }
    for table, values in changes.items():
        plain[table] = {**plain.get(table, {}), **values} if isinstance(values, dict) else values
    return resolve(plain)


def draw(seed: int, label: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A 16-pixel image: noise, with a bright corner where the label is "spot"."""
    image = np.random.default_rng(seed).integers(0, 120, (SIZE, SIZE), dtype=np.uint8)
    if label == "spot":
        image[:6, :6] += 120
    return image


def in_memory(patients: int, seed: int = 0, images: int = 2) -> Cohort:
    """A cohort that was never a file; patients are "clear" and "spot" in turn."""
    labels = ["spot" if p % 2 else "clear" for p in range(patients) for _ in range(images)]
    pixels = np.stack([draw(seed * 1000 + k, label) for k, label in enumerate(labels)])[:, None]
    words = np.array(labels)
    empty = np.full(len(labels), "")
    numbers = np.repeat(np.arange(patients, dtype=np.int32), images)
    return Cohort(Path("memory"), pixels, np.arange(len(labels)), numbers, words, empty, empty, empty)


def write_cohort(folder: Path, patients: int, seed: int = 0, images: int = 2) -> Path:
    """The same patients as PNG files with a labels.csv."""
    folder.mkdir(parents=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "patient"])
        for k in range(patients * images):
            label = "spot" if k // images % 2 else "clear"
            Image.fromarray(draw(seed * 1000 + k, label)).save(folder / f"{k}.png")
            table.writerow([f"{k}.png", label, f"patient-{seed}-{k // images}"])
    return folder


def honest(
    name: str,
    patients: int = 10,
    scale: float = 1e-3,
    validation: Mapping[int, float] | None = None,
    spread: float | None = None,
) -> Node:
    """A node that answers well without training: its update is drawn from its name and the round.

    `validation` is the loss on validation patients that it measures in each round on the tensors that came,
    `spread` their feature spread.
    """

    def node(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.QUERY:
            return Message(wire.pack_presence(wire.Presence(name, "0", True, time.time())), reply_to=message)
        order, tensors = wire.unpack_order(message.content)
        rng = np.random.default_rng([order.round, *name.encode()])
        study = json.loads(order.study)
        reply = wire.Reply(
            study=resolve(study).hash,
            stage=order.stage,
            round=order.round,
            site=name,
            patients=patients if order.train else 0,
            train={"loss": float(rng.random()), "patients": float(patients)} if order.train else {},
            evaluation={"effective_rank": float(1 + rng.random())} if order.evaluate else {},
        )
        if order.evaluate and spread is not None:
            reply.evaluation.update(feature_spread=spread, effective_rank=20.0)
        if order.round in (validation or {}):
            reply.evaluation["validation_loss"] = dict(validation or {})[order.round]
        update = {n: (scale * rng.standard_normal(v.shape)).astype(np.float32) for n, v in tensors.items()}
        return Message(wire.pack_reply(reply, update if order.train else None), reply_to=message)

    return node


def real(name: str, folder: Path, patients: int = 10) -> Node:
    """A node that trains on patients in memory, with its state in `folder`."""
    site = Site(name, in_memory(patients, seed=sum(name.encode())), folder / name)
    return make_app(lambda _: site)


class Mail(LocalGrid):
    """A LocalGrid with disturbed mail: `disturb(site, reply)` gives the messages that come instead of a reply."""

    def __init__(self, nodes: Mapping[str, Node], disturb: Callable[[str, Message], Iterable[Message]]) -> None:
        super().__init__(nodes)
        self._names = dict(zip(self.get_node_ids(), nodes, strict=True))
        self._disturb = disturb

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        arrived = super().pull_messages(message_ids)
        return [m for reply in arrived for m in self._disturb(self._names[reply.metadata.src_node_id], reply)]


def open_run(folder: Path, study: Study) -> RunDir:
    """A run directory that holds the study."""
    run = RunDir(folder)
    run.create(study)
    return run


def events(run: Path | RunDir, name: str = "") -> list[dict[str, Any]]:
    """The events of a run, or those of one name."""
    path = (run.path if isinstance(run, RunDir) else run) / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if not name or line["event"] == name]


def measured(run: Path | RunDir) -> list[tuple[str, ...]]:
    """All metrics of a run but the times, sorted: a resumed round may come in another order of lines."""
    path = (run.path if isinstance(run, RunDir) else run) / "metrics.csv"
    rows = list(csv.reader(path.read_text().splitlines()))[1:]
    return sorted(tuple(row) for row in rows if row[3] != "seconds")


def same_bits(one: wire.Tensors, other: wire.Tensors) -> bool:
    """Are two sets of tensors equal, bit for bit?"""
    return one.keys() == other.keys() and all(v.tobytes() == other[n].tobytes() for n, v in one.items())
