"""What a person sees while a study runs: bars on a terminal, a line a round elsewhere."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from polyclinic.report.words import absence

LISTED = 8
"""Classes named above a table."""


class Display:
    """A context in which `reading`, `event` and `steps` draw progress on stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal, expand=True)
        self._tasks: dict[str, TaskID] = {}
        self._stage = ""
        self._why: dict[tuple[int, str], str] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def reading(self, what: str, done: int, total: int) -> None:
        """Files of a cohort read so far."""
        self._show("reading", f"reading {what}", done, total)

    def steps(self, done: int, total: int) -> None:
        """Batches of the site that is training."""
        self._show("steps", "  batches at one site", done, total)

    def event(self, event: Mapping[str, Any]) -> None:
        """An event of the run, as it stands in events.jsonl; those of a row's own training carry `row`."""
        name, row = event["event"], event.get("row")
        if not row:
            self._count_sites(event)
        if name in ("run_started", "run_resumed"):
            self._stage = f"  training {row}" if row else "federation"
            self._show("row" if row else "federation", self._stage, event.get("round", 0), event["rounds"])
            if row:
                self._bars.reset(self._tasks["row"], completed=event.get("round", 0))  # the time of this row alone
                self._say(f"  training {row}: {event['rounds'] - event.get('round', 0)} rounds", bars=False)
        elif name == "round_closed":
            text = self._stage + (f", loss {event['loss']:.3f}" if "loss" in event else "")
            self._show("row" if row else "federation", text, event["round"], None)
            if not row:
                self._say(_round_line(event), bars=False)
        elif name == "row_started":
            self._show("rows", f"row {row}", event["made"], event["rows"])
            self._say(f"row {event['made'] + 1} of {event['rows']}: {row}", bars=False)
        elif name == "row_finished":
            if "made" in event:
                self._show("rows", f"row {row}", event["made"], None)
            self._say(_row_line(event), bars=False)
        elif name in ("update_refused", "site_missing"):
            why = event.get("reason") or self._why.get((event["round"], event["site"]), "no answer")
            self._say(f"[yellow]round {event['round']}: {event['site']} left out: {escape(why)}[/yellow]")
        elif why := absence(event):
            self._why[event["round"], event["site"]] = why
        elif name == "report_started":
            self._show("rows", "writing the report", event["rows"], None)
        elif name == "stopped_early":
            patience = f"{event['patience']} round{'s' * (event['patience'] != 1)}"
            self._say(f"round {event['round']}: no better on validation patients for {patience}, stopped")
        elif name == "warning":
            self._say(f"[yellow]{escape(event['text'])}[/yellow]")

    def _count_sites(self, event: Mapping[str, Any]) -> None:
        """A bar of the sites that are there, then of those that have answered in a round: it may take hours."""
        name = event["event"]
        if name == "round_started":
            self._show("sites", f"  sites of round {event['round']}", 0, len(event["sites"]))
        elif name == "site_found":
            found = int(self._bars.tasks[self._tasks["sites"]].completed) if "sites" in self._tasks else 0
            self._show("sites", "  sites found", found + 1, None)
        elif name in ("update_accepted", "update_refused") and "sites" in self._tasks:
            self._bars.advance(self._tasks["sites"])
        elif name == "site_measured":
            self._show("sites", "  sites that have measured the encoder", event["measured"], event["sites"])

    def _show(self, key: str, text: str, done: int, total: int | None) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(text, total=total)
        bar = self._tasks[key]
        if total is not None:
            self._bars.update(bar, total=total)
        self._bars.update(bar, description=text, completed=done)

    def _say(self, text: str, bars: bool = True) -> None:
        if bars or not self.console.is_terminal:
            self.console.print(text, highlight=False)


def _round_line(event: Mapping[str, Any]) -> str:
    auc = f", probe AUC before it {event['probe_auc']:.3f}" if "probe_auc" in event else ""
    loss = f"loss {event['loss']:.3f}, " if "loss" in event else ""  # withheld under differential privacy
    return f"round {event['round']}: {loss}{event['accepted']} sites, {event['seconds']:.1f} s{auc}"


def _row_line(event: Mapping[str, Any]) -> str:
    took = f", {event['seconds']:.1f} s" if "seconds" in event else ""
    return f"row {event['row']}: AUC {event['auc']:.3f}{took}"


def _titled(what: str, measured: Mapping[str, Any] | None) -> Table:
    """An empty table, whose title says of which classes and patients it is."""
    if measured:
        classes = measured["classes"]
        names = ", ".join(classes[:LISTED]) + (f" and {len(classes) - LISTED} more" if len(classes) > LISTED else "")
        what += f"\n{names}: {measured['patients']} test patients, {measured['images']} images"
    return Table(title=escape(what), title_justify="left")


def comparison_table(comparison: Mapping[str, Mapping[str, float]], measured: Mapping[str, Any] | None = None) -> Table:
    """The rows of a run, AUC with its 95 % interval over patients; `measured` says on what."""
    table = _titled("Linear probe on the frozen encoder", measured)
    for column, side in (("row", "left"), ("AUC", "right"), ("95 % interval", "right"), ("balanced accuracy", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for name, scores in comparison.items():
        known = scores["auc_low"] is not None  # of a run across a network nobody has all answers
        interval = f"{scores['auc_low']:.3f} – {scores['auc_high']:.3f}" if known else "–"
        cells = (name, f"{scores['auc']:.3f}", interval, f"{scores['balanced_accuracy']:.3f}")
        table.add_row(*cells, style="bold" if name == "federated" else "")
    return table


def classifier_table(rows: Mapping[str, Mapping[str, float]], measured: Mapping[str, Any] | None = None) -> Table:
    """The fine-tuned classifiers of a run on all test patients; `measured` says of which classes."""
    table = _titled("Fine-tuned classifier", measured)
    table.add_column("row")
    for column in ("AUC", "95 % interval", "accuracy", "balanced accuracy", "calibration error"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        cells = [f"{row[figure]:.3f}" for figure in ("auc", "accuracy", "balanced_accuracy", "ece")]
        cells.insert(1, f"{row['auc_low']:.3f} – {row['auc_high']:.3f}")
        table.add_row(name, *cells, style="bold" if name == "federated" else "")
    return table


def labels_needed(found: Mapping[str, Any], start: str) -> str:
    """The part of a held-out site's labels with which a start matches the supervised one with all, in words."""
    if found["supervised_at_100"] is None:
        return "not measurable"
    needed = found["labels_needed"].get(start, 1.0)
    return "more than all" if needed is None else f"{needed:.0%}"


def holdout_table(sites: Mapping[str, Mapping[str, Any]]) -> Table:
    """Leaving one site out: AUC at the others and at it, and the labels that it needs."""
    table = Table(title="Leaving one site out: AUC of the classifier", title_justify="left")
    for column in ("held out", "start", "in distribution", "zero-shot", "labels needed"):
        table.add_column(column, justify="left" if column in ("held out", "start") else "right")
    for name, found in sites.items():
        for start in found.get("in_distribution", ()):
            figures = [found[scope][start] for scope in ("in_distribution", "zero_shot")]
            cells = ["not measurable" if value is None else f"{value:.3f}" for value in figures]
            table.add_row(name, start, *cells, labels_needed(found, start))
        if "note" in found:
            table.add_row(name, found["note"])
    table.caption = "labels needed: to match the supervised start with all of them"
    return table
