"""`polyclinic cohort`: look at a cohort before anything is trained on it."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import typer

from polyclinic.errors import Refused

Window = Literal["percentile", "voi"] | tuple[float, float]
EXAMPLES = """
Examples:

  polyclinic cohort inspect archive/                    DICOM files, or classes

  polyclinic cohort inspect chest/labels.csv --json     a CSV cohort, as JSON

  polyclinic cohort inspect ct/ --window=-600,1500      lung window, HU

  polyclinic cohort inspect ham/ --channels 3 --html card.html
"""


def register(app: typer.Typer) -> None:
    """Add `polyclinic cohort …` to the root command."""
    group = typer.Typer(help="Look at a site's images: what can be used, what cannot, and why.", no_args_is_help=True)
    group.command("inspect", epilog=EXAMPLES)(inspect)
    group.command("which")(which)
    app.add_typer(group, name="cohort")


State = Annotated[Path, typer.Option(help="Directory of caches, quarantine lists and the key of the patient hashes.")]


def inspect(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of images, or a CSV file with labels.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON, and nothing else.")] = False,
    state: State = Path(".polyclinic"),
    size: Annotated[int, typer.Option(help="Side of the cached square images, pixels.")] = 96,
    channels: Annotated[int, typer.Option(help="1 for grey, 3 for colour.")] = 1,
    window: Annotated[str, typer.Option(help="percentile, voi, or CENTRE,WIDTH in HU.")] = "percentile",
    html: Annotated[Path | None, typer.Option(help="Write the card to this HTML file as well.")] = None,
    allow_burned_in: Annotated[
        bool,
        typer.Option(
            "--allow-burned-in", help="Use ultrasound, secondary captures and files marked as annotated, too."
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read files; one a processor by default.")
    ] = None,
) -> None:
    """Build a cohort and print its data-fitness card: what is in it, what was put aside, and why.

    A cohort is a folder with labels.csv, a folder whose sub-folders are
    classes, or a tree of DICOM files. Columns of the CSV, all but the first
    optional, separated by commas, semicolons or tabs: image (or file), a path
    within its folder; label, several with | between them; patient; site; view;
    scanner; split: train, val or test; sex; age, in years or as DICOM has it.
    Others are not read, and a warning names them.

    Files that cannot be used stop nothing: they are listed, by reason, in quarantine.csv under the state directory.
    A second call reads only files that are new or changed.
    """
    from polyclinic.cohort.build import build_cohort
    from polyclinic.cohort.card import card_html, make_card
    from polyclinic.files import make_folder, write_atomic
    from polyclinic.study import resolve

    images = {"size": size, "channels": channels, "window": _window(window)}
    stage = {"kind": "pretrain", "method": "simclr", "rounds": 1}
    settings = resolve({"study": {"name": "inspect"}, "images": images, "stages": [stage]}, "the options").images
    with progress_bar(shown=not as_json and sys.stderr.isatty()) as progress:
        cohort = build_cohort(
            source, settings, state, workers=workers, progress=progress, allow_burned_in=allow_burned_in
        )
    card = make_card(cohort.folder)
    if html:
        make_folder(html.parent)
        write_atomic(html, _PAGE.format(card=card_html(card)))
    if as_json:
        print(json.dumps(card, indent=2, ensure_ascii=False))
    else:
        from polyclinic.cohort.show import show_card

        show_card(card, cohort.folder, click.get_current_context().find_root().info_name or "polyclinic")


def which(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="The cohort that the id comes from.")],
    identity: Annotated[str, typer.Argument(metavar="ID", help="An id in its quarantine.csv.")],
    state: State = Path(".polyclinic"),
) -> None:
    """Print the file that an id in quarantine.csv stands for. Works only with the state directory that made the id."""
    from polyclinic.cohort.identity import keyed, load_key
    from polyclinic.cohort.scan import locate, scan

    found = scan(locate(source, state))
    key = load_key(state)
    names = [s.relative for s in found.sources if keyed(key, "path", s.relative) == identity]
    if not names:
        raise Refused(
            f"no file of this cohort has the id {identity[:64]!r}", "give the cohort and state that it is from"
        )
    print(found.root / names[0])


def _window(text: str) -> Any:
    """`percentile`, `voi` or [centre, width]; anything else is left for the study's checks to refuse."""
    try:
        return [float(number) for number in text.split(",")] if "," in text else text
    except ValueError:
        return text


@contextmanager
def progress_bar(shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on standard error; nothing where that is not a terminal."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading files"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Cohort card</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }}
.card {{ display: flex; flex-wrap: wrap; gap: 1.5em; align-items: flex-start }}
table {{ border-collapse: collapse }} caption {{ text-align: left; font-weight: 600; white-space: nowrap }}
figure {{ margin: 0 }}
th {{ text-align: left; font-weight: 400; padding-right: 1.5em }} td {{ text-align: right }}
.warning {{ flex-basis: 100%; background: #fff3cd; padding: .5em; margin: 0 }} rect {{ fill: #46627f }}
</style>
<h1>Cohort card</h1>
{card}
</html>
"""
