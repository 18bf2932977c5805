"""The gate by itself: every check, and that what passes does not depend on anything but the update."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from polyclinic import wire
from polyclinic.rules import Aggregation
from polyclinic.wire import Order, Reply, Tensors
from polyclinic_server.gate import NORM_FLOOR, Gate, RefusedUpdate

TENSORS = {"a": np.full((2, 3), 0.5, np.float32), "b": np.zeros(4, np.float32)}
ORDER = Order("{}", 0, 3, "north", wire.digest(TENSORS), True, True)
REPLY = Reply("hash", 0, 3, "north", 10, {"loss": 1.0}, {})


def gate(norms: tuple[float, ...] = (), **settings: Any) -> Gate:
    made = Gate(Aggregation(**settings), {"north": 12, "south": 65_536}, list(norms))
    made.open_round(TENSORS)
    return made


def packed(value: float = 0.1) -> Tensors:
    return {name: np.full(v.shape, value, np.float32) for name, v in TENSORS.items()}


def check(reply: Reply = REPLY, update: Tensors | None = None, at: Gate | None = None) -> float:
    return (at or gate()).check(ORDER, "hash", reply, packed() if update is None else update, TENSORS)


def test_an_honest_update_passes_with_its_norm() -> None:
    assert check() == pytest.approx(0.1 * np.sqrt(10), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"study": "other"}, "it belongs to another study"),
        ({"round": 2}, "it belongs to round 2 and this is round 3: late or replayed"),
        ({"stage": 1}, "it belongs to round 3 and this is round 3: late or replayed"),
        ({"site": "south"}, "it names another site as its sender"),
        ({"site": "nowhere"}, "it names another site as its sender"),
        ({"patients": 13}, "it claims 13 patients; the site may claim 1 to 12"),
        ({"patients": 0}, "it claims 0 patients; the site may claim 1 to 12"),
        ({"patients": -150}, "it claims -150 patients; the site may claim 1 to 12"),
        ({"train": {}}, "it does not say the loss of its training"),
    ],
)
def test_what_a_reply_says_of_itself(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RefusedUpdate) as refused:
        check(replace(REPLY, **change))
    assert str(refused.value) == reason


def test_the_studys_limit_of_patients_binds_sites_that_enrolled_with_more() -> None:
    strict = gate(max_patients=5)
    check(replace(REPLY, patients=5), at=strict)
    with pytest.raises(RefusedUpdate, match="may claim 1 to 5"):
        check(replace(REPLY, patients=6), at=strict)


SIGNALLING = np.frombuffer(np.array([0x7F800001] * 4, "<u4").tobytes(), "<f4")
"""NaNs that raise a flag in the processor."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"a": None}, "its tensors are not those asked for (1 missing, 0 unknown)"),
        ({"z": np.zeros((), np.float32)}, "its tensors are not those asked for (0 missing, 1"),
        ({"b": np.zeros((2, 2), np.float32)}, "its tensor b is not of shape (4,)"),
        ({"b": np.zeros(5, np.float32)}, "its tensor b is not of shape (4,)"),
        ({"b": np.zeros((4, 1), np.float32)}, "its tensor b is not of shape (4,)"),
        ({"b": SIGNALLING}, "its tensor b holds values that are not fini"),
    ],
)
def test_the_form_of_an_update(change: dict[str, Any], reason: str) -> None:
    update = {name: value for name, value in {**packed(), **change}.items() if value is not None}
    with pytest.raises(RefusedUpdate) as refused:
        check(update=update)
    assert str(refused.value).startswith(reason)
    assert len(str(refused.value)) < 200


def test_an_update_without_tensors() -> None:
    with pytest.raises(RefusedUpdate, match="it carries no tensors"):
        gate().check(ORDER, "hash", REPLY, None, TENSORS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value: float) -> None:
    for place in range(4):
        spoilt = np.zeros(4, np.float32)
        spoilt[place] = value
        with pytest.raises(RefusedUpdate, match="its tensor b holds values that are not finite"):
            check(update={**packed(), "b": spoilt})


def test_values_beyond_the_fixed_point_range() -> None:
    wide = gate(norms=(1.0,), norm_limit=1e9)
    check(update=packed(127.9), at=wide)
    with pytest.raises(RefusedUpdate, match="its tensor a changes a weight by 128, at most 128"):
        check(update=packed(-128.0), at=wide)


def test_the_norm_is_held_against_the_median_of_those_accepted() -> None:
    own = float(np.linalg.norm(TENSORS["a"]))
    # The first updates of a stage are measured against the global tensors themselves.
    check(update=packed(0.99 * own / np.sqrt(10)))
    with pytest.raises(RefusedUpdate, match=r"its norm 1\.24 is above the limit 1\.22"):
        check(update=packed(1.01 * own / np.sqrt(10)))
    # Of two sites one alone cannot raise the limit.
    assert gate(norms=(0.02, 5.0)).limit == pytest.approx(0.2)
    later = gate(norms=(0.01, 0.02, 5.0))
    check(update=packed(0.19 / np.sqrt(10)), at=later)
    with pytest.raises(RefusedUpdate, match=r"is above the limit 0\.2$"):
        check(update=packed(0.21 / np.sqrt(10)), at=later)


def test_the_limit_falls_with_the_learning_rate_and_no_site_of_two_moves_it_alone() -> None:
    """The norms of two sites, round by round; the limit is ten times what is typical."""
    assert gate(norms=(3.0, 3.0, 3.0, 3.0, 0.5, 0.5)).limit == pytest.approx(5)
    assert gate(norms=(3.0, 3.0, 3.0, 3.0, 0.5, 1e-9)).limit == pytest.approx(5), "nor lowers it"
    assert gate(norms=(1.0, 1.0, 1.0, 9.0)).limit == pytest.approx(10), "nor raises it"


@pytest.mark.parametrize("rounds", [1, 2, 7, 8])
def test_the_limit_is_set_as_a_round_opens(rounds: int) -> None:
    """From all norms of the rounds before, and not again for every update: it would sort them a thousand times."""
    rng = np.random.default_rng(rounds)
    at = gate(norm_limit=3.0)
    for _ in range(rounds):
        norms = rng.uniform(1, 2, rng.integers(1, 3)).tolist()
        before = at.limit
        at.norms += norms
        assert at.limit == before
        at.open_round(TENSORS)
    ordered, latest = sorted(at.norms), sorted(at.norms[-2:])
    assert at.limit == 3.0 * min(ordered[(len(ordered) - 1) // 2], latest[len(latest) // 2])


def test_a_stage_that_hardly_moves_refuses_nobody_for_it() -> None:
    still = gate(norms=(1e-12, 1e-12))
    check(update=packed(0.9 * NORM_FLOOR * still.own / np.sqrt(10)), at=still)
    with pytest.raises(RefusedUpdate):
        check(update=packed(1.1 * NORM_FLOOR * still.own / np.sqrt(10)), at=still)


def test_the_order_of_tensors_in_a_message_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(v.shape).astype(np.float32) for name, v in TENSORS.items()}
    at = gate(norms=(1.0,))
    norms = {check(update=dict(order), at=at) for order in (values.items(), reversed(values.items()))}
    assert len(norms) == 1


def test_a_check_does_not_take_note_of_the_round_in_flight() -> None:
    at = gate(norms=(0.3,))
    for _ in range(5):
        check(at=at)
    assert at.norms == [0.3]
