"""`polyclinic privacy plan` says both ways what noise is worth, and refuses what no epsilon holds for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from polyclinic.cli import run
from polyclinic.privacy.accounting import Event, epsilon, noise_for_all

STUDY: dict[str, Any] = {
    "study": {"name": "private"},
    "encoder": {"name": "vit_tiny"},
    "stages": [
        {"kind": "pretrain", "method": "mae", "rounds": 6, "batch_size": 40, "local_epochs": 2},
        {"kind": "finetune", "rounds": 3, "batch_size": 20},
    ],
    "evaluation": {"labels": {"a": ["a"], "b": ["b"]}},
    "privacy": {"mode": "patient", "noise": 1.5, "epsilon": 6.0},
}
MAE, CLASSIFIER = Event(1.5, 40 / 1010, 2 * 26), Event(1.5, 20 / 1010, 51)
WHOLE = [MAE] * 6 + [CLASSIFIER] * 3
Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    """Runs the command on STUDY with other privacy settings: (exit code, what it said, what went wrong)."""

    def command(privacy: dict[str, Any], *options: str) -> tuple[int, str, str]:
        file = tmp_path / "study.toml"
        file.write_text(tomli_w.dumps({**STUDY, "privacy": privacy}))
        code = run(["privacy", "plan", str(file), *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_a_plan_for_scripts_holds_every_number(plan: Plan) -> None:
    code, out, _ = plan(STUDY["privacy"], "--patients", "1010", "--json")
    found = json.loads(out)
    assert code == 0
    assert [(stage["rate"], stage["steps"]) for stage in found["stages"]] == [(40 / 1010, 312), (20 / 1010, 153)]
    assert found["stages"][0]["epsilon"] == epsilon([MAE] * 6, 1e-5)
    assert found["epsilon"] == found["stages"][1]["epsilon"] == epsilon(WHOLE, 1e-5)
    assert found["epsilon_prv"] == epsilon(WHOLE, 1e-5, "prv") < found["epsilon"]
    assert found["noise_needed"] == noise_for_all(6.0, 1e-5, WHOLE) < 1.5
    assert (found["cap"], found["delta"], found["rounds"]) == (6.0, 1e-5, 9)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.97, 1.0, 1.2])
def test_the_rounds_that_fit_are_counted_in_the_order_of_the_study(share: float, plan: Plan) -> None:
    cap = share * epsilon(WHOLE, 1e-5)
    _, out, _ = plan({**STUDY["privacy"], "epsilon": cap}, "--patients", "1010", "--json")
    fit = json.loads(out)["rounds_that_fit"]
    rounds = [*WHOLE, *[CLASSIFIER] * 20]
    assert epsilon(rounds[:fit], 1e-5) <= cap < epsilon(rounds[: fit + 1], 1e-5)
    assert (fit >= 9) == (share >= 1)


def test_a_site_may_plan_at_its_own_delta(plan: Plan) -> None:
    _, out, _ = plan(STUDY["privacy"], "--patients", "1010", "--delta", "1e-7", "--json")
    assert json.loads(out)["epsilon"] == epsilon(WHOLE, 1e-7)


def test_a_plan_for_people_says_whether_the_cap_holds(plan: Plan) -> None:
    code, out, _ = plan(STUDY["privacy"], "--patients", "1010")
    assert code == 0
    assert "The study keeps to its cap of epsilon 6:" in out
    assert f"{epsilon(WHOLE, 1e-5):.3f} (numerical: {epsilon(WHOLE, 1e-5, 'prv'):.3f})" in out
    assert "(it has 9; more count as its last)" in out
    _, out, _ = plan({**STUDY["privacy"], "noise": 0.6}, "--patients", "1010")
    assert "The study passes its cap of epsilon 6:" in out and "(it has 9)" in out
    _, out, _ = plan({**STUDY["privacy"], "epsilon": 0.002}, "--patients", "1010")
    assert "more than a study may ask for" in out and " 0 (it has 9)" in out


def test_protecting_sites_adds_gaussians_and_says_what_few_sites_mean(plan: Plan) -> None:
    privacy = {"mode": "site", "noise": 4.0, "epsilon": 3.0}
    code, out, _ = plan(privacy, "--sites", "5", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["epsilon"] == epsilon([Event(4.0, 1.0, 9)], 1e-5)
    assert [(stage["rate"], stage["steps"]) for stage in found["stages"]] == [(1.0, 6), (1.0, 3)]
    assert "a standard deviation of 0.8 clip" in found["meaning"] and "800 times as long" in found["meaning"]
    assert found["meaning"] in " ".join(plan(privacy, "--sites", "5")[1].split())


@pytest.mark.parametrize(
    ("privacy", "options", "problem", "fix"),
    [
        ({"mode": "none"}, ["--patients", "1010"], "promises no differential privacy", "add [privacy] with mode"),
        (STUDY["privacy"], ["--patients", "39"], "fewer patients than a step", "it has 39: set batch_size"),
        (
            STUDY["privacy"],
            ["--patients", "1010", "--delta", "1e-3"],
            "delta is 0.001, which is 1 / patients or more",
            "with 1010 patients",
        ),
        (STUDY["privacy"], ["--patients", "1010", "--delta", "0"], "delta is 0.0", "give one above 0"),
        (STUDY["privacy"], [], "epsilon depends on the patients", "--patients N"),
        ({"mode": "site"}, ["--patients", "9"], "depends on the sites", "--sites N"),
        (STUDY["privacy"], ["--patients", "0"], "0", "--help"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    privacy: dict[str, Any], options: list[str], problem: str, fix: str, plan: Plan
) -> None:
    code, out, said = plan(privacy, *options)
    assert (code, out) == (2, "")
    first, second = said.split("\n  fix: ")
    assert problem in first and fix in second


def test_help_says_which_patients_count_and_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["privacy", "plan", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("all but the test split", "label_fraction", "plan study.toml --patients 840"):
        assert part in said
