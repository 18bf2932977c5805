"""`[simulation]`: which patients play which site, and how sites differ. No part of a study's hash."""

from collections.abc import Collection
from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from polyclinic.settings import Name, Settings, nearest


class Iid(Settings):
    """Patients dealt at random, sites of equal size."""

    kind: Literal["iid"] = "iid"


class Dirichlet(Settings):
    """Label skew: each class is dealt to the sites in proportions drawn from Dirichlet(alpha)."""

    kind: Literal["dirichlet"]
    alpha: float = Field(gt=0, le=1e6)


class Quantity(Settings):
    """Quantity skew: labels alike, sizes of the sites drawn from Dirichlet(alpha)."""

    kind: Literal["quantity"]
    alpha: float = Field(gt=0, le=1e6)


class Classes(Settings):
    """Each site sees a few classes only."""

    kind: Literal["classes"]
    per_site: int = Field(ge=1, le=100_000)
    """Classes that a site sees at most; patients without a label are a class of their own."""


class Column(Settings):
    """Each value of a column is a site; `sites` is left out."""

    kind: Literal["column"]
    by: str
    """`site` or `view`; a patient goes to the value that most of its images have."""


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
ShiftKind = Literal[PixelShift, "label_noise", "prevalence"]


def _is_kind(value: object) -> object:
    if value not in get_args(ShiftKind):
        raise ValueError(nearest(value, get_args(ShiftKind)))
    return value


class Shift(Settings):
    """`[[simulation.site.shift]]`: made at the site's intake, one after another, behind those of several sites."""

    kind: Annotated[ShiftKind, BeforeValidator(_is_kind)]
    severity: float = Field(ge=0, le=1)
    """0: nothing changes."""
    label: str = ""
    """The cohort's word for the class that grows rare with kind = "prevalence"; no other kind has one."""

    @model_validator(mode="after")
    def _has_a_label(self) -> Self:
        if self.kind == "prevalence" and not self.label:
            raise ValueError('a shift of kind "prevalence" names no class: add label = "..."')
        if self.kind != "prevalence" and self.label:
            raise ValueError(f"a shift of kind {self.kind!r} has no label: leave `label` out")
        return self


class SharedShift(Shift):
    """`[[simulation.shift]]`: made at the intake of several sites, one after another."""

    sites: list[Name] = Field(default_factory=list)
    """Whose; empty: all."""


class SimulatedSite(Settings):
    """`[[simulation.site]]`: a named site with a cohort of its own."""

    name: Name
    cohort: str
    allow_burned_in: bool = False
    """Use what may show a patient's name in its pixels: ultrasound, secondary captures, files marked as annotated."""
    shift: list[Shift] = Field(default_factory=list, max_length=100)


class Simulation(Settings):
    """`[simulation]`: which cohorts play the sites. Not part of the study's hash."""

    sites: int = Field(default=0, ge=0, le=100_000)
    cohort: str = ""
    allow_burned_in: bool = False
    """As of a site, for the one cohort."""
    partition: Annotated[Iid | Dirichlet | Quantity | Classes | Column, Field(discriminator="kind")] = Iid()
    shift: list[SharedShift] = Field(default_factory=list, max_length=100)
    site: list[SimulatedSite] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.site and (self.sites or self.cohort):
            raise ValueError(
                "sites are split from one cohort and named as well: keep `sites` and `cohort`, or [[simulation.site]]"
            )
        if isinstance(self.partition, Column):
            if self.sites:
                raise ValueError(
                    f"sites is {self.sites} and partition.kind is 'column', whose values are the sites: leave `sites` "
                    "out"
                )
        elif bool(self.sites) != bool(self.cohort):
            raise ValueError(f"sites is {self.sites} and cohort is {self.cohort!r}: give both, or neither")
        names = [site.name for site in self.site]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sites are called {twice[0]!r}: give each its own name")
        return self

    @model_validator(mode="after")
    def _shifts_have_sites(self) -> Self:
        if self.shift and (self.site or not isinstance(self.partition, Column)):  # whose sites only the cohort knows
            self.require_sites([site.name for site in self.site] or [f"site-{n + 1}" for n in range(self.sites)])
        return self

    def require_sites(self, names: Collection[str]) -> None:
        """Raise a ValueError, "what is wrong: what to do", where a shift is of a site that is not among `names`."""
        known = set(names)
        for number, shift in enumerate(self.shift):
            if unknown := sorted(set(shift.sites) - known):
                raise ValueError(
                    f"simulation.shift.{number}.sites names {unknown[0]!r}, which is no site: "
                    + (nearest(unknown[0], names) if names else "leave it out")
                )

    def shifts_of(self, name: str) -> list[Shift]:
        """The shifts of a site in the order in which they are made."""
        own = [shift for site in self.site if site.name == name for shift in site.shift]
        return [shift for shift in self.shift if not shift.sites or name in shift.sites] + own
