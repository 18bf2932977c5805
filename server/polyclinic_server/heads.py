"""Where every site's privacy ledger ended when the coordinator last heard of it, over all studies.

A site that has restored an older ledger from a backup would spend again what it has spent. It cannot know; so the
coordinator says in every order where the ledger ended, and the site refuses where its own does not hold that line.
"""

from pathlib import Path

from polyclinic.files import make_folder, write_atomic

NAME = "heads"
"""In the coordinator's folder: a file a site."""


class Heads:
    """The heads by site: in a folder, or in memory only (a simulation's sites live no longer than it)."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._heads: dict[str, str] = {}

    def of(self, site: str) -> str:
        """The furthest that the site has said, to whichever study; "" where it never has."""
        if self._folder is not None and (path := self._folder / site).exists():
            self._heads[site] = path.read_text()
        return self._heads.get(site, "")

    def note(self, site: str, head: str) -> None:
        """Keep, durably, what a site has said, unless it is behind what it said before; "" is nothing."""
        if _entries(head) <= _entries(self.of(site)):
            return
        self._heads[site] = head
        if self._folder is not None:
            make_folder(self._folder)
            write_atomic(self._folder / site, head)


def _entries(head: str) -> int:
    """That the ledger had: the first part of a head; 0 of what is none."""
    first = head.partition(":")[0]
    return int(first) if first.isdecimal() and len(first) < 16 else 0
