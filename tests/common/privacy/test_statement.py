"""The paragraph says each of its parts, exactly and never too little; the list of releases is complete."""

import doctest
from typing import Any

import pytest

from polyclinic.privacy import statement as module
from polyclinic.privacy.statement import NONE, released, rounded_up, statement
from polyclinic.study import Study, resolve
from polyclinic.wire import EVALUATION, TRAINING


def study(**privacy: Any) -> Study:
    stage = {"kind": "pretrain", "method": "mae", "rounds": 2}
    given = {"privacy": privacy} if privacy else {}
    return resolve({"study": {"name": "s"}, "encoder": {"name": "vit_tiny"}, "stages": [stage], **given})


PATIENT = {"mode": "patient", "noise": 1.5, "clip": 0.5, "delta": 1e-6}
SITE = {**PATIENT, "mode": "site"}
SPENT = {"north": 2.30511, "east": 1.0}


@pytest.mark.parametrize(
    "part",
    [
        "Unit: a patient of a site with all images there",
        "relation: adding or removing one",
        "(epsilon, delta)-differentially private with epsilon = 1.000 at east, 2.306 at north, at delta = 1e-06",
        "Mechanism: DP-SGD; a step reads one random image of each patient that is drawn",
        "gradient to a norm of 0.5 over all trained weights, adds Gaussian noise of standard deviation 0.75 (noise 1.5",
        "Sampling: Poisson, each patient by itself in every step with the rate expected batch / patients",
        "Composition: Rényi differential privacy over all steps, rounds and stages of this study",
        "over all its studies each site's own ledger composes",
        "Not covered: a patient who is seen at two sites",
        "that a site takes part, how long it takes, and how many patients it has, which is taken as public",
        "the choice that a coordinator makes among studies and their models",
    ],
)
def test_the_promise_to_patients_has_all_its_parts(part: str) -> None:
    assert part in statement(study(**PATIENT), SPENT)


@pytest.mark.parametrize(
    "part",
    [
        "Unit: a site with all its patients",
        "relation: adding or removing what it sends",
        "with epsilon = 2.306 at every site, at delta = 1e-06",
        "each update is clipped as a whole to a norm of 0.5, Gaussian noise of standard deviation 0.75 (noise 1.5",
        "divided by the number of enrolled sites",
        "Sampling: none; every site counts as being in every round",
        "Composition: Rényi differential privacy over all rounds of this study",
        "the coordinator is trusted, since it sees updates bare",
        "Not covered: what the coordinator itself sees; a patient who is seen at two sites",
        "the choice that a coordinator makes among studies and their models",
    ],
)
def test_the_promise_to_sites_has_all_its_parts(part: str) -> None:
    assert part in statement(study(**SITE), dict.fromkeys(SPENT, 2.30511))


def test_both_are_one_paragraph() -> None:
    for promise in (PATIENT, SITE):
        text = statement(study(**promise), SPENT)
        assert "\n" not in text
        assert "  " not in text
        assert text.endswith(".")


def test_without_privacy_one_honest_sentence() -> None:
    assert statement(study(), {}) == NONE
    assert NONE.startswith("No differential privacy was applied")
    assert released(study()) == []


def test_a_site_that_has_said_nothing_is_promised_nothing() -> None:
    text = statement(study(**PATIENT), {**SPENT, "west": None})
    assert "1.000 at east, 2.306 at north, at delta = 1e-06; nothing is known of west, as each site" in text
    assert "at every site" not in statement(study(**PATIENT), {"east": 1.0, "west": None})
    assert "an epsilon that no site has said yet" in statement(study(**PATIENT), {"west": None})


def test_of_many_sites_the_range_is_told() -> None:
    spent = {f"s{k:02d}": 1 + k / 7 for k in range(50)}
    assert "epsilon from 1.000 to 8.000 at 50 sites, at delta" in statement(study(**PATIENT), spent)
    silent = {**spent, **{f"t{k}": None for k in range(9)}}
    assert "; nothing is known of 9 sites" in statement(study(**PATIENT), silent)


@pytest.mark.parametrize("value", [0.0001, 1.0, 1.2341, 7.9999999, 1 / 3, 99.99])
def test_an_epsilon_is_never_written_below_its_value(value: float) -> None:
    assert value <= float(rounded_up(value)) < value + 0.001 + 1e-12
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("promise", [PATIENT, SITE])
def test_every_release_is_covered_or_said_not_to_be(promise: dict[str, Any]) -> None:
    found = {release.quantity: release.cover for release in released(study(**promise))}
    listed = " ".join(found)
    for quantity in ("weights", "number of patients", "losses", "round takes", "takes part", "normalisation",
                     "early stopping", "initial weights", "version"):  # fmt: skip
        assert quantity in listed, quantity
    assert ("epsilon spent" in listed) == (promise is PATIENT)
    assert found["change of the weights"].startswith("bare" if promise is SITE else "clipped patient by patient")
    assert all(release.cover for release in released(study(**promise)))


def test_every_number_on_the_wire_is_in_the_list() -> None:
    """A new one has to be covered before it may leave."""
    withheld = {"loss", "images", *EVALUATION}
    named = {"patients": "number of patients", "seconds": "how long a round takes", "epsilon": "epsilon spent"}
    assert {*TRAINING, *EVALUATION} == withheld | named.keys()
    quantities = [release.quantity for release in released(study(**PATIENT))]
    assert all(any(quantity.startswith(name) for quantity in quantities) for name in named.values())
