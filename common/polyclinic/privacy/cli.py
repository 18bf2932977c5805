"""`polyclinic privacy`: what a study would spend, before anything runs."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyclinic.errors import Refused

if TYPE_CHECKING:
    from polyclinic.privacy.accounting import Event
    from polyclinic.study import PatientPrivacy, SitePrivacy, Study

EXAMPLES = """
Examples:

  polyclinic privacy plan study.toml --patients 840     a site that trains on 840 patients

  polyclinic privacy plan study.toml --sites 12         a study with privacy.mode "site"

  polyclinic privacy plan study.toml --patients 840 --delta 1e-6 --json
"""
WEIGHTS = 1_000_000
"""For the sentence on few sites; the smallest encoder that a study can name has more."""


def register(app: typer.Typer) -> None:
    """Add `polyclinic privacy …` to the root command."""
    group = typer.Typer(help="Differential privacy: what a study would spend.", no_args_is_help=True)
    group.callback()(lambda: None)  # else a group of one command is that command
    group.command("plan", epilog=EXAMPLES)(plan)
    app.add_typer(group, name="privacy")


def plan(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="The study file, TOML.")],
    patients: Annotated[
        int | None, typer.Option(min=1, help="Patients that the site trains on: those of the test split do not count.")
    ] = None,
    sites: Annotated[int | None, typer.Option(min=1, help='Sites that take part, for privacy.mode "site".')] = None,
    delta: Annotated[float | None, typer.Option(help="Instead of the study's: a site has one for its ledger.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, and nothing else.")] = False,
) -> None:
    """Print the epsilon that a study's noise is worth, the noise that its cap would need, and the rounds that fit.

    With privacy.mode "patient" it depends on how many patients the site trains
    on: all but the test split, and of these only a stage's label_fraction,
    where it has one. A site whose stages have different numbers plans with the
    least. What the site has spent in other studies is not in it: its ledger
    adds that.
    """
    from polyclinic.study import load_study

    study = load_study(file)
    privacy = study.privacy
    if privacy.mode == "none":
        raise Refused(
            f"the study {study.name!r} promises no differential privacy, so nothing is spent or kept",
            'add [privacy] with mode = "patient" (or "site"), noise, clip, epsilon and delta to it',
        )
    if privacy.mode == "site":
        found = _of_sites(study, privacy, sites, delta)
    else:
        found = _of_patients(study, privacy, patients, delta)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def _of_patients(
    study: "Study", privacy: "PatientPrivacy", patients: int | None, delta: float | None
) -> dict[str, Any]:
    from polyclinic.privacy.dpsgd import event_of_round

    if patients is None:
        raise Refused("privacy.mode is 'patient', and epsilon depends on the patients of a site", "give --patients N")
    rounds = [event_of_round(privacy, patients, stage) for stage in study.stages]
    return {"mode": "patient", "patients": patients, **_worth(study, privacy, rounds, patients, delta)}


def _of_sites(study: "Study", privacy: "SitePrivacy", sites: int | None, delta: float | None) -> dict[str, Any]:
    from polyclinic.privacy.accounting import Event

    if sites is None:
        raise Refused("privacy.mode is 'site', and what is left to learn depends on the sites", "give --sites N")
    rounds = [Event(privacy.noise, 1.0, 1)] * len(study.stages)
    worth = _worth(study, privacy, rounds, sites, delta)
    return {"mode": "site", "sites": sites, **worth, "meaning": _few_sites(sites, privacy.noise)}


def _worth(
    study: "Study", privacy: "PatientPrivacy | SitePrivacy", rounds: list["Event"], units: int, delta: float | None
) -> dict[str, Any]:
    """The plan of a study in which a round of each stage is one of `rounds`, for as many patients (or sites)."""
    from polyclinic.privacy.accounting import epsilon
    from polyclinic.privacy.ledger import check_delta

    delta = privacy.delta if delta is None else delta
    check_delta(delta, units)
    whole = [
        replace(event, steps=event.steps * stage.rounds) for event, stage in zip(rounds, study.stages, strict=True)
    ]
    stages = [
        {"method": stage.method, "rounds": stage.rounds, "rate": event.rate, "steps": event.steps * stage.rounds}
        | {"epsilon": epsilon(whole[: number + 1], delta)}
        for number, (stage, event) in enumerate(zip(study.stages, rounds, strict=True))
    ]
    return {
        "delta": delta,
        "noise": privacy.noise,
        "clip": privacy.clip,
        "stages": stages,
        "epsilon": epsilon(whole, delta),
        "epsilon_prv": epsilon(whole, delta, "prv"),
        "cap": privacy.epsilon,
        "noise_needed": _least_noise(privacy.epsilon, delta, whole),
        "rounds": study.rounds,
        "rounds_that_fit": _fitting(study, privacy.epsilon, delta, rounds, whole),
    }


def _fitting(study: "Study", cap: float, delta: float, rounds: list["Event"], whole: list["Event"]) -> int:
    """Rounds under the cap, in the study's order, and beyond its end as those of its last stage."""
    from polyclinic.privacy.accounting import rounds_that_fit

    done = 0
    for number, (stage, event) in enumerate(zip(study.stages, rounds, strict=True)):
        fit = rounds_that_fit(cap, delta, event, whole[:number])
        if fit < stage.rounds:
            return done + fit
        done += stage.rounds
    return done + rounds_that_fit(cap, delta, rounds[-1], whole)


def _least_noise(cap: float, delta: float, whole: list["Event"]) -> float | None:
    from polyclinic.privacy.accounting import noise_for_all

    try:
        return noise_for_all(cap, delta, whole)
    except Refused:
        return None


def _show(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    unit = "patients" if found["mode"] == "patient" else "sites"
    console.print(f"{found[unit]} {unit}, noise {found['noise']:g}, clip {found['clip']:g}, delta {found['delta']:g}\n")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("stage", "rounds", "rate", "steps", "epsilon after it"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in found["stages"]:
        row = (f"{stage['rounds']}", f"{stage['rate']:.3g}", f"{stage['steps']}", f"{stage['epsilon']:.3f}")
        table.add_row(stage["method"], *row)
    console.print(table)
    needed = f"{found['noise_needed']:g}" if found["noise_needed"] is not None else "more than a study may ask for"
    fits = "keeps to" if found["epsilon"] <= found["cap"] else "passes"
    beyond = "; more count as its last" if found["rounds_that_fit"] > found["rounds"] else ""
    console.print(f"\nThe study {fits} its cap of epsilon {found['cap']:g}:")
    console.print(f"  epsilon of all of it          {found['epsilon']:.3f} (numerical: {found['epsilon_prv']:.3f})")
    console.print(f"  noise that the cap asks for   {needed}")
    console.print(f"  rounds under the cap          {found['rounds_that_fit']} (it has {found['rounds']}{beyond})")
    if found["mode"] == "site":
        console.print(f"\n{found['meaning']}")


def _few_sites(sites: int, noise: float) -> str:
    times = WEIGHTS**0.5 * noise / sites
    return (
        f"Epsilon does not depend on the number of sites; what can be learned does. With {sites}, the noise on the "
        f"mean of their updates has a standard deviation of {noise / sites:.2g} clip in every weight: over a million "
        f"weights it is {times:,.3g} times as long as the longest update that clip lets through. For few sites, use "
        "privacy.mode 'patient'."
    )
