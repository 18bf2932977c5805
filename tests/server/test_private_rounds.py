"""The round loop under differential privacy: what is withheld, what noise is made, where a study ends."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from polyclinic import wire
from polyclinic.artifacts import load_encoder
from polyclinic.errors import StudyError
from polyclinic.model import initial_tensors
from polyclinic.privacy.accounting import Event, epsilon
from polyclinic.privacy.ledger import Cap
from polyclinic.report import read_run
from polyclinic.study import Study
from polyclinic_client.app import make_app
from polyclinic_client.site import Site
from polyclinic_server.aggregation.private import EpsilonSpent
from polyclinic_server.app import app, lead
from polyclinic_server.display import _lines
from polyclinic_server.gate import withheld
from polyclinic_server.heads import Heads
from polyclinic_server.progress import part, progress, records
from polyclinic_server.rounds import run_study
from polyclinic_server.rundir import RunDir
from polyclinic_server.web import _curves
from polyclinic_simulations.engines.local import LocalGrid, Node

from ..tiny import SITES, Mail, events, honest, in_memory, measured, open_run, real, same_bits, tiny_study

SEATS = dict.fromkeys(SITES, 65_536)
MAE = {"kind": "pretrain", "method": "mae", "rounds": 2, "batch_size": 8}
SIMCLR = {"kind": "pretrain", "method": "simclr", "rounds": 2, "batch_size": 8, "projection": 8}
VIT = {"name": "vit_tiny", "patch": 8}
TOLD = {"loss": 0.123456, "images": 7654321.0, "patients": 8765432.0}
MEASURED = {"probe_auc": 0.987654, "probe_balanced_accuracy": 0.876543, "effective_rank": 20.5, "feature_spread": 1e-9}


def private_study(mode: str, rounds: int = 2, **privacy: Any) -> Study:
    """MAE under DP-SGD at the sites, or SimCLR with noise at the coordinator."""
    stage, encoder = (MAE, VIT) if mode == "patient" else (SIMCLR, {})
    promise = {"mode": mode, "epsilon": 100.0, **privacy}
    return tiny_study(stages=[{**stage, "rounds": rounds}], encoder=encoder, privacy=promise)


def saying(name: str, train: dict[str, float], evaluation: dict[str, float] | None = None, patients: int = 1) -> Node:
    """As `honest`, with these figures in place of its own."""
    node = honest(name)

    def say(message: Message, context: Context) -> Message:
        answer = node(message, context)
        if message.metadata.message_type == MessageType.QUERY:
            return answer
        reply, update = wire.unpack_reply(answer.content)
        told = replace(reply, patients=patients, train=train, evaluation=evaluation or {})
        return Message(wire.pack_reply(told, update), reply_to=message)

    return say


def quiet(mode: str) -> dict[str, Node]:
    """Sites that tell no more than they may."""
    spent = {"epsilon": 1.5} if mode == "patient" else {}
    return {name: saying(name, {"seconds": 3.0, **spent}) for name in SITES}


@pytest.mark.parametrize("mode", ["patient", "site"])
def test_figures_that_a_site_sends_all_the_same_are_dropped_by_name(mode: str, tmp_path: Path) -> None:
    run = open_run(tmp_path, private_study(mode))
    apps = {**quiet(mode), "north": saying("north", {**TOLD, "seconds": 3.0}, MEASURED, patients=65_432)}
    run_study(LocalGrid(apps), run.study, run, SEATS)
    assert [line["accepted"] for line in events(run, "round_closed")] == [3, 3]  # two collapsed figures stop nothing
    written = (tmp_path / "metrics.csv").read_text() + (tmp_path / "events.jsonl").read_text()
    for value in ("0.123456", "7654321", "8765432", "0.987654", "0.876543", "20.5", "1e-09", "65432", 'loss": '):
        assert value not in written, value
    assert {row[3] for row in measured(run)} <= {"accepted", "bytes_up", "bytes_down", "epsilon"}
    warned = [line["text"] for line in events(run, "warning") if "withholds" in line["text"]]
    assert len(set(warned)) == 1
    assert warned[0].startswith("north sends what the study's privacy withholds, dropped: ")
    for name in ("number of patients", *TOLD, *MEASURED):
        assert name in warned[0]


@pytest.mark.parametrize(("mode", "kept"), [("patient", {"seconds", "epsilon"}), ("site", {"seconds"})])
def test_what_may_be_told_under_privacy(mode: str, kept: set[str]) -> None:
    reply = wire.Reply("h", 0, 1, "north", 9, dict.fromkeys(wire.TRAINING, 1.0), dict.fromkeys(wire.EVALUATION, 0.5))
    told, names = withheld(reply, mode)
    assert (told.patients, told.train.keys(), told.evaluation) == (1, kept, {})
    assert set(names) == {"number of patients", *wire.METRICS} - kept
    assert withheld(told, mode) == (told, [])
    assert withheld(reply, "none") == (reply, [])


@pytest.mark.parametrize("mode", ["patient", "site"])
def test_honest_sites_are_not_warned_of_and_nothing_is_measured(mode: str, tmp_path: Path) -> None:
    orders: list[wire.Order] = []

    def noting(node: Node) -> Node:
        def note(message: Message, context: Context) -> Message:
            if message.metadata.message_type != MessageType.QUERY:
                orders.append(wire.unpack_order(message.content)[0])
            return node(message, context)

        return note

    run = open_run(tmp_path, private_study(mode))
    run_study(LocalGrid({name: noting(node) for name, node in quiet(mode).items()}), run.study, run, SEATS)
    assert not [line for line in events(run, "warning") if "withholds" in line["text"]]
    assert len(orders) == 2 * len(SITES)  # no last message: there is nothing to measure
    assert all(order.train and not order.evaluate for order in orders)


def test_a_private_run_is_shown_while_it_goes_on(tmp_path: Path) -> None:
    run = open_run(tmp_path, private_study("patient"))
    run_study(LocalGrid(quiet("patient")), run.study, run, SEATS)
    shown = progress(tmp_path)
    assert (shown.round, shown.losses, shown.probe, _curves(shown)) == (2, [[]], [], [])
    assert not [line for line in _lines(shown) if "loss" in line or "probe" in line]
    assert part("east", records(tmp_path)).epsilon == 1.5


SITE = {"noise": 2.0, "clip": 0.01, "delta": 1e-5}


def test_a_round_is_the_clipped_mean_over_all_seats_with_noise(tmp_path: Path) -> None:
    study = private_study("site", rounds=1, **SITE)
    sent: dict[str, wire.Tensors] = {}

    def note(site: str, reply: Message) -> list[Message]:
        if "update" in reply.content:
            sent[site] = {name: value.copy() for name, value in wire.unpack_tensors(reply.content["update"]).items()}
        return [] if site == "west" and "update" in reply.content else [reply]

    study = study.model_copy(update={"aggregation": study.aggregation.model_copy(update={"round_deadline_s": 0.5})})
    run = open_run(tmp_path, study)
    new = run_study(Mail(quiet("site"), note), study, run, SEATS)
    old = initial_tensors(study, 0, None)
    norms = {
        site: np.sqrt(sum(float(np.sum(np.square(v, dtype=np.float64))) for v in u.values()))
        for site, u in sent.items()
    }
    assert min(norms.values()) > 2 * SITE["clip"]
    noise = np.concatenate([
        (new[name] - value - sum(sent[s][name] * (SITE["clip"] / norms[s]) for s in ("east", "north")) / 3).reshape(-1)
        for name, value in old.items()
    ])  # fmt: skip
    assert float(noise.std()) == pytest.approx(SITE["noise"] * SITE["clip"] / 3, rel=0.2)
    assert abs(float(noise.mean())) < 6 * float(noise.std()) / np.sqrt(noise.size)


def test_two_runs_of_one_study_have_different_noise(tmp_path: Path) -> None:
    study = private_study("site", rounds=1, **SITE)
    results = [run_study(LocalGrid(quiet("site")), study, open_run(tmp_path / n, study), SEATS) for n in "ab"]
    assert not same_bits(*results)


def test_no_sites_update_decides_whether_anothers_counts(tmp_path: Path) -> None:
    """Without privacy, the largest is refused: its norm is too far above the others'."""
    apps = {**quiet("site"), "west": honest("west", scale=0.5)}
    for mode, refused in (("site", 0), ("none", 2)):
        study = private_study("site", **SITE) if mode == "site" else tiny_study()
        run = open_run(tmp_path / mode, study)
        run_study(
            LocalGrid(apps if mode == "site" else {n: honest(n) for n in SITES} | {"west": apps["west"]}),
            study,
            run,
            SEATS,
        )
        assert len(events(run, "update_refused")) == refused
    facts = [json.loads(path.read_text()) for path in (tmp_path / "site" / "checkpoints").glob("*.json")]
    assert [fact["norms"] for fact in facts] == [[]] * 3
    assert all(
        line.keys() == {"time", "event", "round", "site"} for line in events(tmp_path / "site", "update_accepted")
    )


def test_epsilon_grows_with_every_round_alike_for_all_sites(tmp_path: Path) -> None:
    study = private_study("site", rounds=3, **SITE)
    run = open_run(tmp_path, study)
    run_study(LocalGrid(quiet("site")), study, run, SEATS)
    spent = read_run(tmp_path).metrics["epsilon"]
    expected = [(k, epsilon([Event(2.0, 1.0, k)], 1e-5)) for k in (1, 2, 3)]
    assert spent == dict.fromkeys(SITES, expected)
    (warned,) = {line["text"] for line in events(run, "warning")}
    assert warned.startswith("privacy.mode 'site' with 3 sites: the noise on their mean update")


def limit(rounds: int) -> float:
    """An epsilon that allows so many rounds and no more."""
    return (epsilon([Event(2.0, 1.0, rounds)], 1e-5) + epsilon([Event(2.0, 1.0, rounds + 1)], 1e-5)) / 2


def test_a_study_ends_before_the_round_that_would_pass_its_epsilon(tmp_path: Path) -> None:
    study = private_study("site", rounds=4, **SITE, epsilon=limit(2))
    run = open_run(tmp_path, study)
    (tmp_path / "seats.json").write_text(json.dumps(SEATS))
    trained: list[int] = []

    def noting(node: Node) -> Node:
        def note(message: Message, context: Context) -> Message:
            if message.metadata.message_type == MessageType.TRAIN:
                trained.append(int(message.metadata.group_id))
            return node(message, context)

        return note

    with pytest.raises(EpsilonSpent, match=r"2 rounds have spent an epsilon of \d+\.\d{3} at every site"):
        lead(LocalGrid({name: noting(node) for name, node in quiet("site").items()}), run)
    assert set(trained) == {1, 2}
    assert [line["round"] for line in events(run, "round_started")] == [1, 2]
    assert [line["round"] for line in events(run, "epsilon_spent")] == [2]
    load_encoder(tmp_path)  # of the rounds that it could afford
    with pytest.raises(EpsilonSpent):  # going on with it spends nothing more
        lead(LocalGrid(quiet("site")), RunDir(tmp_path))
    assert max(read_run(tmp_path).epsilon.values()) <= limit(2)
    assert read_run(tmp_path).stopped == {0: 2}


def test_a_deployed_study_whose_epsilon_is_spent_has_failed_and_has_its_report(tmp_path: Path) -> None:
    run = open_run(tmp_path, private_study("site", rounds=4, **SITE, epsilon=limit(2)))
    grid = LocalGrid(quiet("site"))
    (tmp_path / "seats.json").write_text(json.dumps(SEATS))
    (tmp_path / "registered.json").write_text(json.dumps(dict(zip(SITES, grid.get_node_ids(), strict=True))))
    app(grid, Context(1, 1, {}, RecordDict(), {"run": str(tmp_path)}))
    assert [line["event"] for line in events(run)][-2:] == ["run_failed", "run_reported"]
    assert progress(tmp_path).state == "failed"
    assert "SimCLR (stopped after 2 of 4 rounds)" in (tmp_path / "report.html").read_text()


def test_a_study_that_cannot_afford_one_round_leaves_nothing(tmp_path: Path) -> None:
    run = open_run(tmp_path, private_study("site", noise=0.1, epsilon=1.0))
    with pytest.raises(StudyError, match=r"one round with privacy\.noise 0\.1 spends an epsilon of"):
        run_study(LocalGrid(quiet("site")), run.study, run, SEATS)
    assert not run.checkpoints.exists()
    assert not (tmp_path / "events.jsonl").exists()


class Stop(BaseException):
    """Stands for Ctrl-C."""


def test_stopped_at_any_event_no_round_is_released_twice_and_none_is_forgotten(tmp_path: Path) -> None:
    study = private_study("site", rounds=3, **SITE)
    whole = open_run(tmp_path / "whole", study)
    run_study(LocalGrid(quiet("site")), study, whole, SEATS)
    for number in range(1, len(events(whole)) + 1):
        sent: dict[int, set[str]] = {}

        def noting(node: Node, sent: dict[int, set[str]] = sent) -> Node:
            def note(message: Message, context: Context) -> Message:
                if message.metadata.message_type == MessageType.TRAIN:
                    order, _ = wire.unpack_order(message.content)
                    sent.setdefault(order.round, set()).add(order.model)
                return node(message, context)

            return note

        seen = 0

        def listen(line: dict[str, Any], number: int = number) -> None:
            nonlocal seen
            seen += 1
            if seen == number:
                raise Stop

        folder = tmp_path / str(number)
        apps = {name: noting(node) for name, node in quiet("site").items()}
        stopping = RunDir(folder, listen)
        stopping.create(study)
        with pytest.raises(Stop):
            run_study(LocalGrid(apps), study, stopping, SEATS)
        run_study(LocalGrid(apps), study, RunDir(folder), SEATS)
        assert {round: len(models) for round, models in sent.items()} == {1: 1, 2: 1, 3: 1}
        assert read_run(folder).epsilon["east"] >= epsilon([Event(2.0, 1.0, 3)], 1e-5)


def test_a_round_that_is_made_again_for_a_damaged_checkpoint_is_paid_for_again(tmp_path: Path) -> None:
    study = private_study("site", rounds=4, **SITE, epsilon=limit(4))
    run = open_run(tmp_path, study)

    def leaving(node: Node) -> Node:
        def leave(message: Message, context: Context) -> Message:
            if message.metadata.message_type == MessageType.TRAIN and message.metadata.group_id == "3":
                raise Stop  # the tensors of round 2 have been sent
            return node(message, context)

        return leave

    with pytest.raises(Stop):
        run_study(LocalGrid({name: leaving(node) for name, node in quiet("site").items()}), study, run, SEATS)
    (run.checkpoints / "round-0002.json").write_text("{")
    with pytest.raises(EpsilonSpent, match="4 rounds have spent"):
        run_study(LocalGrid(quiet("site")), study, RunDir(tmp_path), SEATS)
    assert [line["round"] for line in events(run, "round_closed")] == [1, 2, 2, 3]
    assert read_run(tmp_path).epsilon["east"] == epsilon([Event(2.0, 1.0, 4)], 1e-5)


@pytest.mark.parametrize("mode", ["patient", "site"])
def test_a_private_study_is_led_to_its_report_and_card(mode: str, tmp_path: Path) -> None:
    run = open_run(tmp_path, private_study(mode))
    grid = LocalGrid(quiet(mode))
    (tmp_path / "seats.json").write_text(json.dumps(SEATS))
    (tmp_path / "registered.json").write_text(json.dumps(dict(zip(SITES, grid.get_node_ids(), strict=True))))
    app(grid, Context(1, 1, {}, RecordDict(), {"run": str(tmp_path)}))
    assert [event["event"] for event in events(run)][-2:] == ["run_finished", "run_reported"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    spent = 1.5 if mode == "patient" else epsilon([Event(1.0, 1.0, 2)], 1e-5)
    assert summary["epsilon"] == dict.fromkeys(SITES, spent)
    assert summary["sites"] == {name: {} for name in SITES}  # nobody has said how many patients
    assert summary["comparison"] == {}
    page, card = (tmp_path / "report.html").read_text(), (tmp_path / "MODEL_CARD.md").read_text()
    for text in (page.replace("&#39;", "'"), card.replace("\\", "")):
        assert f"Differential privacy of every {mode}, made at the " in text
        assert "at every site, at delta = 1e-05" in text
        assert "losses, probes, all other figures" in text
        assert "65,536" not in text
        assert "loss</th>" not in text


@pytest.mark.parametrize("mode", ["patient", "site"])
def test_sites_that_really_train_tell_nothing_that_is_withheld(mode: str, tmp_path: Path) -> None:
    tune = {"kind": "finetune", "rounds": 2, "batch_size": 4}
    labels = {"labels": {"clear": ["clear"], "spot": ["spot"]}}
    study = tiny_study(stages=[tune], evaluation=labels, privacy={"mode": mode, "epsilon": 100.0})
    run = open_run(tmp_path / "run", study)
    run_study(LocalGrid({name: real(name, tmp_path / "sites") for name in SITES}), study, run, SEATS)
    assert [line["accepted"] for line in events(run, "round_closed")] == [3, 3]
    assert not [line for line in events(run, "warning") if "withholds" in line["text"]]
    assert all(0 < value <= 100 for value in read_run(run.path).epsilon.values())
    assert read_run(run.path).epsilon.keys() == set(SITES)


def tune(**privacy: Any) -> Study:
    """Fine-tuning by real sites of a few patients."""
    stage = {"kind": "finetune", "rounds": 3, "batch_size": 4}
    labels = {"labels": {"clear": ["clear"], "spot": ["spot"]}}
    return tiny_study(stages=[stage], evaluation=labels, privacy={"mode": "patient", "noise": 2.0, **privacy})


def test_where_too_few_sites_may_spend_more_the_study_ends_with_what_it_has(tmp_path: Path) -> None:
    """It is not begun again and again, as after a site that is lost."""
    sites = {name: real(name, tmp_path / "sites", patients=30) for name in SITES}
    whole = open_run(tmp_path / "whole", tune(epsilon=500.0))
    run_study(LocalGrid(sites), whole.study, whole, SEATS)
    spent = pd.read_csv(whole.path / "metrics.csv").query("metric == 'epsilon'").pivot(
        index="site", columns="round", values="value"
    )  # fmt: skip
    after_two = float(spent[2].max()) * 1.001
    study = tune(epsilon=after_two)
    run = open_run(tmp_path / "run", study)
    (run.path / "seats.json").write_text(json.dumps(SEATS))
    with pytest.raises(EpsilonSpent, match="sites may spend no more of their patients' privacy, and 2 are needed"):
        lead(LocalGrid({name: real(name, tmp_path / "again", patients=30) for name in SITES}), run)
    assert [line["round"] for line in events(run, "round_closed")] == [1, 2]
    assert load_encoder(run.path)
    assert {"round 3 of study" in line["reason"] for line in events(run, "update_refused")} == {True}


def test_one_site_that_may_spend_no_more_is_missed_by_nobody(tmp_path: Path) -> None:
    sites = {name: real(name, tmp_path / "sites", patients=30) for name in SITES}
    poor = Site("north", in_memory(30), tmp_path / "poor", caps=(Cap(1e-3, 1e-5),))
    run = open_run(tmp_path / "run", tune(epsilon=500.0))
    run_study(LocalGrid({**sites, "north": make_app(lambda _: poor)}), run.study, run, SEATS)
    assert [line["accepted"] for line in events(run, "round_closed")] == [2, 2, 2]
    assert {line["site"] for line in events(run, "update_refused")} == {"north"}
    assert all("would pass what the site may spend" in line["reason"] for line in events(run, "update_refused"))


def test_a_site_with_an_older_ledger_is_found_out_by_what_it_said_last(tmp_path: Path) -> None:
    """Over studies: the coordinator keeps where each site's ledger ended, and says it in every order."""
    sites = {name: real(name, tmp_path / "sites", patients=30) for name in SITES}
    heads = tmp_path / "heads"
    for name in ("first", "second"):
        kept = {p: p.read_bytes() for p in (tmp_path / "sites" / "north" / "privacy").glob("*")}
        study = tune(epsilon=500.0).model_copy(update={"study": tiny_study(study={"name": name}).study})
        run = open_run(tmp_path / name, study)
        run_study(LocalGrid(sites), study, run, SEATS, heads=Heads(heads))
    assert [line["accepted"] for line in events(run, "round_closed")] == [3, 3, 3]
    assert {path.name for path in heads.iterdir()} == set(SITES)
    for path, content in kept.items():
        path.write_bytes(content)  # a backup from between the studies
    study = tune(epsilon=500.0).model_copy(update={"study": tiny_study(study={"name": "third"}).study})
    run = open_run(tmp_path / "third", study)
    run_study(LocalGrid(sites), study, run, SEATS, heads=Heads(heads))
    assert {line["site"] for line in events(run, "update_refused")} == {"north"}
    assert all("privacy ledger is not the one" in line["reason"] for line in events(run, "update_refused"))


def test_an_update_that_is_refused_has_been_paid_for_all_the_same(tmp_path: Path) -> None:
    """It has left the site: the report and the next order must know."""
    far = saying("north", {"epsilon": 3.5})

    def wild(message: Message, context: Context) -> Message:
        answer = far(message, context)
        if "update" in answer.content:
            reply, update = wire.unpack_reply(answer.content)
            assert update is not None
            away = {name: np.full_like(value, 50.0) for name, value in update.items()}
            return Message(wire.pack_reply(replace(reply, head="7:abc"), away), reply_to=message)
        return answer

    run, heads = open_run(tmp_path, private_study("patient")), Heads()
    run_study(LocalGrid({**quiet("patient"), "north": wild}), run.study, run, SEATS, heads=heads)
    assert {line["site"] for line in events(run, "update_refused")} == {"north"}
    assert read_run(run.path).epsilon == {"east": 1.5, "north": 3.5, "west": 1.5}
    assert heads.of("north") == "7:abc"


def test_a_head_never_goes_back(tmp_path: Path) -> None:
    """Two studies may run after one another in two processes, each with what it has read."""
    one, other = Heads(tmp_path / "heads"), Heads(tmp_path / "heads")
    one.note("north", "2:a")
    other.note("north", "9:b")
    one.note("north", "3:c")
    one.note("south", "no head at all")
    assert (one.of("north"), other.of("north"), one.of("south")) == ("9:b", "9:b", "")
