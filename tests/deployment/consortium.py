"""A consortium of real processes on loopback: SuperLink, nginx, three SuperNodes, TLS and node authentication on."""

import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from polyclinic_simulations.phantom import write_site

from .processes import end_with_the_tests
from .relay import Relay

SITES = ("alpha", "beta", "gamma")
ELSEWHERE = "127.1.1.1"
"""An address of the coordinator's that is no site's own loopback address, which is reached without a proxy."""
RELAYED = "beta"
"""The site whose network can be cut."""
STUDY = """
[study]
name = "{name}"
seed = 3

[images]
size = 32

[encoder]
name = "{encoder}"
{stages}
[evaluation]
labels = {{ well = ["normal"], ill = ["nodule", "consolidation", "effusion"] }}
test_fraction = 0.5
rows = []

[aggregation]
min_sites = 2
round_deadline_s = {deadline}
"""
STAGE = """
[[stages]]
kind = "pretrain"
method = "{method}"
rounds = {rounds}
batch_size = 16
"""
FINETUNE = """
[[stages]]
kind = "finetune"
rounds = {rounds}
batch_size = 16
probe_rounds = 0
"""


class Consortium:
    """Folders of a coordinator and its sites, and the processes that run for them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "coordinator"
        self.port, superlink = free_port(), free_port()
        address = f"127.0.0.1:{self.port}"
        self.superlink = f"https://127.0.0.1:{superlink}"
        ports = ("--listen", address, "--superlink-port", superlink, "--web-port", free_port())
        self.command("coordinator", "init", "--address", address, *ports)
        settings = self.home / "coordinator.toml"
        assert 'hosts = [\n    "127.0.0.1",' in settings.read_text()
        settings.write_text(settings.read_text().replace("hosts = [", f'hosts = [\n    "{ELSEWHERE}",'))
        self.command("coordinator", "renew")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.relay = Relay(self.port)
        for number, name in enumerate(SITES):
            write_site(folder / "images" / name, name, 10, 5, number=number)
            self.command("site", "init", "--name", name, "--data", folder / "images" / name, "--home", name)
            settings = folder / name / "site.toml"
            text = settings.read_text()
            assert "max_orders = 0 " in text
            settings.write_text(text.replace("max_orders = 0 ", "max_orders = 10000 "))  # one study, many runs of it
            self.enrol(name)

    def enrol(self, name: str) -> None:
        """As the coordinator and the site do it over the telephone."""
        shown = self.command("coordinator", "enrol", f"{name}/request.json", "--fingerprint", self.fingerprint(name))
        assert f"site {name}" in shown
        self.command("site", "join", f"join-{name}.json", "--home", name)
        if name == RELAYED:
            joined = self.folder / name / "join.json"
            address = f'"127.0.0.1:{self.port}"'
            assert joined.read_text().count(address) == 1
            joined.write_text(joined.read_text().replace(address, f'"127.0.0.1:{self.relay.port}"'))

    def fingerprint(self, name: str) -> str:
        from polyclinic.enrolment import Request, read_file

        return read_file(self.folder / name / "request.json", Request).fingerprint

    def command(self, *words: object, code: int = 0, python: str = "") -> str:
        """What `polyclinic ...` prints, run as its user would; or what a Python text in its stead does."""
        done = subprocess.run(
            [sys.executable, *(("-c", python) if python else ("-m", "polyclinic")), *map(str, words)],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, *names: str, environment: dict[str, str] | None = None) -> None:
        """The coordinator, or a site's agent, in the background."""
        for name in names:
            words = ["coordinator", "start"] if name == "coordinator" else ["site", "start", "--home", name]
            with (self.folder / f"{name}.log").open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, "-m", "polyclinic", *words],
                    cwd=self.folder,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **(environment or {})},
                    preexec_fn=end_with_the_tests,
                )

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code."""
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(timeout=60)

    def study(
        self,
        name: str,
        rounds: int = 2,
        deadline: float = 240.0,
        encoder: str = "vit_tiny",
        methods: Sequence[str] = ("mae", "simclr"),
    ) -> Path:
        """The file of a study of so many rounds of the first method, and one of each other."""
        stages = "".join(
            (FINETUNE if method == "supervised" else STAGE).format(method=method, rounds=1 if number else rounds)
            for number, method in enumerate(methods)
        )
        path = self.folder / f"{name}.toml"
        path.write_text(STUDY.format(name=name, encoder=encoder, stages=stages, deadline=deadline))
        return path

    def approve(self, study: Path, *names: str) -> None:
        """At these sites or at all, each on its own machine."""
        with ThreadPoolExecutor() as pool:
            told = pool.map(
                lambda name: self.command("site", "approve", study, "--yes", "--home", name), names or SITES
            )
            assert all("rounds of " in said for said in told)

    def launch(self, study: Path) -> Path:
        """The run directory of a study that has been launched."""
        said = self.command("coordinator", "launch", study, "--yes", "--no-follow")
        return Path(said.rpartition("launched: ")[2].strip())

    def simulate(self, study: Path, python: str = "", sites: Sequence[str] = SITES) -> Path:
        """The run directory of the same study in simulation."""
        text = study.read_text() + "".join(
            f'\n[[simulation.site]]\nname = "{name}"\ncohort = "images/{name}"\n' for name in sites
        )
        rehearsal = study.with_name(f"rehearsal-{study.name}")
        rehearsal.write_text(text)
        out = self.folder / f"rehearsal-{study.stem}"
        told = ("--data", self.folder, "--state", "state", "--out", out)
        self.command("simulate", rehearsal, *told, python=python)
        return out

    def log(self, name: str) -> str:
        """Everything that a member's processes have written."""
        folder = self.folder / name / "logs"
        return "".join(path.read_text(errors="replace") for path in folder.glob("*.log"))

    def close(self) -> None:
        for name in list(self.processes):
            self.stop(name)
        self.relay.close()


def get(consortium: Consortium, path: str, length: int = 0, method: str = "POST") -> int:
    """The gateway's answer to a request for exactly this path, with a body that is said to be so long."""
    context = ssl.create_default_context(cafile=str(consortium.home / "authority.crt"))
    with closing(http.client.HTTPSConnection("127.0.0.1", consortium.port, context=context, timeout=10)) as connection:
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", "127.0.0.1")
        connection.putheader("Content-Length", str(length))
        connection.endheaders()
        with connection.getresponse() as answer:
            return answer.status


def healthy(consortium: Consortium) -> bool:
    """Does SuperLink answer through the gateway?"""
    try:
        return get(consortium, "/health", method="GET") == 200
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
