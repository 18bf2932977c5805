"""The cells of a grid, one after another or as many at once as there are cores; what is finished is not made again."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from polyclinic.errors import PolyclinicError, Refused, StorageError
from polyclinic.files import make_folder, write_atomic
from polyclinic.model import initial_tensors
from polyclinic.study import Study
from polyclinic_simulations.checks import check
from polyclinic_simulations.consortium import Progress as Reading
from polyclinic_simulations.consortium import gather, require
from polyclinic_simulations.shift import pixel_shifts
from polyclinic_simulations.simulate import simulate
from polyclinic_simulations.sweep.grid import Cell, Grid

CELLS = "cells"
FAILED = "failed.json"
FEDERATED = ("federated", "scratch", "init")
"""The rows that a rule trains."""
REPORT_BYTES = 3_000_000
"""Of a finished cell, beside its encoder."""
COPIES = 8
"""Of its tensors that a site keeps at most while it trains: two rounds of update and moments, and one half made."""

Listen = Callable[[str, Mapping[str, Any]], None]
"""Is told (cell, event)."""


@dataclass(frozen=True)
class Place:
    """Where a sweep works: its own folder, where relative cohort paths start, and where built cohorts are kept."""

    out: Path
    data: Path
    state: Path

    def folder(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.out / CELLS / cell.name


def is_made(folder: Path) -> bool:
    """Whether a cell is finished."""
    return (folder / "summary.json").exists()


def prepare(grid: Grid, place: Place, at_once: int, reading: Reading) -> None:
    """Build all cohorts, deal the patients of every world once, and see that the disk can hold the grid.

    Raises:
        Refused, StudyError, CohortError: a cell cannot be simulated, or the grid is too large for the disk.
    """
    largest = 0
    worlds: set[str] = set()
    for cell in grid.cells:
        world = cell.study.simulation.model_dump_json()
        if world in worlds:
            continue
        worlds.add(world)
        check(cell.study, place.data, False)
        members = gather(cell.study, place.data, place.state, reading)
        require(members, cell.study)
        shifted = sum(len(m.own) for m in members if any(pixel_shifts(m.shifts)))
        pixels = cell.study.images.size**2 * cell.study.images.channels
        tensors = COPIES * (2 * len(members) + 1) * _bytes(cell.study)  # the federation's and those of the rows
        largest = max(largest, shifted * pixels + tensors)
    missing = [cell for cell in grid.cells if not is_made(place.folder(cell))]
    needed = min(at_once, len(missing)) * largest + sum(_bytes(cell.study) + REPORT_BYTES for cell in missing)
    free = shutil.disk_usage(_existing(place.out)).free
    if needed > free:
        raise Refused(
            f"the grid needs some {needed / 1e9:.1f} GB in {place.out}, and {free / 1e9:.1f} GB are free there",
            "ask for fewer cells or a smaller encoder, or give another --out",
        )


def _bytes(study: Study) -> int:
    """Of the tensors of the study's first stage."""
    return sum(value.nbytes for value in initial_tensors(study, 0, None).values())


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def make_cell(cell: Cell, place: Place, listen: Listen = lambda cell, event: None) -> None:
    """Simulate one cell, or go on with it. What a finished one no longer needs goes.

    A study that cannot be trained, as where too few sites are left, is a result: its reason is kept in its stead.

    Raises:
        StorageError: the disk is full.
    """
    folder = place.folder(cell)
    begun = (folder / "study.toml").exists()
    make_folder(folder.parent)
    (folder / FAILED).unlink(missing_ok=True)
    try:
        simulate(
            cell.study, folder, place.data, place.state, resume=begun, listen=lambda event: listen(cell.name, event)
        )
    except StorageError:
        raise
    except PolyclinicError as error:
        folder.mkdir(exist_ok=True)
        write_atomic(folder / FAILED, json.dumps({"problem": error.problem}))
        return
    for part in ("sites", "rows", "checkpoints"):
        shutil.rmtree(folder / part, ignore_errors=True)


def one_by_one(cells: list[Cell], place: Place, listen: Listen) -> Iterator[Cell]:
    """Make the cells here; each as it is finished."""
    for cell in cells:
        make_cell(cell, place, listen)
        yield cell


def side_by_side(cells: list[Cell], place: Place, listen: Listen) -> Iterator[Cell]:
    """Make the cells on Ray, as many at once as there are cores for their threads; each as it is finished.

    Raises:
        Refused: ray is not installed. PolyclinicError: a process was lost.
    """
    from polyclinic_simulations.engines.ray import cluster

    with cluster(max(cell.study.compute.threads for cell in cells)):
        import ray

        far = ray.remote(max_retries=0)(make_cell)
        pending = {far.options(num_cpus=cell.study.compute.threads).remote(cell, place): cell for cell in cells}
        while pending:
            ready, _ = ray.wait(list(pending), timeout=1.0)
            for reference in ready:
                cell = pending.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    raise PolyclinicError(
                        f"the process that made {cell.name} was lost: {type(error).__name__}",
                        "run again, or with --engine local: finished cells are kept",
                    ) from error
                yield cell


def results(grid: Grid, place: Place) -> pd.DataFrame:
    """The tidy table of all finished cells: a line a figure.

    Columns: the axes, then `row` (as in a run's comparison), `site` (where it was measured; "": everywhere),
    `label_fraction` (of the training patients' labels that the probe has learnt from), `metric`, `value`, `low`, `high`
    (95 % over test patients, of some), `cell`. An axis is empty where the row does not depend on it.
    """
    lines: list[dict[str, Any]] = []
    for cell in grid.cells:
        if is_made(folder := place.folder(cell)):
            lines += [{**_axes(cell, grid, line["row"]), **line, "cell": cell.name} for line in _lines(folder)]
    columns = [*grid.axes, "row", "site", "label_fraction", "metric", "value", "low", "high", "cell"]
    return pd.DataFrame(lines, columns=columns)


def failures(grid: Grid, place: Place) -> dict[str, str]:
    """{cell: why it could not be trained}."""
    found = {cell.name: place.folder(cell) / FAILED for cell in grid.cells}
    return {name: json.loads(path.read_text())["problem"] for name, path in found.items() if path.exists()}


def _axes(cell: Cell, grid: Grid, row: str) -> dict[str, str]:
    """The cell's values, those left out that its row does not depend on."""
    own = row in FEDERATED
    return {axis: v if own or axis not in grid.shared else "" for axis, v in cell.values.items()}


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    summary = json.loads((folder / "summary.json").read_text())
    blank = {"site": "", "label_fraction": 1.0, "low": None, "high": None}
    for prefix, table in (("", "comparison"), ("classifier_", "classifier")):
        for row, scores in summary[table].items():
            ends = {"low": scores["auc_low"], "high": scores["auc_high"]}
            yield {**blank, "row": row, "metric": f"{prefix}auc", "value": scores["auc"], **ends}
            value = scores["balanced_accuracy"]
            yield {**blank, "row": row, "metric": f"{prefix}balanced_accuracy", "value": value}
    for row, found in summary["profiles"].items():
        line = {**blank, "row": row}
        yield from ({**line, "site": at, "metric": "auc", "value": v} for at, v in found["at_sites"].items())
        yield from ({**line, "site": at, "metric": "auc_own_probe", "value": v} for at, v in found["own"].items())
        for fraction, value in found["labels"].items():
            if float(fraction) < 1:
                yield {**line, "label_fraction": float(fraction), "metric": "auc", "value": value}
        if found["site_auc"] is not None:
            yield {**line, "metric": "site_auc", "value": found["site_auc"]}
    measured = pd.read_csv(folder / "metrics.csv", keep_default_na=False)
    at_sites = measured[measured["site"] != ""]
    costs = {name: at_sites.loc[at_sites["metric"] == m, "value"].sum() for name, m in COSTS.items()}
    costs |= {"rounds": summary["rounds"], "wall_s": summary["wall_s"]}
    yield from ({**blank, "row": "federated", "metric": name, "value": float(v)} for name, v in costs.items())


COSTS = {"bytes_up": "bytes_up", "bytes_down": "bytes_down", "site_seconds": "seconds"}
"""Of the federation, summed over sites and rounds: {in results.csv: in metrics.csv}."""
