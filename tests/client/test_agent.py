"""The agent: what it starts, under which caps, and what it says about that."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from polyclinic.bundle import bundle_hash
from polyclinic.enrolment import Join
from polyclinic.errors import Refused
from polyclinic_client import agent
from polyclinic_client.hospital import SETTINGS, Hospital, make_hospital
from polyclinic_client.overview import overview
from polyclinic_server.pki import make_authority

from ..tiny import write_cohort

AUTHORITY = make_authority("c")[1].decode()
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    """Joined, with a coordinator that is not there."""
    make_hospital(tmp_path / "site", "north", write_cohort(tmp_path / "images", 2))
    file = tmp_path / "join.json"
    answer = Join(name="north", coordinator="c", address="127.0.0.1:1", authority=AUTHORITY, bundle=bundle_hash())
    file.write_text(answer.model_dump_json())
    made = Hospital(tmp_path / "site")
    made.join(file)
    path = made.path / SETTINGS
    text = path.read_text().replace("threads = 0", "threads = 2").replace("memory_gb = 0.0", "memory_gb = 3.5")
    path.write_text(text.replace("gpu = true", "gpu = false"))
    return Hospital(made.path)


def until(true: Callable[[], bool], patience_s: float = 60.0) -> None:
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_flower_understands_what_it_is_started_with(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "write_guard", lambda home: home / "bin")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.local:3128")
    monkeypatch.setenv("NO_PROXY", "example.org")
    program = agent._programs(hospital)[-1]
    found = _parse_args_run_supernode().parse_args(list(program._command())[4:])
    health = json.loads((hospital.path / "health.json").read_text())
    assert found.health_server_address == health["grpc"]
    assert health["http"] == f"http://{found.host}:{found.port}/health"
    assert found.host == "127.0.0.1"
    assert found.superlink == "127.0.0.1:1"
    environment = {**os.environ, **program._environment}
    assert environment["HTTPS_PROXY"] == "http://proxy.local:3128"
    assert environment["no_proxy"] == "example.org,127.0.0.1,localhost"
    assert (environment["OMP_NUM_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == ("2", "")
    assert environment["PATH"] == str(hospital.path / "bin")


def test_no_agent_without_an_answer_and_none_beside_another(hospital: Hospital, tmp_path: Path) -> None:
    make_hospital(tmp_path / "other", "south", tmp_path / "images")
    with pytest.raises(Refused, match="has not answered yet"):
        agent.run_agent(Hospital(tmp_path / "other"))
    with agent.locked(hospital.path), pytest.raises(Refused, match="another process runs"):
        agent.run_agent(hospital)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_node_that_runs_is_capped_and_says_that_it_is_well(hospital: Hospital) -> None:
    """A real SuperNode, which waits for a coordinator that is not there."""
    metrics = hospital.path / "metrics.prom"
    with subprocess.Popen(
        [sys.executable, "-m", "polyclinic", "site", "start", "--home", str(hospital.path)],
        env={**os.environ, "HTTP_PROXY": "http://127.0.0.1:1"},  # which is not to stand between its own programs
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:
        try:
            until(lambda: bool(overview(hospital)["answering"]))
            address = json.loads((hospital.path / "health.json").read_text())["grpc"]
            with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
                said = HealthStub(channel).Check(HealthCheckRequest(), timeout=10)
            assert said.status == HealthCheckResponse.SERVING
            node = int((hospital.path / "logs" / "supernode.pid").read_text())
            limits = Path(f"/proc/{node}/limits").read_text()
            assert re.search(r"Max data size +3500000000 ", limits)
            environment = Path(f"/proc/{node}/environ").read_bytes().split(b"\0")
            assert {b"OMP_NUM_THREADS=2", b"CUDA_VISIBLE_DEVICES="} <= set(environment)
            until(lambda: 'up{site="north"} 1\n' in metrics.read_text())
        finally:
            running.send_signal(signal.SIGTERM)
    assert running.returncode == 0
    assert 'up{site="north"} 0\n' in metrics.read_text()
    assert not overview(hospital)["running"]
