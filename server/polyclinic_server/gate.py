"""The gate: what an update must be before it is folded. Whatever is not, is refused by name and reason.

An update arrives from a machine that the coordinator does not control. Each check below answers one way in which a
faulty or hostile site could spoil a round; a refusal costs that site its turn, never the round.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from statistics import median_high, median_low

import numpy as np
from numpy.typing import NDArray

from polyclinic.rules import Aggregation
from polyclinic.wire import Order, Reply, Tensors
from polyclinic_server.aggregation.fedavg import CHUNK, LARGEST_VALUE

NORM_FLOOR = 1e-3
"""Fraction of the global tensors' norm below which no update is called too large."""
PRIVATE = {"patient": {"seconds", "epsilon"}, "site": {"seconds"}}
"""Figures that a reply may carry by privacy mode: those that no patient's image changes."""


class RefusedUpdate(ValueError):
    """Why an update does not pass."""


@dataclass
class Gate:
    """The checks of one stage.

    Attributes:
        settings: limits from the study.
        seats: patients that each site enrolled with; none may claim more.
        norms: of the updates accepted in earlier rounds of the stage. Those of the round in flight do not count, so
            that what passes does not depend on who is first.
        own: norm of the round's global tensors.
        mode: the study's privacy. Under "site" no norm is too large: clipping bounds it, and a limit drawn from all
            sites' norms would have one site decide whether another's update counts.
        limit: largest norm that passes in the round; 0 before any is open.
    """

    settings: Aggregation
    seats: Mapping[str, int]
    norms: list[float] = field(default_factory=list)
    own: float = 0.0
    mode: str = "none"
    limit: float = field(default=0.0, init=False)

    def open_round(self, tensors: Tensors) -> None:
        """Take note of the global tensors' own norm, and set the round's limit from it and `norms`."""
        self.own = math.sqrt(sum(squares for value in tensors.values() for squares, _ in _chunks(value)))
        self.limit = self._limit()

    def check(self, order: Order, study_hash: str, reply: Reply, update: Tensors | None, tensors: Tensors) -> float:
        """The norm of an update that passes.

        Raises:
            RefusedUpdate: it does not; the text is the reason.
        """
        bound_to(order, study_hash, reply)
        self._weight(reply)
        if update is None:
            raise RefusedUpdate("it carries no tensors")
        if self.mode == "none" and "loss" not in reply.train:
            raise RefusedUpdate("it does not say the loss of its training")
        self._form(update, tensors)
        norm = self._norm(update, tensors)
        if norm > self.limit:
            raise RefusedUpdate(f"its norm {norm:.3g} is above the limit {self.limit:.3g}")
        return norm

    def _limit(self) -> float:
        """The study's multiple of the median so far, or of the latest ones', if that is less.

        In a stage's first round it is the norm of the global tensors themselves.
        Norms fall with the learning rate, so that by the end a hundredfold update is no larger than the first honest
        ones. The latest are as many as there are sites: a round's, where all answer. Of two, the lower one is the
        median so far, lest one site raise the limit, and the higher one that of the latest, lest one site lower it.
        """
        if self.mode == "site":
            return math.inf
        if not self.norms:
            return self.own
        typical = min(median_low(self.norms), median_high(self.norms[-len(self.seats) :]))
        return max(self.settings.norm_limit * typical, NORM_FLOOR * self.own)

    def _weight(self, reply: Reply) -> None:
        allowed = min(self.seats[reply.site], self.settings.max_patients)
        if not 1 <= reply.patients <= allowed:
            raise RefusedUpdate(f"it claims {reply.patients} patients; the site may claim 1 to {allowed}")

    def _form(self, update: Tensors, tensors: Tensors) -> None:
        if set(update) != set(tensors):
            missing, extra = len(set(tensors) - set(update)), len(set(update) - set(tensors))
            raise RefusedUpdate(f"its tensors are not those asked for ({missing} missing, {extra} unknown)")
        for name, value in tensors.items():
            if update[name].shape != value.shape:
                raise RefusedUpdate(f"its tensor {name} is not of shape {value.shape}")

    def _norm(self, update: Tensors, tensors: Tensors) -> float:
        """The norm, if every value is finite and within the fixed-point range. Summed in the order of `tensors`."""
        total = 0.0
        for name in tensors:
            for squares, largest in _chunks(update[name]):
                if not math.isfinite(largest):
                    raise RefusedUpdate(f"its tensor {name} holds values that are not finite")
                if largest >= LARGEST_VALUE:
                    by = "more than any may" if self.mode == "site" else f"{largest:.3g}, at most {LARGEST_VALUE:g}"
                    raise RefusedUpdate(f"its tensor {name} changes a weight by {by}")
                total += squares
        return math.sqrt(total)


def bound_to(order: Order, study_hash: str, reply: Reply) -> None:
    """Refuse a reply that is not one to `order`.

    Raises:
        RefusedUpdate: it is of another study, stage, round or site.
    """
    if reply.study != study_hash:
        raise RefusedUpdate("it belongs to another study")
    if (reply.stage, reply.round) != (order.stage, order.round):
        raise RefusedUpdate(f"it belongs to round {reply.round} and this is round {order.round}: late or replayed")
    if reply.site != order.site:
        raise RefusedUpdate("it names another site as its sender")


def withheld(reply: Reply, mode: str) -> tuple[Reply, list[str]]:
    """(reply, names): without what a site may not tell of its patients under `mode`, and what that was.

    An honest site sends none of it; one that runs another version must not have it in a report by mistake.
    """
    if mode == "none":
        return reply, []
    allowed = PRIVATE[mode]
    kept = {name: value for name, value in reply.train.items() if name in allowed}
    names = [
        *(["number of patients"] if reply.patients != 1 else []),
        *(reply.train.keys() - allowed),
        *reply.evaluation,
    ]
    return replace(reply, patients=1, train=kept, evaluation={}), sorted(names)


def _chunks(value: NDArray[np.float32]) -> Iterator[tuple[float, float]]:
    """(sum of squares, largest magnitude) of each chunk of a tensor. Not np.dot: BLAS would start its threads here."""
    flat = value.reshape(-1)
    for at in range(0, flat.size, CHUNK):
        with np.errstate(invalid="ignore"):  # a signalling NaN is refused like any other, without a warning
            wide = flat[at : at + CHUNK].astype(np.float64)
            found = float(np.einsum("i,i->", wide, wide)), float(np.abs(wide).max())
        yield found
