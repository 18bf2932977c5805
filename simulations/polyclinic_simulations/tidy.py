"""What a finished run no longer needs: most of its bytes, which only going on with it would read."""

import shutil
from pathlib import Path

from polyclinic_server import checkpoints


def tidy(folder: Path, keep: Path | None = None) -> None:
    """Remove the sites' stored rounds and all checkpoints below `folder`, but for the newest in the folder `keep`."""
    for state in {path.parent for path in folder.rglob("moments-*.safetensors")}:
        shutil.rmtree(state)
    for found in list(folder.rglob("checkpoints")):
        if found != keep:
            shutil.rmtree(found)
    if keep is not None:
        checkpoints.drop(keep, kept=1)
