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
from polyclinic.rules import Aggregation
from polyclinic.study import MAX_CHARACTERS, Study, resolve, with_weights

SEED = "seed"
TABLES = {"rule": "aggregation", "partition": "simulation.partition"}
"""Axes whose values are settings of one table: {axis: table}."""
KEYS = {"rule": "rule", "partition": "kind", "method": "method"}
"""The key of a value that is no table itself, by axis."""
ROWS = "evaluation.rows"
"""The one key that no axis may set: which cells train which rows is the sweep's own business."""
MOST = 10_000
"""Cells of a grid."""

Plain = dict[str, Any]
Patch = tuple[str, Plain]
"""(a value in words, {dotted key of the study: what it becomes})."""


@dataclass(frozen=True)
class Cell:
    """One study of a grid.

    Attributes:
        values: {axis: the cell's value on it, in words}, in the order of the file.
        study: with all rows that the file asks for.
    """

    values: dict[str, str]
    study: Study

    @cached_property
    def name(self) -> str:
        """Of the cell's folder: its values, and a digest of the study, so that a changed one is another cell."""
        words = re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(self.values.values())).strip("-.")[:60]
        return f"{words}-{sha256(self.with_rows([]).to_toml().encode()).hexdigest()[:10]}"

    def with_rows(self, rows: list[Any]) -> Study:
        """The study with these rows alone beside `federated`."""
        evaluation = self.study.evaluation.model_copy(update={"rows": rows})
        return self.study.model_copy(update={"evaluation": evaluation})


@dataclass(frozen=True)
class Grid:
    """All cells of a grid file.

    Attributes:
        axes: {axis: its values in words}, in the order of the file; the seed is the last.
        conditions: the axes that say how sites differ. The others are choices, which are compared under each condition.
        rules: the axes that change nothing for a site that trains alone: how updates are combined.
        faults: those that change nothing but the federation: who is unreliable.
    """

    axes: dict[str, list[str]]
    conditions: list[str]
    rules: list[str]
    faults: list[str]
    cells: list[Cell]

    @property
    def choices(self) -> list[str]:
        """The axes on which one may choose."""
        return [axis for axis in self.axes if axis != SEED and axis not in self.conditions]

    def axes_of(self, row: str) -> list[str]:
        """On which a row depends; the cells that agree on them share it."""
        free = {"federated": [], "scratch": self.faults, "init": self.faults}.get(row, self.rules + self.faults)
        return [axis for axis in self.axes if axis not in free]


def read_grid(path: Path) -> Grid:
    """Read a grid file and resolve all its studies.

    Raises:
        StudyError: it cannot be read, names no axis, or a cell is no study; the error names the cell.
    """
    try:
        base = tomllib.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path} is not TOML: {error}", "correct the line it names") from error
    axes = dict(_flat(base.pop("grid", {}), path))
    if not axes:
        raise StudyError(
            f"{path} has no [grid], or an empty one", 'name what to vary, such as: [grid] rule = ["fedavg", "median"]'
        )
    resolve(base, str(path))  # an error that all cells share is the study's
    axes = {axis: values for axis, values in axes.items() if axis != SEED} | {SEED: axes.get(SEED, [_seed(base)])}
    patches = {axis: [_patch(axis, value, base, path) for value in values] for axis, values in axes.items()}
    _require(patches, path)
    for axis in patches.keys() & TABLES.keys():
        _clear(base, axis)
    return Grid(
        axes={axis: [name for name, _ in found] for axis, found in patches.items()},
        conditions=_axes_that_set(r"simulation\.", patches),
        rules=_axes_that_set(r"aggregation\.", patches),
        faults=_axes_that_set(r"simulation\.(fault|clock)(\.|$)", patches),
        cells=list(_cells(base, patches, path)),
    )


def _seed(base: Plain) -> int:
    return int(base["study"].get("seed", 0))


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CHARACTERS * 4 + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"cannot read the grid file {path}: {error}", "give the path of a TOML file") from error
    if len(text) > MAX_CHARACTERS:
        raise StudyError(f"{path} has more than {MAX_CHARACTERS} characters", "give a shorter grid")
    return text


def _flat(table: Any, path: Path, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """(dotted name, values) of every axis, whether its name is quoted or makes tables."""
    if isinstance(table, dict):
        for key, value in table.items():
            yield from _flat(value, path, f"{prefix}.{key}" if prefix else key)
    elif isinstance(table, list) and prefix:
        yield prefix, table
    else:
        raise StudyError(f"{path}: [grid] {prefix} is {table!r}", f"give a list, such as [{table!r}]")


def _patch(axis: str, value: Any, base: Plain, path: Path) -> Patch:
    """One value of an axis."""
    if isinstance(value, dict) and value.keys() == {"name", "set"} and isinstance(value["set"], dict):
        return str(value["name"]), dict(_leaves(value["set"]))
    try:
        name = _words(axis, value)
    except ValueError as error:  # of thousands of hexadecimal digits
        raise StudyError(f"{path}: [grid] {axis} has a number that is too long", "give a shorter one") from error
    own = value if isinstance(value, dict) else {KEYS.get(axis, ""): value}
    if axis == SEED:
        return name, {"study.seed": value}
    if axis in TABLES:
        return name, {f"{TABLES[axis]}.{key}": setting for key, setting in own.items()}
    if axis == "method":
        stages = [number for number, stage in enumerate(base["stages"]) if stage.get("kind") != "finetune"]
        if not stages:
            raise StudyError(f"{path}: [grid] method has no pretrain stage to change", "add one, or leave method out")
        return name, {f"stages.{number}.{key}": setting for number in stages for key, setting in own.items()}
    if axis == "severity":
        return name, _scaled(base.get("simulation", {}), value, path)
    if "." not in axis:
        raise StudyError(
            f"{path}: [grid] has no axis {axis!r} with the value {value!r}",
            "use method, rule, partition, severity, seed, a key's whole name, or values that say what they set: "
            '{ name = "...", set = { "a.key" = ... } }',
        )
    return name, {axis: value}


def _leaves(table: Plain, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value), the tables of a table opened; an empty one is a value."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _words(axis: str, value: Any) -> str:
    """A value in words: what names it, then its settings.

    >>> _words("rule", {"rule": "fedprox", "mu": 0.1}), _words("seed", 3)
    ('fedprox mu=0.1', '3')
    """
    if not isinstance(value, dict):
        return str(value)
    first = value.get(KEYS.get(axis, ""), "")
    return " ".join([*([str(first)] if first else []), *(f"{k}={v}" for k, v in value.items() if k != KEYS.get(axis))])


def _scaled(simulation: Plain, factor: Any, path: Path) -> Plain:
    """All shifts with this part of their severity."""
    shifts = {f"simulation.shift.{n}": shift for n, shift in enumerate(simulation.get("shift", []))}
    for place, site in enumerate(simulation.get("site", [])):
        shifts |= {f"simulation.site.{place}.shift.{n}": shift for n, shift in enumerate(site.get("shift", []))}
    if not shifts:
        raise StudyError(f"{path}: [grid] severity has no shift to scale", "add [[simulation.shift]] to the study")
    if not isinstance(factor, int | float) or not 0 <= factor <= 1:
        raise StudyError(f"{path}: [grid] severity is {factor!r}", "give numbers from 0 to 1")
    return {f"{key}.severity": float(factor * shift["severity"]) for key, shift in shifts.items()}


def _require(patches: Mapping[str, list[Patch]], path: Path) -> None:
    """Refuse axes without values, with one twice, and two that set the same: the later would undo the earlier."""
    for axis, found in patches.items():
        names = [name for name, _ in found]
        if not names:
            raise StudyError(f"{path}: [grid] {axis} has no value", "list its values, or leave the axis out")
        if "" in names:
            raise StudyError(f"{path}: [grid] {axis} has a value without a name", "name every value")
        if twice := [name for name in names if names.count(name) > 1]:
            raise StudyError(f"{path}: [grid] {axis} names {twice[0]!r} twice", "list every value once")
    sets = {axis: {key for _, settings in found for key in settings} for axis, found in patches.items()}
    for one, other in itertools.permutations(sets, 2):
        if clash := next((key for key in sets[one] for inner in sets[other] if _within(inner, key)), None):
            raise StudyError(f"{path}: [grid] {one} and {other} both set {clash}", "vary it on one axis")
    if any(_within(ROWS, key) for keys in sets.values() for key in keys):
        raise StudyError(f"{path}: [grid] varies {ROWS}, which all cells share", "set it in [evaluation]")
    if (count := math.prod(map(len, patches.values()))) > MOST:
        raise StudyError(f"{path}: the grid has {count} cells", f"ask for at most {MOST}")


def _within(inner: str, key: str) -> bool:
    """Whether one dotted key is another, or in its table."""
    return f"{inner}.".startswith(f"{key}.")


def _clear(base: Plain, axis: str) -> None:
    """Leave out what the base says of a table whose settings an axis gives: they may be no settings of its values."""
    if axis == "partition":
        base.get("simulation", {}).pop("partition", None)
    elif "aggregation" in base:
        base["aggregation"] = {k: v for k, v in base["aggregation"].items() if k in Aggregation.model_fields}


def _axes_that_set(keys: str, patches: Mapping[str, list[Patch]]) -> list[str]:
    """The axes all of whose values set only keys that begin so."""
    return [
        axis
        for axis, found in patches.items()
        if axis != SEED and all(re.match(keys, key) for _, settings in found for key in settings)
    ]


def _cells(base: Plain, patches: Mapping[str, list[Patch]], path: Path) -> Iterator[Cell]:
    """Every combination."""
    for chosen in itertools.product(*patches.values()):
        plain = copy.deepcopy(base)
        for _, settings in chosen:
            for key, value in settings.items():
                _set(plain, key, copy.deepcopy(value), path)
        values = dict(zip(patches, (name for name, _ in chosen), strict=True))
        where = f"{path}, cell " + ", ".join(f"{axis} = {value}" for axis, value in values.items())
        yield Cell(values, with_weights(resolve(plain, where), path))


def _set(plain: Any, key: str, value: Any, path: Path) -> None:
    """Set a dotted key; numbers are places in lists."""
    *parents, last = key.split(".")
    try:
        for part in parents:
            plain = plain[int(part)] if isinstance(plain, list) else plain.setdefault(part, {})
        plain[int(last) if isinstance(plain, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise StudyError(f"{path}: the study has no place for {key!r}", "give the key's whole name") from error
