"""`[simulation]`: which patients play which site, and how sites differ. No part of a study's hash."""

from collections.abc import Collection
from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from polyclinic.faults import TIMED, AnyFault, SimulatedClock
from polyclinic.settings import Name, Settings, nearest


class Iid(Settings):
    """Patients dealt at random, sites of equal size."""

    kind: Literal["iid"] = "iid"


class Dirichlet(Settings):
    """Label skew: each class is dealt to the sites in proportions drawn from Dirichlet(alpha)."""

    kind: Literal["dirichlet"]
    alpha: float = Field(gt=0, le=1e6)
    """The smaller, the more sites differ: of five sites with 0.1, one has four fifths of a class."""


class Quantity(Settings):
    """Quantity skew: labels alike, sizes of the sites drawn from Dirichlet(alpha)."""

    kind: Literal["quantity"]
    alpha: float = Field(gt=0, le=1e6)
    """The smaller, the more sizes differ."""


class Classes(Settings):
    """Each site sees a few classes only."""

    kind: Literal["classes"]
    per_site: int = Field(ge=1, le=100_000)
    """Classes that a site sees at most; patients without a label are a class of their own."""


class Column(Settings):
    """Each value of a column is a site; `sites` is left out."""

    kind: Literal["column"]
    by: str
    """`site`, `view`, `scanner`, `sex` or `age`; a patient goes to the value that most of its images have."""
    edges: list[Annotated[int, Field(ge=1, le=90)]] = Field(default_factory=list, max_length=89)
    """Years at which one site's patients end and the next one's begin, ascending: [40, 60] makes the sites under-40,
    40-59 and 60-and-over. Only with by = "age"; every age above 89 is kept as 90."""

    @model_validator(mode="after")
    def _edges_are_of_ages(self) -> Self:
        if self.by == "age" and not self.edges:
            raise ValueError('partition.by is "age" and nothing says where groups begin: add edges = [40, 60]')
        if self.by != "age" and self.edges:
            raise ValueError(f"partition.by is {self.by!r}, which has no edges: leave `edges` out")
        if self.edges != sorted(set(self.edges)):
            raise ValueError(f"partition.edges is {self.edges}: give years in ascending order, each once")
        return self


PixelShift = Literal[
    "response",
    "sharpness",
    "noise",
    "bit_depth",
    "inversion",
    "collimation",
    "marker",
    "local_contrast",
    "resolution",
]
LabelShift = Literal["label_noise", "label_policy"]
MixShift = Literal["prevalence", "view_mix", "sex_mix", "age_mix"]
ShiftKind = Literal[PixelShift, LabelShift, MixShift]
VALUED: dict[str, str] = {"prevalence": "class", "view_mix": "view", "sex_mix": "sex", "label_policy": "class"}
"""The kinds of shift that concern patients of one value, with what that is a value of."""


def _is_kind(value: object) -> object:
    if value not in get_args(ShiftKind):
        raise ValueError(nearest(value, get_args(ShiftKind)))
    return value


class Shift(Settings):
    """`[[simulation.site.shift]]`: made at the site's intake, one after another, behind those of several sites."""

    kind: Annotated[ShiftKind, BeforeValidator(_is_kind)]
    severity: float = Field(ge=0, le=1)
    """0: nothing changes."""
    value: str = ""
    """The cohort's word for whom the shift concerns: the class that grows rare with kind = "prevalence", the view with
    "view_mix", the sex (F, M or O) with "sex_mix", the class that is called otherwise with "label_policy"; no other
    kind has one."""
    becomes: str = ""
    """What a site of another reading convention calls that class, in the cohort's words; only with kind =
    "label_policy"."""

    @model_validator(mode="after")
    def _has_a_value(self) -> Self:
        if self.kind in VALUED and not self.value:
            raise ValueError(f'a shift of kind {self.kind!r} names no {VALUED[self.kind]}: add value = "..."')
        if self.kind not in VALUED and self.value:
            raise ValueError(f"a shift of kind {self.kind!r} has no value: leave `value` out")
        if self.kind == "label_policy" and self.becomes in ("", self.value):
            raise ValueError(f'the class {self.value!r} becomes no other: give another as becomes = "..."')
        if self.kind != "label_policy" and self.becomes:
            raise ValueError(f"a shift of kind {self.kind!r} calls nothing otherwise: leave `becomes` out")
        return self


class SharedShift(Shift):
    """`[[simulation.shift]]`: made at the intake of several sites, one after another."""

    sites: list[Name] = Field(default_factory=list)
    """Whose; empty: all."""


def _is_a_table(value: object) -> object:
    if isinstance(value, str):
        raise ValueError('give a table, such as { kind = "dirichlet", alpha = 0.5 }')
    return value


class SimulatedSite(Settings):
    """`[[simulation.site]]`: a named site with a cohort of its own."""

    name: Name
    """What reports and folders call the site."""
    cohort: str = ""
    """The folder of its images, relative to that of --data, or without that to the study's."""
    phantom: int = Field(default=0, ge=0, le=100_000)
    """In place of a cohort: patients that are invented for the site, seeded by the study."""
    allow_burned_in: bool = False
    """Use what may show a patient's name in its pixels: ultrasound, secondary captures, files marked as annotated."""
    shift: list[Shift] = Field(default_factory=list, max_length=100)


class Simulation(Settings):
    """`[simulation]`: which cohorts play the sites. Not part of the study's hash."""

    sites: int = Field(default=0, ge=0, le=100_000)
    """Into how many `cohort` or `phantom` is split; 0 where sites are named, or a column's values are the sites."""
    cohort: str = ""
    """The folder of images that is split; relative as a site's is."""
    phantom: int = Field(default=0, ge=0, le=100_000)
    """In place of a cohort: patients that are invented, all as of one hospital, seeded by the study."""
    allow_burned_in: bool = False
    """As of a site, for the one cohort."""
    partition: Annotated[
        Annotated[Iid | Dirichlet | Quantity | Classes | Column, Field(discriminator="kind")],
        BeforeValidator(_is_a_table),
    ] = Iid()
    """How patients are dealt to the sites: a table."""
    shift: list[SharedShift] = Field(default_factory=list, max_length=100)
    clock: SimulatedClock = SimulatedClock()
    """The time that rounds would take in deployment: a table."""
    fault: list[AnyFault] = Field(default_factory=list, max_length=100)
    site: list[SimulatedSite] = Field(default_factory=list)
    held_out: list[Name] = Field(default_factory=list)
    """Sites that take no part in training, whose patients are there to be measured on."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.site and (self.sites or self.cohort or self.phantom):
            raise ValueError(
                "sites are split from one cohort and named as well: keep `sites` and `cohort`, or [[simulation.site]]"
            )
        sources: list[SimulatedSite | Simulation] = [self, *self.site]
        for source in sources:
            if source.cohort and source.phantom:
                raise ValueError(f"cohort is {source.cohort!r} and phantom is {source.phantom}: keep one of them")
        if none := [site.name for site in self.site if not (site.cohort or site.phantom)]:
            raise ValueError(f"the site {none[0]!r} has no patients: give it a cohort, or a number of phantom patients")
        if isinstance(self.partition, Column):
            if self.sites:
                raise ValueError(
                    f"sites is {self.sites} and partition.kind is 'column', whose values are the sites: leave `sites` "
                    "out"
                )
        elif bool(self.sites) != bool(self.cohort or self.phantom):
            raise ValueError(f"sites is {self.sites} and cohort is {self.cohort!r}: give both, or neither")
        names = [site.name for site in self.site]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sites are called {twice[0]!r}: give each its own name")
        return self

    @model_validator(mode="after")
    def _faults_have_time(self) -> Self:
        for number, fault in enumerate(self.fault):
            if isinstance(fault, TIMED) and not self.clock.images_per_s:
                raise ValueError(
                    f"simulation.fault.{number} is of kind {fault.kind!r}, which needs virtual time: give "
                    "[simulation.clock] an images_per_s"
                )
        return self

    @model_validator(mode="after")
    def _named_sites_exist(self) -> Self:
        if (self.shift or self.fault or self.held_out) and (
            self.site or not isinstance(self.partition, Column)
        ):  # whose sites only the cohort knows
            self.require_sites([site.name for site in self.site] or [f"site-{n + 1}" for n in range(self.sites)])
        return self

    def require_sites(self, names: Collection[str]) -> None:
        """Raise a ValueError, "what is wrong: what to do", where a site is named that is not among `names`."""
        known = set(names)
        named = {f"shift.{number}.sites": shift.sites for number, shift in enumerate(self.shift)}
        named |= {f"fault.{number}.sites": fault.sites for number, fault in enumerate(self.fault)}
        for key, sites in {**named, "held_out": self.held_out}.items():
            if unknown := sorted(set(sites) - known):
                raise ValueError(
                    f"simulation.{key} names {unknown[0]!r}, which is no site: "
                    + (nearest(unknown[0], names) if names else "leave it out")
                )

    def shifts_of(self, name: str) -> list[Shift]:
        """The shifts of a site in the order in which they are made."""
        own = [shift for site in self.site if site.name == name for shift in site.shift]
        return [shift for shift in self.shift if not shift.sites or name in shift.sites] + own

    @property
    def unreliable(self) -> bool:
        """Whether time is virtual, or something goes wrong."""
        return bool(self.fault or self.clock.images_per_s)

    def faults_of(self, name: str) -> dict[int, AnyFault]:
        """The faults of a site by their place in `fault`."""
        return {number: fault for number, fault in enumerate(self.fault) if not fault.sites or name in fault.sites}
