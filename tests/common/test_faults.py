"""`[simulation.clock]` and `[[simulation.fault]]`: what is refused and why, and whose faults are whose."""

from typing import Any

import pytest

from polyclinic.errors import StudyError
from polyclinic.simulation import Simulation
from polyclinic.study import parse_study, resolve

CLOCK = {"images_per_s": 50.0}
FLIP = {"kind": "sign_flip"}


def simulation(*faults: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A study of three sites."""
    return {
        "study": {"name": "small"},
        "stages": [{"kind": "pretrain", "method": "simclr", "rounds": 2}],
        "simulation": {"sites": 3, "cohort": "x", "fault": list(faults), **more},
    }


@pytest.mark.parametrize(
    ("data", "problem", "fix"),
    [
        (simulation({"kind": "drop"}), "simulation.fault.0.kind is 'drop'", "one of 'dropout', 'lateness', 'slow'"),
        (simulation({"kind": "dropout"}), "fault.0 is of kind 'dropout', which needs virtual time", "an images_per_s"),
        (simulation(FLIP, {"kind": "slow", "factor": 2.0}), "fault.1 is of kind 'slow'", "an images_per_s"),
        (simulation({"kind": "lateness"}, clock=CLOCK), "simulation.fault.0.seconds is missing", "add it"),
        (simulation({"kind": "lateness", "seconds": 0}, clock=CLOCK), "fault.0.seconds is 0", "more than 0"),
        (simulation({"kind": "slow", "factor": 0.5}, clock=CLOCK), "fault.0.factor is 0.5", "at least 1"),
        (simulation({"kind": "scaling", "factor": 0}), "fault.0.factor is 0", "more than 0"),
        (simulation({"kind": "noise"}), "simulation.fault.0.factor is missing", "add it"),
        (simulation({"kind": "collusion", "factor": -1}), "fault.0.factor is -1", "at least 0"),
        (simulation({**FLIP, "factor": 2.0}), "unknown key 'simulation.fault.0.factor'", "known key"),
        (simulation({**FLIP, "probability": 1.5}), "fault.0.probability is 1.5", "at most 1"),
        (simulation({**FLIP, "rounds": [3, 2]}), "rounds is [3, 2]", "first <= last"),
        (simulation({**FLIP, "rounds": [0, 2]}), "fault.0.rounds.0 is 0", "at least 1"),
        (simulation({**FLIP, "sites": ["site-4"]}), "simulation.fault.0.sites names 'site-4'", "nearest is 'site-3'"),
        (simulation(clock={"images_per_s": -1}), "clock.images_per_s is -1", "at least 0"),
        (simulation(clock={**CLOCK, "images_per_s": 1e-9}), "clock.images_per_s is 1e-09", "give 0.001 or more"),
        (simulation(clock={**CLOCK, "bytes_per_s": 0}), "clock.bytes_per_s is 0", "at least 1"),
        (simulation(clock={**CLOCK, "start_hour": 24}), "clock.start_hour is 24", "less than 24"),
        (simulation(clock={**CLOCK, "nights": [20, 25]}), "clock.nights.1 is 25", "at most 24"),
        (simulation(clock={**CLOCK, "nights": [20, 20]}), "clock.nights is [20.0, 20.0]", "two different hours"),
        (simulation(clock={**CLOCK, "nights": [24, 6]}), "clock.nights is [24.0, 6.0]", "two different hours"),
        (simulation(clock={"nights": [20, 6]}), "clock does not say how fast sites train", "add images_per_s"),
    ],
)
def test_wrong_values_are_refused_with_key_value_and_fix(data: dict[str, Any], problem: str, fix: str) -> None:
    with pytest.raises(StudyError) as caught:
        resolve(data)
    assert problem in caught.value.problem
    assert fix in caught.value.fix


def test_a_site_has_its_own_faults_and_those_of_all_by_their_place() -> None:
    study = resolve(simulation({**FLIP, "sites": ["site-2"]}, {"kind": "dropout"}, clock=CLOCK))
    assert {n: list(study.simulation.faults_of(f"site-{n}")) for n in (1, 2)} == {1: [1], 2: [0, 1]}
    assert study.simulation.unreliable
    assert not Simulation().unreliable


def test_they_survive_toml_and_are_no_part_of_the_identity() -> None:
    faults = [{**FLIP, "rounds": [2, 5], "probability": 0.5}, {"kind": "lateness", "seconds": 60}]
    study = resolve(simulation(*faults, clock={**CLOCK, "nights": [20, 6]}))
    assert parse_study(study.to_toml(), "again") == study
    assert study.hash == resolve(simulation()).hash
