"""Virtual time: that of the simulated hospitals, which passes as fast as their sites can be trained here.

Times are seconds since the run began, in whole ticks of 1/1024 s: floats add those exactly, so that the seconds of a
run's rounds add up to the moment at which it was interrupted, and a resumed run meets the same nights and deadlines.
"""

import heapq
import math

from polyclinic.faults import SimulatedClock
from polyclinic_server.mail import Clock
from polyclinic_server.progress import records
from polyclinic_server.rundir import RunDir

TICKS_PER_S = 1024
HOUR_S, DAY_S = 3_600.0, 86_400.0


class VirtualClock(Clock):
    """Stands still while sites are trained, and jumps to what comes next."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now
        self._arrivals: list[float] = []

    def now(self) -> float:
        """Seconds since the run began."""
        return self._now

    def expect(self, moment: float) -> None:
        """Something arrives then: nobody waits beyond it."""
        heapq.heappush(self._arrivals, moment)

    def wait(self, until: float) -> None:
        """Jump to the next arrival, or to `until` where that is before."""
        while self._arrivals and self._arrivals[0] <= self._now:
            heapq.heappop(self._arrivals)
        self._now = whole(min([until, *self._arrivals[:1]]))


def whole(seconds: float) -> float:
    """The next tick."""
    return math.ceil(seconds * TICKS_PER_S) / TICKS_PER_S


def after_work(begin: float, work_s: float, clock: SimulatedClock) -> float:
    """When a site has done `work_s` seconds of work from `begin` on, if it works in the clock's nights only."""
    opens, closes = clock.nights
    night_s = (closes - opens) * HOUR_S % DAY_S or DAY_S
    since = (begin + (clock.start_hour - opens) * HOUR_S) % DAY_S  # the last night began
    left = max(night_s - since, 0.0)
    if work_s <= left or work_s == 0:
        return begin + work_s
    nights, rest = divmod(work_s - left, night_s)
    if rest == 0:
        nights, rest = nights - 1, night_s
    return begin - since + (1 + nights) * DAY_S + rest


def virtual_seconds(run: RunDir, made: int) -> float:
    """Of the rounds up to `made`, as they were last closed."""
    closed = [event for event in records(run.path).events if event["event"] == "round_closed"]
    return math.fsum({event["round"]: event["seconds"] for event in closed if event["round"] <= made}.values())
