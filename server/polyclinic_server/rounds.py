"""The round loop: send, fold replies as they arrive, close, checkpoint.

One message a site and round: the order to train carries the order to evaluate the same tensors. A round closes when
every site has replied, or at its deadline with those that have. Only one update is in memory at a time.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from polyclinic import wire
from polyclinic.errors import QuorumLost
from polyclinic.model import initial_tensors
from polyclinic.study import Study
from polyclinic.wire import Order, Reply, Tensors, digest
from polyclinic_server import checkpoints
from polyclinic_server.aggregation import RULES
from polyclinic_server.aggregation.fedavg import weight_of
from polyclinic_server.checkpoints import Checkpoint
from polyclinic_server.gate import Gate, RefusedUpdate
from polyclinic_server.rundir import RunDir

POLL_S = 0.2
"""Seconds between looks for replies when none has come."""


@dataclass(frozen=True)
class Round:
    """One round in flight: what is asked of whom, and from which tensors."""

    number: int
    stage: int
    tensors: Tensors
    orders: Mapping[str, Order]


def run_study(grid: Grid, study: Study, run: RunDir, seats: Mapping[str, int], evaluate: bool = True) -> Tensors:
    """Lead a study from its newest checkpoint to its end.

    Args:
        grid: the way to the sites' nodes.
        run: where checkpoints, metrics and events go; an earlier attempt's are continued.
        seats: the enrolled sites, each with the number of patients it enrolled with.
        evaluate: have the sites measure the global encoder as `[evaluation]` asks.

    Returns:
        The global tensors after the last round.

    Raises:
        QuorumLost: fewer than `min_sites` were found, or sent an update that passed the gate in time.
    """
    checkpoint, tensors = _start(study, run)
    nodes = find_sites(grid, study, run, seats)
    gate = Gate(study.aggregation, seats, list(checkpoint.norms))
    for number in range(checkpoint.round + 1, study.rounds + 1):
        stage, _ = study.stage_of(number - 1)
        if stage != checkpoint.stage:
            tensors, gate.norms = initial_tensors(study, stage, tensors), []
        orders = _orders(
            study, number, stage, tensors, nodes, train=True, evaluate=evaluate and _due(study, number - 1)
        )
        tensors, norms = _round(grid, study, run, Round(number, stage, tensors, orders), nodes, gate)
        gate.norms += norms
        checkpoint = Checkpoint(study.hash, number, stage, digest(tensors), list(gate.norms))
        checkpoints.save(run.checkpoints, checkpoint, tensors)
    if evaluate:
        stage = len(study.stages) - 1
        orders = _orders(study, study.rounds, stage, tensors, nodes, train=False, evaluate=True)
        _measure(grid, study, run, Round(study.rounds, stage, tensors, orders), nodes, seats)
    return tensors


def _due(study: Study, made: int) -> bool:
    """Whether the tensors after `made` rounds are to be measured."""
    every = study.evaluation.every
    return every > 0 and made % every == 0


def _start(study: Study, run: RunDir) -> tuple[Checkpoint, Tensors]:
    """The newest checkpoint, or one of the initial tensors."""
    found = checkpoints.newest(run.checkpoints, study.hash, lambda text: run.event("warning", text=text))
    if found is None:
        tensors = initial_tensors(study, 0, None)
        found = Checkpoint(study.hash, 0, 0, digest(tensors), []), tensors
        checkpoints.save(run.checkpoints, *found)
        run.event("run_started", study=study.name, hash=study.hash, rounds=study.rounds)
    else:
        run.event("run_resumed", round=found[0].round, rounds=study.rounds)
    run.rewind(found[0].round)
    return found


def find_sites(grid: Grid, study: Study, run: RunDir, seats: Mapping[str, int]) -> dict[str, int]:
    """Ask every node who it is, until all enrolled sites are found or the deadline passes: {site: node}."""
    nodes: dict[str, int] = {}
    asked: set[int] = set()
    deadline = time.monotonic() + study.aggregation.round_deadline_s
    pending: dict[str, int] = {}
    while set(nodes) != set(seats) and time.monotonic() < deadline:
        fresh = [node for node in grid.get_node_ids() if node not in asked]
        asked.update(fresh)
        for node in fresh:
            pending.update(dict.fromkeys(grid.push_messages([Message(RecordDict(), node, MessageType.QUERY)]), node))
        replies = list(grid.pull_messages(list(pending)))
        for reply in replies:
            node = pending.pop(str(reply.metadata.reply_to_message_id))
            name = _claimed_name(reply)
            if name in seats and name not in nodes:
                nodes[name] = node
            else:
                run.event("warning", text=f"a node calls itself {name!r}, which is not an enrolled site or is taken")
        if not replies:
            time.sleep(POLL_S)
    for name in sorted(set(seats) - set(nodes)):
        run.event("site_missing", round=0, site=name)
    _require(study, len(nodes), "were found")
    return dict(sorted(nodes.items()))


def _claimed_name(reply: Message) -> str:
    record = reply.content.config_records.get("site") if reply.has_content() else None
    return str(record.get("site"))[:64] if record else ""


def _orders(
    study: Study, number: int, stage: int, tensors: Tensors, nodes: Mapping[str, int], *, train: bool, evaluate: bool
) -> dict[str, Order]:
    model, text = digest(tensors), study.canonical()
    return {name: Order(text, stage, number, name, model, train, evaluate) for name in nodes}


def _round(
    grid: Grid, study: Study, run: RunDir, round: Round, nodes: Mapping[str, int], gate: Gate
) -> tuple[Tensors, list[float]]:
    """The new global tensors, and the norms of the updates in them by site name."""
    started = time.monotonic()
    run.event("round_started", round=round.number, stage=round.stage, sites=list(nodes))
    gate.open_round(round.tensors)
    fold = RULES[study.aggregation.rule](round.tensors)
    norms: dict[str, float] = {}
    accepted: dict[str, Reply] = {}
    for site, message in _replies(grid, study, run, round, nodes):
        try:
            reply, update = _read(message)
            norm = gate.check(round.orders[site], study.hash, reply, update, round.tensors)
        except (RefusedUpdate, wire.Malformed) as reason:
            run.event("update_refused", round=round.number, site=site, reason=str(reason))
            continue
        assert update is not None  # the gate has seen to it
        _record(study, run, round, site, reply, wire.size(update))
        fold.add(wire.drain(update), weight_of(reply.patients, study.aggregation.weighting))
        norms[site], accepted[site] = norm, reply
        run.event("update_accepted", round=round.number, site=site, norm=norm, patients=reply.patients)
    _require(study, len(norms), f"sent an update that passed in round {round.number}")
    new = fold.close(round.tensors)
    seconds = time.monotonic() - started
    means = _means({site: reply.train for site, reply in accepted.items()}, gate.seats)
    run.metrics(round.stage, round.number, "", {"loss": means["loss"], "accepted": len(norms), "seconds": seconds})
    before = _means({site: reply.evaluation for site, reply in accepted.items()}, gate.seats)
    run.metrics(_stage_before(study, round), round.number - 1, "", before)
    run.event("round_closed", round=round.number, seconds=seconds, accepted=len(norms), loss=means["loss"], **before)
    return new, [norms[site] for site in sorted(norms)]


def _measure(
    grid: Grid, study: Study, run: RunDir, round: Round, nodes: Mapping[str, int], seats: Mapping[str, int]
) -> None:
    """The last message: the sites measure the encoder that the study has made."""
    measured: dict[str, dict[str, float]] = {}
    for site, message in _replies(grid, study, run, round, nodes):
        try:
            reply, _ = _read(message)
        except (RefusedUpdate, wire.Malformed) as reason:
            run.event("update_refused", round=round.number, site=site, reason=str(reason))
            continue
        measured[site] = reply.evaluation
        run.metrics(round.stage, round.number, site, reply.evaluation)
    run.metrics(round.stage, round.number, "", _means(measured, seats))


def _means(values: Mapping[str, Mapping[str, float]], seats: Mapping[str, int]) -> dict[str, float]:
    """Patient-weighted mean of each metric, in order of site name, over the sites that could measure it."""
    means = {}
    for metric in sorted({metric for measured in values.values() for metric in measured}):
        pairs = [(measured[metric], seats[site]) for site, measured in sorted(values.items()) if metric in measured]
        means[metric] = sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
    return means


def _stage_before(study: Study, round: Round) -> int:
    """The stage that made the tensors which a round starts from."""
    return study.stage_of(max(round.number - 2, 0))[0]


def _replies(
    grid: Grid, study: Study, run: RunDir, round: Round, nodes: Mapping[str, int]
) -> Iterator[tuple[str, Message]]:
    """(site, message) as replies arrive, until every site has answered or the deadline has passed."""
    packed = wire.pack_tensors(round.tensors)
    kind = MessageType.TRAIN if next(iter(round.orders.values())).train else MessageType.EVALUATE
    deadline = time.monotonic() + study.aggregation.round_deadline_s
    pending: dict[str, str] = {}
    answered: set[str] = set()
    for site, node in nodes.items():
        message = Message(wire.pack_order(round.orders[site], packed), node, kind, group_id=str(round.number))
        pending.update(dict.fromkeys(grid.push_messages([message]), site))
    del message, packed
    while pending and time.monotonic() < deadline:
        replies = list(grid.pull_messages(list(pending)))
        if not replies:
            time.sleep(POLL_S)
        while replies:
            message = replies.pop()
            # A message that answers nothing that was asked, or answers twice, is nobody's turn.
            sender = pending.pop(str(message.metadata.reply_to_message_id), None)
            if sender is None:
                run.event("warning", text="a reply to nothing that was asked was dropped")
            else:
                answered.add(sender)
                yield sender, message
            del message
    for site in sorted(set(nodes) - answered):
        run.event("site_missing", round=round.number, site=site)


def _read(message: Message) -> tuple[Reply, ArrayRecord | None]:
    if message.has_error():
        raise RefusedUpdate(f"the site failed: {str(message.error.reason)[:200]}")
    return wire.unpack_reply(message.content)


def _record(study: Study, run: RunDir, round: Round, site: str, reply: Reply, bytes_up: int) -> None:
    """Metrics of a site: of its training in this round, and of the tensors that came, under the round before."""
    down = sum(value.nbytes for value in round.tensors.values())
    run.metrics(round.stage, round.number, site, {**reply.train, "bytes_down": down, "bytes_up": bytes_up})
    run.metrics(_stage_before(study, round), round.number - 1, site, reply.evaluation)


def _require(study: Study, sites: int, did: str) -> None:
    if sites < study.aggregation.min_sites:
        raise QuorumLost(
            f"only {sites} of at least {study.aggregation.min_sites} sites {did}",
            "see events.jsonl for each site's reason; bring the sites back, or lower aggregation.min_sites",
        )
