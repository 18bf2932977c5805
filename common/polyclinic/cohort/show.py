"""The data-fitness card in a terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polyclinic.cohort.build import QUARANTINE
from polyclinic.cohort.card import in_colour, near_text, size_text
from polyclinic.cohort.quarantine import MEANING, Reason

BLOCKS = " ▁▂▃▄▅▆▇█"
LISTED = 8


def show_card(card: Mapping[str, Any], folder: Path, program: str = "polyclinic") -> None:
    """Print a card to standard output, for terminals of 80 columns or more; `program` is how the command is called."""
    console = Console(highlight=False)
    per, sizes = card["images_per_patient"], card["sizes"]
    summary = Table.grid(padding=(0, 2))
    for name, value in (
        ("files", f"{card['files']}, of which {card['files_used']} used"),
        ("images", f"{card['images']}, cached as {' × '.join(map(str, card['tensor']))}"),
        ("patients", f"{card['patients']}, with {per['mean']} images on average, at most {per['most']}"),
        ("original size", size_text(sizes)),
        ("intensities", f"dark {bars(card['histogram'])} bright"),
        ("near-duplicates", near_text(card["near_duplicates"])),
    ):  # fmt: skip
        summary.add_row(f"[bold]{name}[/bold]", value)
    console.print(summary)
    labels = {word: f"{n['images']} ({n['patients']})" for word, n in card["labels"].items()}
    counted = {name: card[name] for name in ("modalities", "views", "sites", "splits", "photometric")}
    tables = [
        _words(name, rows) for name, rows in {"labels: images (patients)": labels, **counted}.items() if any(rows)
    ]
    console.print(Columns(tables, padding=(1, 3)))
    if card["quarantine"]:
        console.print(_quarantine(card["quarantine"]))
        console.print(f"each by its id: [bold]{escape(str(folder / QUARANTINE))}[/bold]", soft_wrap=True)
        console.print(f"the file of an id: [bold]{escape(program)} cohort which DIR ID[/bold]")
    if in_colour(card):
        console.print(
            "most images are stored in colour and read as grey; if colour tells something: --channels 3 here, "
            "channels = 3 under \\[images] in a study"
        )
    for warning in card["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")


def bars(histogram: list[float]) -> str:
    """A histogram as a line of block characters; whatever is above zero shows.

    >>> bars([0.0, 0.1, 0.4, 0.8])
    ' ▁▄█'
    """
    top = max(histogram)
    return "".join(BLOCKS[max(round(8 * part / top), part > 0)] for part in histogram)


def _words(title: str, rows: Mapping[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(min_width=len(title), max_width=36, overflow="fold")
    table.add_column(justify="right")
    for word, count in list(rows.items())[:LISTED]:
        table.add_row(escape(word) or "[dim](none)[/dim]", str(count))
    if len(rows) > LISTED:
        table.add_row(f"[dim]… {len(rows) - LISTED} more[/dim]", "")
    return table


def _quarantine(counts: Mapping[str, int]) -> Table:
    table = Table(
        title="quarantine", title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
    table.add_column(justify="right")
    table.add_column(no_wrap=True, style="yellow")
    table.add_column()
    for reason, count in counts.items():
        table.add_row(str(count), reason, MEANING[Reason(reason)])
    return table
