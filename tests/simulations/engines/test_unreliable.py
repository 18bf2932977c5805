"""The Grid of unreliable sites: what is lost, late, changed or damaged, and that a study goes on to the same bits."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Context, Error, Message, MessageType

from polyclinic import wire
from polyclinic.encoders import ENCODERS
from polyclinic.errors import QuorumLost
from polyclinic.stages import Finetune
from polyclinic.study import Study
from polyclinic.wire import Tensors
from polyclinic_client.site import Site
from polyclinic_server import checkpoints
from polyclinic_server.mail import Clock
from polyclinic_server.rounds import run_study
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.engines.byzantine import colluded
from polyclinic_simulations.engines.clock import VirtualClock
from polyclinic_simulations.engines.local import LocalGrid, Node
from polyclinic_simulations.engines.unreliable import UnreliableGrid, _images, open_grid, strikes

from ...tiny import (
    SIMCLR,
    SITES,
    TinyEncoder,
    events,
    honest,
    in_memory,
    measured,
    open_run,
    real,
    same_bits,
    tiny_study,
)

NIGHTS = {"images_per_s": 10.0, "bytes_per_s": 1e6, "nights": [20, 6], "start_hour": 12}
IMAGES = {"east": 600, "north": 3_000, "west": 6_000}
"""A minute, five, and ten."""


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))


def study_of(*faults: dict[str, Any], clock: Mapping[str, Any] | None = None, **changes: Any) -> Study:
    """Four rounds, evaluated only at their end; sites train at any hour unless `clock` says otherwise."""
    simulation = {
        "site": [{"name": name, "cohort": name} for name in SITES],
        "clock": {"images_per_s": 10.0, **(clock or {})},
        "fault": list(faults),
    }
    plain = {
        "stages": [{**SIMCLR, "rounds": 4}],
        "evaluation": {"rows": [], "every": 0},
        "aggregation": {"min_sites": 1, "round_deadline_s": 3600.0},
    }
    return tiny_study(**{**plain, "simulation": simulation, **changes})


class Consortium:
    """Nodes that train nothing, and what they were asked: [(round, site)] in the order in which they worked."""

    def __init__(self, nodes: Mapping[str, Node] | None = None) -> None:
        self.asked: list[tuple[int, str]] = []
        self.nodes = {name: self._noting(name, node) for name, node in (nodes or honest_nodes()).items()}

    def _noting(self, name: str, node: Node) -> Node:
        def noted(message: Message, context: Context) -> Message:
            if message.metadata.message_type == MessageType.TRAIN:
                self.asked.append((int(message.metadata.group_id), name))
            return node(message, context)

        return noted

    def run(self, study: Study, run: RunDir, images: Mapping[str, int] = IMAGES) -> Tensors:
        """Lead the study here from its newest checkpoint; `images` are those that a site trains on."""
        sites = {name: cast(Site, SimpleNamespace(split=lambda _, n=n: (range(n), ()))) for name, n in images.items()}
        grid, clock = open_grid(self.nodes, study, run, sites)
        return run_study(grid, study, run, dict.fromkeys(SITES, 10), clock=clock, evaluate=False)


def honest_nodes() -> dict[str, Node]:
    return {name: honest(name) for name in SITES}


def rounds_of(run: RunDir, event: str) -> dict[str, list[int]]:
    """The rounds of an event, by site."""
    found: dict[str, list[int]] = {}
    for line in events(run, event):
        found.setdefault(line["site"], []).append(line["round"])
    return found


def seconds(run: RunDir) -> list[float]:
    return [line["seconds"] for line in events(run, "round_closed")]


def test_a_fault_happens_as_often_as_it_should_and_always_to_the_same() -> None:
    study = study_of({"kind": "sign_flip", "probability": 0.3}, {"kind": "sign_flip", "probability": 0.3})
    drawn = {(site, n): frozenset(strikes(study, site, n)) for site in SITES for n in range(1, 1001)}
    for fault in (0, 1):
        rate = sum(fault in struck for struck in drawn.values()) / len(drawn)
        assert abs(rate - 0.3) < 4 * (0.3 * 0.7 / len(drawn)) ** 0.5
    both = sum(len(struck) == 2 for struck in drawn.values()) / len(drawn)
    assert abs(both - 0.09) < 4 * (0.09 * 0.91 / len(drawn)) ** 0.5  # one says nothing of the other
    assert all(frozenset(strikes(study, *key)) == struck for key, struck in reversed(list(drawn.items())))
    other = study.model_copy(update={"study": study.study.model_copy(update={"seed": 4})})
    assert any(frozenset(strikes(other, *key)) != struck for key, struck in drawn.items())


def test_a_fault_is_of_its_sites_and_rounds() -> None:
    study = study_of({"kind": "sign_flip", "sites": ["east"], "rounds": [2, 3]}, {"kind": "corrupt", "probability": 0})
    found = {(site, n) for site in SITES for n in range(1, 5) if strikes(study, site, n)}
    assert found == {("east", 2), ("east", 3)}


def test_a_round_lasts_as_its_slowest_site_takes(tmp_path: Path) -> None:
    study = study_of(clock={"bytes_per_s": 1e9})
    run, sites = open_run(tmp_path, study), Consortium()
    sites.run(study, run)
    assert seconds(run) == pytest.approx([600.0] * 4, abs=0.01)
    assert [site for number, site in sites.asked if number == 1] == ["east", "north", "west"]
    metrics = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert [float(row[-1]) for row in metrics if row[3] == "seconds"] == seconds(run)


def test_answers_come_in_the_order_in_which_they_arrive(tmp_path: Path) -> None:
    study = study_of({"kind": "slow", "factor": 20.0, "sites": ["east"]})
    run = open_run(tmp_path, study)
    Consortium().run(study, run)
    assert [line["site"] for line in events(run, "update_accepted")][:3] == ["north", "west", "east"]
    assert seconds(run) == pytest.approx([1200.0] * 4, abs=0.1)


def test_tensors_take_time_both_ways(tmp_path: Path) -> None:
    study = study_of(clock={"images_per_s": 1e6, "bytes_per_s": 8.0})
    run = open_run(tmp_path, study)
    Consortium().run(study, run)
    order = checkpoints.newest(run.checkpoints, study.hash, lambda text: None)
    assert order is not None
    size = len(next(iter(wire.pack_tensors(order[1]).values())).data)
    assert seconds(run) == pytest.approx([2 * size / 8.0] * 4, abs=0.1)


def test_sites_train_on_as_many_images_as_the_stage_gives_them(tmp_path: Path) -> None:
    """In two local epochs all training images; then those with a label that the study takes."""
    stages = [
        {**SIMCLR, "rounds": 1, "local_epochs": 2},
        {"kind": "finetune", "rounds": 1, "batch_size": 8, "label_fraction": 0.3},
    ]
    classes = {"labels": {"spot": ["spot"], "clear": ["clear"]}, "rows": [], "every": 0}
    study = study_of(stages=stages, evaluation=classes, clock={"images_per_s": 0.1})
    run = open_run(tmp_path, study)
    sites = {name: Site(name, in_memory(10), tmp_path) for name in SITES[:2]}
    grid, clock = open_grid({name: honest(name) for name in sites}, study, run, sites)
    run_study(grid, study, run, dict.fromkeys(sites, 10), clock=clock, evaluate=False)
    training, labelled = (
        sites["east"].split(study)[0],
        sites["east"].labelled(study, cast(Finetune, study.stages[1]))[0],
    )
    assert 0 < len(labelled) < len(training)
    assert seconds(run) == pytest.approx([20.0 * len(training), 10.0 * len(labelled)], abs=0.1)


def test_a_site_without_labels_trains_on_none(tmp_path: Path) -> None:
    stage = {"kind": "finetune", "rounds": 1, "batch_size": 8}
    study = study_of(stages=[stage], evaluation={"labels": {"ill": ["a"], "well": ["b"]}, "rows": [], "every": 0})
    site = Site("east", in_memory(10), tmp_path)
    assert _images(site, study, study.stages[0]) == 0


def test_a_week_of_nights_is_passed_in_a_few_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From noon, 13 hours of work a round, between 20:00 and 6:00: what is not done by then rests."""
    jumps: list[float] = []
    wait = VirtualClock.wait

    def noting(clock: VirtualClock, until: float) -> None:
        wait(clock, until)
        jumps.append(clock.now())

    monkeypatch.setattr(VirtualClock, "wait", noting)
    deadline = {"round_deadline_s": 4 * 86_400.0}
    study = study_of(clock=NIGHTS, aggregation=deadline, stages=[{**SIMCLR, "rounds": 6}])
    run = open_run(tmp_path, study)
    Consortium().run(study, run, {"east": 10, "north": 10, "west": 13 * 36_000})
    ended = [8 + 24 + 3, 35 + 7 + 14 + 6, 62 + 4 + 14 + 9, 89 + 1 + 38 + 2, 130 + 8 + 14 + 5, 157 + 5 + 14 + 8]
    assert (np.cumsum(seconds(run)) / 3600).tolist() == pytest.approx(ended, abs=0.01)
    assert len(jumps) <= 2 * study.rounds  # to the two small sites, who answer together, and to the large one


def test_who_is_late_is_left_out_and_is_back_for_the_next_round(tmp_path: Path) -> None:
    late = {"kind": "slow", "factor": 10.0, "sites": ["west"], "rounds": [2, 2]}  # 100 min
    study = study_of(late, clock={"bytes_per_s": 1e9})
    run, sites = open_run(tmp_path, study), Consortium()
    sites.run(study, run)
    assert rounds_of(run, "update_accepted") == {"east": [1, 2, 3, 4], "north": [1, 2, 3, 4], "west": [1, 3, 4]}
    assert rounds_of(run, "site_missing") == rounds_of(run, "site_late") == {"west": [2]}
    assert len([line for line in events(run, "site_found") if line["site"] == "west"]) == 2  # it was asked who it is
    assert events(run, "update_refused") == []
    assert sorted(sites.asked) == [(number, site) for number in range(1, 5) for site in SITES]  # each once
    [event] = events(run, "site_late")
    assert event["late_s"] == pytest.approx(6000 - 3600, abs=0.1)
    # The third begins where the second was still at work: 40 minutes more, then its own ten.
    assert seconds(run) == pytest.approx([600, 3600, 2400 + 600, 600], abs=0.1)


def test_who_is_still_at_work_in_the_end_measures_nothing(tmp_path: Path) -> None:
    late = {"kind": "slow", "factor": 100.0, "sites": ["west"], "rounds": [4, 4]}
    study = study_of(late)
    run = open_run(tmp_path, study)
    clock = VirtualClock()
    grid = UnreliableGrid(honest_nodes(), study, run, clock, {name: [n] for name, n in IMAGES.items()})
    run_study(grid, study, run, dict.fromkeys(SITES, 10), clock=clock)
    assert rounds_of(run, "site_missing") == {"west": [4, 4]}
    last = {row[2] for row in measured(run) if row[3] == "effective_rank"}
    assert last == {"", "east", "north"}


def test_who_drops_out_is_asked_nothing_and_is_back_for_the_next_round(tmp_path: Path) -> None:
    study = study_of({"kind": "dropout", "sites": ["north"], "rounds": [2, 3]}, clock={"bytes_per_s": 1e9})
    run, sites = open_run(tmp_path, study), Consortium()
    sites.run(study, run)
    assert rounds_of(run, "update_accepted")["north"] == [1, 4]
    assert rounds_of(run, "site_missing") == {"north": [2, 3]}
    assert [number for number, site in sites.asked if site == "north"] == [1, 4]
    assert seconds(run) == pytest.approx([600, 3600, 3600, 600], abs=0.1)


def test_lateness_is_exponential(tmp_path: Path) -> None:
    """Of so many rounds of three sites, the mean and the fraction beyond it."""
    study = study_of({"kind": "lateness", "seconds": 1000.0}, aggregation={"round_deadline_s": 1e6})
    grid = UnreliableGrid(honest_nodes(), study, open_run(tmp_path, study), VirtualClock(), {n: [0] for n in SITES})
    waits = []
    for number in range(1, 501):
        for site in SITES:
            order = wire.Order("", 0, number, site, "", True, False)
            waits.append(grid._arrival(order, 0, strikes(study, site, number)))
    assert np.mean(waits) == pytest.approx(1000.0, rel=0.1)
    assert np.mean(np.array(waits) > 1000.0) == pytest.approx(np.exp(-1), abs=0.04)


def test_too_few_sites_is_the_error_that_it_always_is(tmp_path: Path) -> None:
    study = study_of(
        {"kind": "dropout", "sites": ["north", "west"], "rounds": [3, 4]}, aggregation={"round_deadline_s": 3600.0}
    )
    run = open_run(tmp_path, study)
    with pytest.raises(QuorumLost, match="only 1 of at least 2 sites sent an update that passed in round 3"):
        Consortium().run(study, run)
    assert len(events(run, "round_closed")) == 2
    struck = events(run, "site_struck")
    assert [(event["round"], event["site"], event["faults"]) for event in struck] == [
        (3, "north", ["dropout"]), (3, "west", ["dropout"])
    ]  # fmt: skip


def sent(study: Study, folder: Path) -> dict[str, Tensors]:
    """The updates of the first round as a coordinator would get them."""
    run = open_run(folder, study)
    grid = UnreliableGrid(honest_nodes(), study, run)
    tensors = {"a": np.zeros((30, 20), np.float32), "b": np.zeros(7, np.float32)}
    packed, model = wire.pack_tensors(tensors), wire.digest(tensors)
    orders = [wire.Order(study.canonical(), 0, 1, site, model, True, False) for site in SITES]
    nodes = dict(zip(grid.get_node_ids(), orders, strict=True))
    messages = [
        Message(wire.pack_order(order, packed), node, MessageType.TRAIN, group_id="1") for node, order in nodes.items()
    ]
    found = [wire.unpack_reply(reply.content) for reply in grid.send_and_receive(messages)]
    return {reply.site: update for reply, update in found if update is not None}


def plain_time(*faults: dict[str, Any]) -> Study:
    """A study with faults and without a virtual clock."""
    simulation = {"site": [{"name": name, "cohort": name} for name in SITES], "fault": list(faults)}
    return study_of(simulation=simulation)


def test_hostile_sites_send_what_their_faults_make_of_honest_updates(tmp_path: Path) -> None:
    own = sent(plain_time(), tmp_path / "honest")
    faults: list[dict[str, Any]] = [
        {"kind": "sign_flip", "sites": ["east"]},
        {"kind": "scaling", "factor": 4.0, "sites": ["east", "north"]},
    ]
    found = sent(plain_time(*faults), tmp_path / "hostile")
    for site, factor in {"east": -4, "north": 4, "west": 1}.items():
        assert same_bits(found[site], {name: np.float32(factor) * value for name, value in own[site].items()})
    found = sent(plain_time({"kind": "collusion", "factor": 1.5, "sites": ["east", "west"]}), tmp_path / "together")
    assert same_bits(found["east"], colluded([own["east"], own["west"]], 1.5))
    assert same_bits(found["west"], found["east"])
    assert same_bits(found["north"], own["north"])


def test_sites_collude_with_those_who_train(tmp_path: Path) -> None:
    """Of five, one fails and one drops out; one trains too late, and the two others know what it has trained."""
    names = ["a", "b", "c", "d", "e", "honest"]

    def fails(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            return Message(Error(1000, "no"), reply_to=message)
        return honest("b")(message, context)

    faults = [
        {"kind": "collusion", "factor": 0.0, "sites": names[:5]},
        {"kind": "dropout", "sites": ["c"]},
        {"kind": "slow", "factor": 1e4, "sites": ["d"]},
    ]
    simulation = {
        "site": [{"name": name, "cohort": name} for name in names],
        "fault": faults,
        "clock": {"images_per_s": 10.0},
    }
    study = study_of(simulation=simulation, stages=[{**SIMCLR, "rounds": 1}])
    run, clock = open_run(tmp_path, study), VirtualClock()
    nodes = {**{name: honest(name) for name in names}, "b": fails}
    grid = UnreliableGrid(nodes, study, run, clock, {name: [100] for name in names})
    run_study(grid, study, run, dict.fromkeys(names, 10), clock=clock, evaluate=False)
    norms = {line["site"]: line["norm"] for line in events(run, "update_accepted")}
    assert sorted(norms) == ["a", "e", "honest"]
    assert norms["a"] == norms["e"] == pytest.approx(norms["honest"] / 3**0.5, rel=0.1)  # of three independent vectors
    assert [line["site"] for line in events(run, "update_refused")] == ["b"]


def test_corrupt_updates_are_refused_by_name_and_the_study_goes_on(tmp_path: Path) -> None:
    study = plain_time({"kind": "corrupt", "sites": ["west"], "rounds": [1, 3]})
    run = open_run(tmp_path, study)
    Consortium().run(study, run)
    refused = events(run, "update_refused")
    assert [(line["round"], line["site"]) for line in refused] == [(1, "west"), (2, "west"), (3, "west")]
    assert all("not finite" in line["reason"] or "tensors" in line["reason"] for line in refused)
    assert [line["accepted"] for line in events(run, "round_closed")] == [2, 2, 2, 3]


def test_without_faults_the_grid_of_a_study_is_the_plain_one(tmp_path: Path) -> None:
    study = tiny_study()
    grid, clock = open_grid(honest_nodes(), study, open_run(tmp_path, study), {})
    assert (type(grid), type(clock)) == (LocalGrid, Clock)
    hostile, clock = open_grid(honest_nodes(), plain_time({"kind": "sign_flip"}), RunDir(tmp_path), {})
    assert (type(hostile), type(clock)) == (UnreliableGrid, Clock)


def test_a_clock_alone_changes_no_bit(tmp_path: Path) -> None:
    study = study_of(clock=NIGHTS, aggregation={"round_deadline_s": 1e6})
    tensors = Consortium().run(study, open_run(tmp_path / "nights", study))
    run = open_run(tmp_path / "plain", study)
    expected = run_study(LocalGrid(honest_nodes()), study, run, dict.fromkeys(SITES, 10), evaluate=False)
    assert same_bits(tensors, expected)


class Stop(BaseException):
    """Stands for Ctrl-C."""


def arrivals(run: RunDir) -> dict[tuple[int, str], float]:
    return {(line["round"], line["site"]): line["arrives_s"] for line in events(run, "site_late")}


FAULTS: list[dict[str, Any]] = [
    {"kind": "dropout", "probability": 0.25},
    {"kind": "lateness", "seconds": 30_000.0, "probability": 0.5},
    {"kind": "slow", "factor": 300.0, "sites": ["west"], "probability": 0.5},
    {"kind": "noise", "factor": 0.5, "sites": ["east"]},
    {"kind": "collusion", "factor": 1.0, "sites": ["north", "west"], "probability": 0.5},
    {"kind": "corrupt", "probability": 0.3},
]


def test_stopped_and_resumed_is_as_undisturbed(tmp_path: Path) -> None:
    deadline = {"min_sites": 1, "round_deadline_s": 57_600.0}
    clock = {"nights": [20, 6], "start_hour": 5.5}
    study = study_of(*FAULTS, clock=clock, aggregation=deadline, stages=[{**SIMCLR, "rounds": 4}])
    whole = open_run(tmp_path / "whole", study)
    expected = Consortium().run(study, whole)
    told = events(whole)
    assert {"site_late", "site_missing", "update_refused"} <= {line["event"] for line in told}
    for number in [k for k, line in enumerate(told, start=1) if line["event"] in ("site_late", "round_closed")]:
        seen: Iterator[int] = iter(range(1, number + 1))

        def listen(line: Mapping[str, Any], seen: Iterator[int] = seen, number: int = number) -> None:
            if next(seen) == number:
                raise Stop

        first = RunDir(tmp_path / str(number), listen)
        first.create(study)
        with pytest.raises(Stop):
            Consortium().run(study, first)
        run = RunDir(first.path)
        assert same_bits(Consortium().run(study, run), expected)
        assert measured(run) == measured(whole)
        lasted = {line["round"]: line["seconds"] for line in events(run, "round_closed")}
        assert list(lasted.values()) == seconds(whole)
        assert arrivals(run) == arrivals(whole)


def test_a_late_site_goes_on_from_what_it_has_trained_too_late(tmp_path: Path) -> None:
    """As deployed, its optimizer's moments are those of the round that nobody waited for, whoever was killed since."""
    late = {"kind": "slow", "factor": 9e3, "sites": ["west"], "rounds": [1, 1]}  # 3.5 hours
    study = study_of(late, stages=[{**SIMCLR, "rounds": 2}], aggregation={"round_deadline_s": 1e4})
    images = dict.fromkeys(SITES, 14)

    def trained(folder: Path, stop: bool = False) -> Tensors:
        def listen(line: Mapping[str, Any]) -> None:
            if stop and (line["event"], line.get("round")) == ("round_started", 2):
                raise Stop

        run = RunDir(folder, listen)
        run.create(study)
        if stop:
            with pytest.raises(Stop):
                Consortium(nodes_in(folder)).run(study, run, images)
            run = RunDir(folder)
        return Consortium(nodes_in(folder)).run(study, run, images)

    def nodes_in(folder: Path) -> dict[str, Node]:
        return {name: real(name, folder) for name in SITES}

    whole = trained(tmp_path / "whole")
    states = [path.name for path in (tmp_path / "whole" / "west").rglob("moments-*")]
    assert sorted(states) == ["moments-0001.safetensors", "moments-0002.safetensors"]
    assert rounds_of(RunDir(tmp_path / "whole"), "update_accepted")["west"] == [2]
    assert same_bits(trained(tmp_path / "killed", stop=True), whole)
