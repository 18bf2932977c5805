"""Every bound is held with key, value and fix; a study's identity is stable; hostile files are refused."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from polyclinic.errors import StudyError
from polyclinic.methods import METHODS, make_method
from polyclinic.rules import Aggregation, AnyAggregation, TrimmedMeanRule
from polyclinic.simulation import Dirichlet
from polyclinic.stages import SEPARABLE_METHODS, Views
from polyclinic.study import (
    MAX_CHARACTERS,
    Compute,
    Encoder,
    Evaluation,
    Head,
    Images,
    Study,
    load_study,
    parse_canonical,
    parse_study,
    resolve,
)

from ..tiny import METHOD_STAGES

STAGE: dict[str, Any] = {"kind": "pretrain", "method": "simclr", "rounds": 2}
SMALL: dict[str, Any] = {"study": {"name": "small"}, "stages": [STAGE]}

TOML = """
[study]
name = "small"
[[stages]]
kind = "pretrain"
method = "simclr"
rounds = 2
"""

RULES: dict[str, type[BaseModel]] = {
    get_args(model.model_fields["rule"].annotation)[0]: model for model in get_args(get_args(AnyAggregation)[0])
}
"""Every rule with the class of its settings."""

TABLES: list[tuple[str, type[BaseModel]]] = [
    ("study", Head),
    ("images", Images),
    ("encoder", Encoder),
    ("evaluation", Evaluation),
    ("aggregation", Aggregation),
    *((f"aggregation:{rule}", model) for rule, model in RULES.items()),
    ("compute", Compute),
    ("simulation.partition", Dirichlet),
    ("stages.0.views", Views),
    *((f"stages.0:{method}", model) for method, model in METHOD_STAGES.items()),
]
"""Every table that has bounds. `stages.0:mae` is the first stage with that method, `aggregation:krum` has that rule."""


def study_with(key: str, value: Any) -> tuple[dict[str, Any], str]:
    """A small study that is right but for `value` at `key` (as in TABLES), and the key as errors name it."""
    data = copy.deepcopy(SMALL)
    if key.startswith("aggregation:"):
        rule, _, last = key.removeprefix("aggregation:").partition(".")
        return data | {"aggregation": {"rule": rule, last: value}}, f"aggregation.{last}"
    if ":" in key:
        stage, _, rest = key.partition(":")
        method, _, rest = rest.partition(".")
        data["stages"][0] |= {"method": method, "kind": "finetune" if method == "supervised" else "pretrain"}
        data["evaluation"] = {"labels": {"ill": ["a"], "well": ["b"]}}
        data["encoder"] = {"name": "vit_tiny" if method != "simclr" else "resnet18"}
        key = f"{stage}.{rest}"
    *path, last = key.split(".")
    table: Any = data
    for part in path:
        table = table[int(part)] if part.isdigit() else table.setdefault(part, {})
    if path == ["simulation", "partition"]:
        table["kind"] = "dirichlet"
    table[last] = value
    return data, key


def beyond(bound: Any, step: float) -> tuple[Any, str] | None:
    """A value one step beyond a bound, and the limit that the error must name."""
    match bound:
        case Ge(ge=limit):
            return limit - step, f"at least {limit}"
        case Gt(gt=limit):
            return limit, f"more than {limit}"
        case Le(le=limit):
            return limit + step, f"at most {limit}"
        case Lt(lt=limit):
            return limit, f"less than {limit}"
        case MultipleOf(multiple_of=factor):
            return factor * 2 + 1, f"multiple of {factor}"
    return None


def bounds() -> Iterator[Any]:
    """(key, value just beyond a bound, limit) for every bound of every number in a study."""
    for table, model in TABLES:
        for name, field in model.model_fields.items():
            steps = [bound.multiple_of for bound in field.metadata if isinstance(bound, MultipleOf)]
            for bound in field.metadata:
                if case := beyond(bound, *steps or [1 if field.annotation is int else 1e-3]):
                    yield pytest.param(f"{table}.{name}", *case, id=f"{table}.{name}-{type(bound).__name__}")
                else:
                    assert not isinstance(bound, MinLen | MaxLen), f"test the length of {name}"


@pytest.mark.parametrize(("key", "value", "limit"), list(bounds()))
def test_a_value_beyond_a_bound_is_refused_with_key_value_and_limit(key: str, value: Any, limit: str) -> None:
    data, named = study_with(key, value)
    with pytest.raises(StudyError) as caught:
        resolve(data, "study.toml")
    assert caught.value.problem == f"study.toml: {named} is {float(value) if isinstance(value, float) else value}"
    assert limit in caught.value.fix


def test_the_bounds_above_are_many() -> None:
    assert len(list(bounds())) > 50  # else the walk over the tables has lost some


NOISE = {"kind": "noise", "severity": 0.5}


def shifted(**shift: Any) -> dict[str, Any]:
    """A simulation of three sites with a shift."""
    return {"sites": 3, "cohort": "x", "shift": [{**NOISE, **shift}]}


def aged(**partition: Any) -> dict[str, Any]:
    """A simulation of a site for each group of ages."""
    return {"cohort": "x", "partition": {"kind": "column", "by": "age", **partition}}


def named(shifts: list[dict[str, Any]]) -> dict[str, Any]:
    """A simulation of the site `a` with shifts of its own."""
    return {"site": [{"name": "a", "cohort": "x", "shift": shifts}]}


@pytest.mark.parametrize(
    ("key", "value", "problem", "fix"),
    [
        ("study.name", "a b", "study.name is 'a b'", "letters, digits"),
        ("study.name", "../etc", "study.name is '../etc'", "letters, digits"),
        ("study.name", "x\n", r"study.name is 'x\n'", "letters, digits"),
        ("study.name", 7, "study.name is 7", "a text in quotes"),
        ("study.seed", 1.5, "study.seed is 1.5", "a whole number"),
        ("study.seed", True, "study.seed is True", "a whole number"),
        ("images.channels", 2, "images.channels is 2", "1 or 3"),
        ("images.window", "lung", "images.window is 'lung'", "'percentile', 'voi' or [centre, width] in HU"),
        ("images.window", [40.0, 0.0], "images.window is [40.0, 0.0]", "a width above 0"),
        ("images.window", [40.0], "images.window is [40.0]", "[centre, width]"),
        (
            "encoder.name",
            "resnet19",
            "encoder.name is 'resnet19'",
            "'resnet18', 'resnet50', 'bit_resnet50', 'vit_tiny'",
        ),
        ("encoder.init", "weights.pt", "encoder.init is 'weights.pt'", 'give "random" or'),
        ("stages", [], "stages is []", "at least 1 items"),
        ("stages", [STAGE] * 101, "stages is [{", "at most 100 items"),
        ("stages", {"rounds": 1}, "stages is a table", "a list"),
        ("stages.0.kind", "pretrian", "stages.0.kind is 'pretrian'", "'pretrain'"),
        ("stages.0.method", "simcl", "stages.0.method is 'simcl'", "one of 'simclr', 'micle', 'mlvicx', 'mae', 'sssd'"),
        ("stages.0.rounds", "2", "stages.0.rounds is '2'", "a whole number"),
        ("stages.0.learning_rate", float("nan"), "stages.0.learning_rate is nan", "a finite number"),
        ("stages.0.learning_rate", float("inf"), "stages.0.learning_rate is inf", "a finite number"),
        ("stages.0.learning_rate", "fast", "stages.0.learning_rate is 'fast'", "a number"),
        ("stages.0.views", "all", "stages.0.views is 'all'", "a table"),
        ("stages.0.views.flip", 1, "stages.0.views.flip is 1", "true or false"),
        ("stages.0.views.crop", 0.3, "stages.0.views.crop is 0.3", "a list"),
        ("stages.0.views.crop", [0.3, 1.5], "stages.0.views.crop.1 is 1.5", "at most 1"),
        ("stages.0.views.crop", [0.9, 0.3], "crop is [0.9, 0.3]", "smallest <= largest"),
        ("evaluation.labels", {"yes": ["a"], "no": ["a"]}, "the label 'a' stands under both 'yes' and 'no'", "in one"),
        ("evaluation.labels", {"yes": "a"}, "evaluation.labels.yes is 'a'", "a list"),
        ("evaluation.rows", ["pixel"], "evaluation.rows.0 is 'pixel'", "'pixels', 'random'"),
        ("aggregation.rule", "krun", "aggregation.rule is 'krun'", "one of 'fedavg', 'fedprox', 'fedbn'"),
        ("aggregation.f", 1, "unknown key 'aggregation.f'", "the known keys are 'rule', 'weighting'"),  # fedavg's
        ("aggregation", {"rule": "krum", "mu": 1}, "unknown key 'aggregation.mu'", "the known keys are 'rule'"),
        ("aggregation", {"rule": "fedavgm", "momentm": 1}, "unknown key 'aggregation.momentm'", "is 'momentum'"),
        ("aggregation", {"rule": "krum", "weighting": "patients"}, "aggregation.weighting is 'patients'", "'equal'"),
        ("aggregation", {"rule": "median", "weighting": "tempered"}, "aggregation.weighting is 'tempered'", "'equal'"),
        ("privacy.mode", "patent", "privacy.mode is 'patent'", "one of 'none', 'patient', 'site'"),
        ("simulation.sites", 3, "sites is 3 and cohort is ''", "both"),
        ("simulation", {"site": [{"name": "a", "cohort": "x"}] * 2}, "two sites are called 'a'", "its own name"),
        ("simulation", {"site": [{"name": "a", "cohort": "x"}], "sites": 2, "cohort": "y"}, "split from one", "keep"),
        ("simulation.partition", {"kind": "dirichlet"}, "simulation.partition.alpha is missing", "add it"),
        ("simulation.partition", {"kind": "quantity", "alpha": 0}, "simulation.partition.alpha is 0", "more than 0"),
        ("simulation.partition", {"kind": "classes", "per_site": 0}, "partition.per_site is 0", "at least 1"),
        (
            "simulation",
            {"sites": 3, "cohort": "x", "partition": {"kind": "column", "by": "view"}},
            "sites is 3 and partition.kind is 'column'",
            "leave `sites` out",
        ),
        ("simulation", shifted(kind="nois"), "simulation.shift.0.kind is 'nois'", "the nearest is 'noise'"),
        ("simulation", shifted(kind="xyz"), "simulation.shift.0.kind is 'xyz'", "give one of 'response', 'sharpness'"),
        ("simulation", shifted(kind=[]), "simulation.shift.0.kind is []", "give one of"),
        ("simulation", shifted(severity=1.01), "simulation.shift.0.severity is 1.01", "at most 1"),
        ("simulation", shifted(severity=-0.01), "simulation.shift.0.severity is -0.01", "at least 0"),
        ("simulation", shifted(site=["site-1"]), "unknown key 'simulation.shift.0.site'", "'sites'"),
        ("simulation", shifted(sites=["site-1", "site-4"]), "names 'site-4'", "the nearest is 'site-3'"),
        ("simulation", shifted(sites=["Q"]), "names 'Q', which is no site", "give one of 'site-1', 'site-2', 'site-3'"),
        ("simulation", shifted(kind="prevalence"), "a shift of kind 'prevalence' names no class", "add value"),
        ("simulation", shifted(kind="sex_mix"), "a shift of kind 'sex_mix' names no sex", "add value"),
        ("simulation", shifted(kind="age_mix", value="58"), "a shift of kind 'age_mix' has no value", "`value` out"),
        ("simulation", shifted(value="ill"), "a shift of kind 'noise' has no value", "`value` out"),
        ("simulation", shifted(kind="label_policy", value="ill"), "'ill' becomes no other", "as becomes"),
        ("simulation", shifted(kind="label_policy", value="a", becomes="a"), "'a' becomes no other", "as becomes"),
        ("simulation", shifted(becomes="ill"), "a shift of kind 'noise' calls nothing otherwise", "`becomes` out"),
        ("simulation", {**shifted(), "held_out": ["site-4"]}, "held_out names 'site-4'", "the nearest is 'site-3'"),
        ("simulation", named([]) | {"held_out": ["b"]}, "simulation.held_out names 'b'", "give one of 'a'"),
        ("simulation", aged(), "nothing says where groups begin", "add edges = [40, 60]"),
        ("simulation", aged(edges=[60, 40]), "partition.edges is [60, 40]", "ascending order"),
        ("simulation", aged(edges=[40, 40]), "partition.edges is [40, 40]", "each once"),
        ("simulation", aged(edges=[91]), "partition.edges.0 is 91", "at most 90"),
        ("simulation", aged(by="sex", edges=[40]), "partition.by is 'sex', which has no edges", "leave `edges` out"),
        ("simulation", named([{**NOISE, "sites": ["a"]}]), "unknown key 'simulation.site.0.shift.0.sites'", "severity"),
        ("simulation", named([]) | {"shift": [{**NOISE, "sites": ["b"]}]}, "names 'b'", "give one of 'a'"),
        ("simulation.partition", {"kind": "skew"}, "simulation.partition.kind is 'skew'", "one of 'iid', 'dirichlet'"),
    ],
)
def test_other_wrong_values_are_refused_with_key_value_and_fix(key: str, value: Any, problem: str, fix: str) -> None:
    with pytest.raises(StudyError) as caught:
        resolve(study_with(key, value)[0])
    assert problem in caught.value.problem
    assert fix in caught.value.fix


def unknown_keys() -> Iterator[Any]:
    """(a key with one letter missing, the key it should name), for every key of every table."""
    for table, model in TABLES:
        for name in model.model_fields:
            if len(name) > 4 and name not in ("method", "alpha"):  # those decide which table it is
                yield pytest.param(f"{table}.{name[:2]}{name[3:]}", name, id=f"{table}.{name}")


@pytest.mark.parametrize(("key", "nearest"), list(unknown_keys()))
def test_an_unknown_key_names_the_nearest_known_one(key: str, nearest: str) -> None:
    data, named = study_with(key, 1)
    with pytest.raises(StudyError) as caught:
        resolve(data)
    assert f"unknown key {named!r}" in caught.value.problem
    assert f"the nearest known key is {nearest!r}" in caught.value.fix


@pytest.mark.parametrize(
    ("key", "nearest"), [("stage", "stages"), ("imges.size", "images"), ("simulations", "simulation")]
)
def test_an_unknown_table_names_the_nearest_known_one(key: str, nearest: str) -> None:
    with pytest.raises(StudyError, match=f"the nearest known key is '{nearest}'"):
        resolve(study_with(key, 1)[0])


def test_an_unknown_key_that_is_like_none_lists_them_all() -> None:
    with pytest.raises(StudyError, match=r"unknown key 'study\.foo'\n  fix: the known keys are 'name', 'seed'"):
        resolve({**SMALL, "study": {"name": "x", "foo": 1}})


@pytest.mark.parametrize("kind", ["fintune", "pretraining", 3])
def test_an_unknown_kind_of_stage_names_both(kind: object) -> None:
    with pytest.raises(StudyError, match=f"stages.0.kind is {kind!r}\n  fix: give 'pretrain' or 'finetune'"):
        resolve({**SMALL, "stages": [STAGE | {"kind": kind}]})


def test_all_problems_are_named_at_once_up_to_a_few() -> None:
    data = {"study": {"name": "x", "seed": -1}, "stages": [STAGE | {"rounds": 0}]}
    with pytest.raises(
        StudyError, match=r"study\.seed is -1; stages\.0\.rounds is 0\n  fix: study\.seed: give at least 0;"
    ):
        resolve(data)
    with pytest.raises(StudyError, match="and 992 more"):
        resolve(SMALL | {f"key{number}": 1 for number in range(1000)})


def test_what_an_error_repeats_is_short_and_without_control_characters() -> None:
    with pytest.raises(StudyError) as caught:
        resolve(SMALL | {"\x1b[31m": 1, "x" * 10_000: 1, "study": {"name": "\x07" * 10_000}})
    assert len(str(caught.value)) < 1_000
    assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("method", "encoder", "patch", "size", "problem"),
    [
        ("mae", "resnet18", 8, 96, "stages.0 trains 'mae'"),
        ("simclr", "vit_tiny", 7, 96, "encoder.patch is 7 and does not divide images.size 96"),
        ("mae", "vit_tiny", 8, 96, ""),
        ("simclr", "resnet18", 7, 96, ""),
    ],
)
def test_method_encoder_and_size_must_fit(method: str, encoder: str, patch: int, size: int, problem: str) -> None:
    data = SMALL | {
        "stages": [STAGE | {"method": method}],
        "encoder": {"name": encoder, "patch": patch},
        "images": {"size": size},
    }
    if not problem:
        assert resolve(data).encoder.patch == patch
        return
    with pytest.raises(StudyError) as caught:
        resolve(data)
    assert problem in caught.value.problem


def test_fine_tuning_needs_the_names_of_its_classes() -> None:
    stages = [STAGE, {"kind": "finetune", "rounds": 3}]
    with pytest.raises(StudyError, match=r"stages\.1 fine-tunes and evaluation\.labels names 0 classes"):
        resolve(SMALL | {"stages": stages})
    named = resolve(SMALL | {"stages": stages, "evaluation": {"labels": {"a": ["A"], "b": ["B"], "ignore": ["?"]}}})
    assert named.evaluation.classes == ["a", "b"]
    with pytest.raises(StudyError, match="patience is 2 and can never end a stage of 3 rounds"):
        resolve(
            SMALL
            | {
                "stages": [{"kind": "finetune", "rounds": 3, "patience": 2}],
                "evaluation": {"labels": {"a": [], "b": []}},
            }
        )
    turned = resolve(SMALL | {"stages": stages, "evaluation": {"labels": {"b": ["B"], "ignore": ["?"], "a": ["A"]}}})
    assert turned.evaluation.classes == resolve(json.loads(turned.canonical())).evaluation.classes == ["a", "b"]
    assert named.stages[1].method == "supervised"
    assert resolve(json.loads(named.canonical())) == named


def test_defaults_depend_on_method_and_channels_under_the_users_own() -> None:
    grey, colour = resolve(SMALL), resolve(SMALL | {"images": {"channels": 3}})
    assert grey.stages[0].views is not None
    assert colour.stages[0].views is not None
    assert (grey.stages[0].views.rotation, colour.stages[0].views.rotation) == (15.0, 180.0)
    own = resolve(SMALL | {"images": {"channels": 3}, "stages": [STAGE | {"views": {"rotation": 5}}]})
    assert own.stages[0].views == colour.stages[0].views.model_copy(update={"rotation": 5.0})


def test_rounds_are_counted_across_stages() -> None:
    study = resolve(SMALL | {"stages": [STAGE, STAGE | {"rounds": 3}]})
    assert study.rounds == 5
    assert [study.stage_of(round) for round in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(IndexError, match="beyond the study's 5"):
        study.stage_of(5)


def test_the_simulation_is_not_part_of_the_identity_and_everything_else_is() -> None:
    rehearsed = resolve(SMALL | {"simulation": {"sites": 5, "cohort": "images"}})
    assert rehearsed.hash == resolve(SMALL).hash
    assert rehearsed != resolve(SMALL)
    assert resolve(study_with("study.seed", 1)[0]).hash != resolve(SMALL).hash


def test_a_site_has_the_shifts_of_all_sites_then_its_own() -> None:
    blur, dim = ({"kind": kind, "severity": 0.25} for kind in ("sharpness", "response"))
    sites = [{"name": "a", "cohort": "x", "shift": [dim]}, {"name": "b", "cohort": "y"}]
    simulation = resolve(SMALL | {"simulation": {"site": sites, "shift": [NOISE, {**blur, "sites": ["a"]}]}}).simulation
    assert [shift.kind for shift in simulation.shifts_of("a")] == ["noise", "sharpness", "response"]
    assert [shift.kind for shift in simulation.shifts_of("b")] == ["noise"]


def test_a_simulation_with_shifts_and_a_partition_survives_toml() -> None:
    for kind in aged(edges=[40, 60])["partition"], {"kind": "classes", "per_site": 2}:
        simulation = {**shifted(), "sites": 0 if kind["kind"] == "column" else 3, "partition": kind}
        study = resolve(SMALL | {"simulation": simulation})
        assert parse_study(study.to_toml(), "again") == study


def test_writing_a_default_out_or_a_whole_number_for_a_fraction_changes_nothing() -> None:
    written = resolve(SMALL | {"images": {"size": 96}, "aggregation": {"round_deadline_s": 3600}})
    assert written.hash == resolve(SMALL).hash


STUDIES = st.fixed_dictionaries(
    {
        "study": st.fixed_dictionaries({"name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)}),
        "stages": st.lists(
            st.fixed_dictionaries(
                {"kind": st.just("pretrain"), "method": st.just("simclr"), "rounds": st.integers(1, 10_000)},
                optional={
                    "temperature": st.floats(1e-3, 10),
                    "learning_rate": st.floats(1e-6, 100) | st.integers(1, 100),
                    "views": st.fixed_dictionaries({}, optional={"crop": st.just([0.2, 0.9]), "flip": st.booleans()}),
                },
            ),
            min_size=1,
            max_size=3,
        ),
    },
    optional={
        "images": st.fixed_dictionaries(
            {"window": st.sampled_from(["percentile", "voi", [40.0, 400.0], [-600, 1500]])}
        ),
        "evaluation": st.fixed_dictionaries(
            {"labels": st.dictionaries(st.text(), st.lists(st.text(), max_size=3), max_size=1)}
        ),
        "simulation": st.fixed_dictionaries({"sites": st.integers(1, 9), "cohort": st.text(min_size=1)}),
    },
)


@given(STUDIES)
def test_a_study_survives_toml_and_its_canonical_form(data: dict[str, Any]) -> None:
    study = resolve(data)
    again = parse_study(study.to_toml(), "again")
    sent = parse_canonical(study.canonical(), "sent")
    assert again == study
    assert study.hash == again.hash == sent.hash
    assert sent.canonical() == study.canonical()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from([*Study.model_fields, *(name for _, model in TABLES for name in model.model_fields)])


@given(PLAIN | st.dictionaries(KEYS, PLAIN | st.dictionaries(KEYS, PLAIN) | st.lists(st.dictionaries(KEYS, PLAIN))))
def test_no_data_does_worse_than_a_study_error(data: Any) -> None:
    with pytest.raises(StudyError):
        resolve(data)


@given(st.text() | st.text(alphabet="[]{}=.,#'\"\n abn0123456789-:_\\"))
def test_no_text_does_worse_than_a_study_error(text: str) -> None:
    with pytest.raises(StudyError):
        parse_study(text, "hostile")
    with pytest.raises(StudyError):
        parse_canonical(text, "hostile")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a = " + "[" * 3_900, id="nested lists"),
        pytest.param("a = " + "{b = " * 700 + "1" + "}" * 700, id="nested tables"),
        pytest.param("a." * 1_900 + "b = 1", id="dotted key"),
        pytest.param("[" + "a." * 1_900 + "b]", id="dotted table"),
        pytest.param("a." * 100_000 + "b = 1", id="endless dotted key"),
        pytest.param("\n".join(f"{'a.' * 1_990}b{n} = 1" for n in range(63)), id="many dotted keys"),
        pytest.param("#" * MAX_CHARACTERS + "\n", id="too long"),
        pytest.param("a = " + "9" * 3_900, id="a huge number"),
        pytest.param("a = " + "\n".join(["9" * 3_900]), id="a number with thousands of digits"),
        pytest.param("a = 1e999999", id="overflow"),
        pytest.param("\n".join(f"[[a{n}]]" for n in range(20_000)), id="many tables"),
    ],
)
def test_hostile_toml_is_refused_in_time(text: str) -> None:
    with pytest.raises(StudyError) as caught:
        parse_study(text, "hostile.toml")
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 40_000, "NaN", '{"study": NaN}', '"\\ud800"', " " * 256_001])
def test_a_hostile_canonical_form_is_refused(text: str) -> None:
    with pytest.raises(StudyError):
        parse_canonical(text, "hostile")


@pytest.mark.parametrize("date", ["2026-11-20", "2026-11-20T08:00:00Z", "08:00:00"])
def test_dates_are_refused(date: str) -> None:
    with pytest.raises(StudyError, match=r"holds the date or time .*\n  fix: .*in quotes"):
        parse_study(TOML.replace('"small"', date), "study.toml")


def test_files_are_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(TOML, encoding=encoding)
        assert load_study(path) == resolve(SMALL)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"[study", b"x" * 5_000_000])
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StudyError, match=r"study\.toml"):
        load_study(path)


def test_a_folder_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot read the study file"):
        load_study(tmp_path)


def test_the_canonical_form_is_sorted_and_compact() -> None:
    text = resolve(SMALL).canonical()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert "simulation" not in json.loads(text)


MLVICX = {"kind": "pretrain", "method": "mlvicx", "rounds": 1}


def test_mlvicx_brings_its_bottlenecks_into_the_encoder_unless_told_not_to() -> None:
    assert not resolve(SMALL).encoder.context
    assert resolve({**SMALL, "stages": [*SMALL["stages"], MLVICX]}).encoder.context
    assert not resolve({**SMALL, "stages": [MLVICX], "encoder": {"context": False}}).encoder.context


@pytest.mark.parametrize("method", ["mae", "sssd"])
def test_bottlenecks_and_skipped_tokens_do_not_go_together(method: str) -> None:
    skipping = {"kind": "pretrain", "method": method, "rounds": 1}
    with pytest.raises(StudyError, match="skips tokens"):
        resolve({**SMALL, "encoder": {"name": "vit_tiny"}, "stages": [MLVICX, skipping]})


def test_defaults_stay_as_they_were_approved() -> None:
    # A changed default is another study: sites must approve it anew. Change this hash only when that is meant.
    assert resolve(SMALL).hash == "18cc24b604f2a9fa7ded79d5b3c7b6e34b3443155e851547cfddf5961c74c5d6"


def test_naming_the_default_rule_changes_nothing_and_another_is_another_study() -> None:
    assert resolve(SMALL | {"aggregation": {"rule": "fedavg"}}).hash == resolve(SMALL).hash
    studies = {rule: resolve(SMALL | {"aggregation": {"rule": rule}}) for rule in RULES}
    assert len({study.hash for study in studies.values()}) == len(RULES)
    for rule, study in studies.items():
        assert parse_canonical(study.canonical(), rule) == parse_study(study.to_toml(), rule) == study
        assert json.loads(study.canonical())["aggregation"].keys() == RULES[rule].model_fields.keys()


@pytest.mark.parametrize("rule", RULES)
def test_patients_are_promised_privacy_under_any_rule(rule: str) -> None:
    assert resolve({**PRIVATE, "aggregation": {"rule": rule}}).aggregation.weighting == "equal"


@pytest.mark.parametrize(
    ("rule", "keys", "least"),
    [
        ("fedavg", {}, 1),
        ("ldawa", {}, 1),
        ("median", {}, 3),
        ("krum", {"f": 4}, 11),
        *(("trimmed_mean", {"fraction": 1 / n}, n) for n in (3, 7, 10, 100)),
        ("trimmed_mean", {"fraction": 0.45}, 3),
    ],
)
def test_a_rule_says_how_many_updates_it_needs(rule: str, keys: dict[str, float], least: int) -> None:
    made = resolve(SMALL | {"aggregation": {"rule": rule, **keys}}).aggregation
    assert made.least == least
    if isinstance(made, TrimmedMeanRule):
        assert (made.cut(least - 1), made.cut(least)) == (0, 1)
        assert all(n - 2 * made.cut(n) >= 1 for n in range(1, 500))


def test_a_number_of_thousands_of_digits_is_a_bad_study() -> None:
    with pytest.raises(StudyError, match="holds a value that no study has"):
        parse_study('[study]\nname = "x"\nseed = 0x' + "f" * 3900, "here")


PRIVATE: dict[str, Any] = {
    "study": {"name": "private"},
    "encoder": {"name": "vit_tiny"},
    "stages": [{"kind": "pretrain", "method": "mae", "rounds": 2}, {"kind": "finetune", "rounds": 3}],
    "evaluation": {"labels": {"a": ["a"], "b": ["b"]}},
    "privacy": {"mode": "patient"},
}


def test_a_promise_of_privacy_brings_the_defaults_that_it_needs() -> None:
    study = resolve(PRIVATE)
    assert study.aggregation.weighting == "equal"
    assert study.evaluation.every == 0
    assert study.compute.precision == "fp32"
    assert getattr(study.stages[1], "class_weights") == "none"  # noqa: B009 (the type knows no stage)
    of_sites = resolve({**PRIVATE, "privacy": {"mode": "site"}})
    assert of_sites.aggregation.weighting == "equal"
    assert of_sites.evaluation.every == 0
    assert of_sites.compute.precision == "bf16"
    assert resolve(study.plain()).hash == study.hash


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"stages": [{"kind": "pretrain", "method": "simclr", "rounds": 1}]}, "loss is not separable"),
        ({"stages": [{"kind": "pretrain", "method": "micle", "rounds": 1}]}, "loss is not separable"),
        ({"stages": [{"kind": "pretrain", "method": "mlvicx", "rounds": 1}]}, "loss is not separable"),
        ({"aggregation": {"weighting": "patients"}}, "aggregation.weighting is 'patients'"),
        ({"compute": {"precision": "bf16"}}, "compute.precision is 'bf16'"),
        ({"evaluation": {**PRIVATE["evaluation"], "every": 1}}, "evaluation.every is 1"),
        ({"stages": [{"kind": "finetune", "rounds": 3, "class_weights": "balanced"}]}, "stages.0.class_weights"),
        ({"stages": [{"kind": "finetune", "rounds": 9, "patience": 2}]}, "a stage's patience is above 0"),
        ({"stages": [{"kind": "finetune", "rounds": 9, "patience": 2}], "privacy": {"mode": "site"}}, "patience"),
        *(
            ({"privacy": {"mode": "site"}, "aggregation": {"rule": rule}}, f"aggregation.rule is '{rule}'")
            for rule in RULES
            if rule != "fedavg"
        ),
        ({"privacy": {"mode": "patient", "noise": 0.0}}, "privacy.noise is 0.0"),
        ({"privacy": {"mode": "patient", "noise": -1.0}}, "privacy.noise is -1.0"),
        ({"privacy": {"mode": "patient", "clip": 0.0}}, "privacy.clip is 0.0"),
        ({"privacy": {"mode": "patient", "delta": 1.0}}, "privacy.delta is 1.0"),
        ({"privacy": {"mode": "none", "noise": 1.0}}, "privacy.noise"),
        ({"privacy": {"noise": 1.0}}, "privacy.mode is missing"),
    ],
)
def test_what_privacy_cannot_cover_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError) as caught:
        resolve({**PRIVATE, **changed})
    assert said in caught.value.problem
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"encoder": {"name": "bit_resnet50"}}, "'bit_resnet50' has no batch normalisation"),
        ({"encoder": {"name": "vit_tiny"}}, "'vit_tiny' has no batch normalisation"),
        ({"aggregation": {"rule": "fedavgm"}}, "aggregation.rule 'fedavgm' may go beyond all updates"),
        ({"aggregation": {"rule": "fedadam"}}, "aggregation.rule 'fedadam' may go beyond all updates"),
        ({"privacy": {"mode": "patient"}}, "a patient's gradient depends on the others in the batch"),
        ({"privacy": {"mode": "site"}}, "could take a running variance below zero"),
    ],
)
def test_batch_normalisation_is_refused_where_its_statistics_would_not_hold(
    changed: dict[str, dict[str, Any]], said: str
) -> None:
    plain = {**PRIVATE, "stages": [PRIVATE["stages"][1]], "privacy": {"mode": "none"}, **changed}
    encoder = {"name": "resnet18", **changed.get("encoder", {})}
    with pytest.raises(StudyError) as caught:
        resolve({**plain, "encoder": {**encoder, "norm": "batch"}})
    assert said in caught.value.problem
    assert "norm" in caught.value.fix
    assert resolve({**plain, "encoder": encoder}).encoder.norm == "group"


def test_the_separable_methods_are_those_that_say_so() -> None:
    stages = {m: {"kind": "finetune" if m == "supervised" else "pretrain", "method": m, "rounds": 1} for m in METHODS}
    studies = {m: resolve({**PRIVATE, "stages": [stage], "privacy": {"mode": "none"}}) for m, stage in stages.items()}
    assert {m for m, s in studies.items() if make_method(s.stages[0], 2).separable} == SEPARABLE_METHODS


def test_maps_of_one_pixel_are_refused_in_bf16() -> None:
    """There torch's gradients are not the same twice, so that no run could be repeated."""
    stage = {"kind": "pretrain", "method": "simclr", "rounds": 1}
    plain = {"study": {"name": "small"}, "images": {"size": 16}, "stages": [stage]}
    with pytest.raises(StudyError, match="bf16 gradients of a ResNet are not the same twice"):
        resolve(plain)
    assert resolve({**plain, "compute": {"precision": "fp32"}}).images.size == 16
    assert resolve({**plain, "images": {"size": 24}}).compute.precision == "bf16"


def test_what_a_newcomer_tries_is_pointed_the_right_way() -> None:
    stage = '[[stages]]\nkind = "pretrain"\nmethod = "simclr"\nrounds = 1\n'
    head = '[study]\nname = "s"\n' + stage
    with pytest.raises(
        StudyError, match=r"has a \[grid\]: it is many studies\n  fix: polyclinic sweep grid.toml --out DIR"
    ):
        parse_study(head + "[grid]\nseed = [0, 1]\n", "grid.toml")
    with pytest.raises(StudyError, match=r'such as { kind = "dirichlet", alpha = 0.5 }'):
        parse_study(head + '[simulation]\nsites = 2\ncohort = "c"\npartition = "dirichlet"\n', "study.toml")
