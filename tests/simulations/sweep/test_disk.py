"""How much room a grid asks for: by hand, against what a cell really keeps, and before anything is built."""

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyclinic.encoders import ENCODERS
from polyclinic.errors import Refused
from polyclinic.model import build_stage, shared_tensors
from polyclinic.study import Study
from polyclinic_simulations import simulate
from polyclinic_simulations.sweep import disk, run
from polyclinic_simulations.sweep.grid import Cell, Grid
from polyclinic_simulations.sweep.run import Place

from ...tiny import SIMCLR, TinyEncoder, tiny_study, write_cohort

LABELS = {"ill": ["spot"], "well": ["clear"]}
FINETUNE = {"kind": "finetune", "rounds": 2, "batch_size": 8, "probe_rounds": 0}


class WideEncoder(TinyEncoder):
    """The tiny one with weights enough that the heads of files are nothing beside them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.ballast = nn.Parameter(torch.zeros(50_000))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + 0.0 * self.ballast.sum()  # trained, so that it has moments


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: WideEncoder(images.channels))
    disk._bytes_of.cache_clear()


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the bytes that are free on every disk."""

    def set_to(bytes: int) -> None:
        usage = namedtuple("usage", "total used free")(10**12, 0, bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return set_to


def tensor_bytes(study: Study, stage: int) -> int:
    return sum(tensor.nbytes for tensor in shared_tensors(*build_stage(study, stage)).values())


def study_with(*stages: dict[str, Any], **changes: Any) -> Study:
    evaluation = {"rows": ["random", "alone", "pooled"], "every": 0, "labels": LABELS}
    simulation = {"sites": 3, "cohort": "all"}
    return tiny_study(**{"stages": list(stages), "evaluation": evaluation, "simulation": simulation, **changes})


def test_every_term_counts_to_the_byte(tmp_path: Path, free: Callable[[int], None]) -> None:
    """Three sites, the federation, three alone and one pooled: 7 states of two rounds of update and two moments, 5
    trainings of three checkpoints and a best one, 6 copies half made. Of two cells in hand at once, the larger two."""
    small = study_with(SIMCLR)
    large = study_with(SIMCLR, {**SIMCLR, "projection": 64})
    least, most = tensor_bytes(small, 0), tensor_bytes(large, 1)
    assert least < most
    images = 10_000
    loads = [(small, 3, 0), (large, 3, 0), (large, 3, images)]
    working = 2 * (7 * 2 * 3 + 5 * 4 + 6) * most + images
    needed = working + (least + 2 * most) + 3 * disk.REPORT_BYTES
    free(needed)
    disk.require_room(tmp_path / "not" / "there", loads, 2)
    free(needed - 1)
    with pytest.raises(Refused, match=r"needs some 0\.0 GB in .*there, and 0\.0 GB are free"):
        disk.require_room(tmp_path / "not" / "there", loads, 2)
    disk.require_room(tmp_path / "not" / "there", loads, 2, held=1)  # what is there already is no more free


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ({"rule": "fedprox", "mu": 0.1}, 0),
        ({"rule": "fedbn"}, 7 * 2),  # a round at every state
        ({"rule": "fedadam"}, 3 * 2),  # two moments with each of the federation's checkpoints
    ],
)
def test_what_a_rule_keeps_is_counted(rule: dict[str, Any], more: int) -> None:
    plain = study_with(SIMCLR)
    by_rule = study_with(SIMCLR, aggregation={**rule, "min_sites": 2})
    assert disk.in_hand(by_rule, 3) - disk.in_hand(plain, 3) == more * tensor_bytes(plain, 0)


def test_a_cell_keeps_no_more_than_is_asked_for_and_not_much_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = list[int]()
    real = simulate.tidy

    def tidy(*folders: Path) -> None:
        kept.append(sum(path.stat().st_size for path in folders[0].parent.rglob("*.safetensors")))
        real(*folders)

    monkeypatch.setattr(simulate, "tidy", tidy)
    write_cohort(tmp_path / "data" / "all", 16)
    evaluation = {"rows": ["pooled", "scratch"], "every": 0, "labels": LABELS}
    short = {**SIMCLR, "rounds": 1}
    study = study_with(short, FINETUNE, evaluation=evaluation, simulation={"sites": 2, "cohort": "all"})
    run.make_cell((cell := Cell({"seed": "0"}, study), study), place := Place(tmp_path, tmp_path / "data", tmp_path))
    asked = disk.in_hand(study, 2) + disk.finished(study) - disk.REPORT_BYTES
    assert 0.75 * asked < kept[0] <= asked
    left = sum(path.stat().st_size for path in place.folder(cell).rglob("*"))
    assert 2 * tensor_bytes(study, 1) < left <= disk.finished(study)


def test_the_disk_is_looked_at_before_patients_are_and_again_with_their_images(
    tmp_path: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cohort(tmp_path / "all", 16)
    shift = [{"kind": "response", "severity": 0.5}]
    study = study_with(SIMCLR, simulation={"sites": 3, "cohort": "all", "shift": shift})
    cell = Cell({"seed": "0"}, study)
    grid, place = Grid({"seed": ["0"]}, [], [], [], [cell]), Place(tmp_path / "out", tmp_path, tmp_path / "state")
    needed = disk.in_hand(study, 3) + disk.finished(study)
    images = 16 * 2 * study.images.size**2

    def prepare() -> None:
        run.prepare(grid, [(cell, study)], place, 1, lambda what, done, total: None)

    free(needed - 1)
    with pytest.raises(Refused, match="needs some"):
        prepare()
    assert not place.state.exists(), "no cohort has been built"
    free(needed + images - 1)
    with pytest.raises(Refused, match="needs some"):
        prepare()
    assert place.state.exists()
    free(needed + images)
    prepare()


def test_a_method_that_shares_a_world_with_another_is_sized_for_itself(
    tmp_path: Path, free: Callable[[int], None]
) -> None:
    write_cohort(tmp_path / "all", 16)
    large = study_with({**SIMCLR, "projection": 64})
    cells = [Cell({"method": "small"}, study_with(SIMCLR)), Cell({"method": "large"}, large)]
    grid = Grid({"method": ["small", "large"]}, [], [], [], cells)
    place = Place(tmp_path / "out", tmp_path, tmp_path / "state")
    free(disk.in_hand(large, 3) + sum(disk.finished(cell.study) for cell in cells) - 1)
    with pytest.raises(Refused, match="needs some"):
        run.prepare(grid, [(cell, cell.study) for cell in cells], place, 1, lambda what, done, total: None)


def test_held_out_sites_keep_no_rounds() -> None:
    study = study_with(SIMCLR, simulation={"sites": 3, "cohort": "all", "held_out": ["site-3"]})
    assert run._sites(study) == 2
    partition = {"kind": "column", "by": "sex"}
    by_column = study_with(SIMCLR, simulation={"cohort": "all", "partition": partition, "held_out": ["F"]})
    assert run._sites(by_column) == 1, "only the cohort knows them"
