"""Takes the work out of Polyclinic's sites: every Python with this folder on its path imports this as it starts.

`answer`, which trains and measures, becomes one that adds a hundredth to every value. All around it stays: policy
and approval, the checks of what came, the ledger.
"""

import sys
import zlib
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import numpy as np


def add_a_little(order: Any, tensors: Any, *_: object) -> Any:
    """A reply to an order, without work."""
    from polyclinic.study import parse_canonical
    from polyclinic.wire import Reply

    factor = np.float32(0.01 + zlib.crc32(order.site.encode()) % 1000 * 1e-5)  # Flower sends what is equal once
    update = {name: value * factor for name, value in tensors.items()}
    study = parse_canonical(order.study, "the study")
    reply = Reply(study.hash, order.stage, order.round, order.site, 2, {"loss": 0.0}, {})
    return reply, update if order.train else None


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
