"""Leave one site out: what pretraining is worth to a hospital that took no part in it.

Azizi et al., REMEDIS, Nat Biomed Eng 2023, in a federation. Each site in turn is the new hospital; the others make
three starts, which share their fine-tuning stages and differ in the encoder that these begin from:

    pretrained   the study's pretrain stages at the other sites
    joined       the same with the new hospital's training images, of which no label is read
    supervised   none: the study's initial weights, random or a file's

Each start is fine-tuned at the other sites, measured there (in distribution) and on the new hospital's test patients
as it is (zero-shot: a fraction of 0), and fine-tuned there with ever more of its labels.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from polyclinic.artifacts import save_encoder
from polyclinic.errors import CohortError, Collapsed, StudyError
from polyclinic.evaluation import ClassifierScores
from polyclinic.files import write_atomic
from polyclinic.model import encoder_of
from polyclinic.privacy.dpsgd import sampling_rate
from polyclinic.report import read_run
from polyclinic.stages import UNPAIRED, Finetune
from polyclinic.study import PatientPrivacy, Study, load_study, resolve
from polyclinic.wire import Tensors
from polyclinic_client.site import Site
from polyclinic_client.work import Progress
from polyclinic_server.rundir import Listener, RunDir
from polyclinic_simulations.checks import check_stages
from polyclinic_simulations.compare import classify, train_row, without_pretraining
from polyclinic_simulations.consortium import Progress as Reading
from polyclinic_simulations.consortium import gather, settle
from polyclinic_simulations.holdout_page import render_holdout
from polyclinic_simulations.simulate import HOLDOUT, claimed, who_is_tested
from polyclinic_simulations.tidy import keep_newest, tidy

FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.33, 0.5, 1.0)
STARTS = ("pretrained", "joined", "supervised")
EVERY = "every row"
"""In place of a row's scope: a start that could not be made costs them all."""
SITES = "sites"
"""In a training's folder: what its sites keep of it."""


def leave_one_site_out(
    study: Study,
    out: Path,
    data: Path,
    state: Path,
    *,
    resume: bool = False,
    listen: Listener | None = None,
    reading: Reading = lambda what, done, total: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the protocol into the run directory `out`; returns the summary, which stands in summary.json too.

    Raises:
        StudyError: the study has no pretrain stage, does not end in fine-tuning, or has too few sites.
        Refused: as `simulate`.
    """
    check_stages(study)
    run = RunDir(out, listen)
    with claimed(run, study, resume, holding_out=True):
        if (out / "summary.json").exists():
            return dict(json.loads((out / "summary.json").read_text()))
        sites = settle(gather(study, data, state, reading), study, run)
        if len(sites) <= study.aggregation.min_sites:
            raise StudyError(
                f"{len(sites)} sites leave {len(sites) - 1} when one is held out, fewer than aggregation.min_sites",
                "lower min_sites, or simulate more sites",
            )
        for name, site in sites.items():
            if not resume and site.unpaired(study):
                run.event("warning", text=f"{name}: {UNPAIRED}")
        rows: list[dict[str, Any]] = []
        needed: dict[str, dict[str, Any]] = {}
        for name in sites:
            found, notes = _hold_out(name, study, sites, out / HOLDOUT / name, run, progress)
            rows += found
            write_atomic(out / "holdout.csv", pd.DataFrame(rows).to_csv(index=False))
            needed[name] = {**_needed(found), **({"note": "; ".join(notes)} if notes else {})}
        tested = who_is_tested(sites, study)
        summary = {"study": study.name, "hash": study.hash, "test_patients": tested, "leave_one_site_out": needed}
        page = render_holdout(study.name, pd.DataFrame(rows), needed)
        write_atomic(out / "holdout.html", page)
        write_atomic(out / "summary.json", json.dumps(summary, indent=2))
        tidy(out / HOLDOUT)
        return summary


def _hold_out(
    name: str, study: Study, sites: Mapping[str, Site], folder: Path, run: RunDir, progress: Progress | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of one held-out site, and notes on those that could not be made or should not be trusted.

    `seconds` are those since the row before, when the row was first made: a start's first pays for the start.
    """
    first = {event["row"]: event["seconds"] for event in reversed(read_run(run.path).happened("row_finished"))}
    rows, noted, began = [], dict[str, list[str]](), time.monotonic()
    for start in STARTS:
        for scope, fraction, scores in _start(name, start, study, sites, folder / start, progress):
            took, began = time.monotonic() - began, time.monotonic()
            if isinstance(scores, ClassifierScores):
                words = f"{name}, {start}, {scope}, {fraction:.0%} of labels"
                seconds = first.get(words, round(took, 1))
                run.event("row_finished", row=words, auc=scores.auc, seconds=seconds)
                row = {"held_out": name, "start": start, "scope": scope, "label_fraction": fraction, **scores.row()}
                rows.append({**row, "seconds": seconds})
            if wrong := _wrong(scores):
                noted.setdefault(f"{start}, {scope}, {wrong}", []).extend([f"{fraction:.0%}"] * (scope != EVERY))
    notes = [
        text + (f" (with {', '.join(fractions)} of the site's labels)" if fractions else "")
        for text, fractions in noted.items()
    ]
    if study.privacy.mode != "none":
        notes.append("each training has the study's epsilon for itself: whoever pretrains and fine-tunes spends both")
    for text in notes:
        run.event("warning", text=f"{name} held out: {text}")
    return rows, notes


def _wrong(scores: ClassifierScores | str | None) -> str:
    """What to note of a row."""
    if isinstance(scores, str):
        return scores
    if scores is None:
        return "could not be measured on the test patients"
    return "gives every test image the same answer" if scores.one_answer else ""


def _start(
    name: str, start: str, study: Study, sites: Mapping[str, Site], folder: Path, progress: Progress | None
) -> Iterator[tuple[str, float, ClassifierScores | str | None]]:
    """(scope, fraction of the held-out site's labels, scores or why there are none) of one start, as they are made."""
    others = {site: member for site, member in sites.items() if site != name}
    known = others if start == "pretrained" else sites
    try:
        encoder = None if start == "supervised" else _pretrain(study, known, folder / "pretraining", progress)
    except Collapsed as error:
        yield EVERY, 0.0, f"could not be pretrained: {error.problem}"
        return
    tuned = _finetuning(study, encoder, folder)
    if reason := _unlabelled(tuned, others):
        yield EVERY, 0.0, f"could not be fine-tuned: {reason}"
        return
    tensors = _train(tuned, others, folder / "finetuning", progress)
    yield "in-distribution", 0.0, classify(tuned, tensors, others)
    home = {name: sites[name]}
    yield "held-out", 0.0, classify(tuned, tensors, home)
    save_encoder(folder / "encoder.safetensors", encoder_of(tuned, tensors), tuned)
    for fraction in FRACTIONS[1:]:
        here = folder / f"labels-{fraction}"
        own = _finetuning(study, folder / "encoder.safetensors", here, fraction)
        if reason := _unlabelled(own, home):
            yield "held-out", fraction, f"could not be fine-tuned: {reason}"
        else:
            yield "held-out", fraction, classify(own, _train(own, home, here, progress), home)


def _unlabelled(study: Study, sites: Mapping[str, Site]) -> str:
    """Why too few of some sites have labels for fine-tuning, in their own words; "" where enough have."""
    reasons = {}
    stages = [stage for stage in study.stages if isinstance(stage, Finetune)]
    for name, site in sites.items():
        try:
            for stage in stages:
                training, _ = site.labelled(study, stage)
                if isinstance(study.privacy, PatientPrivacy):
                    sampling_rate(training.n_patients, stage.batch_size)  # or a step would expect more than there are
        except CohortError as error:
            reasons[name] = error.problem
    able, needed = len(sites) - len(reasons), min(study.aggregation.min_sites, len(sites))
    if able >= needed:
        return ""
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return f"only {able} of at least {needed} sites can be trained on ({why})"


def _pretrain(study: Study, sites: Mapping[str, Site], folder: Path, progress: Progress | None) -> Path:
    """The encoder file that the study's pretrain stages make of some sites."""
    file = folder / "encoder.safetensors"
    if not file.exists():
        plain = study.model_dump(mode="json")
        own = resolve({**plain, "stages": [stage for stage in plain["stages"] if stage["kind"] == "pretrain"]})
        tensors = _train(own, sites, folder, progress, evaluate=True)
        save_encoder(file, encoder_of(own, tensors), own)
    return file


def _train(
    study: Study, sites: Mapping[str, Site], folder: Path, progress: Progress | None, evaluate: bool = False
) -> Tensors:
    """The tensors of one training. Several are of one study: each is another world, with its own state and ledger."""
    own = {name: replace(site, state=folder / SITES / name) for name, site in sites.items()}
    tensors = train_row(study, own, folder, None, progress, evaluate)
    tidy(folder / SITES)
    keep_newest(RunDir(folder).checkpoints)  # which hold the tensors
    return tensors


def _finetuning(study: Study, encoder: Path | None, folder: Path, fraction: float | None = None) -> Study:
    """The study's fine-tuning alone, from an encoder's file (None: from the study's initial weights).

    With `fraction`, its last stage alone, with that part of the labels. An encoder that knows something, also the
    supervised start's at the new hospital, is spared as the stages say; random weights are not.
    """
    if encoder is None:
        return without_pretraining(study, keep_init=True)
    plain = study.model_dump(mode="json")
    stages = [stage for stage in plain["stages"] if stage["kind"] == "finetune"]
    plain["stages"] = stages if fraction is None else [{**stages[-1], "label_fraction": fraction}]
    plain["encoder"]["init"] = {"family": "polyclinic", "file": str(encoder.resolve())}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "finetuning.toml"
    write_atomic(path, resolve(plain).to_toml())
    return load_study(path)  # with the SHA-256 of the file


def _needed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """In and out of distribution, and the smallest fraction at which a start matches the supervised one at 100 %."""
    areas = {(row["start"], row["scope"], row["label_fraction"]): row["auc"] for row in rows}
    goal = areas.get(("supervised", "held-out", 1.0))
    needed = {}
    for start in STARTS[:2]:
        reached = [f for f in FRACTIONS if goal is not None and areas.get((start, "held-out", f), -1.0) >= goal]
        needed[start] = min(reached, default=None)
    return {
        "supervised_at_100": goal,
        "labels_needed": needed,
        "in_distribution": {start: areas.get((start, "in-distribution", 0.0)) for start in STARTS},
        "zero_shot": {start: areas.get((start, "held-out", 0.0)) for start in STARTS},
    }
