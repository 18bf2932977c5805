"""The container files, read: no daemon builds them here. Their health checks are run as they stand."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from polyclinic_client.monitor import note_health

from .stand_in import gateway

DOCKER = Path(__file__).parents[2] / "deploy" / "docker"
TEXT = (DOCKER / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SECRET = re.compile(r"password|token|secret|PRIVATE KEY|\.key\b", re.IGNORECASE)


def instructions() -> list[tuple[str, str, str]]:
    """(stage, instruction, its arguments), comments and continued lines aside."""
    found, stage = [], ""
    whole = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE))
    for line in whole.splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stage = rest.split()[-1]
        if name:
            found.append((stage, name, rest.strip()))
    return found


def of(stage: str, name: str) -> list[str]:
    """The arguments of every instruction of that name in a stage."""
    return [rest for where, what, rest in instructions() if (where, what) == (stage, name)]


def healthcheck(stage: str) -> list[str]:
    """The command that says whether a container is well."""
    (line,) = of(stage, "HEALTHCHECK")
    return list(json.loads(line.partition("CMD ")[2]))


@pytest.mark.parametrize("stage", ["site", "coordinator"])
def test_an_image_runs_as_a_user_without_rights(stage: str) -> None:
    assert of(stage, "USER") == ["10001:10001"]
    names = [name for where, name, _ in instructions() if where == stage]
    assert names.index("USER") > max((at for at, name in enumerate(names) if name == "RUN"), default=-1)
    assert "useradd --uid 10001 --gid 10001" in TEXT


def test_nothing_is_added_from_elsewhere_and_every_context_is_declared() -> None:
    names = [name for _, name, _ in instructions()]
    assert "ADD" not in names
    assert "COPY" not in names  # what is installed comes from the wheelhouse, which is mounted while it is
    mounted = re.findall(r"--mount=type=bind,from=([\w-]+)", TEXT)
    assert mounted == ["wheelhouse"]
    for service in SERVICES.values():
        assert set(mounted) <= service["build"]["additional_contexts"].keys()
        assert (DOCKER / service["build"]["context"] / "Dockerfile").is_file()


def test_images_come_by_their_plain_names() -> None:
    bases = [rest for _, name, rest in instructions() if name == "FROM"]
    assert bases == ["python:${PYTHON}-slim AS base", "base AS site", "base AS coordinator"]
    assert "://" not in TEXT.replace("https://localhost", "")
    assert all("/" not in service["image"] for service in SERVICES.values())


def test_no_secret_is_baked_in() -> None:
    kept = [rest for _, name, rest in instructions() if name in ("ENV", "ARG", "LABEL", "RUN")]
    assert not [line for line in kept if SECRET.search(line)]
    assert not any({"environment", "env_file"} & service.keys() for service in SERVICES.values())


def test_the_python_is_the_wheelhouses() -> None:
    (version,) = of("", "ARG")
    assert version == f"PYTHON={sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.parametrize("name", ["site", "coordinator"])
def test_a_container_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == of(name, "USER")[0]
    assert all({"noexec", "nosuid", "nodev"} <= set(re.split("[:,]", mount)) for mount in service["tmpfs"])
    assert service["mem_limit"]
    assert service["cpus"]
    assert service["pids_limit"]
    assert service["build"]["target"] == name
    assert service["profiles"] == [name]  # a machine is one or the other
    assert not any("docker.sock" in str(volume) for volume in service["volumes"])


def test_a_site_reads_its_images_and_listens_to_nobody() -> None:
    (images,) = [volume for volume in SERVICES["site"]["volumes"] if isinstance(volume, dict)]
    assert images["read_only"] is True
    assert images["bind"] == {"create_host_path": False}
    assert not {"ports", "expose", "network_mode"} & SERVICES["site"].keys()
    assert not of("site", "EXPOSE")


def test_what_is_written_lies_in_a_volume_that_is_declared() -> None:
    for name, service in SERVICES.items():
        assert f"{name}:{of('base', 'WORKDIR')[0]}" in service["volumes"]
        assert name in COMPOSE["volumes"]


def test_the_coordinator_is_reached_at_the_port_it_listens_on() -> None:
    (published,) = SERVICES["coordinator"]["ports"]
    (inside,) = of("coordinator", "EXPOSE")
    assert published == f"443:{inside}"
    assert f"--listen 0.0.0.0:{inside}" in (DOCKER / "compose.yaml").read_text()
    assert f"https://localhost:{inside}/health" in healthcheck("coordinator")[2]


@pytest.mark.parametrize("name", ["site", "coordinator"])
def test_what_a_container_runs_is_a_command(name: str) -> None:
    from typer.testing import CliRunner

    from polyclinic.cli import build

    assert of("base", "ENTRYPOINT") == ['["polyclinic"]']
    (command,) = of(name, "CMD")
    assert CliRunner().invoke(build(), [*json.loads(command), "--help"]).exit_code == 0
    text = (DOCKER / "compose.yaml").read_text()
    lines = re.findall(
        rf"^#   docker compose (?:run --rm .*?{name}|exec .*? polyclinic) ({name} .*)$", text, re.MULTILINE
    )
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        shown = CliRunner().invoke(build(), [*words[:2], "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0
        assert all(word in shown.output for word in words if word.startswith("--"))


def code(command: list[str], home: Path) -> int:
    """Of a health check, run as in the image but with this Python, where a proxy is set for all else."""
    assert command[0] == "python"
    away = {**os.environ, **dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"), "no_proxy": ""}
    command = [sys.executable, *command[1:]]
    return subprocess.run(command, cwd=home, env=away, stderr=subprocess.DEVNULL, timeout=60).returncode


def test_a_site_is_well_while_its_node_answers(tmp_path: Path) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    (tmp_path / "site").mkdir()
    assert code(healthcheck("site"), tmp_path) != 0
    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    note_health(tmp_path / "site", server.server_port, 1)
    assert code(healthcheck("site"), tmp_path) == 0
    server.shutdown()
    server.server_close()
    assert code(healthcheck("site"), tmp_path) != 0


def test_a_coordinator_is_well_while_its_gateway_answers_under_its_own_name(tmp_path: Path) -> None:
    from polyclinic.cli import run

    assert run(["coordinator", "init", "--address", "localhost:8443", "--home", str(tmp_path / "coordinator")]) == 0
    command = healthcheck("coordinator")
    with gateway(tmp_path / "coordinator") as port:
        here = [word.replace("8443", str(port)) for word in command]
        assert code(here, tmp_path) == 0
    assert code(here, tmp_path) != 0
