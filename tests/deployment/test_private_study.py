"""A study that promises patients privacy, between real processes: approved, charged, reported, and never twice."""

import json
from pathlib import Path

import pytest

from .consortium import SITES, Consortium
from .processes import until
from .runs import events, finished

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore:GitWildMatchPattern")]

PRIVATE = """
[privacy]
mode = "patient"
noise = 2.0
epsilon = {epsilon}
delta = 1e-3
"""


def private(consortium: Consortium, name: str, epsilon: float) -> Path:
    """The consortium's study without SimCLR, in steps of two patients."""
    study = consortium.study(name, methods=["mae"])
    text = study.read_text().replace("batch_size = 16", "batch_size = 2")
    study.write_text(text + PRIVATE.format(epsilon=epsilon))
    return study


def spent(consortium: Consortium, site: str) -> dict[str, float]:
    """{study: epsilon at the site's delta}."""
    found = json.loads(consortium.command("site", "ledger", "--json", "--home", site))
    return {row["study"]: row["epsilon"] for row in found["studies"]}


def test_a_private_study_is_charged_at_every_site_and_ends_where_it_is_spent(consortium: Consortium) -> None:
    study = private(consortium, "private", 1e3)
    alone = []
    for site in SITES:
        seen = json.loads(consortium.command("site", "approve", study, "--json", "--home", site))
        alone.append(seen["privacy"]["spending"]["epsilon"])
        said = " ".join(consortium.command("site", "approve", study, "--yes", "--home", site).split())
        assert "differential privacy of patients, made here: an epsilon of" in said
        assert "no number of patients and no figure leaves" in said
    run = consortium.launch(study)
    finished(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["epsilon"].keys() == set(SITES)
    assert not [line for line in events(run) if "loss" in line]
    assert "patients" not in (run / "metrics.csv").read_text()
    for site in SITES:
        assert spent(consortium, site)["private"] > 0
        assert "privacy spent: 4 entries" in consortium.command("site", "ledger", "verify", "--home", site)
    tight = private(consortium, "tight", 0.99 * min(alone))
    for site in SITES:
        said = " ".join(consortium.command("site", "approve", tight, "--yes", "--home", site).split())
        assert "only 1 of its 2 rounds are within the limits" in said
    run = consortium.launch(tight)
    until(lambda: events(run, "run_reported"), 280, "the run's end")
    [ended] = events(run, "run_failed")
    assert "may spend no more of their patients' privacy" in ended["problem"]
    assert [line["round"] for line in events(run, "round_closed")] == [1]
    assert {line["site"] for line in events(run, "update_refused")} == set(SITES)
    assert (run / "encoder.safetensors").exists()
