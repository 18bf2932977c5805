"""`polyclinic study settings` names every setting there is, with the default that it has."""

import tomllib
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from polyclinic.reference import _models, reference
from polyclinic.stages import Stage, Views
from polyclinic.study import Study

from ..tiny import METHOD_STAGES


def tables(head: str) -> list[dict[str, object]]:
    """The tables whose first lines start like this, as TOML; what must be given is left out."""
    return [_read(part) for part in reference().split("\n\n") if part.startswith(head)]


def table(head: str) -> dict[str, object]:
    """The only one."""
    [found] = tables(head)
    return found


def _read(text: str) -> dict[str, object]:
    lines = [line for line in text.splitlines()[1:] if not line.endswith(("must be given", "by method"))]
    return tomllib.loads("\n".join(lines))


@pytest.mark.parametrize("name", [name for name in Study.model_fields if name != "stages"])
def test_a_table_has_every_key_and_its_default(name: str) -> None:
    """Each way to fill it, where there are several: those differ in a key that must be given, and is then shown."""
    ways = _models(Study.model_fields[name].annotation)
    for model, found in zip(ways, tables(f"[{name}]"), strict=True):
        expected = {
            key: field.get_default(call_default_factory=True)
            for key, field in model.model_fields.items()
            if not field.is_required() and key not in ("site", "shift", "fault")
        }
        assert found.keys() - {"mode", "rule"} == expected.keys() - {"mode", "rule"}
        simple = {key: value for key, value in expected.items() if isinstance(value, int | float | str | list | dict)}
        assert {key: found[key] for key in simple} == simple


@pytest.mark.parametrize("method", METHOD_STAGES)
def test_a_method_has_what_it_adds_or_sets_anew(method: str) -> None:
    kind = "finetune" if method == "supervised" else "pretrain"
    found = table(f'[[stages]]   # kind = "{kind}", method = "{method}"')
    fields = METHOD_STAGES[method].model_fields
    assert found == {
        key: field.default
        for key, field in fields.items()
        if key not in ("kind", "method", "views", "rounds")
        and field.default != getattr(Stage.model_fields.get(key), "default", None)
    }


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every model that a type reaches, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        annotation = tuple[*(field.annotation for field in annotation.model_fields.values())]  # type: ignore[misc]
    for part in get_args(annotation):
        yield from models(part)


def test_every_field_of_every_model_is_shown() -> None:
    """A line for each, with its meaning above it, in a table that has all keys of the model."""
    parts = [part.splitlines() for part in reference().split("\n\n")]
    keys = [{line.partition(" = ")[0] for line in part[1:] if not line.startswith("#")} for part in parts]
    reached = {model for model in models(Study) if model is not Study and not issubclass(model, Stage)}
    assert {model.__name__ for model in reached} >= {"Weights", "SimulatedSite", "Iid", "Dirichlet", "Views", "Head"}
    for model in reached:
        own = {name for name in model.model_fields if name not in ("site", "shift", "fault")}  # own tables
        assert own in keys, model
    text = " ".join(line.removeprefix("# ") for part in parts for line in part)
    for model in reached:
        for field in model.model_fields.values():
            assert " ".join((field.description or "").split()) in text
    assert table("[[simulation.site]]") == {"cohort": "", "phantom": 0, "allow_burned_in": False}
    assert "\nname =    # must be given" in reference()
    assert "(above 0, at most 1000000.0)\nalpha =    # must be given" in reference()
    assert "[encoder.init]   # weights of an encoder of the same shape" in reference()


def test_every_setting_has_a_meaning() -> None:
    """Of its own, or that of the class it is inherited from; what tells the ways to fill a table apart needs none."""
    for model in models(Study):
        kin = [parent.model_fields for parent in model.__mro__ if issubclass(parent, BaseModel)]
        for name, field in model.model_fields.items():
            if name not in ("kind", "method", "mode", "rule") and not _models(field.annotation):
                assert any(name in fields and fields[name].description for fields in kin), f"{model.__name__}.{name}"


def test_views_and_meanings_are_there() -> None:
    assert table("[stages.views]").keys() == Views.model_fields.keys()
    assert "# Side of the square that every image is resized to, pixels. (at least 16, at most 1024)" in reference()
