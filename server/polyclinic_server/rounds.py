"""The round loop: send, fold replies as they arrive, close, checkpoint.

One message a site and round: the order to train carries the order to evaluate the same tensors. A round closes when
every site has replied, or at its deadline with those that have. Only one update is in memory at a time, unless the
rule of aggregation has to compare them (`Rule.holds_updates`): if that takes much, the run says so at its start.
Whatever a site sends that is not what it was asked for costs that site its turn, by name and reason, and nothing else.

Under differential privacy no figure that a site measures on patients is asked for, and one that comes all the same is
dropped unseen: neither metrics nor events hold any, and nothing is stopped by one.
"""

from collections.abc import Collection, Iterable, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from polyclinic import wire
from polyclinic.artifacts import first_tensors
from polyclinic.errors import Collapsed, QuorumLost, StudyError
from polyclinic.evaluation import collapsed
from polyclinic.model import initial_tensors
from polyclinic.stages import Finetune
from polyclinic.study import SitePrivacy, Study
from polyclinic.wire import Order, Reply, Tensors, digest
from polyclinic_server import checkpoints
from polyclinic_server.aggregation import RULES, Rule
from polyclinic_server.aggregation.fedavg import LARGEST_WEIGHT, weight_of
from polyclinic_server.aggregation.private import Budget, EpsilonSpent, PrivateMean, what_the_noise_means
from polyclinic_server.checkpoints import Best, Checkpoint
from polyclinic_server.gate import Gate, RefusedUpdate, bound_to, withheld
from polyclinic_server.heads import Heads
from polyclinic_server.mail import Clock, Mail, Round, read, refuse
from polyclinic_server.progress import records
from polyclinic_server.rundir import RunDir

FIGURES = {"effective_rank", "feature_spread"}
"""By which a collapse is told."""
MUCH = 1_000_000_000
"""Bytes of updates in memory above which that is worth a word."""


def run_study(
    grid: Grid,
    study: Study,
    run: RunDir,
    seats: Mapping[str, int],
    evaluate: bool = True,
    registered: Mapping[str, int] | None = None,
    heads: Heads | None = None,
    clock: Clock | None = None,
) -> Tensors:
    """Lead a study from its newest checkpoint to its end.

    Args:
        grid: the way to the sites' nodes.
        run: where checkpoints, metrics and events go; an earlier attempt's are continued.
        seats: the enrolled sites, each with the number of patients it enrolled with.
        evaluate: have the sites measure the global encoder as `[evaluation]` asks.
        registered: the node that each site's key is registered as; None where nodes are as trusted as sites.
        heads: where the sites' privacy ledgers ended in the studies before.
        clock: by which rounds end; the machine's own if None.

    Returns:
        The global tensors after the last round.

    Raises:
        QuorumLost: fewer than `min_sites` were found, or sent an update that passed the gate in time.
        StudyError: the sites' weights cannot be added up exactly, the sites are too few for the rule, or no round keeps
            to the study's epsilon.
        EpsilonSpent: the next round would pass it, or too many sites may spend no more.
        Collapsed: a pretrain stage gives every image nearly the same features.
    """
    _summable(study, seats)
    quorum = _quorum(study, len(seats))
    heads, clock = heads or Heads(), clock or Clock()
    budget = _budget(study, run)
    checkpoint, tensors = _start(study, run)
    state = checkpoints.load_state(run.checkpoints, checkpoint)
    if checkpoint.round == 0:
        _warn(study, run, len(seats), tensors)
    mail = Mail(grid, run, study, seats, registered, clock)
    mail.find()
    gate = Gate(study.aggregation, seats, list(checkpoint.norms), mode=study.privacy.mode)
    evaluate = evaluate and study.privacy.mode == "none"
    while checkpoint.round < study.rounds:
        if budget is not None:
            _afford(budget, run, checkpoint)
        number = checkpoint.round + 1
        stage, stage_round = study.stage_of(number - 1)
        if stage_round == getattr(study.stages[stage], "probe_rounds", None):
            gate.norms = []  # the encoder is unfrozen: larger updates are to be expected
        if stage != checkpoint.stage:
            tensors, gate.norms, state = initial_tensors(study, stage, tensors), [], {}
        mail.look()  # for who has come, or come back, since
        _require(quorum, len(mail.nodes), "were found")
        packed = wire.pack_tensors(tensors)
        tensors = wire.unpack_tensors(packed)  # views of what is sent: one copy in memory
        due = evaluate and _due(study, number - 1)
        orders = _orders(study, number, stage, tensors, mail.nodes, heads, train=True, evaluate=due)
        round = Round(number, stage, tensors, packed, orders)
        fold = _fold(study, tensors, len(seats), state)
        tensors, norms, accepted = _round(mail, study, run, round, gate, heads, fold, quorum, clock)
        state = fold.state
        if budget is None:
            gate.norms += norms
        else:
            _spend(budget, run, round, seats)
        best = _judge(study, run, round, accepted, checkpoint)
        tensors, number = _stop_early(study, run, round, best, tensors)
        checkpoint = Checkpoint(study.hash, number, stage, digest(tensors), list(gate.norms), best)
        checkpoints.save(run.checkpoints, checkpoint, tensors, state)
    if evaluate:
        mail.look()
        stage = len(study.stages) - 1
        orders = _orders(study, study.rounds, stage, tensors, mail.nodes, heads, train=False, evaluate=True)
        last = Round(study.rounds, stage, tensors, wire.pack_tensors(tensors), orders)
        _measure(mail, study, run, last, seats)
    return tensors


def _budget(study: Study, run: RunDir) -> Budget | None:
    """What a study under site-level privacy has spent: a release for every round that has ever been closed.

    Raises:
        StudyError: not even one keeps to the study's epsilon.
    """
    if not isinstance(study.privacy, SitePrivacy):
        return None
    budget = Budget(study.privacy, sum(event["event"] == "round_closed" for event in records(run.path).events))
    if not budget.releases:
        budget.afford()
    return budget


def _afford(budget: Budget, run: RunDir, made: Checkpoint) -> None:
    """See that the round after `made` can be afforded, and write down where the study ends if not.

    Raises:
        EpsilonSpent: it cannot.
    """
    budget.releases = max(budget.releases, made.round)  # what events have lost, the checkpoint knows
    try:
        budget.afford()
    except EpsilonSpent:
        run.event("epsilon_spent", round=made.round, epsilon=budget.spent, limit=budget.privacy.epsilon)
        raise


def _spend(budget: Budget, run: RunDir, round: Round, seats: Iterable[str]) -> None:
    """Count a release, at every seat: whoever sees the sum does not know which sites are in it."""
    budget.releases += 1
    spent = {"epsilon": budget.spent}
    for site in seats:
        run.metrics(round.stage, round.number, site, spent)


def _warn(study: Study, run: RunDir, seats: int, tensors: Tensors) -> None:
    """Say beforehand where noise will be most of what comes out, and where updates will fill the memory."""
    weights = sum(value.size for value in tensors.values())
    if isinstance(study.privacy, SitePrivacy) and (text := what_the_noise_means(study.privacy, seats, weights)):
        run.event("warning", text=text)
    bytes_held = 4 * weights * seats
    if _fold(study, {}, seats, {}).holds_updates and bytes_held > MUCH:
        rule, size = study.aggregation.rule, bytes_held / 1e9
        run.event("warning", text=f"{rule} holds the updates of all {seats} sites in memory: {size:.1f} GB a round")


def _judge(study: Study, run: RunDir, round: Round, accepted: Mapping[str, Reply], before: Checkpoint) -> Best:
    """The best round so far in a stage that may stop early, after the tensors that `round` started from are measured.

    They are better where most of the sites that measured both say so: no site decides alone, and one that is missing
    for a round changes nothing. The rounds of a frozen encoder do not count.
    """
    stage, made = study.stages[round.stage], study.stage_of(round.number - 1)[1]
    best = before.best if before.stage == round.stage else Best()
    if not isinstance(stage, Finetune) or not stage.patience or made <= stage.probe_rounds:
        return best
    losses = {
        site: reply.evaluation["validation_loss"]
        for site, reply in accepted.items()
        if "validation_loss" in reply.evaluation
    }
    both = losses.keys() & best.losses.keys()
    if not losses or (best.losses and 2 * sum(losses[site] < best.losses[site] for site in both) <= len(both)):
        return best
    checkpoints.save_best(run.checkpoints, round.number, round.tensors)
    return Best(round.number, digest(round.tensors), losses)


def _stop_early(study: Study, run: RunDir, round: Round, best: Best, tensors: Tensors) -> tuple[Tensors, int]:
    """(tensors, round) to go on from: `tensors` of `round`, or the stage's best and its last round if it is to end."""
    stage = study.stages[round.stage]
    if not isinstance(stage, Finetune) or not best.losses or round.number - best.measured < stage.patience:
        return tensors, round.number
    run.event("stopped_early", stage=round.stage, round=round.number, patience=stage.patience)
    last = sum(before.rounds for before in study.stages[: round.stage + 1])
    return checkpoints.load_best(run.checkpoints, best), last


def _stop_collapsed(study: Study, made: int, measured: Collection[Mapping[str, float]]) -> None:
    """End a pretrain stage whose encoder most sites find collapsed, once a quarter of its rounds lies behind.

    Args:
        made: rounds of the study after which the encoder was measured.
        measured: what each site found.

    Raises:
        Collapsed: it has.
    """
    if not made:
        return
    stage, last = study.stage_of(made - 1)
    settings = study.stages[stage]
    alike = sum(collapsed(found) for found in measured if found.keys() >= FIGURES)
    if isinstance(settings, Finetune) or last + 1 < settings.rounds / 4 or 2 * alike <= len(measured):
        return
    raise Collapsed(
        f"the encoder has collapsed: at {alike} of {len(measured)} sites it gives every image nearly the same features "
        f"after round {made}",
        "lower the stage's learning_rate, give it larger batches or stronger views, or another method",
    )


def _due(study: Study, made: int) -> bool:
    """Whether the tensors after `made` rounds are to be measured: as often as asked, and whenever a pretrain stage has
    ended, so that no other goes on from an encoder that has collapsed.
    """
    every = study.evaluation.every
    if every and made % every == 0:
        return True
    before = study.stage_of(made - 1)[0] if made else study.stage_of(made)[0]
    return before != study.stage_of(made)[0] and not isinstance(study.stages[before], Finetune)


def _summable(study: Study, seats: Mapping[str, int]) -> None:
    """Refuse sites so large or so many that a round's sum could overflow: it must not depend on who replies first."""
    rule = study.aggregation
    most = sum(weight_of(min(patients, rule.max_patients), rule.weighting) for patients in seats.values())
    if most >= LARGEST_WEIGHT:
        raise StudyError(
            f"the sites' weights add up to {most}, and must stay below {LARGEST_WEIGHT}",
            'lower aggregation.max_patients, or set aggregation.weighting = "equal"',
        )


def _quorum(study: Study, seats: int) -> int:
    """Updates below which a round fails: `min_sites`, or what the rule needs.

    With a single site, which is how a federation is compared with what each site can do alone, every rule has only one
    update to take, and needs no more.

    Raises:
        StudyError: there are too few sites for the rule.
    """
    rule = study.aggregation
    if 1 < seats < rule.least:
        raise StudyError(
            f"aggregation.rule {rule.rule!r}, as it is set, needs updates of {rule.least} sites, and there are {seats}",
            "add sites, choose 'fedavg', or have krum expect a smaller f, trimmed_mean leave out a larger fraction",
        )
    return rule.min_sites if seats == 1 else max(rule.min_sites, rule.least)


def _start(study: Study, run: RunDir) -> tuple[Checkpoint, Tensors]:
    """The newest checkpoint, or one of the initial tensors."""
    found = checkpoints.newest(run.checkpoints, study.hash, lambda text: run.event("warning", text=text))
    if found is None:
        run.rewind(0)
        run.event("run_started", study=study.name, hash=study.hash, rounds=study.rounds)
        tensors = first_tensors(study)
        found = Checkpoint(study.hash, 0, 0, digest(tensors), []), tensors
        checkpoints.save(run.checkpoints, *found)
    else:
        run.rewind(found[0].round)
        run.event("run_resumed", round=found[0].round, rounds=study.rounds)
    return found


def _orders(
    study: Study,
    number: int,
    stage: int,
    tensors: Tensors,
    nodes: Mapping[str, int],
    heads: Heads,
    *,
    train: bool,
    evaluate: bool,
) -> dict[str, Order]:
    model, text = digest(tensors), study.canonical()
    return {name: Order(text, stage, number, name, model, train, evaluate, heads.of(name)) for name in nodes}


def _round(
    mail: Mail,
    study: Study,
    run: RunDir,
    round: Round,
    gate: Gate,
    heads: Heads,
    fold: Rule,
    quorum: int,
    clock: Clock,
) -> tuple[Tensors, list[float], dict[str, Reply]]:
    """The new global tensors, the norms of the updates in them by site name, and what came with these."""
    started = clock.now()
    run.event("round_started", round=round.number, stage=round.stage, sites=list(round.orders))
    gate.open_round(round.tensors)
    accepted: dict[str, tuple[Reply, float]] = {}
    spent: set[str] = set()
    for site, message in mail.replies(round):
        try:
            accepted[site] = _take(message, site, study, run, round, gate, fold, heads)
        except (RefusedUpdate, wire.Malformed) as reason:
            refuse(run, round, site, reason)
            if message.has_error() and message.error.code == wire.SITE_SPENT:
                spent.add(site)
        del message  # or it would stay in memory until the next has come
    if len(accepted) < quorum <= len(accepted) + len(spent):
        run.event("epsilon_spent", round=round.number - 1, sites=sorted(spent))
        raise EpsilonSpent(
            f"{len(spent)} of {len(gate.seats)} sites may spend no more of their patients' privacy, and "
            f"{quorum} are needed for round {round.number}",
            "use what the rounds before have made; see each site's reason in events.jsonl",
        )
    _require(quorum, len(accepted), f"sent an update that passed in round {round.number}")
    sent = {site: reply for site, (reply, _) in accepted.items()}
    _stop_collapsed(study, round.number - 1, [reply.evaluation for reply in sent.values()])
    new = fold.close(round.tensors)
    _close(study, run, round, sent, clock.now() - started)
    return new, [norm for _, (_, norm) in sorted(accepted.items())], sent


def _fold(study: Study, tensors: Tensors, seats: int, state: Tensors) -> Rule:
    """What combines a round's updates; `state` is what the round before has left of it."""
    if isinstance(study.privacy, SitePrivacy):
        return PrivateMean(tensors, study.privacy, seats)
    return RULES[study.aggregation.rule](tensors, study.aggregation, state)


def _take(
    message: Message, site: str, study: Study, run: RunDir, round: Round, gate: Gate, fold: Rule, heads: Heads
) -> tuple[Reply, float]:
    """Fold an update that passes the gate; its reply and its norm.

    Raises:
        RefusedUpdate, Malformed: it does not pass; nothing of it has been kept.
    """
    reply, update = read(message)
    reply, dropped = withheld(reply, study.privacy.mode)
    if dropped:
        run.event("warning", text=f"{site} sends what the study's privacy withholds, dropped: {', '.join(dropped)}")
    bound_to(round.orders[site], study.hash, reply)
    heads.note(site, reply.head)  # what has been spent is spent, whether or not the update is taken
    if (spent := reply.train.pop("epsilon", None)) is not None:
        run.metrics(round.stage, round.number, site, {"epsilon": spent})
    norm = gate.check(round.orders[site], study.hash, reply, update, round.tensors)
    assert update is not None  # the gate has seen to it
    down, up = (sum(value.nbytes for value in tensors.values()) for tensors in (round.tensors, update))
    bytes_sent = {"bytes_down": down, "bytes_up": up}
    run.metrics(round.stage, round.number, site, {**reply.train, **bytes_sent})
    run.metrics(_stage_before(study, round), round.number - 1, site, reply.evaluation)
    fold.add(update.items(), weight_of(reply.patients, study.aggregation.weighting))
    facts = {"none": {"norm": norm, "patients": reply.patients}, "patient": {"norm": norm}, "site": {}}
    run.event("update_accepted", round=round.number, site=site, **facts[study.privacy.mode])
    return reply, norm


def _close(study: Study, run: RunDir, round: Round, accepted: Mapping[str, Reply], seconds: float) -> None:
    """The consortium's metrics: of this round's training, and of the tensors that came, under the round before."""
    patients = {site: reply.patients for site, reply in accepted.items()}
    trained = _means({site: reply.train for site, reply in accepted.items()}, patients)
    loss = {"loss": trained["loss"]} if "loss" in trained else {}  # withheld under differential privacy
    before = _means({site: reply.evaluation for site, reply in accepted.items()}, patients)
    run.metrics(round.stage, round.number, "", {**loss, "accepted": len(accepted), "seconds": seconds})
    run.metrics(_stage_before(study, round), round.number - 1, "", before)
    run.event("round_closed", round=round.number, seconds=seconds, accepted=len(accepted), **loss, **before)


def _measure(mail: Mail, study: Study, run: RunDir, round: Round, seats: Mapping[str, int]) -> None:
    """The last message: the sites measure the encoder that the study has made.

    Raises:
        Collapsed: it is the work of a pretrain stage, and has collapsed.
    """
    measured: dict[str, dict[str, float]] = {}
    for site, message in mail.replies(round):
        try:
            reply, _ = read(message)
            bound_to(round.orders[site], study.hash, reply)
        except (RefusedUpdate, wire.Malformed) as reason:
            refuse(run, round, site, reason)
            continue
        measured[site] = reply.evaluation
        run.metrics(round.stage, round.number, site, reply.evaluation)
        run.event("site_measured", site=site, measured=len(measured), sites=len(seats))
    patients = {e["site"]: e.get("patients") or 1 for e in records(run.path).events if e["event"] == "update_accepted"}
    trained = {site: found for site, found in measured.items() if site in patients}
    run.metrics(round.stage, round.number, "", _means(trained, patients))
    _stop_collapsed(study, round.number, (trained or measured).values())


def _means(values: Mapping[str, Mapping[str, float]], patients: Mapping[str, int]) -> dict[str, float]:
    """Mean of each metric over the sites that could measure it, in order of site name, weighted by the patients that
    their latest accepted update was trained on; alike where they may not tell."""
    means = {}
    for metric in sorted({metric for measured in values.values() for metric in measured}):
        pairs = [(found[metric], patients.get(site, 1)) for site, found in sorted(values.items()) if metric in found]
        means[metric] = sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
    return means


def _stage_before(study: Study, round: Round) -> int:
    """The stage that made the tensors which a round starts from."""
    return study.stage_of(max(round.number - 2, 0))[0]


def _require(quorum: int, sites: int, did: str) -> None:
    if sites < quorum:
        raise QuorumLost(
            f"only {sites} of at least {quorum} sites {did}",
            "see events.jsonl for each site's reason; bring the sites back, or lower aggregation.min_sites as far as "
            "the rule allows",
        )
