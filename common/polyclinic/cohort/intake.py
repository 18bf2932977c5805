"""What goes into reading a file, and what comes out beside its pixels."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

VERSION = 4
"""Goes up when the same file would give other pixels or facts: cohorts are then built anew."""


@dataclass(frozen=True)
class Intake:
    """The settings that a cached tensor depends on: `[images]` of the study and what the site lets in."""

    size: int
    channels: int
    window: Literal["percentile", "voi"] | tuple[float, float]
    allow_burned_in: bool = False
    version: int = VERSION

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Intake":
        """Back from `asdict` through JSON, where the window has become a list."""
        window = values["window"]
        return cls(**{**values, "window": tuple(window) if isinstance(window, list) else window})

    @property
    def stride(self) -> int:
        """Bytes of one cached image."""
        return self.channels * self.size * self.size


@dataclass(frozen=True)
class Facts:
    """What is kept of a file beside its pixels: nothing that could name a patient.

    `patient` is a keyed HMAC, empty where the file has no identifier; `scanner` is a short one, of the machine.
    `modality`, `photometric`, `view`, `sex` and `transfer_syntax` are terms of closed sets, never free text. `height`
    and `width` are the original's, in pixels; `age` is in years, those above 89 as one.
    """

    kind: Literal["dicom", "raster", ""] = ""
    patient: str = ""
    modality: str = ""
    photometric: str = ""
    view: str = ""
    scanner: str = ""
    transfer_syntax: str = ""
    height: int = 0
    width: int = 0
    sex: str = ""
    age: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Only what is known."""
        return {name: value for name, value in asdict(self).items() if value != getattr(Facts, name)}
