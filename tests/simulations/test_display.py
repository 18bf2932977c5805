"""What a person sees while a study runs."""

import io

from rich.console import Console

from polyclinic_simulations.display import Display, classifier_table, comparison_table


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


def test_a_site_is_missing_for_a_reason_that_a_simulation_knows() -> None:
    said = shown(
        {"event": "site_struck", "round": 2, "site": "north", "faults": ["slow", "dropout"]},
        {"event": "site_late", "round": 2, "site": "south", "arrives_s": 9000.0, "late_s": 7260.0},
        *({"event": "site_missing", "round": 2, "site": site} for site in ("north", "south", "west")),
    )
    assert said.splitlines() == [
        "round 2: north left out: dropped out",
        "round 2: south left out: answered 2 h 1 min late",
        "round 2: west left out: no answer",
    ]


def test_where_nobody_looks_at_bars_a_row_has_a_line_as_it_begins_trains_and_ends() -> None:
    said = shown(
        {"event": "row_started", "row": "pooled", "made": 3, "rows": 4},
        {"event": "run_started", "row": "pooled", "rounds": 20},
        {"event": "round_closed", "row": "pooled", "round": 1, "loss": 2.5},
        {"event": "row_finished", "row": "pooled", "made": 4, "auc": 0.8125, "seconds": 61.25},
    )
    assert said.splitlines() == ["row 4 of 4: pooled", "  training pooled: 20 rounds", "row pooled: AUC 0.812, 61.2 s"]


def test_a_rows_rounds_are_counted_on_a_bar_that_is_used_again() -> None:
    display = Display()
    for row, rounds in (("alone:north", 20), ("pooled", 10)):
        display.event({"event": "run_started", "row": row, "rounds": rounds})
        display.event({"event": "round_closed", "row": row, "round": 7, "loss": 2.5})
    [bar] = display._bars.tasks
    assert (bar.description, bar.completed, bar.total) == ("  training pooled, loss 2.500", 7, 10)


def test_a_tables_title_says_of_which_classes_and_patients_it_is() -> None:
    measured = {"classes": [f"[c{k}]" for k in range(10)], "patients": 48, "images": 96}
    for table in (comparison_table({}, measured), classifier_table({}, measured)):
        console = Console(file=io.StringIO(), width=200)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        said = " ".join(console.file.getvalue().split())
        assert "[c0], [c1]" in said
        assert "[c7] and 2 more: 48 test patients, 96 images" in said


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


def test_sites_are_counted_as_they_are_found_and_as_they_answer() -> None:
    display = Display()
    sites = [f"site-{n}" for n in range(1, 4)]
    for site in sites:
        display.event({"event": "site_found", "site": site})
    [bar] = display._bars.tasks
    assert (bar.description, bar.completed) == ("  sites found", 3)
    display.event({"event": "round_started", "round": 2, "sites": sites})
    display.event({"event": "update_accepted", "round": 2, "site": "site-1"})
    display.event({"event": "update_refused", "round": 2, "site": "site-2", "reason": "late"})
    display.event({"event": "round_started", "row": "pooled", "round": 1, "sites": ["pooled"]})
    assert (bar.description, bar.completed, bar.total) == ("  sites of round 2", 2, 3)
