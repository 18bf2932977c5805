"""`polyclinic sweep`. What imports torch loads inside the command."""

import json
import os
import shlex
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

if TYPE_CHECKING:
    from polyclinic.study import Study
    from polyclinic_simulations.sweep.figures import Table as Ranking
    from polyclinic_simulations.sweep.grid import Grid


class Engine(StrEnum):
    """Where studies run."""

    AUTO = "auto"
    LOCAL = "local"
    RAY = "ray"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(sweep)


def sweep(
    grid: Annotated[Path, typer.Argument(help="A study file with a \\[grid].")],
    out: Annotated[Path, typer.Option(help="Where results.csv, sweep.html and the cells go.")],
    data: Annotated[
        Path | None, typer.Option(help="Where relative cohort paths start. Default: the grid's folder.")
    ] = None,
    state: Annotated[Path, typer.Option(help="Where built cohorts are kept between runs.")] = Path(".polyclinic"),
    engine: Annotated[
        Engine,
        typer.Option(
            help="local: one study after another; ray: as many at once as there are cores; auto: ray if it is "
            "installed and there are."
        ),
    ] = Engine.AUTO,
    dry: Annotated[bool, typer.Option("--dry-run", help="Check and list the studies; train nothing.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the ranking, or what --dry-run lists, as JSON.")
    ] = False,
) -> None:
    """Train one study over a grid of methods, rules, partitions, severities and seeds; see which copes with what.

    Rows that do not depend on a choice (sites alone, all pooled, no pretraining) are trained once for all of them.
    Stopped at any moment, the same command goes on; a grid that has grown trains what is new.
    An axis of any name has values that say what they set: { name = "liar", set = { "simulation.fault" = ... } }.

    Examples:

      polyclinic sweep grid.toml --out sweeps/rules

      polyclinic sweep grid.toml --out sweeps/rules --data ../images --engine local

      polyclinic sweep grid.toml --out sweeps/rules --dry-run
    """
    from polyclinic_simulations.sweep.grid import read_grid

    read = read_grid(grid)  # what is mistyped is said before torch is loaded
    from polyclinic.cli import program
    from polyclinic.errors import Interrupted, PolyclinicError, Refused
    from polyclinic.files import locked, make_folder, write_atomic
    from polyclinic.report.words import plural
    from polyclinic_simulations.display import Display
    from polyclinic_simulations.sweep import run
    from polyclinic_simulations.sweep.figures import Table
    from polyclinic_simulations.sweep.page import ranking, render_sweep

    place = run.Place(out.absolute(), (data or grid.parent).absolute(), state.absolute())
    if out.exists() and not out.is_dir():
        raise Refused(f"{out} is a file", "give a folder as --out")
    if out.exists() and any(out.iterdir()) and not (out / "grid.toml").exists():
        raise Refused(f"{out} is not empty, and holds no sweep", "give another --out")
    others = run.strangers(read, place)
    wanted = run.tasks(read, place)
    at_once = _at_once(engine, max(cell.study.compute.threads for cell in read.cells))
    with Display() as display:
        patients = run.prepare(read, wanted, place, at_once, display.reading)
    if dry:
        _list(read, {cell.name: study for cell, study in wanted}, as_json)
        return
    make_folder(out)
    console = Console(stderr=True)
    with locked(out) as free:
        if not free:
            raise Refused(f"another process is working in {out}", "wait for it, or give another --out")
        write_atomic(out / "grid.toml", grid.read_bytes())
        if others:
            told = f"{plural(others, 'folder')} of studies that are none of this grid's, which are left out"
            print(f"warning: {out} holds {told}", file=sys.stderr)
        write_atomic(out / run.PATIENTS, json.dumps(patients))
        try:
            with _Bars(console, len(read.cells), len(read.cells) - len(wanted)) as bars:
                make = run.side_by_side if at_once > 1 else run.one_by_one
                for cell in make(wanted, place, bars.event):
                    bars.finished(cell.name, place.is_made(cell))
                    write_atomic(out / "results.csv", run.results(read, place).to_csv(index=False))
        except KeyboardInterrupt:
            again = ["sweep", grid, "--out", out, "--data", place.data, "--state", state, "--engine", engine.value]
            fix = f"go on with: {program()} {shlex.join(map(str, again))}"
            raise Interrupted("interrupted; what was finished is kept", fix) from None
        finally:
            rows, failed = run.results(read, place), run.failures(read, place)
            write_atomic(out / "results.csv", rows.to_csv(index=False))
            write_atomic(out / "sweep.html", render_sweep(grid.stem, read, rows, place, failed))
    table = Table(rows, read)
    if as_json:
        print(ranking(table, failed))
    else:
        _show(table, failed, out)
    if failed:
        raise PolyclinicError(f"{len(failed)} studies could not be trained", f"see the reasons in {out / 'sweep.html'}")


def _at_once(engine: Engine, threads: int) -> int:
    """Studies that run at a time."""
    from importlib.util import find_spec

    room = max(1, len(os.sched_getaffinity(0)) // threads)
    if engine is Engine.RAY:
        return max(2, room)
    return room if engine is Engine.AUTO and find_spec("ray") else 1


def _list(grid: "Grid", wanted: Mapping[str, "Study"], as_json: bool) -> None:
    from rich.table import Table

    if as_json:
        cells = [
            {"axes": cell.values, "rounds": cell.study.rounds, "made": cell.name not in wanted}
            | ({"rows": wanted[cell.name].evaluation.rows} if cell.name in wanted else {})
            for cell in grid.cells
        ]
        print(json.dumps({"studies": cells}, indent=2))
        return
    table = Table(title=f"{len(grid.cells)} studies, {len(wanted)} still to be made", title_justify="left")
    for axis in grid.axes:
        table.add_column(escape(axis))
    table.add_column("rounds", justify="right")
    table.add_column("rows beside federated")
    for cell in grid.cells:
        rows = ", ".join(wanted[cell.name].evaluation.rows) or "–" if cell.name in wanted else "made"
        table.add_row(*map(escape, cell.values.values()), str(cell.study.rounds), rows)
    Console().print(table)


def _show(table: "Ranking", failed: Mapping[str, str], out: Path) -> None:
    from rich.table import Table

    console = Console()
    of = "classifier" if table.metric == "classifier_auc" else "probe"
    for condition in table.conditions:
        shown = Table(title=escape(table.named(condition) or "Ranking"), title_justify="left")
        for column, side in (("choice", "left"), (f"AUC of the {of}, mean over seeds", "right"), ("seeds", "right")):
            shown.add_column(column, justify=side)  # type: ignore[arg-type]
        for number, (choice, mean) in enumerate(table.ranked(condition)):
            shown.add_row(escape(table.name(choice)), str(mean), str(mean.seeds), style="" if number else "bold")
        for name, mean in table.other_rows(condition):
            shown.add_row(escape(name), str(mean), str(mean.seeds), style="dim")
        console.print(shown)
    for cell, why in failed.items():
        console.print(f"not trained: {cell}: {why}", markup=False, soft_wrap=True)
    console.print(f"report: {out / 'sweep.html'}", soft_wrap=True, highlight=False, markup=False)


class _Bars:
    """On a terminal a bar over all studies and one of each that is in hand; elsewhere a line a study."""

    def __init__(self, console: Console, total: int, made: int) -> None:
        columns = (
            TextColumn("{task.description}", table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis")),
            TextColumn("{task.fields[row]}", table_column=Column(no_wrap=True)),
            BarColumn(None, table_column=Column(ratio=2)),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        shown = console.is_terminal
        self._bars = Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown, expand=True)
        self._console, self._total, self._made = console, total, made
        self._in_hand: dict[str, TaskID] = {}

    def __enter__(self) -> "_Bars":
        self._bars.start()
        self._all = self._bars.add_task("studies", total=self._total, completed=self._made, row="")
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def event(self, cell: str, event: Mapping[str, Any]) -> None:
        """Something that happened in a cell; what happened in a row's own training carries `row`."""
        name = event["event"]
        if cell not in self._in_hand:
            text = escape(f"  {cell.rpartition('-')[0]}")  # without the digest
            self._in_hand[cell] = self._bars.add_task(text, total=None, row="")
        bar = self._in_hand[cell]
        if name == "row_started":
            self._bars.update(bar, row=escape(event["row"]))
        elif name in ("run_started", "run_resumed"):
            self._bars.reset(bar, total=event["rounds"], completed=event.get("round", 0))
        elif name == "round_closed":
            self._bars.update(bar, completed=event["round"])

    def finished(self, cell: str, trained: bool) -> None:
        """A cell has come to its end."""
        self._made += 1
        self._bars.update(self._all, completed=self._made)
        if cell in self._in_hand:
            self._bars.remove_task(self._in_hand.pop(cell))
        if not trained or not self._console.is_terminal:
            said = "" if trained else " could not be trained"
            self._console.print(f"study {self._made} of {self._total}: {cell}{said}", markup=False, highlight=False)
