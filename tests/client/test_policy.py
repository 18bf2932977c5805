"""The site's policy: every limit lets through what is within it, and says why it refuses the rest."""

import tomllib
from datetime import time
from typing import Any

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from pydantic import ValidationError

from polyclinic import wire
from polyclinic.errors import CohortError, Refused
from polyclinic.privacy.ledger import Cap
from polyclinic.study import resolve
from polyclinic_client.policy import TEMPLATE, Policy

from ..tiny import SIMCLR, tiny_study

PRIVATE: dict[str, Any] = {
    "study": {"name": "private"},
    "encoder": {"name": "vit_tiny"},
    "stages": [{"kind": "pretrain", "method": "mae", "rounds": 2}],
    "privacy": {"mode": "patient", "epsilon": 8.0},
}


def test_the_template_is_the_defaults() -> None:
    written = tomllib.loads(TEMPLATE)["policy"]
    assert Policy.model_validate(written) == Policy()
    assert set(written) == set(Policy.model_fields)


def test_by_default_a_plain_study_passes_and_every_figure_may_leave() -> None:
    Policy().check(tiny_study())
    Policy().check_update({"encoder.weight": 4_000_000})
    Policy().check_hours()
    assert Policy().figures() == sorted(wire.METRICS)


@pytest.mark.parametrize(
    ("limits", "changes", "says"),
    [
        ({"methods": ["mae"]}, {}, "does not allow simclr"),
        ({"max_rounds": 1}, {}, "allows 1 rounds; the study has 2"),
        ({"threads": 1}, {"compute": {"threads": 2}}, "allows 1 threads; the study computes with 2"),
        ({"epsilon": 8.0}, {}, "differential privacy of patients .epsilon 8.; the study has none"),
    ],
)
def test_a_study_beyond_a_limit_is_refused(limits: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    Policy().check(tiny_study(**changes))
    with pytest.raises(Refused, match=says):
        Policy(**limits).check(tiny_study(**changes))


def test_a_site_with_a_limit_takes_studies_that_protect_patients_and_keeps_to_its_own_limit() -> None:
    """The study may allow itself more: the stricter limit wins, when a round is reserved."""
    private = resolve(PRIVATE)
    Policy(epsilon=1.0).check(private)
    assert Policy(epsilon=1.0, delta=1e-7).caps == (Cap(1.0, 1e-7),)
    assert Policy().caps == ()
    with pytest.raises(Refused, match="differential privacy of patients"):
        Policy(epsilon=1.0).check(resolve({**PRIVATE, "privacy": {"mode": "site"}}))


@pytest.mark.parametrize(
    ("clock", "open"), [("18:59", False), ("19:00", True), ("23:59", True), ("00:00", True), ("06:59", True),
                        ("07:00", False), ("12:00", False), ("12:30", True), ("13:00", False)]
)  # fmt: skip
def test_hours_may_pass_midnight_and_end_before_their_end(clock: str, open: bool) -> None:
    policy = Policy(hours=["19:00-07:00", "12:30-13:00"])
    if open:
        policy.check_hours(time.fromisoformat(clock))
    else:
        with pytest.raises(Refused) as found:
            policy.check_hours(time.fromisoformat(clock))
        assert found.value.problem == (
            f"the site works 19:00-07:00 and 12:30-13:00 by its own clock, where it is {clock}"
        )
        assert wire.plain(found.value.problem) == found.value.problem  # nothing of it is lost on its way


def test_the_cohort_must_be_large_enough() -> None:
    Policy(min_patients=5).check_cohort(5)
    with pytest.raises(CohortError, match="too few patients"):
        Policy(min_patients=5).check_cohort(4)


def test_what_leaves_is_held_to_names_and_size() -> None:
    policy = Policy(tensors=["encoder.*", "head.bias"], max_megabytes=2.0)
    policy.check_update({"encoder.conv.weight": 1_999_000, "head.bias": 1000})
    with pytest.raises(Refused, match=r"keeps 1 of the update's 2 tensors here, head.weight among them"):
        policy.check_update({"encoder.conv.weight": 4, "head.weight": 4})
    with pytest.raises(Refused, match=r"allows updates of 2 MB; one of the study has 2.1 MB"):
        policy.check_update({"encoder.conv.weight": 2_100_000})


def test_withheld_figures_are_gone_from_the_message_and_nothing_else_is() -> None:
    content = RecordDict(
        {
            "reply": ConfigRecord({"study": "x"}),
            "train": MetricRecord({"loss": 1.0, "seconds": 2.0}),
            "evaluation": MetricRecord({"probe_auc": 0.5, "knn_auc": 0.5}),
        }
    )
    Policy(metrics=["loss", "probe_*"]).withhold(content)
    assert dict(content["train"]) == {"loss": 1.0}
    assert dict(content["evaluation"]) == {"probe_auc": 0.5}
    assert dict(content["reply"]) == {"study": "x"}


def test_orders_are_a_small_multiple_of_the_rounds_unless_said_otherwise() -> None:
    study = tiny_study(stages=[{**SIMCLR, "rounds": 10}])
    assert Policy().orders(study) == 50
    assert Policy(max_orders=7).orders(study) == 7


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"hours": ["7-19"]}, "two times of the day"),
        ({"hours": ["19:00-24:00"]}, "two times of the day"),
        ({"hours": ["07:00-07:00"]}, "two times of the day"),
        ({"metrics": ["loss", "accuracy"]}, "no figure is called 'accuracy'"),
        ({"metrics": ["probe_auc"]}, "without it no update is taken"),
        ({"max_megabytes": 0.0}, "greater than 0"),
        ({"min_patients": 1}, "greater than or equal to 2"),
        ({"gpu": 1}, "valid boolean"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Policy(**wrong)


def test_its_words_name_every_limit() -> None:
    policy = Policy(
        methods=["mae"], max_rounds=11, min_patients=22, max_orders=33, hours=["19:00-07:00"], max_megabytes=44.5,
        tensors=["encoder.*"], metrics=["loss"], epsilon=5.5, delta=1e-7, threads=6, memory_gb=7.5, gpu=False,
    )  # fmt: skip
    text = "\n".join(policy.words())
    for limit in ("mae", "11", "22", "33", "19:00-07:00", "44.5", "encoder.*", "loss", "5.5", "6 t", "7.5", "no GPU"):
        assert limit in text
