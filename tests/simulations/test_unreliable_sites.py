"""`polyclinic simulate` and its preview, where sites are unreliable."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from polyclinic import cli
from polyclinic.encoders import ENCODERS
from polyclinic.errors import Refused
from polyclinic.report.words import of_fault
from polyclinic.study import Study
from polyclinic_client.site import Site
from polyclinic_simulations.compare import train_one
from polyclinic_simulations.simulate import simulate

from ..tiny import SIMCLR, TinyEncoder, events, in_memory, same_bits, tiny_study, write_cohort

CLOCK = {"images_per_s": 0.01, "bytes_per_s": 1e9, "nights": [20, 6]}
"""An image in 100 seconds; from midnight."""


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))


def study_with(clock: Mapping[str, Any], faults: list[dict[str, Any]]) -> Study:
    """Three hospitals of one cohort; one round of SimCLR, measured after it only."""
    return tiny_study(
        stages=[{**SIMCLR, "rounds": 1}],
        evaluation={"rows": [], "every": 0},
        aggregation={"round_deadline_s": 86_400.0},
        simulation={"sites": 3, "cohort": "all", "clock": clock, "fault": faults},
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_cohort(tmp_path / "data" / "all", 24)
    return tmp_path / "data"


def test_a_run_of_unreliable_sites_says_how_long_it_would_have_taken(data: Path, tmp_path: Path) -> None:
    study, run = study_with(CLOCK, [{"kind": "dropout", "sites": ["site-1"]}]), tmp_path / "run"
    summary = simulate(study, run, data, tmp_path / "state")
    assert [line["accepted"] for line in events(run, "round_closed")] == [2]
    assert summary["virtual_s"] == 86_400.0  # one is waited for until the deadline
    assert summary == json.loads((run / "summary.json").read_text())
    assert "<dt>Virtual time</dt><dd>24 h 0 min</dd>" in (run / "report.html").read_text()


def test_what_a_site_is_worth_alone_does_not_depend_on_its_faults(tmp_path: Path) -> None:
    """A run of which no update ever arrives would fail."""
    site = Site("site-1", in_memory(10), tmp_path / "site-1")
    study = study_with(CLOCK, [{"kind": "dropout"}, {"kind": "corrupt"}])
    made = train_one(study, site, tmp_path / "faults")
    site = Site("site-1", in_memory(10), tmp_path / "again")
    assert same_bits(made, train_one(study_with({}, []), site, tmp_path / "none"))


@pytest.mark.parametrize(("clock", "faults"), [(CLOCK, []), ({}, [{"kind": "corrupt"}])])
def test_the_ray_engine_says_that_it_plays_none(clock: Any, faults: Any, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="the ray engine plays neither") as caught:
        simulate(study_with(clock, faults), tmp_path / "run", tmp_path, tmp_path / "state", engine="ray")
    assert "local engine" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_the_preview_lists_the_faults_of_a_site_beside_its_shifts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    faults = [
        {"kind": "dropout", "probability": 0.25, "sites": ["site-3"]},
        {"kind": "scaling", "factor": 10.0, "sites": ["site-2", "site-3"]},
    ]
    Path("study.toml").write_text(study_with(CLOCK, faults).to_toml())
    assert cli.run(["simulate", "study.toml", "--data", "data", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sites"]
    assert [[fault["kind"] for fault in found[name]["fault"]] for name in ("site-1", "site-2", "site-3")] == [
        [],
        ["scaling"],
        ["dropout", "scaling"],
    ]
    assert cli.run(["simulate", "study.toml", "--data", "data", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("shift" in line and "fault" in line for line in lines)
    assert any("site-2" in line and "scaling 10" in line for line in lines)
    assert "time is simulated: 0.01 images and 1000 MB a second, from 20 to 6 h, begun at 0 h" in lines
    Path("study.toml").write_text(study_with({}, []).to_toml())
    assert cli.run(["simulate", "study.toml", "--data", "data", "--dry-run"]) == 0
    plain = capsys.readouterr().out
    assert "fault" not in plain
    assert "time" not in plain


def test_a_fault_in_a_few_words() -> None:
    always = {"probability": 1.0, "rounds": (1, 1_000_000)}
    assert of_fault({"kind": "corrupt", **always}) == "corrupt"
    lateness = {"kind": "lateness", "seconds": 600.0, "probability": 0.25, "rounds": (3, 5)}
    assert of_fault(lateness) == "lateness 600 s (0.25 of rounds, rounds 3 to 5)"
