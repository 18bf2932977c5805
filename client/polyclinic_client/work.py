"""What a site does with an order: evaluate the global tensors as they came, train from them, answer."""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import nn

from polyclinic.cohort import Cohort
from polyclinic.errors import Refused
from polyclinic.evaluation import (
    NotMeasurable,
    alignment,
    classes_of,
    features,
    health,
    knn_probe,
    linear_probe,
    score_classifier,
    targets_of,
)
from polyclinic.methods.base import Method
from polyclinic.model import build_stage, load_tensors, shared_tensors
from polyclinic.privacy.ledger import Cap, Charge
from polyclinic.rules import FedBNRule, FedEMARule, FedProxRule
from polyclinic.seeding import seed_for
from polyclinic.stages import Finetune, Views
from polyclinic.study import PatientPrivacy, Study, parse_canonical
from polyclinic.training import PLAIN, Recipe, pick_device, proximal, train, use_threads
from polyclinic.wire import EVALUATION, Malformed, Order, Reply, Tensors, digest
from polyclinic_client import personal
from polyclinic_client.site import Site
from polyclinic_client.state import SiteState

if TYPE_CHECKING:
    from polyclinic.methods.supervised import Supervised  # with timm, which only some encoders need

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def answer(
    order: Order, tensors: Tensors, site: Site, progress: Progress | None = None
) -> tuple[Reply, Tensors | None]:
    """Carry out an order at a site.

    Returns:
        The reply, and the update (trained minus global tensors) if the order was to train.

    Raises:
        Refused, Malformed: the order is for another site, or contradicts itself.
        CohortError: the site has too little for the study.
    """
    study = parse_canonical(order.study, "the study that came with the order")
    _expect(order, tensors, study, site)
    private = study.privacy.mode != "none"  # then what is measured on patients stays here
    with use_threads(study.compute):  # all of it: torch copies tensors in threads too, and they wait spinning
        method, module = build_stage(study, order.stage)
        if tensors.keys() != set(method.shared(module)):
            raise Malformed("the order's tensors are not those of its stage")
        load_tensors(module, tensors)
        state = SiteState(site.state / study.hash[:16])
        own = state.own_before(order.round + (not order.train))  # an order that trains nothing comes after its round
        if isinstance(study.aggregation, FedBNRule):
            personal.lay_over(module, own)
        module.to(pick_device())
        training, testing = site.split(study)
        stage = study.stages[order.stage]
        measured: dict[str, float] = {}
        if order.evaluate and not private:
            measured |= evaluate(module.get_submodule("encoder"), training, testing, study, stage.views or Views())
        if isinstance(stage, Finetune):
            trained = not order.train or study.stage_of(order.round - 1)[1] > 0  # else the head knows nothing yet
            if order.evaluate and trained and not private:
                measured |= _noted(lambda: _classifier(module, testing, study, stage))
            if order.train:
                training, validation = site.labelled(study, stage)
                if trained and validation is not None:
                    measured |= _validation(method, module, validation, study, stage)
        reply = Reply(study.hash, order.stage, order.round, site.name, 0, {}, _that_may_leave(measured))
        if not order.train:
            return reply, None
        patients, metrics, update = _round(order, tensors, study, method, module, site, training, state, own, progress)
        head = site.spending.head() if study.privacy.mode == "patient" else ""
        return replace(reply, patients=patients, train=metrics, head=head), update


def _expect(order: Order, tensors: Tensors, study: Study, site: Site) -> None:
    """Refuse an order that contradicts itself, or that is another site's."""
    fix = "run the same version of Polyclinic at the coordinator and at every site"
    if order.site != site.name:
        raise Refused(f"the order is for {order.site!r} and this is {site.name!r}", "check the site's registration")
    if not 1 <= order.round <= study.rounds or study.stage_of(order.round - 1)[0] != order.stage:
        raise Refused(f"round {order.round} of the study is not one of stage {order.stage}", fix)
    if digest(tensors) != order.model:
        raise Refused("the order's tensors are not those that it names", fix)
    if study.privacy.mode == "patient" and order.head and not site.spending.holds(order.head):
        raise Refused(
            "the site's privacy ledger is not the one that the coordinator has last heard of: what these patients have "
            "spent is not known here",
            "restore the newest ledger; where it is lost, train on these patients without such a promise no more",
        )


def _round(
    order: Order,
    tensors: Tensors,
    study: Study,
    method: Method,
    module: nn.Module,
    site: Site,
    training: Cohort,
    state: SiteState,
    own: dict[str, torch.Tensor],
    progress: Progress | None,
) -> tuple[int, dict[str, float], Tensors]:
    """(patients, metrics, update) of a round: as stored if it was made before from the same tensors, or trained."""
    if (stored := state.update(order.round, order.model)) is not None:
        facts = json.loads(stored[1]["facts"])
        return facts["patients"], facts["metrics"], {name: value.numpy() for name, value in stored[0].items()}
    started = time.monotonic()
    stage, rule, targets = study.stages[order.stage], study.aggregation, None
    if isinstance(stage, Finetune):
        targets = _targets(training, study, stage)
        cast("Supervised", method).balance(targets)
    noted = personal.blend(module, own, rule.tau) if isinstance(rule, FedEMARule) else {}
    recipe: Recipe = PLAIN
    reserved = 0
    if isinstance(study.privacy, PatientPrivacy):
        from polyclinic.privacy.dpsgd import PatientRecipe  # with Opacus, which only such a study needs

        recipe = PatientRecipe(study.privacy)
        reserved = site.spending.reserve(_charge(order, study, site, training), [Cap.of(study), *site.caps])
    trained, moments = train(
        module,
        method,
        training,
        stage,
        study.compute,
        stage_round=study.stage_of(order.round - 1)[1],
        seed=seed_for(study.seed, "round", site=site.name, stage=order.stage, round=order.round),
        targets=targets,
        optimizer_state=state.moments_before(order.round, order.stage),
        progress=progress,
        midway=None if reserved else state.midway(order.round, order.model),
        recipe=recipe,
        before_step=proximal(module, method.shared(module), rule.mu) if isinstance(rule, FedProxRule) else None,
    )
    patients = min(training.n_patients, study.aggregation.max_patients)
    metrics = {"loss": trained.loss, "images": float(trained.images), "patients": float(training.n_patients)}
    metrics["seconds"] = time.monotonic() - started
    if reserved:
        site.spending.commit(reserved, trained.steps)
    if study.privacy.mode != "none":
        patients, metrics = 1, _spent(study, site) if reserved else {}
    after = shared_tensors(method, module)
    update = {name: after[name] - tensors[name] for name in after}
    facts = {"model": order.model, "facts": json.dumps({"patients": patients, "metrics": metrics})}
    own = personal.to_keep(rule, module) | noted
    state.keep(order.round, order.stage, {n: torch.from_numpy(u) for n, u in update.items()}, facts, moments, own)
    return patients, metrics, update


def _charge(order: Order, study: Study, site: Site, training: Cohort) -> Charge:
    """What a round of a stage costs the patients it is trained on."""
    from polyclinic.privacy.dpsgd import event_of_round

    assert isinstance(study.privacy, PatientPrivacy)
    return Charge(
        study=study.hash,
        name=study.name,
        stage=order.stage,
        round=order.round,
        model=order.model,
        cohort=site.cohort_id(training),
        patients=training.n_patients,
        **asdict(event_of_round(study.privacy, training.n_patients, study.stages[order.stage])),
    )


def _spent(study: Study, site: Site) -> dict[str, float]:
    """What the study has spent here, rounded up to two digits: all of them would tell how many patients there are."""
    assert isinstance(study.privacy, PatientPrivacy)
    spent = site.spending.epsilon(study.privacy.delta, study.hash)
    if spent == 0:  # noise beyond what any figure shows
        return {"epsilon": 0.0}
    digit = 10.0 ** (math.floor(math.log10(spent)) - 1)
    return {"epsilon": float(f"{math.ceil(spent / digit) * digit:.2g}")}


def evaluate(encoder: nn.Module, training: Cohort, testing: Cohort, study: Study, views: Views) -> dict[str, float]:
    """Probes and health of an encoder on a site's own patients; what cannot be measured is left out.

    `views` are those by which the stage trains. The probes learn on the training patients' features and are scored on
    the test patients'. numpy's and scikit-learn's threads are held to the study's number as torch's are: other numbers
    give other bits.
    """
    with use_threads(study.compute), threadpool_limits(study.compute.threads):
        train_x, test_x = (features(encoder, half, study.compute, pick_device()) for half in (training, testing))
        measured = _noted(lambda: health(train_x))
        if measured:
            seed = seed_for(study.seed, "alignment")
            measured["alignment"] = alignment(encoder, training, views, study.compute, pick_device(), seed)
        return measured | _noted(lambda: _probes(train_x, test_x, training, testing, study))


def _that_may_leave(measured: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in measured.items() if name in EVALUATION and math.isfinite(value)}


def _noted(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `measure` finds, or nothing and a line in the site's log."""
    try:
        return measure()
    except NotMeasurable as reason:
        log.info("not measured: %s", reason)
        return {}


def _probes(
    train_x: NDArray[np.float32], test_x: NDArray[np.float32], training: Cohort, testing: Cohort, study: Study
) -> dict[str, float]:
    train_y, test_y = (classes_of(cohort.labels, study.evaluation.labels) for cohort in (training, testing))
    linear = linear_probe(
        train_x, train_y, training.patients, test_x, test_y, testing.patients, seed=seed_for(study.seed, "probe")
    )
    near = knn_probe(train_x, train_y, test_x, test_y, testing.patients, neighbours=study.evaluation.neighbours)
    return {
        "probe_auc": linear.auc,
        "probe_balanced_accuracy": linear.balanced_accuracy,
        "knn_auc": near.auc,
    }


def _targets(cohort: Cohort, study: Study, stage: Finetune) -> torch.Tensor:
    """(images, classes), as in Batch."""
    return torch.from_numpy(targets_of(cohort.labels, study.evaluation.labels, stage.multi_label))


def _classifier(module: nn.Module, testing: Cohort, study: Study, stage: Finetune) -> dict[str, float]:
    """Scores of the whole module on the site's test patients."""
    scores = score_classifier(module, {"": testing}, study, stage)
    return {f"classifier_{name}": value for name, value in scores.row().items()}


def _validation(
    method: Method, module: nn.Module, validation: Cohort, study: Study, stage: Finetune
) -> dict[str, float]:
    """The loss of the tensors as they came on the site's validation patients, classes weighted as there."""
    targets = _targets(validation, study, stage)
    cast("Supervised", method).balance(targets)
    logits = torch.from_numpy(features(module, validation, study.compute, pick_device()))
    known = ~targets.isnan().any(dim=1)
    return {"validation_loss": float(cast("Supervised", method).losses(logits[known], targets[known]).mean())}
