"""What a finished run no longer needs: most of its bytes, which only going on with it would read."""

import shutil
from pathlib import Path

from polyclinic_server import checkpoints


def tidy(*folders: Path) -> None:
    """Remove the sites' stored rounds and all checkpoints below `folders`; links are left as they are."""
    for folder in folders:
        states = {path.parent for path in folder.rglob("moments-*.safetensors")}
        for found in [*states, *folder.rglob("checkpoints")]:
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found)


def keep_newest(folder: Path) -> None:
    """Of a folder of checkpoints, keep the newest alone."""
    checkpoints.drop(folder, kept=1)
    for best in folder.glob("best-*"):
        best.unlink()
