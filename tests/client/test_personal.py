"""What of an encoder stays a site's own: against the formulas, round by round, and asked for again."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polyclinic import training
from polyclinic.encoders import ENCODERS, build_encoder
from polyclinic.encoders.resnet import Basic, BatchNorm, ResidualNetwork
from polyclinic.methods.simclr import Projector
from polyclinic.model import initial_tensors
from polyclinic.rules import FedAvgRule, FedBNRule, FedEMARule
from polyclinic.study import Encoder, Images, Study
from polyclinic.wire import Order, Tensors, digest
from polyclinic_client import work
from polyclinic_client.personal import SCALE, blend, lay_over, normalisation, to_keep
from polyclinic_client.site import Site
from polyclinic_client.state import SiteState
from polyclinic_client.work import answer
from polyclinic_server.rounds import run_study
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.engines.local import LocalGrid

from ..server.test_rounds import Stop, stopping_at
from ..tiny import SIMCLR, TinyEncoder, events, in_memory, measured, open_run, real, same_bits, tiny_study

RULES = ["fedbn", "fedema"]
NORMS = {"encoder.norm.weight", "encoder.norm.bias"}


class TinyBatchEncoder(TinyEncoder):
    """The same with batch normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.norm = BatchNorm(4)  # type: ignore[assignment]


@pytest.fixture
def batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyBatchEncoder(images.channels))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site("north", in_memory(12), tmp_path / "north")


def study_of(rule: str, **changes: Any) -> Study:
    stages = [{**SIMCLR, "rounds": 3}, {**SIMCLR, "rounds": 2, "projection": 4}]
    return tiny_study(**{"aggregation": {"rule": rule}, "stages": stages, **changes})


def ordered(study: Study, round: int, tensors: Tensors, **keys: Any) -> Order:
    stage = study.stage_of(round - 1)[0]
    return replace(Order(study.canonical(), stage, round, "north", digest(tensors), True, False), **keys)


def made(study: Study, round: int, tensors: Tensors, site: Site) -> Tensors:
    _, update = answer(ordered(study, round, tensors), tensors, site)
    assert update is not None
    return update


def moved(tensors: Tensors, by: float) -> Tensors:
    """Global tensors as others have moved them."""
    rng = np.random.default_rng(round(1e6 * by))
    return {n: (v + by * rng.random(v.shape)).astype(np.float32) for n, v in tensors.items()}


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, np.ndarray[Any, Any]]]:
    """What every training starts from."""
    found: list[dict[str, np.ndarray[Any, Any]]] = []
    inner = work.train

    def looking(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found.append({name: value.numpy().copy() for name, value in module.state_dict().items()})
        return inner(module, *args, **kwargs)

    monkeypatch.setattr(work, "train", looking)
    return found


@pytest.mark.parametrize(
    ("build", "layers", "tensors"),
    [
        (lambda: ResidualNetwork(Basic, [1, 1, 1, 1], 1, context=True, norm="group"), 12, 2),
        (lambda: ResidualNetwork(Basic, [1, 1, 1, 1], 1, context=False, norm="batch"), 12, 4),
        (lambda: build_encoder(Encoder(name="vit_tiny"), Images(size=16)), 25, 2),
    ],
)
def test_normalisation_layers_are_found_in_every_encoder(
    build: Callable[[], nn.Module], layers: int, tensors: int
) -> None:
    module = Projector(build(), 4)
    names = normalisation(module)
    assert len(names) == len(set(names)) == layers * tensors
    assert names == [name for name in module.state_dict() if name in set(names)]
    kinds = {name.rpartition(".")[2] for name in names}
    assert kinds == {"weight", "bias"} | ({"running_mean", "running_var"} if tensors == 4 else set())
    assert all(module.state_dict()[name].ndim == 1 for name in names)


def test_bits_normalisation_layers_are_found() -> None:
    with torch.device("meta"):
        encoder = build_encoder(Encoder(name="bit_resnet50"), Images(size=32))
    assert len(normalisation(Projector(encoder, 4))) == 2 * (3 * 16 + 1)


def slow_blend(ours: dict[str, Tensor], theirs: dict[str, Tensor], scale: float, weights: set[str]) -> dict[str, Any]:
    """The formula in float64, value by value for the divergence."""
    pairs = [(float(a), float(b)) for n in weights for a, b in zip(ours[n].ravel(), theirs[n].ravel(), strict=True)]
    m = min(scale * math.sqrt(math.fsum((a - b) ** 2 for a, b in pairs)), 1.0)
    return {n: m * ours[n].double().numpy() + (1 - m) * value.double().numpy() for n, value in theirs.items()}


@pytest.mark.parametrize("scale", [None, 0.05, 0.3, 1e3])
def test_a_blend_is_that_of_a_slow_twin(scale: float | None, batch_norm: None) -> None:
    module, own = (Projector(ENCODERS["resnet18"](Encoder(), Images(size=16)), 4) for _ in range(2))
    for number, value in enumerate(own.state_dict().values()):
        value.add_(number)
    ours = to_keep(FedEMARule(rule="fedema"), own)
    theirs = {name: value.clone() for name, value in module.state_dict().items()}
    weights = {name for name, _ in module.named_parameters() if name.startswith("encoder.")}
    assert ours.keys() == weights | {"encoder.norm.running_mean", "encoder.norm.running_var"}
    kept = {} if scale is None else {SCALE: torch.tensor(scale, dtype=torch.float64)}
    noted = blend(module, ours | kept, 0.7)
    if scale is None:
        distance = math.sqrt(sum(float((ours[n] - theirs[n]).double().square().sum()) for n in weights))
        assert float(noted[SCALE]) == pytest.approx(0.7 / distance, rel=1e-6)
    else:
        assert noted == kept
    expected = slow_blend(ours, {n: theirs[n] for n in ours}, float(noted[SCALE]), weights)
    for name, value in module.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected.get(name, theirs[name].numpy()), rtol=1e-5, atol=1e-6)


def test_an_encoder_that_is_the_global_one_stays_it_and_sets_no_scale() -> None:
    module = Projector(TinyEncoder(1), 4)
    before = copy.deepcopy(module.state_dict())
    own = to_keep(FedEMARule(rule="fedema"), copy.deepcopy(module))
    kept = {SCALE: torch.tensor(0.5, dtype=torch.float64)}
    assert blend(module, own, 0.7) == blend(module, {}, 0.7) == {}
    assert blend(module, own | kept, 0.7) == kept
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_site_keeps_its_layers_its_encoder_or_nothing() -> None:
    module = Projector(TinyEncoder(1), 4)
    assert to_keep(FedAvgRule(), module) == {}
    own = to_keep(FedBNRule(rule="fedbn"), module)
    assert own.keys() == NORMS
    other = Projector(TinyEncoder(1), 4)
    before = copy.deepcopy(other.state_dict())
    lay_over(other, {name: value + 1 for name, value in own.items()})
    for name, value in other.state_dict().items():
        assert torch.equal(value, own[name] + 1 if name in own else before[name])


def test_fedbn_trains_and_measures_with_the_layers_of_the_site(
    site: Site, starts: list[Any], batch_norm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of("fedbn")
    own = NORMS | {"encoder.norm.running_mean", "encoder.norm.running_var"}
    seen: list[Tensors] = []

    def looking(encoder: nn.Module, *args: Any) -> dict[str, float]:
        seen.append({f"encoder.{name}": value.numpy().copy() for name, value in encoder.state_dict().items()})
        return {}

    monkeypatch.setattr(work, "evaluate", looking)
    tensors = initial_tensors(study, 0, None)
    mine = {name: tensors[name] for name in own}
    for round in (1, 2, 3, 4):
        tensors = moved(initial_tensors(study, study.stage_of(round - 1)[0], None), round / 100)
        if round == 1:
            mine = {name: tensors[name] for name in own}
        _, update = answer(ordered(study, round, tensors, evaluate=True), tensors, site)
        assert update is not None
        for name, value in tensors.items():
            expected = mine.get(name, value)
            assert np.array_equal(starts[-1][name], expected)
            assert np.array_equal(seen[-1].get(name, expected), expected)
        mine = {name: tensors[name] + update[name] for name in own}
        stored = SiteState(site.state / study.hash[:16]).own_before(round + 1)
        assert stored.keys() == own
        for name, value in mine.items():
            np.testing.assert_allclose(stored[name], value, rtol=1e-6, atol=1e-6)
        mine = {name: value.numpy() for name, value in stored.items()}
    answer(ordered(study, 4, tensors, train=False, evaluate=True), tensors, site)  # what the last round has made
    assert all(np.array_equal(seen[-1][name], value) for name, value in mine.items())


def test_fedema_starts_between_the_global_encoder_and_its_own(site: Site, starts: list[Any]) -> None:
    study, scale = study_of("fedema"), 0.0
    own: dict[str, Tensor] = {}
    for round in (1, 2, 3, 5):  # one is missed, and another stage begins
        tensors = moved(initial_tensors(study, study.stage_of(round - 1)[0], None), round / 100)
        update = made(study, round, tensors, site)
        weights = {name for name in tensors if name.startswith("encoder.")}
        theirs = {name: torch.tensor(tensors[name]) for name in weights}
        if own and not scale:
            scale = 0.7 / math.sqrt(sum(float((own[n] - theirs[n]).double().square().sum()) for n in weights))
        expected = slow_blend(own, theirs, scale, weights) if own else {}
        for name, value in starts[-1].items():
            np.testing.assert_allclose(value, expected.get(name, tensors[name]), rtol=1e-5, atol=1e-6)
        kept = SiteState(site.state / study.hash[:16]).own_before(round + 1)
        assert kept.keys() - weights == ({SCALE} if scale else set())
        own = {name: kept[name] for name in weights}
        for name, value in own.items():
            np.testing.assert_allclose(value, tensors[name] + update[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_round_that_is_asked_for_again_gives_the_same_bits_after_a_detour_and_after_missed_rounds(
    rule: str, site: Site, starts: list[Any]
) -> None:
    study = study_of(rule, stages=[{**SIMCLR, "rounds": 9}])
    tensors = initial_tensors(study, 0, None)
    for round in (1, 2, 6):
        came, other = moved(tensors, round / 100), moved(tensors, round / 50)
        update = made(study, round, came, site)
        elsewhere = made(study, round, other, site)
        assert same_bits(made(study, round, came, site), update)
        assert not same_bits(update, elsewhere)
    assert len(starts) == 9  # none was answered from the store


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("rule", RULES)
def test_a_round_killed_midway_goes_on_to_the_same_bits(rule: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MIDWAY_S", -1.0)
    study = study_of(rule, stages=[{**SIMCLR, "rounds": 3, "local_epochs": 3}])
    second = replace(site, state=site.state.with_name("undisturbed"))
    tensors = initial_tensors(study, 0, None)
    for where in (site, second):
        made(study, 1, tensors, where)
    came = moved(tensors, 0.01)

    def dying(done: int, steps: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        answer(ordered(study, 2, came), came, site, dying)
    assert same_bits(made(study, 2, came, site), made(study, 2, came, second))
    later = moved(tensors, 0.02)
    assert same_bits(made(study, 3, later, site), made(study, 3, later, second))


@pytest.mark.parametrize("rule", RULES)
def test_a_study_that_is_stopped_and_resumed_is_as_undisturbed(rule: str, batch_norm: None, tmp_path: Path) -> None:
    stages = [{**SIMCLR, "rounds": 2}, {**SIMCLR, "rounds": 1, "projection": 4}]
    study, seats = study_of(rule, stages=stages, evaluation={"rows": [], "every": 0}), {"east": 10, "west": 10}
    grid = LocalGrid({name: real(name, tmp_path / "sites") for name in seats})
    whole = open_run(tmp_path / "whole", study)
    expected = run_study(grid, study, whole, seats)
    assert (expected["encoder.norm.running_var"] > 0).all()
    lines = [(line["event"], line.get("round")) for line in events(whole)]
    for event in (("update_accepted", 2), ("round_started", 3)):
        where = tmp_path / event[0]
        again = LocalGrid({name: real(name, where / "sites") for name in seats})
        with pytest.raises(Stop):
            run_study(again, study, stopping_at(where, study, lines.index(event) + 1), seats)
        assert same_bits(run_study(again, study, RunDir(where), seats), expected)
        assert measured(where) == measured(whole)


@pytest.mark.parametrize("rule", RULES)
def test_patients_who_are_promised_privacy_are_trained_on_from_what_is_kept(
    rule: str, tmp_path: Path, starts: list[Any]
) -> None:
    study = study_of(
        rule,
        stages=[{"kind": "finetune", "rounds": 3, "batch_size": 8, "probe_rounds": 0}],
        evaluation={"rows": [], "labels": {"clear": ["clear"], "spot": ["spot"]}},
        privacy={"mode": "patient", "noise": 2.0, "delta": 1e-3},
    )
    site = Site("north", in_memory(60), tmp_path / "north")
    tensors = initial_tensors(study, 0, None)
    for _ in range(2):
        made(study, len(starts) + 1, tensors, site)
    (folder,) = (path.parent for path in site.state.rglob("own-0001.safetensors"))
    own = SiteState(folder).own_before(2)
    changed = {name for name in tensors if not np.array_equal(starts[1][name], tensors[name])}
    assert changed == own.keys()


@pytest.mark.parametrize(
    "stage",
    [
        {"kind": "pretrain", "method": "simclr"},
        {"kind": "pretrain", "method": "micle"},
        {"kind": "pretrain", "method": "mlvicx", "projection": 16, "common": 8},
        {"kind": "finetune", "probe_rounds": 0},
        {"kind": "finetune", "probe_rounds": 1},
    ],
)
def test_every_method_trains_an_encoder_that_normalises_batches(
    stage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training its statistics move, unless it is frozen; a batch of one image with a label is no error."""

    def small(encoder: Encoder, images: Images) -> nn.Module:
        return ResidualNetwork(Basic, [1, 1, 1, 1], images.channels, encoder.context, encoder.norm)

    monkeypatch.setitem(ENCODERS, "resnet18", small)
    study = tiny_study(
        encoder={"norm": "batch"},
        stages=[{**stage, "rounds": 2, "batch_size": 4}],
        evaluation={"rows": [], "labels": {"clear": ["clear"], "spot": ["spot"]}},
        aggregation={"rule": "fedbn"},
    )
    cohort = in_memory(8, images=1)
    if stage["kind"] == "finetune":  # one image with a label in most batches
        labels = np.array([label if patient in (0, 1, 2) else "" for patient, label in enumerate(cohort.labels)])
        cohort = replace(cohort, labels=labels)
    tensors = initial_tensors(study, 0, None)
    update = made(study, 1, tensors, Site("north", cohort, tmp_path))
    travelling = {name for name in update if "running" in name}
    assert len(travelling) == 24
    assert not any("num_batches" in name for name in update)
    frozen = stage.get("probe_rounds") == 1
    assert all(np.isfinite(update[name]).all() and update[name].any() != frozen for name in travelling)
    new = {name: value + update[name] for name, value in tensors.items()}
    assert frozen or all((new[name] > 0).all() for name in travelling if name.endswith("var"))
