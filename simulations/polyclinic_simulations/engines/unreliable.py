"""Unreliable sites: the local engine with a Grid that loses, delays and changes what sites answer.

What happens to a site in a round is drawn from the study's seed, the fault's place, site and round alone. With a
virtual clock, an answer is there once that has reached the moment at which it arrives:

    the order's way + training, in the site's nights + the update's way + lateness

A site that answers after the deadline trains all the same, once, and takes up its next order when that answer has left.
Nobody asks for the answer any more: as in deployment, a grid hands over only what is asked for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.clientapp import ClientApp
from numpy.random import Generator

from polyclinic import wire
from polyclinic.errors import CohortError
from polyclinic.faults import TIMED, AnyFault, Collusion, Corrupt, Dropout, Lateness, Slow
from polyclinic.seeding import numpy_generator, seed_for
from polyclinic.stages import AnyStage, Finetune
from polyclinic.study import Study
from polyclinic.wire import Order, Packed, Tensors
from polyclinic_client.site import Site
from polyclinic_server import checkpoints
from polyclinic_server.mail import Clock
from polyclinic_server.progress import records
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.engines.byzantine import changed, colluded, damaged
from polyclinic_simulations.engines.clock import VirtualClock, after_work, virtual_seconds, whole
from polyclinic_simulations.engines.local import LocalGrid, Node

Struck = dict[int, tuple[AnyFault, Generator]]
"""What happens to a site in a round: the fault and what it draws from, by the fault's place in the study."""


@dataclass(frozen=True)
class Errand:
    """An order that a site has been sent.

    Attributes:
        arrives: when its answer does; 0 without a virtual clock.
        late: that is after the deadline.
    """

    order: Order
    struck: Struck
    arrives: float = 0.0
    late: bool = False


def open_grid(
    apps: Mapping[str, Node | ClientApp], study: Study, run: RunDir, sites: Mapping[str, Site]
) -> tuple[LocalGrid, Clock]:
    """The grid of a study's sites, and the time that it goes by: where an earlier attempt has left off."""
    wanted = study.simulation
    if not wanted.unreliable:
        return LocalGrid(apps, expire=True), Clock()
    if not wanted.clock.images_per_s:
        return UnreliableGrid(apps, study, run), Clock()
    found = checkpoints.newest(run.checkpoints, study.hash, lambda text: None)  # of which the round loop warns
    made = found[0].round if found else 0
    clock = VirtualClock(virtual_seconds(run, made))
    images = {name: [_images(site, study, stage) for stage in study.stages] for name, site in sites.items()}
    return UnreliableGrid(apps, study, run, clock, images, made), clock


def strikes(study: Study, site: str, round: int) -> Struck:
    """What happens to a site in a round: always the same, whoever else is asked and whenever."""
    struck: Struck = {}
    for place, fault in study.simulation.faults_of(site).items():
        rng = numpy_generator(seed_for(study.seed, f"fault {place}", site=site, round=round))
        if fault.rounds[0] <= round <= fault.rounds[1] and rng.random() < fault.probability:
            struck[place] = fault, rng
    return struck


def _images(site: Site, study: Study, stage: AnyStage) -> int:
    """On which a site trains in an epoch of a stage; 0 where it has no labels for it."""
    if not isinstance(stage, Finetune):
        return len(site.split(study)[0])
    try:
        return len(site.labelled(study, stage)[0])
    except CohortError:
        return 0


class UnreliableGrid(LocalGrid):
    """A LocalGrid whose sites have the faults of `[simulation]`; with a `clock`, their answers take its time."""

    def __init__(
        self,
        apps: Mapping[str, Node | ClientApp],
        study: Study,
        run: RunDir,
        clock: VirtualClock | None = None,
        images: Mapping[str, Sequence[int]] | None = None,
        made: int = 0,
    ) -> None:
        """With a clock, `images` are those that a site trains on, by stage; `made` rounds are closed already."""
        super().__init__(apps, expire=clock is None)
        self._study, self._run, self._clock, self._images = study, run, clock, images or {}
        self._errands: dict[str, Errand] = {}
        self._in_flight = (0, "")
        self._deadline = 0.0
        self._trained: dict[str, list[Message]] = {}  # what colluding sites have not sent yet
        self._common: dict[int, Packed] = {}
        late = [event for event in records(run.path).events if event["event"] == "site_late"]
        self._busy: dict[str, float] = {e["site"]: e["arrives_s"] for e in late if e["round"] <= made}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages, and settle what becomes of each order."""
        ids: list[str] = []
        for message in messages:
            ids += super().push_messages([message])
            if message.metadata.message_type == MessageType.QUERY:
                continue
            order, _ = wire.unpack_order(message.content)
            self._begin(order, message.metadata.message_type)
            struck = strikes(self._study, order.site, order.round) if order.train else {}
            if struck:
                faults = [fault.kind for fault, _ in struck.values()]
                self._run.event("site_struck", round=order.round, site=order.site, faults=faults)
            if any(isinstance(fault, Dropout) for fault, _ in struck.values()):
                del self._waiting[ids[-1]]
            else:
                self._errands[ids[-1]] = self._errand(order, message, struck)
        return ids

    def _begin(self, order: Order, kind: str) -> None:
        """Forget the round before with the first order of the next. Its deadline is that of all its orders."""
        if (order.round, kind) != self._in_flight:
            self._in_flight = order.round, kind
            self._errands, self._trained, self._common = {}, {}, {}
            if self._clock:
                self._deadline = self._clock.now() + self._study.aggregation.round_deadline_s

    def _errand(self, order: Order, message: Message, struck: Struck) -> Errand:
        if self._clock is None:
            return Errand(order, struck)
        bytes_sent = sum(len(array.data) for array in message.content.array_records["tensors"].values())
        arrives = self._arrival(order, bytes_sent, struck)
        self._clock.expect(arrives)
        return Errand(order, struck, arrives, arrives > whole(self._deadline))

    def _arrival(self, order: Order, bytes_sent: int, struck: Struck) -> float:
        """When a site's answer does. A measurement takes no time but that of the tensors' way there."""
        assert self._clock is not None
        wanted, stage = self._study.simulation.clock, self._study.stages[order.stage]
        way_s = bytes_sent / wanted.bytes_per_s
        begin = max(self._clock.now() + way_s, self._busy.get(order.site, 0.0))
        if not order.train:
            return whole(begin)
        work_s = self._images[order.site][order.stage] * stage.local_epochs / wanted.images_per_s
        waits_s = 0.0
        for fault, rng in struck.values():
            if isinstance(fault, Slow):
                work_s *= fault.factor
            elif isinstance(fault, Lateness):
                waits_s += rng.exponential(fault.seconds)
        return whole(after_work(begin, work_s, wanted) + way_s + waits_s)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The first reply that has arrived. What comes too late for its round is worked out now, and dropped."""
        for number in message_ids:
            errand, replies = self._errands.get(number), list[Message]()
            if errand is None:
                replies = list(super().pull_messages([number]))
            elif errand.late:
                self._too_late(number, errand)
            elif self._clock is None or self._clock.now() >= errand.arrives:
                replies = self._answer(number, errand)
            if replies:
                return replies
        return []

    def _too_late(self, number: str, errand: Errand) -> None:
        """Have a site train whose answer the round does not wait for: now, so that no checkpoint lacks its state."""
        if errand.order.train:
            site, late_s = errand.order.site, errand.arrives - self._deadline
            self._run.event("site_late", round=errand.order.round, site=site, arrives_s=errand.arrives, late_s=late_s)
            self._busy[site] = errand.arrives
            self._replies(number, errand)
        self._waiting.pop(number, None)  # to measure leaves nothing behind
        del self._errands[number]

    def _answer(self, number: str, errand: Errand) -> list[Message]:
        """A site's reply as its faults leave it; none where it has been asked for already."""
        replies = self._replies(number, errand)
        for reply in replies:
            if reply.has_content() and "update" in reply.content:
                reply.content["update"] = self._spoiled(reply.content.array_records["update"], errand.struck)
        return replies

    def _spoiled(self, update: Packed, struck: Struck) -> Packed:
        """An update with its faults, one after another."""
        for number, (fault, rng) in struck.items():
            if isinstance(fault, Corrupt):
                return damaged(update, rng)  # nobody can read what is left
            if isinstance(fault, Collusion):
                update = self._common[number]
            elif not isinstance(fault, TIMED):
                update = wire.pack_tensors(changed(fault, wire.unpack_tensors(update), rng))
        return update

    def _replies(self, number: str, errand: Errand) -> list[Message]:
        """What a site has honestly made of its order. Where it colludes, all that do are trained first."""
        for place, (fault, _) in errand.struck.items():
            if isinstance(fault, Collusion) and place not in self._common:
                self._common[place] = wire.pack_tensors(colluded(self._train_together(place), fault.factor))
        return self._trained.pop(number) if number in self._trained else list(super().pull_messages([number]))

    def _train_together(self, place: int) -> list[Tensors]:
        """The honest updates of all sites that collude in a round, whenever they answer."""
        updates = []
        for number, errand in sorted(self._errands.items(), key=lambda item: item[1].order.site):
            if place in errand.struck:
                if number not in self._trained:
                    self._trained[number] = list(super().pull_messages([number]))
                sent = [reply.content for reply in self._trained[number] if reply.has_content()]
                updates += [wire.unpack_tensors(content.array_records["update"]) for content in sent]
        return updates
