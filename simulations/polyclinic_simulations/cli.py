"""`polyclinic demo`, `simulate`, `compare`, `evaluate`, `export`. What imports torch loads inside the commands."""

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from polyclinic.study import Study


class Engine(StrEnum):
    """Where the sites run."""

    LOCAL = "local"
    RAY = "ray"


Out = Annotated[Path | None, typer.Option(help="Run directory. Default: runs/<study>-<n>.")]
State = Annotated[Path, typer.Option(help="Where built cohorts are kept between runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add this package's commands."""
    from polyclinic_simulations.papers.cli import register as register_papers
    from polyclinic_simulations.phantom.cli import register as register_phantom
    from polyclinic_simulations.sweep.cli import register as register_sweep

    for command in (demo, simulate, compare, evaluate, export):
        app.command()(command)
    register_sweep(app)
    register_phantom(app)
    register_papers(app)


def simulate(
    study: Annotated[Path, typer.Argument(help="The study file.")],
    engine: Annotated[
        Engine, typer.Option(help="local: in this process; ray: on Flower's simulation runtime.")
    ] = Engine.LOCAL,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Where relative cohort paths start. Default: the study's folder.")
    ] = None,
    state: State = Path(".polyclinic"),
    holding_out: Annotated[
        bool,
        typer.Option("--leave-one-site-out", help="Each site in turn takes no part: what is pretraining worth to it?"),
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Show the sites, their patients and shifts; train and write no run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Rehearse a whole consortium on this machine.

    Builds the cohorts, trains federated, trains the comparison rows, and leaves a run directory with the encoder,
    its model card and report.html. Killed at any moment, --resume goes on from the last finished round.

    Examples:

      polyclinic simulate study.toml

      polyclinic simulate study.toml --data ../images --out runs/first

      polyclinic simulate study.toml --out runs/first --resume

      polyclinic simulate study.toml --leave-one-site-out

      polyclinic simulate study.toml --dry-run
    """
    from polyclinic.errors import Refused
    from polyclinic.study import load_study
    from polyclinic_simulations.checks import check, check_weights

    if resume and out is None:
        raise Refused("--resume needs the run to go on with", "give its folder: --out runs/<study>-<n> --resume")
    if holding_out and engine is Engine.RAY:
        raise Refused("sites are left out on the local engine only", "leave --engine out")
    read = load_study(study)
    check(read, data or study.parent, holding_out)
    check_weights(read)
    if dry:
        _preview(read, data or study.parent, state, as_json)
        return
    with _place(out, read.name) as folder:
        _run(read, folder, data or study.parent, state, engine, resume, as_json, holding_out)


def demo(
    out: Out = None,
    seed: Annotated[int, typer.Option(help="Of patients and training.", min=0)] = 0,
    state: State = Path(".polyclinic"),
    as_json: Json = False,
) -> None:
    """Show it all in a few minutes: invented patients as DICOM files at several hospitals, one encoder, one report.

    Example:

      polyclinic demo --seed 1
    """
    from polyclinic_simulations.demo import demo_study

    study = demo_study(seed)
    with _place(out, study.name) as folder:
        _run(study, folder, state, state, Engine.LOCAL, False, as_json)


def compare(runs: Annotated[list[Path], typer.Argument(help="Run directories.")], as_json: Json = False) -> None:
    """Put the rows of several runs side by side.

    Example:

      polyclinic compare runs/cxr-1 runs/cxr-2
    """
    from polyclinic_simulations.display import classifier_table, comparison_table, holdout_table

    kinds = ("comparison", "classifier", "leave_one_site_out")
    found = {run: _summary(run) for run in runs}
    tables = {
        kind: {f"{run} {row}": scores for run, made in found.items() for row, scores in made.get(kind, {}).items()}
        for kind in kinds
    }
    for run, made in found.items():
        if not any(made.get(kind) for kind in kinds):
            why = "; ".join(made.get("notes", [])) or "nothing was measured"
            print(f"warning: {run} has no rows: {why}", file=sys.stderr)
    tested = {made.get("test_patients") for made in found.values()}
    if len(tested - {None}) > 1:
        print("warning: the runs were measured on different test patients: read their intervals", file=sys.stderr)
    elif None in tested and len(found) > 1:  # of a run across a network nobody knows
        print("warning: the runs may have been measured on different test patients", file=sys.stderr)
    if as_json:
        asked = {kind: rows for kind, rows in tables.items() if rows or kind != "leave_one_site_out"}
        print(json.dumps(asked, indent=2))
        return
    for kind, show in (("comparison", comparison_table), ("classifier", classifier_table)):
        if tables[kind]:
            told = [made.get("measured", {}).get(kind) for made in found.values() if made.get(kind)]
            alike = all(other == told[0] for other in told)
            Console().print(show(tables[kind], told[0] if alike else None))
            if not alike:
                print("warning: the rows above are not all of the same classes and patients", file=sys.stderr)
    if tables["leave_one_site_out"]:
        Console().print(holdout_table(tables["leave_one_site_out"]))


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    cohort: Annotated[
        Path, typer.Option(help="Images the run has not seen: a folder, a CSV or a tree of DICOM files.")
    ],
    allow_burned_in: Annotated[
        bool, typer.Option("--allow-burned-in", help="Use ultrasound, secondary captures and annotated files, too.")
    ] = False,
    state: State = Path(".polyclinic"),
    as_json: Json = False,
) -> None:
    """Probe a run's encoder on another cohort, beside an untrained encoder and plain pixels.

    The figures are printed and kept nowhere: to keep them, send --json to a file.

    Examples:

      polyclinic evaluate runs/cxr-1 --cohort ../images/other-hospital

      polyclinic evaluate runs/cxr-1 --cohort ../images/other-hospital --json > other-hospital.json
    """
    from polyclinic_simulations.display import comparison_table
    from polyclinic_simulations.outside import evaluate_outside

    rows, known = evaluate_outside(run, cohort, state, allow_burned_in)
    for name in [name for name, scores in rows.items() if scores["one_answer"]]:
        print(f"warning: row {name}: the probe gives every test image the same answer", file=sys.stderr)
    if known:
        text = f"warning: {known} of these images are the run's own sites' too: what it learnt from them flatters it"
        print(text, file=sys.stderr)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    ours = rows["federated"]
    measured = {"classes": ours["classes"], "patients": ours["n_test"], "images": ours["test_images"]}
    Console().print(comparison_table(rows, measured))
    learnt, tested = ours["n_train"], ours["n_test"]
    print(f"probes learnt on {learnt} images and measured on {tested} other patients of {cohort.name}")


def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    to: Annotated[Path, typer.Option(help="A new folder for the encoder, its model card and the report.")],
) -> None:
    """Copy what others need from a run: encoder and classifier, MODEL_CARD.md, report.html, study.toml.

    The report is written anew, without pictures of images and without the sites' cards: the run's own has both.

    Example:

      polyclinic export runs/cxr-1 --to cxr-encoder
    """
    import shutil

    from polyclinic.artifacts import CLASSIFIER
    from polyclinic.cli import program
    from polyclinic.errors import Refused
    from polyclinic.files import make_folder, write_atomic
    from polyclinic.report import render_shared
    from polyclinic.study import load_study

    _summary(run)
    files = ("encoder.safetensors", "MODEL_CARD.md")
    if missing := [name for name in files if not (run / name).is_file()]:
        raise Refused(f"{run} has no {missing[0]}", f"make it again: {program()} simulate ... --resume")
    if to.exists():
        raise Refused(f"{to} exists already", "give a folder that does not")
    study = load_study(run / "study.toml")
    make_folder(to)
    for name in files:
        shutil.copyfile(run / name, to / name)
    if (run / CLASSIFIER).exists():
        shutil.copyfile(run / CLASSIFIER, to / CLASSIFIER)
    write_atomic(to / "report.html", render_shared(run))
    write_atomic(to / "study.toml", study.to_toml(simulation=False))
    print(to)


def _run(
    study: "Study",
    out: Path,
    data: Path,
    state: Path,
    engine: Engine,
    resume: bool,
    as_json: bool,
    holding_out: bool = False,
) -> None:
    from polyclinic.cli import program
    from polyclinic.errors import Collapsed, Interrupted, PolyclinicError, QuorumLost, Refused
    from polyclinic_server.aggregation.private import EpsilonSpent
    from polyclinic_simulations.display import Display, classifier_table, comparison_table, holdout_table
    from polyclinic_simulations.holdout import leave_one_site_out
    from polyclinic_simulations.simulate import simulate as run_it

    again = ["simulate", out / "study.toml", "--data", data, "--state", state, "--engine", engine.value]
    again += ["--leave-one-site-out"] if holding_out else []
    how = f"{program()} {shlex.join([*map(str, again), '--out', str(out), '--resume'])}"
    try:
        with Display() as display:
            shown: dict[str, Any] = {"listen": display.event, "reading": display.reading, "progress": display.steps}
            if holding_out:
                summary = leave_one_site_out(study, out, data, state, resume=resume, **shown)
            else:
                summary = run_it(study, out, data, state, engine=engine.value, resume=resume, **shown)
    except KeyboardInterrupt:
        if not (out / "study.toml").exists():
            raise
        raise Interrupted("interrupted; what was finished is kept", f"go on with: {how}") from None
    except PolyclinicError as error:
        if not isinstance(error, Refused | EpsilonSpent | Collapsed) and (out / "study.toml").exists():
            if isinstance(error, QuorumLost) and study.simulation.unreliable:  # the seed strikes the same sites again
                error.fix = "lower aggregation.min_sites or what strikes the sites, or give them longer, and begin anew"
            else:
                error.fix += f"\n  then go on with: {how}"
        raise
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    console = Console()
    if holding_out:
        console.print(holdout_table(summary["leave_one_site_out"]))
        console.print(
            f"every row: {out / 'holdout.csv'}\nreport: {out / 'holdout.html'}", soft_wrap=True, highlight=False
        )
        return
    if summary["comparison"]:
        console.print(comparison_table(summary["comparison"], summary["measured"]["comparison"]))
    if summary["classifier"]:
        console.print(classifier_table(summary["classifier"], summary["measured"]["classifier"]))
    for site in summary["held_out"]:
        probes = {row: found["at_sites"] for row, found in summary["profiles"].items()}
        for what, areas in (("probe", probes), ("classifier", summary["classifier_at_sites"])):
            known = ", ".join(f"{row} {found[site]:.3f}" for row, found in areas.items() if site in found)
            text = f"AUC of the {what} at {site}, which is held out: {known or 'not measurable'}"
            if areas:
                console.print(text, markup=False, highlight=False)
    for note in summary["notes"]:
        console.print(note, markup=False)
    console.print(f"report: {out / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


def _preview(study: "Study", data: Path, state: Path, as_json: bool) -> None:
    from polyclinic_simulations.display import Display
    from polyclinic_simulations.preview import clock_in_words, preview, preview_tables

    with Display() as display:
        found = preview(study, data, state, display.reading)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for table in preview_tables(found):
            Console().print(table, "")
        if found["clock"]:
            Console().print(clock_in_words(found["clock"]), highlight=False, soft_wrap=True)
        for name, site in found["sites"].items():
            for text in site["warnings"]:
                Console().print(f"{escape(name)}: {text}", style="yellow", highlight=False, soft_wrap=True)


def _summary(run: Path) -> dict[str, Any]:
    from polyclinic.errors import Refused

    try:
        return dict(json.loads((run / "summary.json").read_text()))
    except (OSError, ValueError) as error:
        raise Refused(f"{run} is not a finished run", "give a run directory that holds summary.json") from error


@contextmanager
def _place(out: Path | None, name: str) -> Iterator[Path]:
    """`out`, or the first runs/<name>-<n> that does not exist: made at once, so that no other process takes it.

    Gone if an error leaves it empty.
    """
    from polyclinic.files import tentative

    if out is not None:
        yield out
        return
    runs = Path("runs")
    made = [] if runs.exists() else [runs]
    path = next(path for number in count(1) if _made(path := runs / f"{name}-{number}"))
    with tentative([path, *made]):
        yield path


def _made(path: Path) -> bool:
    """Whether a folder could be made, as it did not exist."""
    from polyclinic.files import make_folder

    make_folder(path.parent)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
        return True
    return False
