"""Virtual time: nights, jumps, and what an interrupted run has spent."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.faults import SimulatedClock
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.engines.clock import VirtualClock, after_work, virtual_seconds, whole

HOURS = st.integers(0, 23)


def stepped(begin: int, work: int, clock: SimulatedClock) -> int:
    """The minute after the last of `work` minutes, each worked where it lies in the night."""
    opens, closes = (int(hour * 60) for hour in clock.nights)
    now = begin
    while work:
        of_day = (now + int(clock.start_hour * 60)) % 1440
        night = opens <= of_day < closes if opens < closes else of_day >= opens or of_day < closes
        work -= night
        now += 1
    return now


@given(HOURS, st.integers(1, 24), HOURS, st.integers(0, 4_000), st.integers(0, 4_000))
def test_work_is_done_at_night_as_minute_by_minute(opens: int, length: int, start: int, begin: int, work: int) -> None:
    nights = (0.0, 24.0) if length == 24 else (float(opens), float((opens + length) % 24))
    clock = SimulatedClock(images_per_s=1.0, nights=nights, start_hour=float(start))
    assert after_work(begin * 60.0, work * 60.0, clock) == 60.0 * stepped(begin, work, clock)


def test_a_part_of_a_night_is_worked_through_without_a_break() -> None:
    clock = SimulatedClock(images_per_s=1.0, nights=(20.0, 6.0), start_hour=21.5)
    assert after_work(10.25, 30.5, clock) == 40.75
    assert after_work(0.0, 8.5 * 3600, clock) == 8.5 * 3600  # to the last second
    assert after_work(0.0, 8.5 * 3600 + 1, clock) == 22.5 * 3600 + 1  # from 21:30 to 20:00, and a second
    assert after_work(12 * 3600.0, 0.0, clock) == 12 * 3600.0  # nothing to do waits for no night


def test_it_stands_still_and_jumps_to_the_next_arrival_or_as_far_as_is_asked() -> None:
    clock = VirtualClock(100.0)
    clock.expect(160.0)
    clock.expect(130.5)
    assert clock.now() == 100.0
    seen = []
    for until in (120.0, 1000.0, 1000.0, 1000.0):
        clock.wait(until)
        seen.append(clock.now())
    assert seen == [120.0, 130.5, 160.0, 1000.0]


@given(st.lists(st.floats(0, 1e7), min_size=1, max_size=30))
def test_ticks_add_up_exactly_whatever_the_order(spans: list[float]) -> None:
    clock = VirtualClock()
    seconds = []
    for span in spans:
        started = clock.now()
        clock.wait(started + span)
        assert started + span <= clock.now() <= started + span + 2 / 1024
        seconds.append(clock.now() - started)
    assert sum(seconds) == sum(reversed(seconds)) == clock.now() == whole(clock.now())


def test_what_rounds_have_taken_is_counted_once_a_round(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number, seconds in ((1, 0.5), (2, 9.0), (2, 7.25), (3, 2.0)):  # the second was made again
        run.event("round_closed", round=number, seconds=seconds)
    run.event("row_finished", seconds=100.0)
    assert [virtual_seconds(run, made) for made in range(4)] == [0.0, 0.5, 7.75, 9.75]


def test_a_run_that_has_not_begun_has_taken_no_time(tmp_path: Path) -> None:
    assert virtual_seconds(RunDir(tmp_path), 0) == pytest.approx(0.0)
