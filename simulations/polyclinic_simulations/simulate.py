"""A whole study on this machine: cohorts, rounds, rows, report."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from polyclinic.artifacts import write_model_card
from polyclinic.cohort import open_cohort
from polyclinic.cohort.card import make_card
from polyclinic.cohort.index import read_meta
from polyclinic.errors import QuorumLost, Refused, StorageError, StudyError
from polyclinic.evaluation import ClassifierScores, NotMeasurable, Scores, classes_of, targets_of, unmapped
from polyclinic.files import locked, make_folder, tentative, write_atomic
from polyclinic.methods.base import Batch
from polyclinic.model import build_stage
from polyclinic.report import embedding_table, read_run, render_report, save_views_figure
from polyclinic.seeding import seed_for, torch_generator
from polyclinic.stages import UNPAIRED, Finetune
from polyclinic.study import Study
from polyclinic.wire import Tensors
from polyclinic_client.app import make_app
from polyclinic_client.site import Site
from polyclinic_client.work import Progress
from polyclinic_server import checkpoints
from polyclinic_server.aggregation.private import EpsilonSpent
from polyclinic_server.app import lead
from polyclinic_server.rundir import Listener, RunDir
from polyclinic_simulations.compare import encoder_features, row, row_folder, row_names
from polyclinic_simulations.consortium import Progress as Reading
from polyclinic_simulations.consortium import gather, hold_out, settle
from polyclinic_simulations.engines.clock import virtual_seconds
from polyclinic_simulations.engines.unreliable import open_grid
from polyclinic_simulations.tidy import keep_newest, tidy

EXAMPLES = 6
"""Images in the figure of views."""
HOLDOUT = "holdout"
"""In the directory of a run that leaves one site out: all that it trains. One that leaves none out trains beside it."""
PACKAGES = ("polyclinic", "torch", "torchvision", "timm", "flwr", "scikit-learn", "pydicom")


def simulate(
    study: Study,
    out: Path,
    data: Path,
    state: Path,
    *,
    engine: str = "local",
    resume: bool = False,
    listen: Listener | None = None,
    reading: Reading = lambda what, done, total: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a study into the run directory `out`, or go on with it there. Returns the summary.

    Raises:
        Refused: `out` holds something already, or, with `resume`, a run of another kind, study or patients; or the
            engine plays no unreliable sites.
    """
    if engine == "ray" and study.simulation.unreliable:
        raise Refused(
            "the ray engine plays neither [simulation.clock] nor [[simulation.fault]]",
            "use the local engine, or leave them out",
        )
    started = time.monotonic()
    run = RunDir(out, listen)
    with claimed(run, study, resume):
        sites, held_out = hold_out(settle(gather(study, data, state, reading), study, run), study)
        before = read_run(out).seconds
        run.event("cohorts_read", seconds=round(time.monotonic() - started, 1))
        _keep_cards(run, study, sites, reading, warn=not (out / "seats.json").exists())
        seats = {name: site.cohort.n_patients for name, site in sites.items()}
        write_atomic(out / "seats.json", json.dumps(seats))
        with _unless_spent(study, run):
            if engine == "ray":
                from polyclinic_simulations.engines.ray import run_ray

                run_ray(run, [site.state for site in sites.values()], study.compute.threads)
            else:
                apps = {name: make_app(partial(_given, site), progress) for name, site in sites.items()}
                grid, clock = open_grid(apps, study, run, sites)
                lead(grid, run, clock=clock)
        summary = _conclude(study, run, sites, held_out, engine, listen, progress, started - before)
        run.event("report_written")
        tidy(out / "sites", out / "rows")
        keep_newest(run.checkpoints)
        return summary


@contextmanager
def _unless_spent(study: Study, run: RunDir) -> Iterator[None]:
    """Go on to the report where a study has spent its epsilon, if that was in its last stage.

    Raises:
        EpsilonSpent: it was in an earlier one: what the study was for has not begun.
    """
    try:
        yield
    except EpsilonSpent as error:
        found = checkpoints.newest(run.checkpoints, study.hash, lambda text: run.event("warning", text=text))
        if found is None or found[0].round == 0 or found[0].stage < len(study.stages) - 1:
            raise
        run.event("warning", text=f"ended after round {found[0].round} of {study.rounds}: {error.problem}")


def _given(site: Site, context: object) -> Site:
    return site


@contextmanager
def claimed(run: RunDir, study: Study, resume: bool, holding_out: bool = False) -> Iterator[None]:
    """The run directory, locked: empty for a new run, of the same study and kind for one that is resumed.

    A new run that ends before any round, refused or for want of a disk, leaves nothing behind; of one that is resumed,
    nothing is removed.
    """
    if run.path.exists() and not run.path.is_dir():
        raise Refused(f"{run.path} is a file", "give a folder as --out")
    made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    make_folder(run.path, mode=0o700)  # its report shows images
    with tentative(made), locked(run.path) as free:
        if not free:
            raise Refused(f"another process is working in {run.path}", "wait for it, or give another --out")
        (_resumable(run, study, holding_out) if resume else _empty(run.path))
        run.create(study)
        try:
            yield
        except (Refused, StorageError):
            if not resume and not run.checkpoints.exists() and not (run.path / HOLDOUT).exists():
                for path in run.path.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise


def same(study: Study, other: Study) -> bool:
    """Whether two studies differ in nothing but where the file of their initial weights lies."""
    return (study.hash, study.simulation) == (other.hash, other.simulation)


def _empty(path: Path) -> None:
    """Refuse a folder that holds more than a file left half written."""
    if any(found.suffix != ".tmp" for found in path.iterdir()):
        known = (path / "study.toml").exists()
        fix = "give another --out" + (", or --resume to go on with the run in it" if known else "")
        raise Refused(f"{path} is not empty", fix)


def _resumable(run: RunDir, study: Study, holding_out: bool) -> None:
    """Refuse what is no run, or one of another kind or study."""
    if not (run.path / "study.toml").exists():
        raise Refused(
            f"there is no run to resume in {run.path}", "give the folder of a run as --out, or leave --resume out"
        )
    held_out = (run.path / HOLDOUT).exists()
    if held_out and not holding_out:
        raise Refused(f"{run.path} holds a run that leaves one site out", "resume it with --leave-one-site-out")
    if holding_out and not held_out and (run.checkpoints.exists() or (run.path / "summary.json").exists()):
        raise Refused(f"{run.path} holds a run that leaves no site out", "resume it without --leave-one-site-out")
    if not same(run.study, study):
        raise StudyError(f"{run.path} holds a run of another study", "resume with the study file it was started with")


def _keep_cards(run: RunDir, study: Study, sites: Mapping[str, Site], reading: Reading, warn: bool) -> None:
    """The data-fitness card of every site's patients; with `warn`, what it warns of is an event."""
    cards = {}
    for name, site in sites.items():
        cards[name] = make_card(site.cohort.folder, site.cohort, site.split(study)[1])
        reading("each site's patients", len(cards), len(sites))
    (run.path / "report").mkdir(exist_ok=True)
    write_atomic(run.path / "report" / "cards.json", json.dumps(cards))
    words = [word for site in sites.values() for word in site.cohort.labels]
    for text in [*unmapped(study.evaluation.labels, words), *_left_out(study, words)] if warn else ():
        run.event("warning", text=text)
    for name, card in cards.items() if warn else ():
        texts = list(card["warnings"])
        if sites[name].unpaired(study):
            texts.append(UNPAIRED)
        if across := card["near_duplicates"]["across_split"]:
            pairs = "pair of nearly equal images stands" if across == 1 else "pairs of nearly equal images stand"
            texts.append(f"{across} {pairs} in training and in test: figures may flatter")
        for text in texts:
            run.event("warning", text=f"{name}: {text}")


def _left_out(study: Study, words: list[str]) -> list[str]:
    """What to warn of where a classifier of one class an image passes over labels; `words` are those of all images."""
    if not any(isinstance(stage, Finetune) and not stage.multi_label for stage in study.stages):
        return []
    labels, mapping = np.array(words), study.evaluation.labels
    labelled = classes_of(labels, mapping) != ""
    count = int((labelled & np.isnan(targets_of(labels, mapping, multi_label=False)).any(axis=1)).sum())
    text = f"the classifier leaves out {count} of {labelled.sum()} labelled images, whose words [evaluation] labels "
    return [text + "does not name"] if count else []


def _conclude(
    study: Study,
    run: RunDir,
    sites: Mapping[str, Site],
    held_out: Mapping[str, Site],
    engine: str,
    listen: Listener | None,
    progress: Progress | None,
    started: float,
) -> dict[str, Any]:
    """Rows, pictures, summary, model card and report of a run whose rounds are made.

    `started` is when it began by the monotonic clock, had there been no pause between its attempts.
    """
    newest = checkpoints.newest(run.checkpoints, study.hash, lambda text: run.event("warning", text=text))
    assert newest is not None  # the rounds are made
    federated = newest[1]
    measured = _rows(study, run, sites, held_out, federated, listen, progress)
    run.event("report_started", rows=len(row_names(study, sites)))
    _pictures(study, run.path, sites, federated)
    summary = {
        "study": study.name,
        "hash": study.hash,
        "engine": engine,
        "sites": {n: {"patients": s.cohort.n_patients, "images": len(s.cohort)} for n, s in sites.items()},
        "held_out": list(held_out),
        "rounds": newest[0].round,
        "test_patients": who_is_tested(sites, study),
        **measured,
        "warnings": _warnings(run.path),
        "wall_s": round(time.monotonic() - started, 1),
        **_virtual(study, run, newest[0].round),
        "bytes_sent": _bytes_sent(run.path),
        "epsilon": read_run(run.path).epsilon,
        "versions": {package: version(package) for package in PACKAGES},
    }
    write_atomic(run.path / "summary.json", json.dumps(summary, indent=2))
    write_model_card(run.path)
    render_report(run.path)
    return summary


def _rows(
    study: Study,
    run: RunDir,
    sites: Mapping[str, Site],
    held_out: Mapping[str, Site],
    federated: Tensors,
    listen: Listener | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """What the rows leave in the summary: figures by row, and on what they were measured."""
    comparison: dict[str, dict[str, float]] = {}
    classifier: dict[str, dict[str, float]] = {}
    measured: dict[str, dict[str, Any]] = {}
    profiles: dict[str, dict[str, Any]] = {}
    at_sites: dict[str, dict[str, float]] = {}
    operating: list[dict[str, Any]] = []
    notes: list[str] = []
    for number, name in enumerate(names := row_names(study, sites)):
        run.event("row_started", row=name, made=number, rows=len(names))
        began = time.monotonic()
        try:
            told = _of_row(name, listen)
            probed, classified, profiled = row(name, study, sites, run.path, federated, told, progress, held_out)
        except NotMeasurable as reason:  # of the labels, which all rows share
            notes += [note] if (note := f"no comparison: {reason}") not in notes else []
            if isinstance(study.stages[-1], Finetune):
                continue  # of the rows that are trained, the classifier may still be measured
            break
        except (QuorumLost, EpsilonSpent):  # a site that could not train has cost the study nothing but its own row
            notes.append(f"no row {name}: the study could not be trained on it: {_why_not(row_folder(run.path, name))}")
            continue
        if probed is not None:
            comparison[name], measured["comparison"] = probed.row(), _tested(probed)
        if profiled is not None:
            profiles[name] = asdict(profiled)
        if classified is not None:
            classifier[name], measured["classifier"] = classified.row(), _tested(classified)
            at_sites[name] = classified.at_sites
            operating = classified.operating if name == "federated" else operating
        notes += _constant(name, probed, classified)
        found = comparison.get(name) or classifier[name]
        run.event("row_finished", row=name, made=number + 1, seconds=round(time.monotonic() - began, 1), **found)
    if "scratch" in study.evaluation.rows and all(isinstance(stage, Finetune) for stage in study.stages):
        notes.append("no row scratch: the study pretrains nothing, and is that row itself")
    notes += _cautions(classifier, measured)
    return {
        "measured": measured,
        "comparison": comparison,
        "classifier": classifier,
        "classifier_at_sites": at_sites,
        "profiles": profiles,
        "operating": operating,
        "notes": notes,
    }


def _tested(scores: Scores | ClassifierScores) -> dict[str, Any]:
    """On what a row was measured, as are all rows of its table."""
    return {"classes": scores.classes, "patients": scores.n_test, "images": scores.test_images}


def _why_not(folder: Path) -> str:
    """Why the only site of a row could not train, in its own words."""
    events = read_run(folder).happened("update_refused")
    return str(events[-1]["reason"]) if events else "it did not answer"


def _cautions(classifier: Mapping[str, Mapping[str, float]], measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader of both tables should not miss: other classes in each, and pretraining that has not helped."""
    texts = []
    told = [measured[table]["classes"] for table in ("comparison", "classifier") if table in measured]
    if len(told) == 2 and sorted(told[0]) != sorted(told[1]):
        texts.append(
            f"the probe tells {len(told[0])} classes apart and the classifier {len(told[1])}: their AUCs do not compare"
        )
    ours, other = classifier.get("federated"), classifier.get("scratch")
    if ours and other and ours["auc_low"] <= other["auc"]:
        verdict = "not surely better than" if ours["auc"] > other["auc"] else "no better than"
        texts.append(
            f"fine-tuning after pretraining is {verdict} without it: AUC {ours['auc']:.3f} "
            f"({ours['auc_low']:.3f} to {ours['auc_high']:.3f}) against {other['auc']:.3f} of the row scratch"
        )
    return texts


def _of_row(name: str, listen: Listener | None) -> Listener | None:
    """Tells `listen` the events of a row's own training, each with the row's name."""
    return None if listen is None else lambda event: listen({**event, "row": name})


def _pictures(study: Study, run: Path, sites: Mapping[str, Site], federated: Any) -> None:
    """The embedding map's table and the example views: simulation only, since both come from images."""
    encode = encoder_features(study, federated)
    names = [name for name, site in sites.items() for _ in range(len(site.cohort))]
    labels = [word for site in sites.values() for word in classes_of(site.cohort.labels, study.evaluation.labels)]
    found = np.concatenate([encode(site.cohort) for site in sites.values()])
    table = embedding_table(found, np.array(names), np.array(labels), seed_for(study.seed, "embedding") % 2**31)
    write_atomic(run / "report" / "embedding.csv", table.to_csv(index=False))
    each = -(-EXAMPLES // len(sites))
    shown = torch.cat([site.cohort.pixels(np.arange(min(len(site.cohort), each))) for site in sites.values()])
    originals = shown[:EXAMPLES].float() / 255
    method, _ = build_stage(study, 0)
    given = originals.repeat_interleave(2, dim=0) if method.pairs else originals  # a pair of the same: two views of it
    batch = Batch(given, torch.arange(len(given)), torch.zeros(len(given), len(study.evaluation.classes)))
    drawn = [method.views(batch, torch_generator(seed_for(study.seed, "shown", round=n))).views[0] for n in range(3)]
    save_views_figure(run / "report" / "views.png", originals, drawn)


def _constant(name: str, *found: Scores | ClassifierScores | None) -> list[str]:
    """What to note of a row whose probe or classifier gives one answer to all."""
    return [
        f"row {name}: the {'probe' if isinstance(scores, Scores) else 'classifier'} gives every test image the same "
        "answer; only its AUC tells images apart"
        for scores in found
        if scores is not None and scores.one_answer
    ]


def who_is_tested(sites: Mapping[str, Site], study: Study) -> str:
    """A digest of the patients on whom all rows are measured, whatever decided who they are."""
    tested: dict[str, set[int]] = {}
    for site in sites.values():
        whole, test = open_cohort(site.cohort.folder), site.split(study)[1]
        numbers = whole.patients[np.isin(whole.rows, test.rows)]
        tested.setdefault(read_meta(whole.folder)["digest"], set()).update(numbers.tolist())
    chosen = sorted((digest, sorted(numbers)) for digest, numbers in tested.items())
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()


def _warnings(run: Path) -> list[str]:
    """What the run warned of, each text once."""
    return list(dict.fromkeys(event["text"] for event in read_run(run).happened("warning")))


def _virtual(study: Study, run: RunDir, made: int) -> dict[str, float]:
    """How long the rounds have taken by the study's virtual clock, if it has one."""
    return {"virtual_s": round(virtual_seconds(run, made), 1)} if study.simulation.clock.images_per_s else {}


def _bytes_sent(run: Path) -> int:
    """Bytes of tensors that the sites sent, over all rounds."""
    table = pd.read_csv(run / "metrics.csv")
    return int(table.loc[table["metric"] == "bytes_up", "value"].sum())
