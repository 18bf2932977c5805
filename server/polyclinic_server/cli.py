"""`polyclinic coordinator`: make a coordinator, enrol sites, keep it running, launch studies. torch loads inside."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from polyclinic.study import Study
    from polyclinic_server.home import Home

FOLLOW_S = 0.5
HomeDir = Annotated[Path, typer.Option("--home", help="The coordinator's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the group `coordinator`."""
    group = typer.Typer(no_args_is_help=True, help="Lead a consortium: enrol hospitals, launch studies.")
    for command in (init, renew, enrol, revoke, start, launch, status, stop, report, export):
        group.command()(command)
    app.add_typer(group, name="coordinator")


def init(
    address: Annotated[str, typer.Option(help="host:port at which hospitals reach this machine.")],
    name: Annotated[str, typer.Option(help="Of this coordinator, in its certificates.")] = "coordinator",
    listen: Annotated[str | None, typer.Option(help="address:port to bind here. Default: all, same port.")] = None,
    superlink_port: Annotated[int, typer.Option(help="On loopback, for Flower.", min=1, max=65_534)] = 8000,
    web_port: Annotated[int, typer.Option(help="On loopback, for the page.", min=1, max=65_535)] = 8080,
    health_port: Annotated[
        int, typer.Option(help="On loopback, for Flower's health. Default: after --superlink-port.", min=0, max=65_535)
    ] = 0,
    home: HomeDir = Path("coordinator"),
) -> None:
    """Make a coordinator: its own authority, this machine's certificate, the gateway's configuration.

    Example:

      polyclinic coordinator init --address polyclinic.example.org:443
    """
    from pydantic import TypeAdapter, ValidationError

    from polyclinic.enrolment import Address
    from polyclinic.errors import Refused
    from polyclinic.settings import Name
    from polyclinic_server.home import Settings, make_home

    try:
        TypeAdapter(Name).validate_python(name)
        for given in [address, listen or address]:
            TypeAdapter(Address).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(f"{first['input']!r} will not do", str(first["ctx"]["error"])) from error
    host, _, port = address.rpartition(":")
    bound, hosts = listen or f"0.0.0.0:{port}", [host.strip("[]")]
    made = make_home(home, Settings(name, address, bound, superlink_port, hosts, web_port, health_port))
    print(f"{made.path}\nnext: polyclinic coordinator start; open port {port} to the hospitals, and no other")


def renew(home: HomeDir = Path("coordinator")) -> None:
    """Give this machine a new certificate, from the same authority: hospitals need not be told. Then start again."""
    from polyclinic_server.home import Home
    from polyclinic_server.home import renew as renew_certificate
    from polyclinic_server.pki import days_left

    found = Home(home)
    renew_certificate(found.path, found.settings)
    print(f"valid for {days_left((found.path / 'server.crt').read_bytes())} days; start the coordinator again")


def enrol(
    request: Annotated[Path, typer.Argument(help="The request file that the hospital sent.")],
    fingerprint: Annotated[
        str | None, typer.Option(help="That the hospital reads out; without it, you are asked to compare.")
    ] = None,
    patients: Annotated[int, typer.Option(help="For how many the site may count at most.", min=1, max=65_536)] = 65_536,
    to: Annotated[Path | None, typer.Option(help="The answer. Default: join-NAME.json")] = None,
    home: HomeDir = Path("coordinator"),
) -> None:
    """Enrol a hospital: compare the fingerprint of its key over the telephone, then send back the answer.

    Example:

      polyclinic coordinator enrol request-north.json
    """
    from polyclinic.enrolment import Request, read_file
    from polyclinic.errors import Refused
    from polyclinic.files import write_atomic
    from polyclinic_server.home import Home

    found, asked = Home(home), read_file(request, Request)
    print(f"site {asked.name}, version {asked.version}; the fingerprint of its key:\n{asked.fingerprint}")
    if fingerprint is None and not typer.confirm("Does the hospital read out the same fingerprint?"):
        raise Refused("not enrolled", "ask the hospital for its request again")
    if fingerprint not in (None, asked.fingerprint):
        raise Refused(f"the key's fingerprint is {asked.fingerprint}", "ask the hospital for its request again")
    answer = found.enrol(asked, patients)
    path = to or Path(f"join-{asked.name}.json")
    write_atomic(path, answer.model_dump_json(indent=2))
    print(
        f"send back: {path}; the site compares the fingerprint of this coordinator's authority:\n{answer.fingerprint}"
    )


def revoke(site: Annotated[str, typer.Argument(help="The site's name.")], home: HomeDir = Path("coordinator")) -> None:
    """Let a site take no part any more. While the coordinator runs, within seconds; its name is not given again."""
    from polyclinic_server.home import Home

    print(f"{Home(home).revoke(site).name} is revoked")


def start(home: HomeDir = Path("coordinator")) -> None:
    """Run SuperLink, the gateway, the page that shows what goes on, and whatever study is launched.

    Until told to stop (Ctrl-C, SIGTERM).
    """
    import logging

    from polyclinic_server.home import Home
    from polyclinic_server.supervisor import Supervisor

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    Supervisor(Home(home)).run()


def launch(
    study: Annotated[Path, typer.Argument(help="The study file.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    follow: Annotated[bool, typer.Option(help="Show rounds as they close; Ctrl-C leaves the study running.")] = True,
    home: HomeDir = Path("coordinator"),
) -> None:
    """Run a study at the enrolled hospitals: shows what it will do, asks, and follows it.

    Example:

      polyclinic coordinator launch study.toml
    """
    from polyclinic.errors import Refused
    from polyclinic.study import load_study
    from polyclinic_server.home import Home

    found, read = Home(home), load_study(study)
    seats = {name: site.patients for name, site in found.sites().items() if not site.revoked}
    if found.wanted is not None:
        raise Refused(f"{found.wanted.name} is running", "wait for it, or: polyclinic coordinator stop")
    if len(seats) < read.aggregation.min_sites:
        raise Refused(
            f"{len(seats)} sites are enrolled, and the study asks for {read.aggregation.min_sites}",
            "enrol more, or lower aggregation.min_sites",
        )
    for line in [*_preview(read, seats), _online(found, seats)]:
        print(line)
    if not yes and not typer.confirm("Launch it?"):
        raise Refused("not launched", "launch it when you are ready")
    run = _prepare(found, read, seats)
    found.want(run)
    print(f"launched: {run}")
    if follow:
        _follow(run)


def _preview(study: "Study", seats: dict[str, int]) -> Iterator[str]:
    """What a study will do, before anything is asked of a site."""
    from polyclinic.artifacts import first_tensors
    from polyclinic.report.words import plural

    tensors = first_tensors(study)
    size = sum(value.nbytes for value in tensors.values()) / 1e6
    stages = ", then ".join(f"{stage.rounds} rounds of {stage.method}" for stage in study.stages)
    yield f"{study.name} ({study.hash}): {stages}"
    yield f"at {plural(len(seats), 'site')}: {', '.join(seats)}"
    figures = "and its metrics" if study.privacy.mode == "none" else "and no figure of patients, no loss and no AUC"
    yield f"each round sends every site {size:.1f} MB and takes as much back: {len(tensors)} tensors, {figures}"
    if study.privacy.mode != "none":
        promise = study.privacy
        whose = "patients, made at the sites" if promise.mode == "patient" else "whole sites, made here"
        yield (
            f"differential privacy of {whose}: noise {promise.noise:g}, clip {promise.clip:g}, at most epsilon "
            f"{promise.epsilon:g} at delta {promise.delta:g}; see polyclinic privacy plan"
        )
    yield f"a round closes when all have answered, or after {study.aggregation.round_deadline_s / 60:.0f} minutes"


def _online(home: "Home", seats: dict[str, int]) -> str:
    """Who could begin at once."""
    from polyclinic_server.overview import overview

    facts = overview(home)
    here = [name for name in seats if facts.sites[name].online]
    gone = [name for name in seats if facts.sites[name].online is False]
    if not here and not gone:
        return "online now: not known, since " + (
            "no site is registered yet" if facts.superlink else "SuperLink is down"
        )
    return f"online now: {', '.join(here) or 'nobody'}" + (f"; not: {', '.join(gone)}" if gone else "")


def _prepare(home: "Home", study: "Study", seats: dict[str, int]) -> Path:
    """A run directory with the study and the sites."""
    from polyclinic.files import write_atomic
    from polyclinic.study import resolve
    from polyclinic_server.rundir import RunDir

    for number in count(1):
        path = home.path / "runs" / f"{study.name}-{number}"
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
            break
    plain = study.model_dump(mode="json", exclude={"simulation"})
    run = RunDir(path)
    run.create(resolve(plain))
    write_atomic(path / "seats.json", json.dumps(seats))
    run.event("launched", hash=study.hash, sites=list(seats))
    return path


def _follow(run: Path) -> None:
    """Print what happens, until the run has ended."""
    from polyclinic.errors import Interrupted, PolyclinicError

    at = 0
    try:
        while True:
            lines = (run / "events.jsonl").read_text().splitlines()
            for event in map(json.loads, lines[at:]):
                if text := _line(event):
                    print(text, flush=True)
                if event["event"] == "run_reported":
                    print(f"report: {run / 'report.html'}")
                    return
                if event["event"] == "run_stopped":
                    return
                if event["event"] == "run_failed":
                    raise PolyclinicError(event["problem"], event["fix"])
            at = len(lines)
            time.sleep(FOLLOW_S)
    except KeyboardInterrupt:
        raise Interrupted("the study goes on", "see it with: polyclinic coordinator status --follow") from None


def _line(event: dict[str, Any]) -> str:
    """An event in words; "" for those that are of no interest to who follows."""
    name = event["event"]
    if name == "round_closed":
        loss = f"loss {event['loss']:.3f}, " if "loss" in event else ""  # withheld under differential privacy
        return f"round {event['round']}: {loss}{event['accepted']} sites, {event['seconds']:.1f} s"
    if name == "update_refused":
        return f"round {event['round']}: {event['site']} left out: {event['reason']}"
    if name == "site_found":
        return f"{event['site']} is here" + ("" if event["approved"] else ", and has not approved the study yet")
    if name == "site_lost":
        return f"round {event['round']}: {event['site']} is gone for now; it is asked again when it is back"
    if name == "site_missing":
        return f"round {event['round']}: {event['site']} has not answered"
    if name == "run_interrupted":
        return f"interrupted: {event['problem']}; it goes on by itself"
    plain = {"submitted": "handed to Flower", "run_resumed": "goes on from its last checkpoint"}
    return plain.get(name, event.get("text", "") if name == "warning" else "")


def status(
    follow: Annotated[bool, typer.Option("--follow", help="Go on showing rounds.")] = False,
    as_json: Json = False,
    home: HomeDir = Path("coordinator"),
) -> None:
    """Show the sites, the study that runs or ran last, and what somebody should see to."""
    from dataclasses import asdict

    from polyclinic_server.display import show
    from polyclinic_server.home import Home
    from polyclinic_server.overview import overview

    found = Home(home)
    facts = overview(found)
    if as_json:
        print(json.dumps(asdict(facts), indent=2))
        return
    show(facts)
    if follow and found.wanted is not None:
        _follow(found.wanted)


def stop(home: HomeDir = Path("coordinator")) -> None:
    """Stop the running study. What is finished is kept; it is not gone on with."""
    from polyclinic.errors import Refused
    from polyclinic_server.home import Home
    from polyclinic_server.rundir import last_event
    from polyclinic_server.supervisor import stop_run

    found = Home(home)
    if (run := found.launched) is None:
        raise Refused("no study is running", "see polyclinic coordinator status")
    ended = last_event(run) in ("run_reported", "run_failed")
    stop_run(found, run)
    print(f"{'it had ended before' if ended else 'stopped'}: {run}")


RunName = Annotated[str | None, typer.Argument(help="Its folder's name under runs/. Default: the run launched last.")]


def report(run: RunName = None, home: HomeDir = Path("coordinator")) -> None:
    """Say where a run's report is; of a run that has not ended, write one of what is there so far.

    Example:

      polyclinic coordinator report
    """
    from polyclinic_server.home import Home
    from polyclinic_server.rundir import last_event

    found = _chosen(Home(home), run)
    if last_event(found) != "run_reported" or not (found / "report.html").exists():
        from polyclinic.report import render_report

        render_report(found)
        print(f"{found.name} has not finished: this is what is there so far", file=sys.stderr)
    print(found / "report.html")


def export(
    to: Annotated[Path, typer.Option(help="A new folder for the encoder, its model card and the report.")],
    run: RunName = None,
    home: HomeDir = Path("coordinator"),
) -> None:
    """Copy what others need from a finished run, as `polyclinic export` does.

    Example:

      polyclinic coordinator export --to chest-encoder
    """
    from polyclinic.cli import run as command
    from polyclinic.errors import Refused
    from polyclinic_server.home import Home
    from polyclinic_server.rundir import last_event

    found = _chosen(Home(home), run)
    if last_event(found) != "run_reported":
        raise Refused(f"{found.name} has not finished", "wait for its last round: polyclinic coordinator status")
    raise typer.Exit(command(["export", str(found), "--to", str(to)]))


def _chosen(home: "Home", name: str | None) -> Path:
    from polyclinic.errors import Refused

    run = home.path / "runs" / Path(name).name if name else home.latest
    if run is None or not (run / "study.toml").is_file():
        raise Refused(
            f"there is no run {name}" if name else "no study has been launched", "see polyclinic coordinator status"
        )
    return run
