"""How much of a disk a grid takes: what finished cells keep, and what those in hand hold until they are finished.

Bytes of tensors are those of the study's largest stage; all figures are bounds from above.
"""

import heapq
import shutil
from functools import cache
from pathlib import Path

from polyclinic.encoders import build_encoder
from polyclinic.errors import Refused
from polyclinic.methods import make_method
from polyclinic.rules import FedAdamRule, FedAvgMRule, FedBNRule, FedEMARule
from polyclinic.stages import AnyStage, Finetune
from polyclinic.study import Encoder, Images, Study
from polyclinic_client import state
from polyclinic_server import checkpoints
from polyclinic_simulations.compare import has_scratch

REPORT_BYTES = 3_000_000
"""Of a finished cell, beside its encoder and classifier."""
HALF_MADE = 6
"""Copies of the tensors in how far a round has come: the module and two moments, once more while they are replaced."""

Load = tuple[Study, int, int]
"""(a study, how many sites train, bytes of images that sites store for themselves since their pixels are shifted)."""


def require_room(out: Path, loads: list[Load], at_once: int, held: int = 0) -> None:
    """Refuse a grid whose cells, `at_once` of them in hand, do not fit on the disk of `out`.

    `held` are bytes that those which are begun have there already.

    Raises:
        Refused: it has too few bytes free.
    """
    working = heapq.nlargest(at_once, (in_hand(study, sites) + images for study, sites, images in loads))
    needed = sum(working) + sum(finished(study) for study, _, _ in loads) - held
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise Refused(
            f"the grid needs some {needed / 1e9:.1f} GB in {out}, and {free / 1e9:.1f} GB are free there",
            "ask for fewer cells or a smaller encoder, or give another --out",
        )


def finished(study: Study) -> int:
    """Bytes that stay: the encoder, the classifier where one is fine-tuned, and the report."""
    return (1 + isinstance(study.stages[-1], Finetune)) * _bytes(study) + REPORT_BYTES


def in_hand(study: Study, sites: int) -> int:
    """Bytes of the rounds and checkpoints that a cell holds just before its end, when the last row trains.

    Every row that trains keeps its own until then: `scratch` and `init` as the federation does, the others as one site.
    """
    rows, rule = study.evaluation.rows, study.aggregation
    federations = 1
    if "scratch" in rows and has_scratch(study):
        federations += 1 + (study.encoder.init != "random")
    single = ("alone" in rows) * sites + ("pooled" in rows)
    made = 3 + isinstance(rule, FedBNRule | FedEMARule)  # in a round at a site: update, two moments, its own tensors
    remembered = 2 * isinstance(rule, FedAvgMRule | FedAdamRule)
    at_sites = (federations * sites + single) * state.KEPT * made
    at_server = federations * checkpoints.KEPT * (1 + remembered) + single * checkpoints.KEPT
    best = federations + single
    return (at_sites + at_server + best + HALF_MADE) * _bytes(study)


def _bytes(study: Study) -> int:
    classes = len(study.evaluation.classes)
    return max(_bytes_of(study.encoder, study.images, stage, classes) for stage in study.stages)


@cache
def _bytes_of(encoder: Encoder, images: Images, stage: AnyStage, classes: int) -> int:
    """Of the tensors that leave a site in a stage."""
    method = make_method(stage, classes)
    module = method.build(build_encoder(encoder, images))
    state = module.state_dict()
    return sum(4 * state[name].numel() for name in method.shared(module))
