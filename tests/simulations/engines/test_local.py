"""The local engine: Flower's Grid without Flower's runtime."""

import signal
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from polyclinic_server import mail
from polyclinic_server.rounds import run_study
from polyclinic_simulations.engines.local import LocalGrid

from ...tiny import SITES, events, honest, open_run, tiny_study


def echo(message: Message, context: Context) -> Message:
    name = str(context.node_config["site"])
    return Message(RecordDict({"site": ConfigRecord({"site": name})}), reply_to=message)


def question(node: int) -> Message:
    return Message(RecordDict(), node, MessageType.QUERY)


def test_is_a_grid_with_one_node_a_site() -> None:
    grid = LocalGrid({"east": echo, "west": echo})
    assert isinstance(grid, Grid)
    nodes = list(grid.get_node_ids())
    assert len(set(nodes)) == 2
    assert [info.node_id for info in grid.get_nodes()] == nodes
    replies = list(grid.send_and_receive([question(node) for node in nodes]))
    assert [reply.content["site"]["site"] for reply in replies] == ["east", "west"]
    assert [reply.metadata.src_node_id for reply in replies] == nodes


def test_a_message_is_carried_out_when_it_is_looked_for_one_a_look() -> None:
    worked: list[str] = []

    def noting(message: Message, context: Context) -> Message:
        worked.append(str(context.node_config["site"]))
        return echo(message, context)

    grid = LocalGrid({"east": noting, "west": noting})
    ids = list(grid.push_messages([question(node) for node in grid.get_node_ids()]))
    assert worked == []
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)] == ids[:1]
    assert worked == ["east"]
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)] == ids[1:]
    assert list(grid.pull_messages(ids)) == []


def test_what_nobody_waits_for_any_more_is_not_carried_out() -> None:
    worked: list[str] = []

    def noting(message: Message, context: Context) -> Message:
        worked.append(message.metadata.message_id)
        return echo(message, context)

    grid = LocalGrid({"east": noting})
    (node,) = grid.get_node_ids()
    stale, fresh = grid.push_messages([question(node), question(node)])
    assert len(list(grid.pull_messages([fresh]))) == 1
    assert worked == [fresh] != [stale]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_in_a_site_stops_the_server(interrupt: type[BaseException]) -> None:
    def node(message: Message, context: Context) -> Message:
        raise interrupt

    grid = LocalGrid({"east": node})
    with pytest.raises(interrupt):
        list(grid.send_and_receive([question(next(iter(grid.get_node_ids())))]))


def test_what_a_node_raises_comes_as_an_error_without_its_text() -> None:
    def node(message: Message, context: Context) -> Any:
        raise ValueError("/data/Jane Doe")

    grid = LocalGrid({"east": node, "west": ClientApp()})
    for message in grid.send_and_receive([question(node) for node in grid.get_node_ids()]):
        assert message.error.reason == "ValueError"


def hangs(message: Message, context: Context) -> Message:
    """A site on storage that has gone: errors that it catches do not reach it."""
    while True:
        with suppress(Exception):
            Event().wait()


def test_a_site_that_hangs_is_interrupted_when_its_message_expires() -> None:
    handler, (left, _) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    assert left > 1  # pytest's own, for tests that hang
    grid = LocalGrid({"east": hangs, "west": echo}, expire=True)
    east, west = grid.get_node_ids()
    asked = [Message(RecordDict(), east, MessageType.QUERY, ttl=0.2), question(west)]
    replies = list(grid.send_and_receive(asked))
    assert [reply.content["site"]["site"] for reply in replies] == ["west"]
    assert signal.getsignal(signal.SIGALRM) == handler
    assert left - 60 < signal.getitimer(signal.ITIMER_REAL)[0] < left - 0.2


@pytest.mark.parametrize("ttl", [1e12, 100.0])
def test_an_alarm_that_is_due_before_stays(ttl: float) -> None:
    seen: list[Any] = []

    def node(message: Message, context: Context) -> Message:
        seen.append(signal.getsignal(signal.SIGALRM))
        return echo(message, context)

    handler, (left, _) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    grid = LocalGrid({"east": node}, expire=True)
    message = Message(RecordDict(), next(iter(grid.get_node_ids())), MessageType.QUERY, ttl=ttl)
    assert len(list(grid.send_and_receive([message]))) == 1
    assert (seen == [handler]) == (left <= ttl)
    assert signal.getsignal(signal.SIGALRM) == handler


def test_a_grid_of_which_it_is_not_asked_waits() -> None:
    def slow(message: Message, context: Context) -> Message:
        time.sleep(0.3)
        return echo(message, context)

    grid = LocalGrid({"east": slow})
    message = Message(RecordDict(), next(iter(grid.get_node_ids())), MessageType.QUERY, ttl=0.1)
    assert len(list(grid.send_and_receive([message]))) == 1


def test_outside_the_main_thread_a_site_takes_the_time_that_it_takes() -> None:
    def slow(message: Message, context: Context) -> Message:
        time.sleep(0.3)
        return echo(message, context)

    grid = LocalGrid({"east": slow}, expire=True)
    replies: list[Message] = []
    message = Message(RecordDict(), next(iter(grid.get_node_ids())), MessageType.QUERY, ttl=0.1)
    thread = Thread(target=lambda: replies.extend(grid.send_and_receive([message])))
    thread.start()
    thread.join()
    assert len(replies) == 1


def test_a_study_goes_on_without_a_site_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "GRACE_S", 0.0)

    def stuck(message: Message, context: Context) -> Message:
        node = hangs if message.metadata.message_type == MessageType.TRAIN else honest(SITES[0])
        return node(message, context)

    study = tiny_study(aggregation={"round_deadline_s": 1.0, "min_sites": 2})
    run = open_run(tmp_path, study)
    apps = {name: honest(name) for name in SITES} | {SITES[0]: stuck}
    run_study(LocalGrid(apps, expire=True), study, run, dict.fromkeys(SITES, 10))
    assert {line["site"] for line in events(run, "site_missing")} == {SITES[0]}
    assert [line["accepted"] for line in events(run, "round_closed")] == [2] * study.rounds
