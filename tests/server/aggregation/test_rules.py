"""Every rule against its formula written out slowly, by itself and through the round loop, and what it must survive."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum
from numpy.typing import NDArray
from pydantic import TypeAdapter

from polyclinic import wire
from polyclinic.errors import QuorumLost, StudyError
from polyclinic.model import initial_tensors
from polyclinic.rules import Aggregation, AnyAggregation
from polyclinic.study import Study
from polyclinic_server import checkpoints, rounds
from polyclinic_server.aggregation import RULES
from polyclinic_server.aggregation.fedavg import CHUNK, FedAvg, weight_of
from polyclinic_server.aggregation.krum import squared_distances
from polyclinic_server.aggregation.ldawa import cosine
from polyclinic_server.rounds import run_study
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.engines.local import LocalGrid, Node

from ...tiny import SIMCLR, Mail, events, honest, measured, open_run, same_bits, tiny_study
from ..test_rounds import Shuffled, Stop, stopping_at

Update = dict[str, NDArray[np.float32]]
Exact = dict[str, NDArray[np.float64]]
Memory = dict[str, Any]
Twin = Callable[[Exact, list[Exact], list[int], Any, Memory], Exact]

SHAPES = {"a.weight": (3, 4), "b": (), "c": (0, 5), "d": (7,)}
SITES = ("bern", "east", "north", "south", "west")
SEATS = dict(zip(SITES, (10, 20, 40, 10, 30), strict=True))
KEPT = ["fedavgm", "fedadam"]
"""Rules that remember something."""
ROBUST = ["median", "trimmed_mean", "krum"]


def each(names: Iterable[str], of: Callable[[str, int], float], like: Exact) -> Exact:
    """{name: tensor}, value by value."""
    return {n: np.array([of(n, k) for k in range(like[n].size)]).reshape(like[n].shape) for n in names}


def slow_mean(start: Exact, updates: list[Exact], weights: list[int]) -> Exact:
    """Of the updates."""
    parts = list(zip(updates, weights, strict=True))
    return each(start, lambda n, k: math.fsum(w * float(u[n].flat[k]) for u, w in parts) / sum(weights), start)


def slow_fedavg(start: Exact, updates: list[Exact], weights: list[int], rule: Any, memory: Memory) -> Exact:
    """w + mean."""
    mean = slow_mean(start, updates, weights)
    return {n: value + mean[n] for n, value in start.items()}


def slow_fedavgm(start: Exact, updates: list[Exact], weights: list[int], rule: Any, memory: Memory) -> Exact:
    """The sum over all rounds, each worth momentum to the power of its age: the recursion rolled out."""
    means = memory.setdefault("means", [])
    means.append(slow_mean(start, updates, weights))
    ages = range(len(means) - 1, -1, -1)

    def velocity(n: str, k: int) -> float:
        return math.fsum(rule.momentum**age * float(mean[n].flat[k]) for age, mean in zip(ages, means, strict=True))

    moved = each(start, velocity, start)
    return {n: value + rule.learning_rate * moved[n] for n, value in start.items()}


def slow_fedadam(start: Exact, updates: list[Exact], weights: list[int], rule: Any, memory: Memory) -> Exact:
    """Moments as weighted sums over all rounds."""
    means = memory.setdefault("means", [])
    means.append(slow_mean(start, updates, weights))
    ages = range(len(means) - 1, -1, -1)

    def step(n: str, k: int) -> float:
        seen = [float(mean[n].flat[k]) for mean in means]
        first = sum((1 - rule.beta1) * rule.beta1**age * d for age, d in zip(ages, seen, strict=True))
        second = sum((1 - rule.beta2) * rule.beta2**age * d * d for age, d in zip(ages, seen, strict=True))
        second += rule.beta2 ** len(means) * rule.tau**2
        return float(rule.learning_rate * first / (math.sqrt(second) + rule.tau))

    moved = each(start, step, start)
    return {n: value + moved[n] for n, value in start.items()}


def slow_ldawa(start: Exact, updates: list[Exact], weights: list[int], rule: Any, memory: Memory) -> Exact:
    """The mean of weights, not of changes."""
    new: Exact = {}
    for n, old in start.items():
        sites = [old + update[n] for update in updates]
        shares = []
        for site, weight in zip(sites, weights, strict=True):
            length = float(np.linalg.norm(old) * np.linalg.norm(site))
            shares.append(weight * (max(float(np.vdot(old, site)) / length, 0) if length else 1.0))
        total = sum(shares)
        mean = sum((share / total * site for share, site in zip(shares, sites, strict=True)), 0 * old) if total else old
        new[n] = np.asarray(mean)
    return new


def slow_median(start: Exact, updates: list[Exact], weights: list[int], rule: Any, memory: Memory) -> Exact:
    """Of each value."""
    return each(start, lambda n, k: start[n].flat[k] + statistics.median(float(u[n].flat[k]) for u in updates), start)


def slow_trimmed(start: Exact, updates: list[Exact], weights: list[int], rule: Any, memory: Memory) -> Exact:
    """Of each value, one at each end after the other left out."""

    def mean(n: str, k: int) -> float:
        left = [float(u[n].flat[k]) for u in updates]
        for _ in range(math.floor(rule.fraction * len(updates))):
            left.remove(min(left))
            left.remove(max(left))
        return float(start[n].flat[k]) + statistics.fmean(left)

    return each(start, mean, start)


def slow_krum(start: Exact, updates: list[Exact], weights: list[int], rule: Any, memory: Memory) -> Exact:
    """The least of all sums over n - f - 2 others, whichever they are."""
    flat = [np.concatenate([u[n].reshape(-1) for n in sorted(u)]) for u in updates]

    def score(i: int) -> float:
        apart = [math.dist(flat[i], other) ** 2 for j, other in enumerate(flat) if j != i]
        return min(sum(some) for some in itertools.combinations(apart, len(updates) - rule.f - 2))

    best = updates[min(range(len(updates)), key=score)]
    return {n: value + best[n] for n, value in start.items()}


TWINS: dict[str, Twin] = {
    "fedavg": slow_fedavg,
    "fedprox": slow_fedavg,
    "fedbn": slow_fedavg,
    "fedema": slow_fedavg,
    "fedavgm": slow_fedavgm,
    "fedadam": slow_fedadam,
    "ldawa": slow_ldawa,
    "median": slow_median,
    "trimmed_mean": slow_trimmed,
    "krum": slow_krum,
}


def settings_of(rule: str, **keys: Any) -> Any:
    return TypeAdapter(AnyAggregation).validate_python({"rule": rule, **keys})


def draw(rng: np.random.Generator, scale: float = 1.0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Update:
    return {n: np.asarray(scale * rng.standard_normal(shape), np.float32) for n, shape in shapes.items()}


def exact(tensors: wire.Tensors) -> Exact:
    return {n: value.astype(np.float64) for n, value in tensors.items()}


def fold(settings: Aggregation, start: Update, updates: list[Update], weights: list[int], state: Update) -> Update:
    """One round; `state` goes on."""
    rule = RULES[settings.rule](start, settings, dict(state))
    for update, weight in zip(updates, weights, strict=True):
        rule.add(update.items(), weight)
    new = rule.close(start)
    state.update(rule.state)
    return new


def test_every_rule_of_the_study_is_there_and_has_a_twin() -> None:
    with pytest.raises(ValueError, match="Input tag 'x' found") as caught:
        settings_of("x")
    assert all(f"'{name}'" in str(caught.value) for name in RULES)
    assert RULES.keys() == TWINS.keys()


@pytest.mark.parametrize("rule", TWINS)
@pytest.mark.parametrize("sites", [5, 6, 9])
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_three_rounds_are_those_of_a_slow_twin(rule: str, sites: int, scale: float) -> None:
    rng = np.random.default_rng(sites)
    settings, new, state, memory = settings_of(rule), draw(rng), {}, {}  # type: ignore[var-annotated]
    for _ in range(3):
        start, updates = new, [draw(rng, scale) for _ in range(sites)]
        weights = rng.integers(1, 1000, sites).tolist()
        new = fold(settings, start, updates, weights, state)
        twin = TWINS[rule](exact(start), [exact(update) for update in updates], weights, settings, memory)
        for name, value in new.items():
            assert value.dtype == np.float32
            assert value.shape == start[name].shape
            np.testing.assert_allclose(value, twin[name], rtol=3e-7, atol=1e-6 * scale + 1e-8)
    assert bool(state) == (rule in KEPT)


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        ("fedavgm", {"momentum": 0.0, "learning_rate": 0.5}),
        ("fedavgm", {"momentum": 0.5, "learning_rate": 2.0}),
        ("fedadam", {"beta1": 0.0, "beta2": 0.5, "tau": 0.1, "learning_rate": 1.0}),
        ("trimmed_mean", {"fraction": 0.49}),
        ("trimmed_mean", {"fraction": 0.12}),
        ("krum", {"f": 0}),
        ("krum", {"f": 3}),
    ],
)
def test_settings_mean_what_the_formula_says(rule: str, keys: dict[str, float]) -> None:
    rng = np.random.default_rng(3)
    settings, new, state, memory = settings_of(rule, **keys), draw(rng), {}, {}  # type: ignore[var-annotated]
    for _ in range(2):
        start, updates = new, [draw(rng, 0.1) for _ in range(9)]
        new = fold(settings, start, updates, [1] * 9, state)
        twin = TWINS[rule](exact(start), [exact(update) for update in updates], [1] * 9, settings, memory)
        for name, value in new.items():
            np.testing.assert_allclose(value, twin[name], rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("rule", TWINS)
def test_the_order_of_arrival_changes_no_bit(rule: str) -> None:
    rng = np.random.default_rng(0)
    start, settings = draw(rng), settings_of(rule)
    arrivals = [(draw(rng, 10.0**-k), int(rng.integers(1, 65_536))) for k in range(5)]
    before: Update = {}
    fold(settings, start, [draw(rng)], [1], before)
    found = []
    for order in itertools.permutations(arrivals):
        state = {name: value.copy() for name, value in before.items()}
        new = fold(settings, start, [update for update, _ in order], [weight for _, weight in order], state)
        found.append(new | {f"state of {name}": value for name, value in state.items()})
    assert all(same_bits(found[0], other) for other in found)


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("rule", [name for name, twin in TWINS.items() if twin is not slow_fedavg])
def test_chunks_meet_at_their_edges(rule: str, size: int) -> None:
    """Where values do not depend on others, those about the edges alone give the same bits."""
    rng = np.random.default_rng(size)
    shapes = {"x": (size,)}
    start, updates, state = draw(rng, 1.0, shapes), [draw(rng, 0.1, shapes) for _ in range(5)], {}  # type: ignore[var-annotated]
    new = fold(settings_of(rule), start, updates, [1, 2, 3, 4, 5], state)["x"]
    edges = [0, 1, CHUNK - 2, size - 1, *range(CHUNK - 1, min(CHUNK + 2, size))]
    if rule in ("ldawa", "krum"):  # whose result depends on the whole
        mean = TWINS[rule](exact(start), [exact(u) for u in updates], [1, 2, 3, 4, 5], settings_of(rule), {})
        np.testing.assert_allclose(new, mean["x"], rtol=1e-6, atol=1e-7)
        return
    few = [{"x": update["x"][edges]} for update in updates]
    assert (new[edges] == fold(settings_of(rule), {"x": start["x"][edges]}, few, [1, 2, 3, 4, 5], {})["x"]).all()


def test_adams_first_step_by_hand() -> None:
    settings = settings_of("fedadam", learning_rate=0.5, beta1=0.9, beta2=0.99, tau=0.01)
    new = fold(settings, {"x": np.zeros(2, np.float32)}, [{"x": np.array([0.1, 0], np.float32)}], [1], {})["x"]
    assert new[0] == pytest.approx(0.5 * 0.01 / (math.sqrt(0.99 * 1e-4 + 0.01 * 0.01) + 0.01), rel=1e-6)
    assert new[1] == 0


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ([[0.5, 0], [-1, 1]], [1.5, 0]),  # the second stands at a right angle to what was: it counts for nothing
        ([[0.5, 0], [-4, 0]], [1.5, 0]),  # it has turned round
        ([[-4, 0], [-4, 0]], [1, 0]),  # all have
    ],
)
def test_ldawa_counts_a_layer_by_its_angle(moves: list[list[float]], expected: list[float]) -> None:
    start = {"x": np.array([1, 0], np.float32), "other": np.array([1, 0], np.float32)}
    updates = [{"x": np.array(move, np.float32), "other": np.array([0.25, 0], np.float32)} for move in moves]
    new = fold(settings_of("ldawa"), start, updates, [1, 1000], {})
    assert new["x"].tolist() == expected
    assert new["other"].tolist() == [1.25, 0]


def test_a_layer_of_zeros_is_averaged_by_size() -> None:
    zeros = {"x": np.zeros(2, np.float32)}
    updates = [{"x": np.array([4, 0], np.float32)}, {"x": np.array([0, -8], np.float32)}]
    assert fold(settings_of("ldawa"), zeros, updates, [3, 1], {})["x"].tolist() == [3, -2]
    assert cosine(zeros["x"], updates[0]["x"]) == 1


def test_krum_takes_the_one_that_flowers_takes() -> None:
    rng = np.random.default_rng(5)
    for sites, f in ((5, 1), (9, 3), (7, 0)):
        start, updates = draw(rng, 0.0), [draw(rng) for _ in range(sites)]
        contents = [
            RecordDict({"arrays": ArrayRecord({n: Array(value) for n, value in sorted(update.items())})})
            for update in updates
        ]
        [theirs] = select_multikrum(contents, num_malicious_nodes=f, num_nodes_to_select=1)
        new = fold(settings_of("krum", f=f), start, updates, [1] * sites, {})
        assert all((theirs["arrays"][name].numpy() == value).all() for name, value in new.items())  # type: ignore[index]


def test_distances_of_updates_that_are_nearly_alike_keep_their_digits() -> None:
    large = np.full(1000, 10.0, np.float32)
    near = large.copy()
    near[0] = np.nextafter(near[0], np.float32(11))
    apart = squared_distances([{"x": large}, {"x": near}, {"x": large}])
    assert apart[0, 1] == apart[1, 0] == apart[1, 2] == float(near[0] - large[0]) ** 2 > 0
    assert apart[0, 2] == 0


def test_of_a_tie_krum_takes_the_same_one_whoever_has_sent_it() -> None:
    start = {"x": np.zeros(1, np.float32)}
    sent = [{"x": np.array([value], np.float32)} for value in (1, 2, 10)]  # 1 and 2 are as near to each other
    settings = settings_of("krum", f=0)
    taken = {fold(settings, start, list(order), [1] * 3, {})["x"].item() for order in itertools.permutations(sent)}
    assert taken in ({1.0}, {2.0})


def nodes(sites: Iterable[str] = SITES) -> dict[str, Node]:
    return {name: honest(name, SEATS.get(name, 10)) for name in sites}


def study_of(rule: str, **changes: Any) -> Study:
    keys = changes.pop("aggregation", {})
    return tiny_study(**{"aggregation": {"rule": rule, **keys}, "stages": [SIMCLR], **changes})


@pytest.mark.parametrize("rule", TWINS)
def test_a_study_is_that_of_a_slow_twin_behind_the_gate(rule: str, tmp_path: Path) -> None:
    """A sixth site sends what is no number, in the second round too: it is refused, and the rule never sees it."""
    study = study_of(rule, aggregation={"round_deadline_s": 5.0})
    sent: list[dict[str, Exact]] = [{}, {}]

    def note(site: str, reply: Message) -> list[Message]:
        if "update" in reply.content:
            update = wire.unpack_tensors(reply.content["update"])
            sent[int(reply.metadata.group_id) - 1][site] = {n: v.astype(np.float64) for n, v in update.items()}
        return [reply]

    apps = {**nodes(), "zurich": honest("zurich", scale=math.nan)}
    run = open_run(tmp_path, study)
    new = run_study(Mail(apps, note), study, run, {**SEATS, "zurich": 10})
    refused = [(line["round"], line["site"]) for line in events(run, "update_refused")]
    assert refused == [(1, "zurich"), (2, "zurich")]
    expected, memory = exact(initial_tensors(study, 0, None)), {}  # type: ignore[var-annotated]
    weights = [weight_of(SEATS[site], study.aggregation.weighting) for site in SITES]
    for update in sent:
        expected = TWINS[rule](expected, [update[site] for site in SITES], weights, study.aggregation, memory)
    for name, value in new.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", TWINS)
def test_a_study_has_the_same_bits_in_any_order_of_arrival(rule: str, tmp_path: Path) -> None:
    study = study_of(rule)
    run = open_run(tmp_path / "in order", study)
    expected = run_study(LocalGrid(nodes()), study, run, SEATS)
    for seed in range(2):
        other = open_run(tmp_path / str(seed), study)
        assert same_bits(run_study(Shuffled(nodes(), seed), study, other, SEATS), expected)
        for path in sorted(run.checkpoints.iterdir()):
            assert (other.checkpoints / path.name).read_bytes() == path.read_bytes()


TWO_STAGES = [{**SIMCLR, "rounds": 3}, {**SIMCLR, "rounds": 2, "projection": 4}]


@pytest.mark.parametrize("rule", KEPT)
def test_what_a_rule_remembers_survives_a_stop_at_any_event(rule: str, tmp_path: Path) -> None:
    study = study_of(rule, stages=TWO_STAGES)
    apps = nodes(SITES[:2])
    seats = {name: SEATS[name] for name in apps}
    whole = open_run(tmp_path / "whole", study)
    expected = run_study(LocalGrid(apps), study, whole, seats)
    for number in range(1, len(events(whole)) + 1):
        with pytest.raises(Stop):
            run_study(LocalGrid(apps), study, stopping_at(tmp_path / str(number), study, number), seats)
        run = RunDir(tmp_path / str(number))
        assert same_bits(run_study(LocalGrid(apps), study, run, seats), expected)
        assert measured(run) == measured(whole)
        for path in sorted(whole.checkpoints.iterdir()):
            assert (run.checkpoints / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("rule", KEPT)
def test_it_is_of_the_checkpoint_that_is_gone_on_from(rule: str, tmp_path: Path) -> None:
    study = study_of(rule, stages=[{**SIMCLR, "rounds": 4}])
    run = open_run(tmp_path, study)
    expected = run_study(LocalGrid(nodes()), study, run, SEATS)
    for number in (3, 4):
        (run.checkpoints / f"round-{number:04d}.safetensors").write_bytes(b"damaged")
    assert same_bits(run_study(LocalGrid(nodes()), study, RunDir(tmp_path), SEATS), expected)


@pytest.mark.parametrize("rule", KEPT)
def test_without_it_the_result_would_be_another(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(rule, stages=[{**SIMCLR, "rounds": 3}])
    expected = run_study(LocalGrid(nodes()), study, open_run(tmp_path / "whole", study), SEATS)
    count = [line["event"] for line in events(tmp_path / "whole")].index("round_closed") + 2
    with pytest.raises(Stop):
        run_study(LocalGrid(nodes()), study, stopping_at(tmp_path / "run", study, count), SEATS)
    monkeypatch.setattr(checkpoints, "load_state", lambda folder, checkpoint: {})
    assert not same_bits(run_study(LocalGrid(nodes()), study, RunDir(tmp_path / "run"), SEATS), expected)


@pytest.mark.parametrize("rule", ["fedavg", *KEPT])
def test_a_new_stage_begins_without_it(rule: str, tmp_path: Path) -> None:
    """After the first round of a stage it is what a rule makes of that round's updates alone."""
    study = study_of(rule, stages=[{**SIMCLR, "rounds": 2}, {**SIMCLR, "rounds": 1, "projection": 4}])
    sent: dict[str, Update] = {}

    def note(site: str, reply: Message) -> list[Message]:
        if "update" in reply.content:
            sent[site] = {n: v.copy() for n, v in wire.unpack_tensors(reply.content["update"]).items()}
        return [reply]

    run = open_run(tmp_path, study)
    new = run_study(Mail(nodes(), note), study, run, SEATS)
    found = checkpoints.newest(run.checkpoints, study.hash, pytest.fail)
    assert found is not None
    assert found[1].keys() == new.keys()  # what the rule remembers is no tensor of the encoder
    state = checkpoints.load_state(run.checkpoints, found[0])
    assert {name.partition(".")[2] for name in state} == (set() if rule == "fedavg" else set(new))
    fresh: Update = {}
    fold(study.aggregation, new, [sent[site] for site in SITES], list(SEATS.values()), fresh)
    assert same_bits(fresh, state)


@pytest.mark.parametrize(
    ("rule", "keys", "least"),
    [
        ("median", {}, 3),
        ("trimmed_mean", {}, 5),
        ("trimmed_mean", {"fraction": 0.34}, 3),
        ("trimmed_mean", {"fraction": 0.1}, 10),
        ("krum", {}, 5),
        ("krum", {"f": 0}, 3),
        ("krum", {"f": 2}, 7),
    ],
)
def test_too_few_sites_for_a_rule_are_refused_before_anything_runs(
    rule: str, keys: dict[str, Any], least: int, tmp_path: Path
) -> None:
    study = study_of(rule, aggregation=keys, stages=[{**SIMCLR, "rounds": 1}])
    names = [f"s{number}" for number in range(least)]
    run = open_run(tmp_path / "few", study)
    with pytest.raises(StudyError, match=f"needs updates of {least} sites, and there are {least - 1}"):
        run_study(LocalGrid(nodes(names[:-1])), study, run, dict.fromkeys(names[:-1], 10))
    assert not run.checkpoints.exists()
    run = open_run(tmp_path / "enough", study)
    run_study(LocalGrid(nodes(names)), study, run, dict.fromkeys(names, 10))
    assert [line["accepted"] for line in events(run, "round_closed")] == [least]


def test_a_round_with_too_few_updates_for_its_rule_ends_the_run(tmp_path: Path) -> None:
    def failing(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and message.metadata.group_id == "2":
            raise RuntimeError("no")
        return honest("west", SEATS["west"])(message, context)

    study = study_of("krum")
    assert study.aggregation.min_sites == 2
    run = open_run(tmp_path, study)
    with pytest.raises(QuorumLost, match="only 4 of at least 5 sites sent an update that passed in round 2"):
        run_study(LocalGrid({**nodes(), "west": failing}), study, run, SEATS)
    assert [line["round"] for line in events(run, "round_closed")] == [1]


@pytest.mark.parametrize("rule", ROBUST)
def test_a_single_site_is_the_same_under_every_robust_rule(rule: str, tmp_path: Path) -> None:
    one = {"aggregation": {"min_sites": 1, "weighting": "equal"}}
    results = []
    for name in ("fedavg", rule):
        study = study_of(name, **one)
        results.append(run_study(LocalGrid(nodes(["east"])), study, open_run(tmp_path / name, study), {"east": 20}))
    for name, value in results[0].items():
        np.testing.assert_allclose(results[1][name], value, rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("rule", TWINS)
def test_a_rule_that_fills_the_memory_says_so(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "MUCH", 0)
    study = study_of(rule, stages=[{**SIMCLR, "rounds": 1}])
    run = open_run(tmp_path, study)
    run_study(LocalGrid(nodes()), study, run, SEATS)
    told = [line["text"] for line in events(run, "warning")]
    assert told == ([f"{rule} holds the updates of all 5 sites in memory: 0.0 GB a round"] if rule in ROBUST else [])


def test_updates_are_given_up_as_they_are_combined() -> None:
    start = {"x": np.zeros(3, np.float32)}
    for name in ROBUST:
        rule = RULES[name](start, settings_of(name), {})
        for _ in range(5):
            rule.add({"x": np.ones(3, np.float32)}.items(), 1)
        rule.close(start)
        assert not any(update for update in rule._updates)  # type: ignore[attr-defined]


def drifting(name: str, factor: float) -> Node:
    """A node whose updates go the way that all go, with noise of their own, times `factor`; all equally far."""

    def node(message: Message, context: Context) -> Message:
        reply = honest(name)(message, context)
        if message.metadata.message_type != "train":
            return reply
        update = wire.unpack_tensors(reply.content["update"])
        noisy = {n: 1 + 200 * value for n, value in update.items()}  # of deviation 0.2 about 1
        length = math.sqrt(sum(float((value**2).sum()) for value in noisy.values()))
        moved = {n: (0.1 * factor / length * value).astype(np.float32) for n, value in noisy.items()}
        reply.content["update"] = wire.pack_tensors(moved)
        return reply

    return node


@pytest.mark.parametrize(("rule", "stands"), [("fedavg", False), *((rule, True) for rule in ROBUST)])
def test_one_byzantine_site_of_five_turns_fedavg_round_and_no_robust_rule(
    rule: str, stands: bool, tmp_path: Path
) -> None:
    """It sends ten times the opposite, as far as the gate lets it."""
    study = study_of(rule, aggregation={"weighting": "equal"}, stages=[{**SIMCLR, "rounds": 3}])
    progress = {}
    for last in (1.0, -9.99):
        apps = {name: drifting(name, last if name == "west" else 1.0) for name in SITES}
        run = open_run(tmp_path / str(last), study)
        new = run_study(LocalGrid(apps), study, run, dict.fromkeys(SITES, 10))
        assert events(run, "update_refused") == []
        start = initial_tensors(study, 0, None)
        progress[last] = sum(float((new[n] - value).sum()) for n, value in start.items())
    if stands:
        assert progress[-9.99] == pytest.approx(progress[1.0], rel=0.1)
    else:
        assert progress[-9.99] == pytest.approx(-1.2 * progress[1.0], rel=0.1)  # (4 - 9.99) / 5


def test_fedavg_stands_as_it_was() -> None:
    rule = RULES["fedavg"](draw(np.random.default_rng(0)), settings_of("fedavg"), {})
    assert isinstance(rule, FedAvg)
    assert not rule.holds_updates
    assert rule.state == {}
