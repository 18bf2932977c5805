"""What a site does with an order: evaluate the global tensors as they came, train from them, answer."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from polyclinic.cohort import Cohort
from polyclinic.errors import Refused, SiteFailed
from polyclinic.evaluation import NotMeasurable, classes_of, features, health, knn_probe, linear_probe
from polyclinic.methods.base import Method
from polyclinic.model import build_stage, load_tensors, shared_tensors
from polyclinic.seeding import seed_for
from polyclinic.study import Study, resolve
from polyclinic.training import pick_device, train
from polyclinic.wire import Order, Reply, Tensors
from polyclinic_client.site import Site
from polyclinic_client.state import SiteState

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def answer(
    order: Order, tensors: Tensors, site: Site, progress: Progress | None = None
) -> tuple[Reply, Tensors | None]:
    """Carry out an order at a site.

    Returns:
        The reply, and the update (trained minus global tensors) if the order was to train.

    Raises:
        Refused: the order is for another site, or the site has too little for the study.
    """
    study = resolve(json.loads(order.study), "the study that came with the order")
    if order.site != site.name:
        raise Refused(f"the order is for {order.site!r} and this is {site.name!r}", "check the site's registration")
    method, module = build_stage(study, order.stage)
    load_tensors(module, tensors)
    module.to(pick_device())
    training, testing = site.split(study)
    reply = Reply(study.hash, order.stage, order.round, site.name, 0, {}, {})
    if order.evaluate:
        reply = replace(reply, evaluation=evaluate(module.get_submodule("encoder"), training, testing, study))
    if not order.train:
        return reply, None
    patients, metrics, update = _round(order, tensors, study, method, module, site, training, progress)
    return replace(reply, patients=patients, train=metrics), update


def _round(
    order: Order,
    tensors: Tensors,
    study: Study,
    method: Method,
    module: nn.Module,
    site: Site,
    training: Cohort,
    progress: Progress | None,
) -> tuple[int, dict[str, float], Tensors]:
    """(patients, metrics, update) of a round: as stored if it was made before from the same tensors, or trained."""
    state = SiteState(site.state / study.hash[:16])
    if (stored := state.update(order.round, order.model)) is not None:
        facts = json.loads(stored[1]["facts"])
        return facts["patients"], facts["metrics"], {name: value.numpy() for name, value in stored[0].items()}
    started = time.monotonic()
    trained, moments = train(
        module,
        method,
        training,
        study.stages[order.stage],
        study.compute,
        stage_round=study.stage_of(order.round - 1)[1],
        seed=seed_for(study.seed, "round", site=site.name, stage=order.stage, round=order.round),
        optimizer_state=state.moments(order.round - 1, order.stage),
        progress=progress,
    )
    if trained.steps == 0:
        raise SiteFailed("no batch had two patients to compare", "use a larger batch_size or leave this site out")
    metrics = {"loss": trained.loss, "images": float(trained.images), "patients": float(training.n_patients)}
    metrics["seconds"] = time.monotonic() - started
    after = shared_tensors(method, module)
    update = {name: after[name] - tensors[name] for name in after}
    facts = {"model": order.model, "facts": json.dumps({"patients": training.n_patients, "metrics": metrics})}
    state.keep(order.round, order.stage, {n: torch.from_numpy(u) for n, u in update.items()}, facts, moments)
    return training.n_patients, metrics, update


def evaluate(encoder: nn.Module, training: Cohort, testing: Cohort, study: Study) -> dict[str, float]:
    """Probes and health of an encoder on a site's own patients; what cannot be measured is left out.

    The probes learn on the training patients' features and are scored on the test patients'.
    """
    device = pick_device()
    train_x, test_x = (features(encoder, cohort, study.compute, device) for cohort in (training, testing))
    metrics = {k: v for k, v in health(train_x).items() if k in ("effective_rank", "feature_spread")}
    train_y, test_y = (classes_of(cohort.labels, study.evaluation.labels) for cohort in (training, testing))
    try:
        linear = linear_probe(
            train_x, train_y, training.patients, test_x, test_y, testing.patients, seed=seed_for(study.seed, "probe")
        )
        near = knn_probe(train_x, train_y, test_x, test_y, testing.patients, neighbours=study.evaluation.neighbours)
    except NotMeasurable as reason:
        log.info("no probe: %s", reason)
        return metrics
    return {
        **metrics,
        "probe_auc": linear.auc,
        "probe_balanced_accuracy": linear.balanced_accuracy,
        "knn_auc": near.auc,
    }
