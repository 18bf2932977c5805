"""Where every site's privacy ledger ended when the coordinator last heard of it, over all studies.

A site that has restored an older ledger from a backup would spend again what it has spent. It cannot know; so the
coordinator says in every order where the ledger ended, and the site refuses where its own does not hold that line.
"""

import json
from pathlib import Path

from polyclinic.files import write_atomic

NAME = "heads.json"
"""In the coordinator's folder."""


class Heads:
    """The heads by site: in a file, or in memory only (a simulation's sites live no longer than it)."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._heads: dict[str, str] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def of(self, site: str) -> str:
        """As the site said it last; "" where it never has."""
        return self._heads.get(site, "")

    def note(self, site: str, head: str) -> None:
        """Keep, durably, what a site has said; "" is nothing."""
        if not head or head == self.of(site):
            return
        self._heads[site] = head
        if self._path is not None:
            write_atomic(self._path, json.dumps(self._heads, indent=2, sort_keys=True))
