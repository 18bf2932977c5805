"""Every setting of a study, as a commented study file: written from the models themselves, so that it is never old."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from polyclinic.stages import AnyStage, Stage, Views
from polyclinic.study import Study

WIDTH = 100
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def reference() -> str:
    """All tables of a study with their keys, defaults, bounds and meanings, TOML with comments."""
    parts: list[str] = []
    for name, field in Study.model_fields.items():
        if name == "stages":
            parts += _stages()
        else:
            models = _models(field.annotation)
            for model in models:
                parts += _tables(f"[{name}]", model, _meaning(model) if len(models) > 1 else "")
    return "\n\n".join(parts) + "\n"


def _tables(head: str, model: type[BaseModel], meaning: str = "") -> Iterator[str]:
    """A table, then those within it, each way to fill one by itself; what is a list of tables stands only there."""
    within = {name: _models(field.annotation) for name, field in model.model_fields.items()}
    plain = {name: field for name, field in model.model_fields.items() if not (within[name] and _is_list(field))}
    yield _lines(f"{head}   # {meaning}" if meaning else head, plain)
    for name, models in within.items():
        path = f"{head.strip('[]')}.{name}"
        for inner in models:
            own = f"[[{path}]]" if _is_list(model.model_fields[name]) else f"[{path}]"
            yield from _tables(own, inner, _meaning(inner))


def _meaning(model: type[BaseModel]) -> str:
    """The first line of what a model says of itself, without the name of its table."""
    return (model.__doc__ or "").strip().partition("\n")[0].rpartition("`: ")[2]


def _stages() -> Iterator[str]:
    """What every stage has, then what each method adds or sets anew."""
    yield _lines("[[stages]]   # in order; each starts from the encoder that the one before left", Stage.model_fields)
    for model in _models(AnyStage):
        [method] = get_args(model.model_fields["method"].annotation)
        kind = model.model_fields["kind"].default
        kind = "pretrain" if kind == "pretrain" else "finetune"
        own = {
            name: field
            for name, field in model.model_fields.items()
            if name not in ("kind", "method", "views")
            and (name not in Stage.model_fields or field.default != Stage.model_fields[name].default)
        }
        yield _lines(f'[[stages]]   # kind = "{kind}", method = "{method}"', own)
    yield _lines("[stages.views]   # of the stage before; defaults by method and channels", Views.model_fields)


def _lines(head: str, fields: Mapping[str, FieldInfo]) -> str:
    lines = [head]
    for name, field in fields.items():
        meaning = " ".join(filter(None, [*(field.description or "").split(), _bounds(field)]))
        lines += textwrap.wrap(meaning, WIDTH, initial_indent="# ", subsequent_indent="# ")
        lines.append(f"{name} = {_default(field)}")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        words = _literals(field.annotation)
        return json.dumps(words[0]) if len(words) == 1 else "   # must be given"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        inside = ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.model_dump(mode="json").items())
        return f"{{ {inside} }}"
    return json.dumps(value) if value is not None else "    # by method"


def _bounds(field: FieldInfo) -> str:
    """What a value may be: one of some words, or a number between bounds."""
    words = [repr(word) for word in _literals(field.annotation)]
    limits = [
        f"{text} {getattr(limit, name)}"
        for limit in field.metadata
        for name, text in BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]
    said = [f"One of {', '.join(words)}."] if len(words) > 1 else []
    return " ".join([*said, *([f"({', '.join(limits)})"] if limits else [])])


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _literals(part)]


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is list


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation mentions, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return [model for part in parts for model in _models(part)]
