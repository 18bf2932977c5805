"""What `polyclinic site status` shows: the node, the studies that may run, what was asked and answered last."""

from collections.abc import Iterator
from typing import Any

from polyclinic import __version__
from polyclinic.files import locked
from polyclinic.study import parse_canonical
from polyclinic_client.hospital import Approval, Hospital
from polyclinic_client.monitor import Tally, answers
from polyclinic_client.network import certificate_days


def overview(hospital: Hospital) -> dict[str, Any]:
    """For JSON.

    `running` is the agent's, by its lock; `answering` SuperNode's, by its health service. `last_answer` is the newest
    entry of the ledger about an order.
    """
    joined = hospital.joined
    with locked(hospital.path) as free:
        running = not free
    last = Tally().read(hospital.ledger).last
    shown = ("time", "kind", "study", "round", "bytes", "error")
    return {
        "name": hospital.name,
        "version": __version__,
        "coordinator": joined.address if joined else None,
        "certificate_days": certificate_days(joined.authority) if joined else None,
        "running": running,
        "answering": running and answers(hospital.path),
        "approved": {hash: _study(hospital, hash, found) for hash, found in hospital.approvals().items()},
        "last_answer": {name: last[name] for name in shown if name in last} if last else None,
        "policy": list(hospital.settings.policy.words()),
    }


def _study(hospital: Hospital, hash: str, approval: Approval) -> dict[str, Any]:
    study, asked = parse_canonical(approval.study, "an approved study"), hospital.orders(hash)
    return {
        "study": study.name,
        "by": approval.by,
        "at": approval.approved,
        "patients": approval.patients,
        "orders": asked.count,
        "max_orders": hospital.settings.policy.orders(study),
        "last_order": asked.last or None,
    }


def in_words(facts: dict[str, Any]) -> Iterator[str]:
    """The same for a terminal."""
    state = "running" if facts["answering"] else "running, but not answering" if facts["running"] else "not running"
    yield f"{facts['name']}: {state}, coordinator {facts['coordinator'] or 'unknown: it has not answered yet'}"
    if facts["certificate_days"] is not None:
        yield f"certificate of the coordinator's authority: {facts['certificate_days']} days left"
    for hash, study in facts["approved"].items():
        yield f"approved: {study['study']} ({hash}) by {study['by']} at {study['at']}, {study['patients']} patients"
        when = f", the last at {study['last_order']}" if study["last_order"] else ""
        yield f"    {study['orders']} of {study['max_orders']} orders carried out{when}"
    if last := facts["last_answer"]:
        what = last.get("error") or f"round {last['round']}, {last.get('bytes', 0) / 1e6:.1f} MB"
        yield f"last answer: {last['time']}, {last['kind']}: {what}"
    yield "policy:"
    yield from (f"    {line}" for line in facts["policy"])


def spending(hospital: Hospital) -> dict[str, Any]:
    """What studies have spent of the patients' privacy, for JSON: epsilon at the site's delta, by study and together.

    `limit` and `left` are None where the site has no limit of its own; `unprotected` are the studies that have let
    updates out without a promise, which no epsilon covers.
    """
    from polyclinic.privacy.accounting import epsilon

    ledger, policy = hospital.spending, hospital.settings.policy
    spent, charged = ledger.epsilon(policy.delta), ledger.by_study()
    rounds: dict[str, set[int]] = {}
    promised = {row.study for row in charged}
    for entry in hospital.ledger.entries():
        if "tensors" in entry and entry["study"] not in promised:
            rounds.setdefault(entry["study"], set()).add(entry["round"])
    return {
        "epsilon": spent,
        "delta": policy.delta,
        "limit": policy.epsilon or None,
        "left": max(0.0, policy.epsilon - spent) if policy.epsilon else None,
        "studies": [
            {
                "study": row.name,
                "hash": row.study,
                "rounds": row.rounds,
                "steps": row.steps,
                "noise": row.noise,
                "epsilon": epsilon(row.events, policy.delta),
                "last": row.last,
            }
            for row in charged
        ],
        "unprotected": [{"hash": study, "rounds": len(made)} for study, made in rounds.items()],
    }


def spending_words(facts: dict[str, Any]) -> Iterator[str]:
    """The same for a terminal."""
    for row in facts["studies"]:
        rounds = f"{row['rounds']} rounds, {row['steps']} steps, the last at {row['last']}"
        yield f"{row['study']} ({row['hash'][:16]}): epsilon {row['epsilon']:.3f}; {rounds}"
    for row in facts["unprotected"]:
        left = f"updates of {row['rounds']} rounds left without a promise"
        yield f"study {row['hash'][:16]}: {left}; no epsilon covers them"
    if not facts["studies"]:
        yield "no study that promises patients privacy has trained here"
    limit = (
        f"of the site's {facts['limit']:g}, {facts['left']:.3f} left" if facts["limit"] else "no limit of the site's"
    )
    yield f"all together: epsilon {facts['epsilon']:.3f} at delta {facts['delta']:g}, {limit}"
