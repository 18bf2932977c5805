"""What `polyclinic coordinator start` does: keeps SuperLink, the gateway and the page running, registers sites, and
runs the wanted study again and again until it has ended.

A study's progress stands in its checkpoints, so it is Flower's run that is expendable: when the ServerApp, SuperLink or
the machine has died, another run goes on from the newest checkpoint. That a run is alive is told by the lock that its
ServerApp holds on the run directory, whatever Flower believes.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from polyclinic.bundle import bundle_folder
from polyclinic.errors import PolyclinicError
from polyclinic.files import locked, write_atomic
from polyclinic.processes import Program, keep_running
from polyclinic_server.home import CONNECTION, Enrolled, Home
from polyclinic_server.rundir import ENDED, REGISTERED, RunDir, last_event

log = logging.getLogger(__name__)

BIN = Path(sys.executable).parent
FLOWER_TIMEOUT_S = 60.0
"""For one of Flower's own commands."""
LONGEST_PAUSE_S = 60.0
"""Between attempts of a run that makes no round."""
STARTING_S = 60.0
"""After a run was submitted, until its ServerApp must have taken the run directory's lock."""


def environment(home: Path) -> dict[str, str]:
    """For Flower's programs: our own installation first on PATH, no telemetry, no update checks."""
    return {
        "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


class Supervisor:
    """The coordinator's programs and what is to be seen to between."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._submitted = self._looked = 0.0
        self._tries, self._made, self._at_work = 0, "", 0.0
        path, port = home.path, str(home.settings.superlink_port)
        superlink = [
            *(sys.executable, "-P", "-m", "polyclinic_server.superlink", str(path / "signatures.db")),
            *("--ssl-certfile", str(path / "server.crt"), "--ssl-keyfile", str(path / "server.key")),
            *("--ssl-ca-certfile", str(path / "authority.crt"), "--database", str(path / "superlink.db")),
            *("--host", "127.0.0.1", "--port", port, "--health-server-address", home.settings.health_address),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        ]
        nginx = ["nginx", "-c", str(path / "gateway" / "nginx.conf"), "-e", str(path / "gateway" / "error.log")]
        page = [sys.executable, "-P", "-m", "polyclinic_server.web", "--home", str(path)]
        self.programs = [
            Program("superlink", lambda: superlink, path / "logs" / "superlink.log", environment(path)),
            Program("gateway", lambda: nginx, path / "logs" / "gateway.log", {}),
            Program("page", lambda: page, path / "logs" / "page.log", {}),
        ]

    def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        with self.home.claimed():
            log.info("what goes on: %s", self.home.settings.page)
            keep_running(self.programs, self.look)

    def look(self) -> None:
        """See to sites and to the wanted run, at most every two seconds; what fails is tried again."""
        if time.monotonic() - self._looked < 2.0:
            return
        self._looked = time.monotonic()
        steps: list[Callable[[], None]] = [*(partial(self._register, site) for site in self._sites()), self._advance]
        for step in steps:
            try:
                step()
            except (PolyclinicError, OSError, ValueError, KeyError, TypeError) as error:
                log.warning("will be tried again: %s", error)
                self._looked = time.monotonic() + 3.0

    def _sites(self) -> list[Enrolled]:
        """Those that SuperLink is to be told of."""
        try:
            return [site for site in self.home.sites().values() if bool(site.node) == site.revoked]
        except (OSError, ValueError, TypeError) as error:
            log.warning("the list of sites cannot be read: %s", error)
            return []

    def _register(self, site: Enrolled) -> None:
        """Tell SuperLink of a site that it does not know yet, or that is revoked."""
        if site.revoked:
            flower(self.home, "supernode", "unregister", str(site.node), CONNECTION)
            self.home.change(site.name, node=0)
        else:
            self.home.change(site.name, node=register(self.home, site))

    def _advance(self) -> None:
        """Submit the wanted run if it is neither at work nor at its end."""
        if (run := self.home.wanted) is None:
            self._submitted = 0.0
            return
        with locked(run) as free:
            if not free:
                self._submitted = 0.0
                self._at_work = time.monotonic()
                return
        superlink = self.programs[0]
        if superlink.has_lost_a_child():  # that which starts ServerApps; Flower 1.41 starts it once
            log.warning("nothing starts ServerApps any more; SuperLink is started again")
            superlink.stop()
            return
        now = time.monotonic()
        if (self._submitted and now - self._submitted < STARTING_S) or now - self._at_work < self._pause(run):
            return
        registered = {name: site.node for name, site in self.home.sites().items() if site.node and not site.revoked}
        write_atomic(run / REGISTERED, json.dumps(registered))
        flower(self.home, "run", str(bundle_folder()), CONNECTION, "--run-config", f'run="{run}"')
        self._submitted = time.monotonic()
        self._tries += 1
        RunDir(run).event("submitted")

    def _pause(self, run: Path) -> float:
        """Seconds to wait before a run is submitted again: none where it has got on, else longer and longer."""
        made = max((path.name for path in (run / "checkpoints").glob("round-*.json")), default="")
        if (run.name + made) != self._made:
            self._made, self._tries = run.name + made, 0
        return min(2.0**self._tries, LONGEST_PAUSE_S) if self._tries > 1 else 0.0


def register(home: Home, site: Enrolled) -> int:
    """Flower's number of a site that SuperLink did not know."""
    with NamedTemporaryFile("w", suffix=".pub", dir=home.path) as file:
        file.write(site.public_key + "\n")
        file.flush()
        return int(flower(home, "supernode", "register", file.name, CONNECTION, "--name", site.name)["node-id"])


def flower(home: Home, *arguments: str) -> dict[str, Any]:
    """What one of Flower's own commands answers.

    Raises:
        PolyclinicError: it fails, or SuperLink does not answer.
    """
    command = [str(BIN / "flwr"), *arguments, "--format", "json"]
    what = f"`flwr {' '.join(arguments[:2])}`"
    try:
        done = subprocess.run(  # noqa: S603 (our own installation's program, arguments as a list)
            command,
            env={**os.environ, **environment(home.path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FLOWER_TIMEOUT_S,
        )
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise PolyclinicError(f"{what} gave no answer", "see logs/superlink.log; it is tried again") from error
    if not answer.get("success", done.returncode == 0):
        raise PolyclinicError(
            f"{what} failed: {str(answer.get('error-message', answer))[:500]}", "see logs/superlink.log"
        )
    return dict(answer)


def stop_run(home: Home, run: Path) -> None:
    """End a run for good: nobody submits it again, and Flower's own runs of it are stopped.

    Raises:
        PolyclinicError: SuperLink does not answer: the run is not submitted again, and may be asked to stop again.
    """
    if last_event(run) not in ENDED:
        RunDir(run).event("run_stopped")
    for found in flower(home, "list", CONNECTION).get("runs", []):
        if str(found.get("status", "")).startswith(("running", "starting", "pending")):
            flower(home, "stop", str(found["run-id"]), CONNECTION)
    home.want(None)
