"""What a check of the doctor found."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do where that is not well."""

    check: str
    level: Level
    found: str
    fix: str = ""
