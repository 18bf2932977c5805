"""The ray engine: the same round loop and ClientApp on Flower's simulation runtime, on one machine or a Ray cluster.

`run_simulation` is deprecated in favour of `flwr run`, which packs the working directory, starts a daemon and leaves it
behind, and knows nothing of the sites' folders; so it stands as the only public way into the runtime from a program.
It runs in a thread here and its ServerApp only hands over the Grid: the round loop stays in the calling thread, so that
its errors arrive as they are and Ctrl-C stops it, and the sites after the batch that they are at.
"""

import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Event

from flwr.app import ConfigRecordValues, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import telemetry

from polyclinic.errors import PolyclinicError, Refused
from polyclinic_client.app import make_app
from polyclinic_client.site import open_site
from polyclinic_server.app import lead
from polyclinic_server.rundir import RunDir

STOP = ".stop"
"""In the run directory: the sites are to stop working. They share its file system, since their states are in it."""


def run_ray(run: RunDir, folders: list[Path], threads: int) -> None:
    """Lead the run with one simulated node a state folder, each with `threads` processors.

    Raises:
        Refused: ray is not installed, or no machine of the cluster has that many processors.
        PolyclinicError: what `lead` raises; or the runtime itself has stopped.
    """
    with cluster(threads):
        from flwr.simulation import run_simulation

        grids: Queue[Grid] = Queue()
        finished = Event()
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            grids.put(grid)
            finished.wait()

        stop = run.path.absolute() / STOP
        stop.unlink(missing_ok=True)
        states = [folder.absolute() for folder in folders]
        client = make_app(
            lambda context: open_site(states[int(context.node_config["partition-id"])]),
            lambda done, total: _go_on_unless(stop),
        )
        resources: dict[str, dict[str, ConfigRecordValues]] = {
            "client_resources": {"num_cpus": threads, "num_gpus": 0.0}
        }
        with ThreadPoolExecutor(1) as executor:
            runtime = executor.submit(run_simulation, server, client, len(folders), "ray", resources)
            try:
                lead(_watched(grids.get(), runtime), run)
            except BaseException:
                stop.touch()
                raise
            finally:
                finished.set()


def _go_on_unless(stop: Path) -> None:
    """Called by a site after each batch: Ray's processes ignore Ctrl-C, and the runtime waits for all of them."""
    if stop.exists():
        raise PolyclinicError("the run was stopped", "go on with --resume")


@contextmanager
def cluster(threads: int) -> Iterator[None]:
    """Ray, started or joined (RAY_ADDRESS), without the noise that it and Flower make."""
    telemetry.FLWR_TELEMETRY_ENABLED = "0"  # read from the environment when flwr was imported, long ago
    telemetry.state["source"] = "unavailable"  # or it is written under the home directory, telemetry or not
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # sites see the machine's GPUs; ray warns where it is unset
    try:
        import ray
    except ImportError as error:
        raise Refused("the ray engine needs ray, which is not installed", "install polyclinic[ray]") from error
    flower = logging.getLogger("flwr")
    level = flower.level
    flower.setLevel(logging.CRITICAL)
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        most = max(node["Resources"].get("CPU", 0) for node in ray.nodes())  # type: ignore[no-untyped-call]
        if threads > most:
            raise Refused(
                f"a site computes with {threads} threads and the largest machine of the cluster has {most:g}",
                "lower compute.threads, or use the local engine",
            )
        yield
    finally:
        ray.shutdown()
        flower.setLevel(level)


def _watched(grid: Grid, runtime: Future[None]) -> Grid:
    """The grid, with the runtime's end as an error: nobody would answer any more."""
    pull = grid.pull_messages

    def pull_messages(message_ids: Iterable[str]) -> Iterable[Message]:
        if runtime.done():
            raise PolyclinicError(
                f"Flower's simulation runtime has stopped: {runtime.exception()}",
                "run with --resume, or with the local engine",
            )
        return pull(message_ids)

    grid.pull_messages = pull_messages  # type: ignore[method-assign]
    return grid
