"""Takes the work out of Polyclinic's sites: every Python with this folder on its path imports this as it starts.

`answer`, which trains and measures, becomes one that adds a hundredth to every value. All around it stays: policy and
approval, the checks of what came, the update kept on disk, the ledger. What goes with the work is to build the model
and load the tensors into it, to split the cohort, and to keep the optimizer's moments.
"""

import sys
import zlib
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import numpy as np


def add_a_little(order: Any, tensors: Any, site: Any, *_: object) -> Any:
    """A reply to an order, without work."""
    import torch

    from polyclinic.study import parse_canonical
    from polyclinic.wire import Reply
    from polyclinic_client import work
    from polyclinic_client.state import SiteState

    study = parse_canonical(order.study, "the study")
    work._expect(order, tensors, study, site)
    factor = np.float32(0.01 + zlib.crc32(order.site.encode()) % 1000 * 1e-5)  # Flower sends what is equal once
    update = {name: value * factor for name, value in tensors.items()}
    reply = Reply(study.hash, order.stage, order.round, order.site, 2, {"loss": 0.0}, {})
    if not order.train:
        return reply, None
    kept = {name: torch.from_numpy(value) for name, value in update.items()}
    SiteState(site.state / study.hash[:16]).keep(order.round, order.stage, kept, {"model": order.model}, {})
    return reply, update


class Replaced:
    """Finds `polyclinic_client.app` once, and changes it as it is loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """As the import system asks for it."""
        if name != "polyclinic_client.app":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_replace(module: Any) -> None:
            load(module)
            module.answer = add_a_little

        spec.loader.exec_module = load_and_replace  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Replaced())
