"""The outbound ledger: everything that has left the site, in order, where nobody can change it unseen.

An entry is durable before what it speaks of leaves. One that names what then did not leave (the machine died) is
possible; the opposite is not.
"""

import csv
import io
from dataclasses import dataclass

from polyclinic.chain import Chain


@dataclass(frozen=True)
class Ledger(Chain):
    """The chain `ledger` in `folder`."""

    name: str = "ledger"

    def to_csv(self) -> str:
        """A line an entry, for who keeps records of processing: what left, when, for which study, how much."""
        columns = ["entry", "time", "to", "kind", "study", "stage", "round", "patients", "tensors", "bytes", "metrics"]
        columns += ["version", "error"]
        text = io.StringIO()
        table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for entry in self.entries():
            metrics = "; ".join(f"{name} {value:.6g}" for name, value in entry.get("metrics", {}).items())
            table.writerow({**entry, "tensors": len(entry.get("tensors", [])), "metrics": metrics})
        return text.getvalue()
