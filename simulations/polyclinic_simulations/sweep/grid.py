"""A grid file: a study, and under `[grid]` the values that it is run with, every one with every other.

    [grid]
    rule = ["fedavg", { rule = "fedprox", mu = 0.1 }]
    partition = ["iid", { kind = "dirichlet", alpha = 0.1 }]
    "encoder.norm" = ["group", "batch"]
    seed = [0, 1, 2]

`method` is that of every pretrain stage, `severity` a factor on that of every shift; a dotted name is any key of the
study. A value may be a table `{ name = "...", set = { "a.b" = ..., "c.d" = ... } }`, which sets several keys at once.
"""

import copy
import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from polyclinic.errors import StudyError
from polyclinic.study import MAX_CHARACTERS, Study, resolve, with_weights

SEED = "seed"
NAMED = {"rule": "aggregation", "partition": "simulation.partition"}
"""Axes whose values are a table of the study, or the one key that says which: {axis: table}."""
KEYS = {"rule": "rule", "partition": "kind", "method": "method"}
"""That key, by axis."""
MOST = 10_000
"""Cells of a grid."""

Plain = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One study of a grid.

    Attributes:
        values: {axis: the cell's value on it, in words}, in the order of the file.
        baselines: whether this cell trains the rows that no rule and no fault changes, for all cells that share them.
    """

    values: dict[str, str]
    study: Study
    baselines: bool = True

    @cached_property
    def name(self) -> str:
        """Of the cell's folder: its values, and a digest of the study, so that a changed one is another cell."""
        words = re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(self.values.values())).strip("-.")[:60]
        return f"{words}-{sha256(self.study.to_toml().encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Grid:
    """All cells of a grid file.

    Attributes:
        axes: {axis: its values in words}, in the order of the file; the seed is one of them.
        conditions: the axes that say how sites differ. The others are choices, which are compared under each condition.
        shared: the axes on which only rows that are federated depend.
    """

    axes: dict[str, list[str]]
    conditions: list[str]
    shared: list[str]
    cells: list[Cell]

    @property
    def choices(self) -> list[str]:
        """The axes on which one may choose."""
        return [axis for axis in self.axes if axis != SEED and axis not in self.conditions]


def read_grid(path: Path) -> Grid:
    """Read a grid file and resolve all its studies.

    Raises:
        StudyError: it cannot be read, names no axis, or a cell is no study; the error names the cell.
    """
    text = _text(path)
    try:
        base = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path} is not TOML: {error}", "correct the line it names") from error
    axes = dict(_flat(base.pop("grid", {})))
    if not axes:
        raise StudyError(f"{path} has no [grid]", 'name what to vary, such as: [grid] rule = ["fedavg", "median"]')
    resolve(base, str(path))  # an error that all cells share is the study's
    axes = {axis: values for axis, values in axes.items() if axis != SEED} | {
        SEED: axes.get(SEED, [base.get("study", {}).get("seed", 0)])
    }
    patches = {axis: [_patch(axis, value, base, path) for value in values] for axis, values in axes.items()}
    _require(patches, path)
    conditions = [axis for axis, found in patches.items() if axis != SEED and all(map(_of_the_world, found))]
    shared = [axis for axis, found in patches.items() if axis != SEED and all(map(_federated_only, found))]
    cells = list(_cells(base, patches, shared, path))
    return Grid({axis: [name for name, _ in found] for axis, found in patches.items()}, conditions, shared, cells)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CHARACTERS * 4 + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"cannot read the grid file {path}: {error}", "give the path of a TOML file") from error
    if len(text) > MAX_CHARACTERS:
        raise StudyError(f"{path} has more than {MAX_CHARACTERS} characters", "give a shorter grid")
    return text


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, values) of every axis, whether its name is quoted or makes tables."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


Patch = tuple[str, Plain]
"""(a value in words, {dotted key of the study: what it becomes})."""


def _patch(axis: str, value: Any, base: Plain, path: Path) -> Patch:
    """One value of an axis."""
    if isinstance(value, dict) and value.keys() == {"name", "set"} and isinstance(value["set"], dict):
        return str(value["name"]), dict(_flat(value["set"]))
    name = _words(axis, value)
    if axis == SEED:
        return name, {"study.seed": value}
    if axis in NAMED:
        own = value if isinstance(value, dict) else {KEYS[axis]: value}
        kept = base.get("aggregation", {}) if axis == "rule" and isinstance(base.get("aggregation"), dict) else {}
        return name, {NAMED[axis]: {**kept, **own}}
    if axis == "method":
        own = value if isinstance(value, dict) else {"method": value}
        stages = [{**s, **own} if s.get("kind") != "finetune" else s for s in base["stages"]]
        return name, {"stages": stages}
    if axis == "severity":
        return name, _scaled(base, value, path)
    if "." not in axis:
        raise StudyError(
            f"{path}: [grid] has no axis {axis!r}", "use method, rule, partition, severity, seed, or a key's whole name"
        )
    return name, {axis: value}


def _words(axis: str, value: Any) -> str:
    """A value in words: what names it, then its settings.

    >>> _words("rule", {"rule": "fedprox", "mu": 0.1}), _words("seed", 3)
    ('fedprox mu=0.1', '3')
    """
    if not isinstance(value, dict):
        return str(value)
    first = value.get(KEYS.get(axis, ""), "")
    return " ".join([*([str(first)] if first else []), *(f"{k}={v}" for k, v in value.items() if k != KEYS.get(axis))])


def _scaled(base: Plain, factor: Any, path: Path) -> Plain:
    """All shifts with this part of their severity."""
    simulation = base.get("simulation", {})
    sites = [site for site in simulation.get("site", []) if site.get("shift")]
    if not sites and not simulation.get("shift"):
        raise StudyError(f"{path}: [grid] severity has no shift to scale", "add [[simulation.shift]] to the study")
    if not isinstance(factor, int | float) or not 0 <= factor <= 1:
        raise StudyError(f"{path}: [grid] severity is {factor!r}", "give numbers from 0 to 1")

    def scaled(shifts: list[Plain]) -> list[Plain]:
        return [{**shift, "severity": float(factor * shift["severity"])} for shift in shifts]

    every = [{**s, "shift": scaled(s["shift"])} if s.get("shift") else s for s in simulation.get("site", [])]
    return {"simulation.shift": scaled(simulation.get("shift", [])), **({"simulation.site": every} if every else {})}


def _require(patches: Mapping[str, list[Patch]], path: Path) -> None:
    for axis, found in patches.items():
        names = [name for name, _ in found]
        if not names or len(set(names)) < len(names):
            problem = f"names {next(n for n in names if names.count(n) > 1)!r} twice" if names else "has no value"
            raise StudyError(f"{path}: [grid] {axis} {problem}", "list every value once")
    if (count := math.prod(map(len, patches.values()))) > MOST:
        raise StudyError(f"{path}: the grid has {count} cells", f"ask for at most {MOST}")


def _of_the_world(patch: Patch) -> bool:
    """Whether a value changes only how the simulated sites are."""
    return all(key.startswith("simulation.") for key in patch[1])


def _federated_only(patch: Patch) -> bool:
    """Whether a value changes nothing for who trains alone: the rule, faults and the clock."""
    return all(re.match(r"(aggregation|simulation\.(fault|clock))(\.|$)", key) for key in patch[1])


def _cells(base: Plain, patches: Mapping[str, list[Patch]], shared: list[str], path: Path) -> Iterator[Cell]:
    """Every combination; of those that share their baselines, the first trains them."""
    trained: set[tuple[str, ...]] = set()
    for chosen in itertools.product(*patches.values()):
        plain = copy.deepcopy(base)
        for _, settings in chosen:
            for key, value in settings.items():
                _set(plain, key, copy.deepcopy(value), path)
        values = dict(zip(patches, (name for name, _ in chosen), strict=True))
        others = tuple(value for axis, value in values.items() if axis not in shared)
        first = others not in trained
        trained.add(others)
        if not first:
            plain["evaluation"] = _only_own_rows(plain.get("evaluation", {}))
        where = f"{path}, cell " + ", ".join(f"{axis} = {value}" for axis, value in values.items())
        yield Cell(values, with_weights(resolve(plain, where), path), first)


def _only_own_rows(evaluation: Plain) -> Plain:
    """Of the rows beside `federated`, those that the rule trains too."""
    asked = evaluation.get("rows", ["scratch"])
    return {**evaluation, "rows": [row for row in asked if row == "scratch"]}


def _set(plain: Any, key: str, value: Any, path: Path) -> None:
    """Set a dotted key; numbers are places in lists."""
    *parents, last = key.split(".")
    try:
        for part in parents:
            plain = plain[int(part)] if isinstance(plain, list) else plain.setdefault(part, {})
        plain[int(last) if isinstance(plain, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise StudyError(f"{path}: the study has no place for {key!r}", "give the key's whole name") from error
