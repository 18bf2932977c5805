"""Leads studies in processes that are killed: `victim.py` reads one JSON order a line and answers how it ended.

An order is {"run": run directory, "kill": null | [target, n, how] | seconds}. `target` is "module:attribute"; the
process kills itself with SIGKILL at the n-th call, "before" or "after" it, or at the n-th value that it yields. Every
order is carried out in a fork of this process, which has imported everything and computed nothing.
"""

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import sklearn.linear_model  # noqa: F401 (or every fork would import it)
from tests.tiny import TinyEncoder

from polyclinic.encoders import ENCODERS
from polyclinic_client.app import make_app
from polyclinic_client.site import open_site
from polyclinic_server.app import lead
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.engines.local import LocalGrid


def deadly(inner: Callable[..., Any], nth: int, how: str) -> Callable[..., Any]:
    """`inner`, at whose n-th call the process ends."""
    left = nth

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(inner)
    def calling(*args: Any, **kwargs: Any) -> Any:
        if how == "before":
            count()
        result = inner(*args, **kwargs)
        if how == "after":
            count()
        return result

    @functools.wraps(inner)
    def yielding(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for value in inner(*args, **kwargs):
            count()
            yield value

    return yielding if how == "yield" else calling


def arm(target: str, nth: int, how: str) -> None:
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, import_module(module))
    setattr(owner, name, deadly(getattr(owner, name), nth, how))


def carry_out(run: Path) -> None:
    if RunDir(run).study.encoder.name == "resnet18":
        ENCODERS["resnet18"] = lambda encoder, images: TinyEncoder(images.channels)
    sites = {folder.name: open_site(folder) for folder in sorted((run / "sites").iterdir())}
    lead(LocalGrid({name: make_app(lambda _, site=site: site) for name, site in sites.items()}), RunDir(run))


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        kill, started = order["kill"], time.monotonic()
        if (child := os.fork()) == 0:
            if isinstance(kill, list):
                arm(*kill)
            carry_out(Path(order["run"]))
            os._exit(0)
        if isinstance(kill, float):
            time.sleep(kill)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        ended = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started}
        print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    main()
