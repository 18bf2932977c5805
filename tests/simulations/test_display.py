"""What a person sees while a study runs."""

import io

from rich.console import Console

from polyclinic_simulations.display import Display


def shown(*events: dict[str, object]) -> str:
    """What a display writes where nobody looks at bars."""
    display = Display()
    display.console = Console(file=io.StringIO(), width=100)
    with display:
        for event in events:
            display.event(event)
    assert isinstance(display.console.file, io.StringIO)
    return display.console.file.getvalue()


def test_what_others_wrote_is_shown_as_it_is() -> None:
    hostile = "[/yellow][bold]all is well[/bold] [link=http://x]"
    assert hostile in shown({"event": "warning", "text": hostile})
    assert hostile in shown({"event": "update_refused", "round": 1, "site": "north", "reason": hostile})


def test_rows_are_counted() -> None:
    display = Display()
    for event in (
        {"event": "row_started", "row": "pixels", "made": 0, "rows": 6},
        {"event": "row_finished", "row": "pixels", "made": 1, "auc": 0.5},
        {"event": "row_started", "row": "random", "made": 1, "rows": 6},
    ):
        display.event(event)
    bar = display._bars.tasks[0]
    assert (bar.description, bar.completed, bar.total) == ("row random", 1, 6)
