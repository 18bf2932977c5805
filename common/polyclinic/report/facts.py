"""What the report says in words and tables."""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from polyclinic.evaluation import collapsed
from polyclinic.privacy.statement import Release, released, rounded_up, statement
from polyclinic.report import words
from polyclinic.report.forest import MANY
from polyclinic.report.plots import COLOURS, palette
from polyclinic.report.run import Run

SHOWN = 6
"""Sites whose collapse is told one by one."""

MOST_SITES = 12
"""Whose figures stand beside each other."""


def what_was_trained(run: Run) -> str:
    """The first sentence: stages, encoder, sites."""
    study = run.study
    stages = ", then ".join(
        f"{words.named(words.METHODS, stage.method)} ({rounds})"
        for stage, rounds in zip(study.stages, rounds_of(run), strict=True)
    )
    images = f"{study.images.size} × {study.images.size} {'grey' if study.images.channels == 1 else 'colour'} images"
    encoder = f"{words.named(words.ENCODERS, study.encoder.name)} for {images}"
    counts = [
        words.plural(sum(site[kind] for site in run.sites.values()), kind.removesuffix("s"))
        for kind in ("patients", "images")
        if run.sites and all(kind in site for site in run.sites.values())
    ]
    whose = f" with {words.listed(counts)}{_invented(run)}" if counts else ""
    return f"{stages} of a {encoder}, across {words.plural(len(run.sites), 'site')}{whose}."


def _invented(run: Run) -> str:
    """Whose patients nobody has ever seen."""
    simulation = run.study.simulation
    sites = [site.name for site in simulation.site if site.phantom]
    if simulation.phantom or (sites and len(sites) == len(simulation.site)):
        return ", all of them invented"
    return f", those of {words.listed(sites)} invented" if sites else ""


def rounds_of(run: Run) -> list[str]:
    """How long each stage trained, in words."""
    planned = [stage.rounds for stage in run.study.stages]
    return [
        f"stopped after {run.stopped[k]} of {words.plural(rounds, 'round')}"
        if k in run.stopped
        else words.plural(rounds, "round")
        for k, rounds in enumerate(planned)
    ]


def how_it_was_trained(run: Run) -> str:
    """The second sentence: rounds, rule, privacy."""
    study = run.study
    rule = words.named(words.RULES, study.aggregation.rule)
    weighting = words.named(words.WEIGHTING, study.aggregation.weighting)
    return (
        "In every round each site trained on its own images and sent a weight update, never an image; "
        f"the updates were combined by {rule}, weighted {weighting}, {words.named(words.PRIVACY, study.privacy.mode)}."
    )


def result(run: Run) -> list[tuple[str, str]]:
    """The federated AUC and its gains, as (figure, what it is)."""
    rows = run.comparison
    if "federated" not in rows:
        return []
    ours = rows["federated"]["auc"]
    against = {} if run.mean_alone is None else {f"the mean single site{_best_alone(run)}": run.mean_alone}
    against |= {name: rows[row]["auc"] for row, name in words.AGAINST.items() if row in rows}
    low_high = interval(rows["federated"], " to ")
    meaning = f"95 % interval {low_high}" if low_high else "mean of the sites' own probes"
    gains = [(words.gain(ours - auc), f"against {name}") for name, auc in against.items()]
    return [(f"{ours:.3f}", f"federated AUC, {meaning}"), *gains]


def _best_alone(run: Run) -> str:
    """Of several single sites, the one that did best, which the mean hides."""
    if len(run.alone) < 2:
        return ""
    best, row = max(run.alone.items(), key=lambda item: item[1]["auc"])
    return f"; the best, {best.removeprefix(words.ALONE)}, has {row['auc']:.3f}"


def tested_on(run: Run, table: str) -> str:
    """Of which classes and patients a table of the summary is; "" where that was not noted."""
    measured = run.summary.get("measured", {}).get(table)
    if not measured:
        return ""
    patients, images = words.plural(measured["patients"], "test patient"), words.plural(measured["images"], "image")
    return f"Classes: {words.listed(measured['classes'])}; {patients} with {images}."


def as_long(run: Run) -> str:
    """How long the rows that train were trained; "" where there are none."""
    rows = [name for name, there in (("single sites", run.alone), ("all pooled", "pooled" in run.comparison)) if there]
    own = ", each by its own early stopping" if any(getattr(s, "patience", 0) for s in run.study.stages) else ""
    told = f"{words.listed(rows)} trained for the same rounds and epochs as the federation{own}."
    return told[0].upper() + told[1:] if rows else ""


def interval(row: Mapping[str, float], between: str = " – ") -> str:
    """The 95 % interval of an AUC; "" where nobody could measure it."""
    return f"{row['auc_low']:.3f}{between}{row['auc_high']:.3f}" if "auc_low" in row else ""


def intervals(run: Run) -> bool:
    """Whether any row of the comparison has an interval."""
    return any(map(interval, run.comparison.values()))


def comparison(run: Run) -> list[dict[str, Any]]:
    """The comparison as a table, the mean single site in it; many single sites come last, not to hide the rest."""
    rows = [
        {
            "name": words.row_name(name),
            "kind": name,
            "auc": f"{row['auc']:.3f}",
            "interval": interval(row) or "–",
            "balanced_accuracy": f"{row['balanced_accuracy']:.3f}",
        }
        for name, row in run.comparison.items()
    ]
    floors = [row for row in rows if row["kind"] in ("random", "pixels")]
    alone = [row for row in rows if row["kind"] in run.alone]
    ours = [row for row in rows if row not in floors and row not in alone]
    if run.mean_alone is None:
        return rows
    mean = {"name": "mean single site", "kind": "mean", "auc": f"{run.mean_alone:.3f}"}
    return [*floors, mean, *ours, *alone] if len(alone) > MANY else [*floors, *alone, mean, *ours]


def classifier(run: Run) -> list[dict[str, Any]]:
    """The fine-tuned classifiers as a table; several classes or few, they are read on the same test patients."""
    return [
        {
            "name": words.row_name(name),
            "kind": name,
            "interval": interval(row),
            **{figure: f"{row[figure]:.3f}" for figure in ("auc", "accuracy", "balanced_accuracy", "ece")},
        }
        for name, row in run.summary.get("classifier", {}).items()
    ]


def at_sites(run: Run) -> dict[str, Any]:
    """The comparison site by site: `sites`, those `held_out` last, and `rows` with an AUC for each, or a dash.

    Empty of a run across a network, and where there are too many sites to read.
    """
    told = run.summary.get("profiles", {})
    profiles = {name: told[name] for name in run.comparison if name in told}
    tested: dict[str, int] = next(filter(None, (found.get("patients") for found in profiles.values())), {})
    shown = _by_site(run, {name: found["at_sites"] for name, found in profiles.items()}, tested)
    for row in shown.get("rows", []):
        known = profiles[row["kind"]]["site_auc"]
        row["site_auc"] = "–" if known is None else f"{known:.3f}"
    return shown


def classifier_at_sites(run: Run) -> dict[str, Any]:
    """The fine-tuned classifiers in the same way."""
    return _by_site(run, run.summary.get("classifier_at_sites", {}))


def _by_site(
    run: Run, found: Mapping[str, Mapping[str, float]], tested: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Any]:
    """`found` is {row: {site: AUC}}, `tested` {site: patients that they are measured on}, where that is known."""
    sites = sorted({site for areas in found.values() for site in areas}, key=lambda s: (_away(run, s), s))
    if not 1 < len(sites) <= MOST_SITES:
        return {}
    rows = [
        {
            "name": words.row_name(name),
            "kind": name,
            "areas": [f"{areas[site]:.3f}" if site in areas else "–" for site in sites],
        }
        for name, areas in found.items()
    ]
    titles = [
        f"{site}{' (held out)' * _away(run, site)}"
        + (f", {words.plural(tested[site], 'patient')}" if site in tested else "")
        for site in sites
    ]
    return {"sites": titles, "rows": rows}


def _away(run: Run, site: str) -> bool:
    return site in run.summary.get("held_out", [])


def warnings(run: Run) -> list[str]:
    """What a reader should not miss: the run's own warnings and notes, and signs of collapse."""
    own = Counter(str(event.get("text", "")) for event in run.happened("warning"))
    texts = [f"{text} ({times} times)" if times > 1 else text for text, times in own.items()]
    texts += [str(text) for key in ("warnings", "notes") for text in run.summary.get(key, []) if str(text) not in own]
    return texts + _collapses(run)


def privacy(run: Run) -> str:
    """The paragraph that says what is promised, and what is not."""
    return statement(run.study, {site: run.epsilon.get(site) for site in run.sites})


def spent(run: Run) -> dict[str, str]:
    """{site: epsilon that the study has spent there}, rounded up."""
    return {site: rounded_up(value) for site, value in run.epsilon.items()}


def releases(run: Run) -> list[Release]:
    """All that left the sites, and how it is covered; nothing is listed of a study without differential privacy."""
    return released(run.study)


def _collapses(run: Run) -> list[str]:
    ranks, spreads = (run.metrics.get(metric, {}) for metric in ("effective_rank", "feature_spread"))
    found = []
    for site in ranks.keys() & spreads.keys():
        spread = dict(spreads[site])
        rounds = [
            round
            for round, rank in ranks[site]
            if round in spread and collapsed({"effective_rank": rank, "feature_spread": spread[round]})
        ]
        if rounds:
            when = f"after round {rounds[0]}" if len(rounds) == 1 else f"after {len(rounds)} rounds, first {rounds[0]}"
            who = site or "consortium"
            found.append(f"{who}: features collapsed {when}; the encoder hardly tells images apart")
    return sorted(found)[:SHOWN] + ([f"{len(found) - SHOWN} more sites collapsed"] if len(found) > SHOWN else [])


def sites(run: Run) -> list[dict[str, Any]]:
    """A row for every site: size, what was done to it, part in the rounds, last loss and probe, epsilon spent."""
    # A round that was made again after a resumption counts once, as it went the last time.
    names = ("update_accepted", "update_refused", "site_missing")
    last = {(e.get("round"), str(e.get("site"))): e["event"] for e in run.events if e.get("event") in names}
    parts = {name: Counter(site for (_, site), event in last.items() if event == name) for name in names}
    colours = palette(run.sites)
    return [
        {
            "name": name,
            "colour": colours[name] if len(colours) <= len(COLOURS) else "",
            **facts,
            "rehearsed": _rehearsed(run, name),
            **{event: counts[name] for event, counts in parts.items()},
            **{metric: _last_value(run, metric, name) for metric in ("loss", "probe_auc")},
            "epsilon": spent(run).get(name, ""),
        }
        for name, facts in run.sites.items()
    ]


def _rehearsed(run: Run, site: str) -> str:
    """The shifts and faults that a simulation gives a site."""
    simulation = run.study.simulation
    shifts = [words.of_shift(shift.model_dump()) for shift in simulation.shifts_of(site)]
    return ", ".join(shifts + [words.of_fault(fault.model_dump()) for fault in simulation.faults_of(site).values()])


def missing(run: Run) -> list[dict[str, Any]]:
    """`round`, `site` and `why` of every order that was not answered in time; the why is what a simulation did."""
    told = [*run.happened("site_late"), *run.happened("site_struck")]
    known = {(event["round"], event["site"]): why for event in told if (why := words.absence(event))}
    return [
        {"round": e["round"], "site": e["site"], "why": known.get((e["round"], e["site"]), "no reply in time")}
        for e in run.happened("site_missing")
    ]


def _last_value(run: Run, metric: str, site: str) -> float | None:
    points = run.metrics.get(metric, {}).get(site)
    return points[-1][1] if points else None
