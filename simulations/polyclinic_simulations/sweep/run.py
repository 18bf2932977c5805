"""The cells of a grid, one after another or as many at once as there are cores; what is finished is not made again."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from polyclinic.cohort.index import read_meta
from polyclinic.errors import PolyclinicError, Refused, StorageError
from polyclinic.files import make_folder, write_atomic
from polyclinic.study import Study, load_study
from polyclinic_simulations.checks import check, check_weights
from polyclinic_simulations.compare import has_scratch
from polyclinic_simulations.consortium import Progress as Reading
from polyclinic_simulations.consortium import gather, require
from polyclinic_simulations.shift import pixel_shifts
from polyclinic_simulations.simulate import simulate
from polyclinic_simulations.sweep.disk import require_room
from polyclinic_simulations.sweep.follow import Follower
from polyclinic_simulations.sweep.grid import Cell, Grid

CELLS, PATIENTS, FAILED = "cells", "patients.json", "failed.json"
COSTS = {"bytes_up": "bytes_up", "bytes_down": "bytes_down", "site_seconds": "seconds"}
"""Of the federation, summed over sites and rounds: {in results.csv: in metrics.csv}."""

Listen = Callable[[str, Mapping[str, Any]], None]
"""Is told (cell, event)."""
Task = tuple[Cell, Study]
"""A cell, and its study with the rows that it trains."""


@dataclass(frozen=True)
class Place:
    """Where a sweep works: its own folder, where relative cohort paths start, and where built cohorts are kept.

    All absolute: a Ray cluster's machines, which share the file system, have other working directories.
    """

    out: Path
    data: Path
    state: Path

    def folder(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.out / CELLS / cell.name

    def is_made(self, cell: Cell) -> bool:
        """Whether a cell is finished: its report is written last."""
        return all((self.folder(cell) / name).exists() for name in ("summary.json", "report.html"))

    def has_failed(self, cell: Cell) -> bool:
        """Whether a cell could not be trained when it was last tried."""
        return (self.folder(cell) / FAILED).exists() and not self.is_made(cell)


def tasks(grid: Grid, place: Place) -> list[Task]:
    """What is still to be made: every row once for the cells that share it, by the one where least can go wrong.

    Those that are begun, or finished, keep the rows that they have; of one that could not be trained, another that is
    not begun takes them over.
    """
    begun = {cell.name: _rows_of(place.folder(cell)) for cell in grid.cells}
    rows: dict[str, list[str]] = {name: list(found or []) for name, found in begun.items()}
    failed = {cell.name for cell in grid.cells if place.has_failed(cell)}
    for row, cells in _sharing(grid):
        free = [cell for cell in cells if begun[cell.name] is None]
        if free and not any(row in rows[cell.name] and cell.name not in failed for cell in cells):
            rows[min(free, key=lambda cell: (cell.name in failed, _risk(cell))).name].append(row)
    return [(cell, cell.with_rows(rows[cell.name])) for cell in grid.cells if not place.is_made(cell)]


def _sharing(grid: Grid) -> Iterator[tuple[str, list[Cell]]]:
    """(a row that the grid asks for, the cells of which one is to train it for all)."""
    for row in grid.cells[0].study.evaluation.rows:
        groups: dict[tuple[str, ...], list[Cell]] = {}
        for cell in grid.cells:
            if row != "scratch" or has_scratch(cell.study):
                groups.setdefault(tuple(cell.values[axis] for axis in grid.axes_of(row)), []).append(cell)
        for cells in groups.values():
            yield row, cells


def _rows_of(folder: Path) -> list[str] | None:
    """The rows of a cell that has been begun."""
    return list(load_study(path).evaluation.rows) if (path := folder / "study.toml").exists() else None


def _risk(cell: Cell) -> tuple[int, int]:
    return len(cell.study.simulation.fault), cell.study.aggregation.least


def prepare(grid: Grid, wanted: list[Task], place: Place, at_once: int, reading: Reading) -> dict[str, str]:
    """Build all cohorts and deal their patients, and see that the disk can hold the grid: before, by what the studies
    alone tell, and after, with the images that sites store for themselves.

    Returns:
        {what decides who is where: a digest of the patients}, of all cells.

    Raises:
        Refused, StudyError, CohortError: a cell cannot be simulated, its patients are not those that were there when
            the sweep was begun, or the grid is too large for the disk.
    """
    path = place.out / PATIENTS
    before: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, str] = {}
    dealt: dict[str, tuple[int, int]] = {}
    held = sum(path.stat().st_size for cell, _ in wanted for path in place.folder(cell).rglob("*") if path.is_file())
    require_room(place.out, [(study, _sites(study), 0) for _, study in wanted], at_once, held)
    for cell in grid.cells:
        if (world := _world(cell.study)) in found:
            continue
        with _named(cell):
            check(cell.study, place.data, False)
            check_weights(cell.study)
            members = gather(cell.study, place.data, place.state, reading)
            require(members, cell.study)
        found[world] = "-".join(sorted({str(read_meta(member.cohort.folder)["digest"])[:16] for member in members}))
        if before.get(world, found[world]) != found[world]:
            raise Refused(
                f"{place.out} was begun with other patients than those in {place.data}",
                "give another --out, or the data that it was begun with",
            )
        shifted = sum(len(m.own) for m in members if any(pixel_shifts(m.shifts)))
        pixels = cell.study.images.size**2 * cell.study.images.channels
        dealt[world] = len(members) - len(cell.study.simulation.held_out), shifted * pixels
    require_room(place.out, [(study, *dealt[_world(cell.study)]) for cell, study in wanted], at_once, held)
    return before | found


def strangers(grid: Grid, place: Place) -> int:
    """Cells in the folder that are none of the grid's.

    Raises:
        Refused: there is nothing else, so that the table and the page of another grid would be lost.
    """
    own = {cell.name for cell in grid.cells}
    there = {path.name for path in (place.out / CELLS).glob("*")}
    if there and not there & own:
        raise Refused(
            f"{place.out} holds the sweep of another grid, and no study of this one",
            "give another --out",
        )
    return len(there - own)


@contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """Say which cell an error is about."""
    try:
        yield
    except PolyclinicError as error:
        error.problem = f"cell {', '.join(f'{axis} = {value}' for axis, value in cell.values.items())}: {error.problem}"
        raise


def _world(study: Study) -> str:
    """A digest of what decides which images there are, at which site, and whether the study can run on them."""
    parts = {"simulation", "images", "encoder", "aggregation", "evaluation", "privacy", "study"}
    return sha256(study.model_dump_json(include=parts).encode()).hexdigest()


def _sites(study: Study) -> int:
    """How many sites train, so far as the study alone tells: at least one."""
    wanted = study.simulation
    return max(1, (len(wanted.site) or wanted.sites) - len(wanted.held_out))


def make_cell(task: Task, place: Place, listen: Listen = lambda cell, event: None) -> None:
    """Simulate one cell, or go on with it. What has come to its end keeps its report or its reason, and no rounds.

    A study that cannot be trained, as where too few sites are left, is a result: its reason is kept in its stead.

    Raises:
        StorageError: the disk is full.
    """
    cell, study = task
    folder = place.folder(cell)
    begun = (folder / "study.toml").exists()
    make_folder(folder.parent)
    if not begun:  # a new run wants an empty folder
        (folder / FAILED).unlink(missing_ok=True)
    try:
        simulate(study, folder, place.data, place.state, resume=begun, listen=lambda event: listen(cell.name, event))
    except StorageError:
        raise
    except PolyclinicError as error:
        folder.mkdir(exist_ok=True)
        write_atomic(folder / FAILED, json.dumps({"problem": error.problem}))
    else:
        (folder / FAILED).unlink(missing_ok=True)
    for part in ("sites", "rows", "checkpoints"):
        shutil.rmtree(folder / part, ignore_errors=True)


def one_by_one(wanted: list[Task], place: Place, listen: Listen) -> Iterator[Cell]:
    """Make the cells here; each as it is finished."""
    for task in wanted:
        make_cell(task, place, listen)
        yield task[0]


def side_by_side(wanted: list[Task], place: Place, listen: Listen) -> Iterator[Cell]:
    """Make the cells on Ray, as many at once as there are cores for their threads; each as it is finished.

    Raises:
        Refused: ray is not installed. PolyclinicError: a process was lost.
    """
    from polyclinic_simulations.engines.ray import cluster

    with cluster(max((study.compute.threads for _, study in wanted), default=1)):
        import ray

        far = ray.remote(max_retries=0)(make_cell)
        followers = {cell.name: Follower(place.folder(cell)) for cell, _ in wanted}
        pending = {far.options(num_cpus=t[1].compute.threads).remote(t, place): t[0] for t in wanted}
        while pending:
            ready, _ = ray.wait(list(pending), timeout=1.0)
            for cell in pending.values():
                for event in followers[cell.name].new():
                    listen(cell.name, event)
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
        if place.is_made(cell):
            for line in _lines(place.folder(cell)):
                own = grid.axes_of(line["row"])
                values = {axis: value if axis in own else "" for axis, value in cell.values.items()}
                lines.append({**values, **line, "cell": cell.name})
    columns = [*grid.axes, "row", "site", "label_fraction", "metric", "value", "low", "high", "cell"]
    return pd.DataFrame(lines, columns=columns)


def notes(grid: Grid, place: Place) -> dict[str, list[str]]:
    """{cell: what its run says of rows that could not be made, or should not be trusted}, of finished cells."""
    found = {
        cell.name: json.loads((place.folder(cell) / "summary.json").read_text())["notes"]
        for cell in grid.cells
        if place.is_made(cell)
    }
    return {name: texts for name, texts in found.items() if texts}


def failures(grid: Grid, place: Place) -> dict[str, str]:
    """{cell: why it could not be trained, and which rows the others lack for it where none of them can take them}."""
    failed = [cell for cell in grid.cells if place.has_failed(cell)]
    found = {cell.name: str(json.loads((place.folder(cell) / FAILED).read_text())["problem"]) for cell in failed}
    for (name, other), rows in _missing(grid, place).items() if failed else ():
        shared = f"the rows that others share with it ({', '.join(rows)}) are missing as well"
        found[name] += f"; {shared}: remove {CELLS}/{other} and run again to have them trained there"
    return found


def _missing(grid: Grid, place: Place) -> dict[tuple[str, str], list[str]]:
    """{(a cell that has failed, a finished one that shares rows with it): those that none has, and none can take}."""
    begun = {cell.name: _rows_of(place.folder(cell)) for cell in grid.cells}
    found: dict[tuple[str, str], list[str]] = {}
    for row, cells in _sharing(grid):
        if any(begun[cell.name] is None for cell in cells):
            continue  # it takes them over when the sweep goes on
        having = [cell for cell in cells if row in (begun[cell.name] or ())]
        made = [cell for cell in cells if place.is_made(cell)]
        if having and made and all(map(place.has_failed, having)):
            found.setdefault((having[0].name, min(made, key=_risk).name), []).append(row)
    return found


@cache
def _lines(folder: Path) -> list[dict[str, Any]]:
    """The figures of a finished cell, which do not change any more."""
    summary = json.loads((folder / "summary.json").read_text())
    blank = {"site": "", "label_fraction": 1.0, "low": None, "high": None}
    lines: list[dict[str, Any]] = []
    for prefix, table in (("", "comparison"), ("classifier_", "classifier")):
        for row, scores in summary[table].items():
            line = {**blank, "row": row}
            ends = {"low": scores["auc_low"], "high": scores["auc_high"]}
            lines.append({**line, "metric": f"{prefix}auc", "value": scores["auc"], **ends})
            lines.append({**line, "metric": f"{prefix}balanced_accuracy", "value": scores["balanced_accuracy"]})
    for row, found in summary.get("classifier_at_sites", {}).items():  # earlier runs had none
        for site, value in found.items():
            lines.append({**blank, "row": row, "site": site, "metric": "classifier_auc", "value": value})
    for row, found in summary["profiles"].items():
        line = {**blank, "row": row}
        lines += [{**line, "site": at, "metric": "auc", "value": v} for at, v in found["at_sites"].items()]
        lines += [{**line, "site": at, "metric": "auc_own_probe", "value": v} for at, v in found["own"].items()]
        few = [(float(fraction), value) for fraction, value in found["labels"].items() if float(fraction) < 1]
        lines += [{**line, "label_fraction": fraction, "metric": "auc", "value": value} for fraction, value in few]
        if found["site_auc"] is not None:
            lines.append({**line, "metric": "site_auc", "value": found["site_auc"]})
    measured = pd.read_csv(folder / "metrics.csv", keep_default_na=False)
    at_sites = measured[measured["site"] != ""]
    sums = at_sites.groupby("metric")["value"].sum()
    costs = {name: sums[metric] for name, metric in COSTS.items() if metric in sums}  # privacy withholds some
    costs |= {name: summary[name] for name in ("rounds", "wall_s", "virtual_s") if name in summary}
    line = {**blank, "row": "federated"}
    return lines + [{**line, "metric": name, "value": float(value)} for name, value in costs.items()]
