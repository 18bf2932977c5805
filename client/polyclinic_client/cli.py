"""`polyclinic site`: make a site, join a consortium, approve studies, keep the node running. torch loads inside."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

HomeDir = Annotated[Path, typer.Option("--home", help="The site's folder.")]


def register(app: typer.Typer) -> None:
    """Add the group `site`."""
    group = typer.Typer(no_args_is_help=True, help="Take part in a consortium: one folder, outbound connections only.")
    for command in (init, join, doctor, firewall, approve, withdraw, start, status):
        group.command()(command)
    book = typer.Typer(invoke_without_command=True, help="What has left this site, and what of privacy is spent.")
    book.callback()(ledger)
    book.command("show")(show_ledger)
    book.command("verify")(verify_ledger)
    group.add_typer(book, name="ledger")
    app.add_typer(group, name="site")


def init(
    name: Annotated[str, typer.Option(help="What the coordinator is to call this site.")],
    data: Annotated[Path, typer.Option(help="The images: read, never written to.")],
    home: HomeDir = Path("site"),
) -> None:
    """Make a site: its key, site.toml with every setting explained, and the request to send to the coordinator.

    Example:

      polyclinic site init --name north --data /mnt/images
    """
    from pydantic import TypeAdapter, ValidationError

    from polyclinic.errors import Refused
    from polyclinic.settings import Name
    from polyclinic_client.hospital import make_hospital

    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise Refused(f"{name[:64]!r} is no name of a site", str(error.errors()[0]["ctx"]["error"])) from error
    request = make_hospital(home, name, data)
    print(f"send {home / 'request.json'} to the coordinator, and read out this fingerprint when they call:")
    print(request.fingerprint)
    print("next: polyclinic site join ANSWER")


def join(
    answer: Annotated[Path, typer.Argument(help="The file that the coordinator sent back.")],
    home: HomeDir = Path("site"),
) -> None:
    """Keep the coordinator's answer: its address, its certificate, the one bundle that may run here."""
    from polyclinic_client.hospital import Hospital

    found = Hospital(home).join(answer)
    print(f"{found.name} may speak to {found.coordinator} at {found.address}, whose authority has the fingerprint")
    print(f"{found.fingerprint}\ncompare it with the coordinator's; next: polyclinic site start")


def doctor(
    study: Annotated[
        Path | None, typer.Option("--study", help="Also try this study on the site's images: pace and memory.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    home: HomeDir = Path("site"),
) -> None:
    """Check whether this site can take part: PASS, WARN or FAIL, each with what to do. Exit code 1 if one fails.

    With a study, a few batches of it are trained and thrown away: nothing of that is kept, and nothing leaves.
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape

    from polyclinic_client.doctor import examine

    found, console = [], Console(highlight=False)
    colours = {"PASS": "green", "WARN": "yellow", "FAIL": "red"}
    for finding in examine(home, study):
        found.append(finding)
        if not as_json:
            mark = f"[{colours[finding.level]}]{finding.level}[/]"
            console.print(f"{mark}  {finding.check}: {escape(finding.found)}", soft_wrap=True)
            if finding.fix:
                console.print(f"      fix: {escape(finding.fix)}", soft_wrap=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    if any(finding.level == "FAIL" for finding in found):
        raise typer.Exit(1)


def firewall(home: HomeDir = Path("site")) -> None:
    """Print one page for the firewall team: which connection this machine needs, to where, and what for."""
    from polyclinic.errors import Refused
    from polyclinic_client.doctor import firewall_note
    from polyclinic_client.hospital import Hospital

    joined = Hospital(home).joined
    if joined is None:
        raise Refused("the coordinator has not answered yet", "then: polyclinic site join join-NAME.json")
    print(firewall_note(joined), end="")


def approve(
    study: Annotated[Path, typer.Argument(help="The study file, as the coordinator gave it out.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and approve only together with --yes.")] = False,
    home: HomeDir = Path("site"),
) -> None:
    """Say in plain words what a study will do here, ask, and record the approval.

    A few batches are trained and thrown away, to say how long a round will take.

    Example:

      polyclinic site approve study.toml
    """
    from polyclinic.cohort.cli import progress_bar
    from polyclinic.errors import Refused
    from polyclinic.study import load_study
    from polyclinic_client.hospital import Hospital
    from polyclinic_client.preview import preview

    hospital, read = Hospital(home), load_study(study)
    hospital.settings.policy.check(read)  # before its images are read
    with progress_bar(shown=sys.stderr.isatty()) as progress:
        cohort = hospital.cohort_for(read, progress)
    seen = preview(hospital, read, cohort)
    if not as_json:
        print("\n".join(seen.words()))
        if not yes and not typer.confirm("Approve it?"):
            raise Refused("not approved", "nothing runs")
    found = hospital.approve(read, cohort) if yes or not as_json else None
    approved = {"by": found.by, "at": found.approved} if found else None
    if as_json:
        print(json.dumps({**seen.plain(), "approved": approved}, indent=2))
    elif found:
        print(f"approved by {found.by} at {found.approved}: {read.hash}")


def withdraw(study: Annotated[str, typer.Argument(help="The study's hash.")], home: HomeDir = Path("site")) -> None:
    """Take an approval back: the study's next message is refused, and what was kept for it here is removed."""
    from polyclinic_client.hospital import Hospital

    Hospital(home).withdraw(study)
    print(f"{study} may not run here any more")


def start(home: HomeDir = Path("site")) -> None:
    """Run the node until told to stop (Ctrl-C, SIGTERM). Only outbound connections, to the coordinator."""
    import logging

    from polyclinic_client.agent import run_agent
    from polyclinic_client.hospital import Hospital

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    run_agent(Hospital(home))


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, home: HomeDir = Path("site")
) -> None:
    """Show what the site knows: its node, the studies that it approved, the last answer, the policy in words."""
    from polyclinic_client.hospital import Hospital
    from polyclinic_client.overview import in_words, overview

    facts = overview(Hospital(home))
    print(json.dumps(facts, indent=2) if as_json else "\n".join(in_words(facts)))


def ledger(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    home: HomeDir = Path("site"),
) -> None:
    """Show what studies have spent of the patients' privacy, and what is left; `show` lists what has left the site.

    Examples:

      polyclinic site ledger

      polyclinic site ledger show --csv > outbound.csv
    """
    if context.invoked_subcommand is not None:
        if home != Path("site"):
            from polyclinic.errors import Refused

            raise Refused("--home stands before the command", f"polyclinic site ledger show --home {home}")
        return
    from polyclinic_client.hospital import Hospital
    from polyclinic_client.overview import spending, spending_words

    facts = spending(Hospital(home))
    print(json.dumps(facts, indent=2) if as_json else "\n".join(spending_words(facts)))


def show_ledger(
    as_json: Annotated[bool, typer.Option("--json", help="Every entry whole, one JSON object a line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="A line an entry, for the privacy officer.")] = False,
    home: HomeDir = Path("site"),
) -> None:
    """Show what has left this site: when, to whom, for which study, how much.

    Examples:

      polyclinic site ledger show

      polyclinic site ledger show --csv > outbound.csv
    """
    from polyclinic_client.hospital import Hospital

    ledger = Hospital(home).ledger
    if as_csv:
        print(ledger.to_csv(), end="")
        return
    for entry in ledger.entries():
        if as_json:
            print(json.dumps(entry))
            continue
        what = f"round {entry['round']} of {entry['study'][:16]}, " if "study" in entry else ""
        size = f"{len(entry['tensors'])} tensors, {entry['bytes'] / 1e6:.1f} MB" if "tensors" in entry else "no tensors"
        print(f"{entry['entry']:>6}  {entry['time']}  {entry['kind']}: {what}{entry.get('error', size)}")


def verify_ledger(home: HomeDir = Path("site")) -> None:
    """Check that no entry of either ledger was changed, removed, added or moved since it was written."""
    from polyclinic_client.hospital import Hospital

    hospital = Hospital(home)
    print(f"what has left: {hospital.ledger.verify()} entries, each after the one before")
    print(f"privacy spent: {hospital.spending.verify()} entries, each after the one before")
