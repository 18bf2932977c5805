"""Studies across real processes: the bits of their simulation, whatever is killed; refusals that cost nobody else."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.cli.build import build_fab_from_disk

from polyclinic.artifacts import load_encoder
from polyclinic.bundle import bundle_folder
from polyclinic.study import load_study
from polyclinic_client.hospital import Hospital
from polyclinic_server.home import Home
from polyclinic_server.supervisor import flower

from ..tiny import METHOD_STAGES
from .conftest import STUDIES
from .consortium import SITES, Consortium, get
from .processes import kill, processes, until
from .runs import each_round_once, events, figures, finished, same_bits

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore:GitWildMatchPattern")]


@pytest.mark.parametrize("name", STUDIES)
def test_a_deployed_study_has_the_bits_of_its_simulation(
    name: str, undisturbed: Callable[[str], tuple[Path, Path]]
) -> None:
    run, rehearsal = undisturbed(name)
    assert same_bits(run, rehearsal)
    assert figures(run) == figures(rehearsal)
    assert each_round_once(run)
    assert {path.name for path in run.iterdir()} >= {"report.html", "MODEL_CARD.md", "summary.json"}
    features = load_encoder(run)(torch.rand(2, 1, 32, 32))
    assert features.isfinite().all() and not torch.equal(features[0], features[1])


def test_every_method_is_deployed() -> None:
    assert {method for *_, methods in STUDIES.values() for method in methods} == METHOD_STAGES.keys()


def test_every_site_has_a_ledger_of_what_left_it(honest: tuple[Path, Path], consortium: Consortium) -> None:
    accepted = {(event["round"], event["site"]): event["norm"] for event in events(honest[0], "update_accepted")}
    study = load_study(honest[0] / "study.toml").hash
    for site in SITES:
        assert "entries, each after the one before" in consortium.command("site", "ledger", "verify", "--home", site)
        entries = list(Hospital(consortium.folder / site).ledger.entries())
        sent = {entry["round"]: entry for entry in entries if "tensors" in entry and entry["study"] == study}
        for round in (1, 2, 3):
            norm = sum(tensor["norm"] ** 2 for tensor in sent[round]["tensors"]) ** 0.5
            assert norm == pytest.approx(accepted[round, site], rel=1e-6)  # what arrived is what was noted
        assert {entry["kind"] for entry in entries} == {"query", "train", "evaluate"}


def test_a_study_runs_only_where_its_very_text_was_approved(consortium: Consortium) -> None:
    """Nobody has asked alpha; beta has approved what the study was before it was edited. They cost gamma nothing."""
    study = consortium.study("partly", rounds=1)
    consortium.approve(study, "beta")
    study.write_text(study.read_text().replace("min_sites = 2", "min_sites = 1"))
    consortium.approve(study, "gamma")
    run = consortium.launch(study)
    finished(run)
    refused = events(run, "update_refused")
    assert {event["site"] for event in refused} == {"alpha", "beta"}
    assert all("is not approved at this site" in event["reason"] for event in refused)
    assert all(event["accepted"] == 1 for event in events(run, "round_closed"))
    assert all("is not approved at this site" in consortium.log(site) for site in ("alpha", "beta"))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run", "/v1/runtime/pull-task-input", "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/..%2fcontrol/start-run",
        "/v1/fleet//../../v1/control/start-run",
        "//v1/control/start-run", "/V1/control/start-run", "/v1/control", "/v1/fleet", "/openapi.json", "/docs", "/",
    ],
)  # fmt: skip
def test_only_the_fleet_is_reached_through_the_gateway(path: str, consortium: Consortium) -> None:
    assert get(consortium, path) == 403


def test_the_gateway_lets_the_fleet_through_and_refuses_a_huge_body(consortium: Consortium) -> None:
    assert get(consortium, "/v1/fleet/activate-node") not in (403, 404, 502)
    assert get(consortium, "/v1/fleet/push-messages", length=10**9) == 413


FOREIGN = """
from pathlib import Path
Path({canary!r}).write_text("ran")
from flwr.clientapp import ClientApp
app = ClientApp()
"""


def test_a_foreign_bundle_runs_nothing_at_a_site(consortium: Consortium, tmp_path: Path) -> None:
    canary, bundle = tmp_path / "canary", tmp_path / "app"
    shutil.copytree(bundle_folder(), bundle)
    (bundle / "foreign.py").write_text(FOREIGN.format(canary=str(canary)))
    settings = (bundle / "pyproject.toml").read_text()
    (bundle / "pyproject.toml").write_text(settings.replace("polyclinic_client.app:app", "foreign:app"))
    assert b"foreign" in build_fab_from_disk(bundle)
    run = consortium.home / "runs" / "foreign"
    shutil.copytree(consortium.home / "runs" / "honest-1", run)
    for path in [*(run / "checkpoints").iterdir(), run / "events.jsonl"]:
        path.unlink()
    flower(Home(consortium.home), "run", str(bundle), "coordinator", "--run-config", f'run="{run}"')
    until(
        lambda: all("was refused: this site runs installed code only" in consortium.log(s) for s in SITES),
        120,
        "refusal",
    )
    assert not canary.exists()
    flower(Home(consortium.home), "list", "coordinator")
    kill(processes("flwr-serverapp"), signal.SIGTERM)


def test_a_second_agent_or_coordinator_is_refused(consortium: Consortium) -> None:
    until(lambda: "runs as process" in (consortium.folder / "alpha.log").read_text(), 30, "the agent")
    assert "another process runs" in consortium.command("site", "start", "--home", "alpha", code=2)
    assert "another process leads" in consortium.command("coordinator", "start", code=2)
