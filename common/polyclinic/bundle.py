"""The Flower app bundle: what the coordinator submits, and the only one that a site runs.

It names modules that are installed everywhere and carries no code. It is built from the installation, to the same bytes
wherever that is the same version, so that a site can compute the hash of the one bundle that it will accept.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

INSTALLED, CHECKOUT = Path(__file__).parent / "app_bundle", Path(__file__).parents[2] / "deploy" / "app"


def bundle_folder() -> Path:
    """Its source: inside the package, or in a checkout under deploy/."""
    return INSTALLED if INSTALLED.exists() else CHECKOUT


@lru_cache(maxsize=1)
def bundle_hash() -> str:
    """SHA-256 of the bundle as Flower builds it from `bundle_folder`, hexadecimal."""
    from flwr.cli.build import build_fab_from_disk  # with much else of Flower's command line

    return hashlib.sha256(build_fab_from_disk(bundle_folder())).hexdigest()
