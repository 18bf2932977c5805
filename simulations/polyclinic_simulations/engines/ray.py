"""The ray engine: the same ServerApp and ClientApp on Flower's simulation runtime, on one machine or a Ray cluster."""

import os
from pathlib import Path

from flwr.app import ConfigRecordValues

from polyclinic.errors import Refused
from polyclinic_client.app import make_app
from polyclinic_client.site import open_site
from polyclinic_server.app import lead
from polyclinic_server.rundir import RunDir


def run_ray(run: RunDir, folders: list[Path], threads: int) -> None:
    """Lead the run with one simulated node a state folder.

    Raises:
        Refused: ray is not installed.
    """
    for switch in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        os.environ.setdefault(switch, "0")
    try:
        import ray  # noqa: F401
        from flwr.app import Context
        from flwr.serverapp import Grid, ServerApp
        from flwr.simulation import run_simulation
    except ImportError as error:
        raise Refused("the ray engine needs ray, which is not installed", "install polyclinic[ray]") from error

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        lead(grid, run)

    client = make_app(lambda context: open_site(folders[int(context.node_config["partition-id"])]))
    resources: dict[str, ConfigRecordValues] = {"num_cpus": threads, "num_gpus": 0.0}
    run_simulation(server, client, len(folders), backend_config={"client_resources": resources})
