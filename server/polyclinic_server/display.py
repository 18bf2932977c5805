"""The coordinator's facts in a terminal, of 80 columns too."""

from collections.abc import Iterator

from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from polyclinic_server.overview import Overview, Site, duration
from polyclinic_server.progress import Points, Run

SHOWN = 5
"""Last rounds whose values are shown."""
COLUMNS = ("site", "node", "approved", "clock", "rounds", "sent", "epsilon")


def show(facts: Overview) -> None:
    """Print the facts: the coordinator, its sites, the run, what somebody should see to."""
    console = Console(highlight=False, markup=False)
    up = "up" if facts.superlink else "down"
    console.print(f"{facts.name} at {facts.address}; page: {facts.page}")
    console.print(f"SuperLink is {up}; certificate: {facts.certificate_days} days left")
    table = Table(*(Column(name, overflow="fold") for name in COLUMNS), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, site in facts.sites.items():
        table.add_row(name, *_cells(site))
    console.print("", table, "", sep="\n")
    for line in _lines(facts.run) if facts.run else ["no study has been launched"]:
        console.print(line)
    for name, site in facts.sites.items():
        if site.trouble:
            console.print(f"{name}, {site.trouble}")
    for note in facts.notes:
        console.print(f"! {note}", style="bold")


def _cells(site: Site) -> Iterator[str]:
    """What is not known stays empty."""
    yield site.presence
    yield "" if site.approved is None else "yes" if site.approved else "NO !"
    yield "" if site.clock_ahead_s is None else f"{site.clock_ahead_s:+.1f} s{' !' if site.clock_is_off else ''}"
    yield str(len(site.accepted))
    yield decimal(site.bytes_sent)
    yield "off" if site.epsilon is None else f"{site.epsilon:.3g}"


def _lines(run: Run) -> Iterator[str]:
    done = f"round {run.at_work}" if run.at_work else f"{run.round}"
    stage = f"stage {run.stage + 1} of {len(run.stages)} ({run.stages[run.stage][0]})"
    yield f"{run.name}: {run.state}, {done} of {run.rounds} rounds, {stage}"
    if run.round_s is not None:
        left = f", about {duration(run.left_s)} left" if run.left_s is not None else ""
        yield f"{duration(run.round_s)} a round{left}"
    for name, points in (("loss", run.losses[run.stage]), ("probe AUC", run.probe)):
        if points:
            yield f"{name} by round: {_values(points)}"
    if run.problem:
        yield f"{run.problem}\n  fix: {run.fix}"


def _values(points: Points) -> str:
    """The last few, with their rounds."""
    return ("... " if len(points) > SHOWN else "") + "  ".join(f"{r}: {v:.4g}" for r, v in points[-SHOWN:])
