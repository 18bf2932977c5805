"""Stored values of a monochrome frame to grey levels, in float32 (PS3.4 N.2).

Functional groups of enhanced multi-frame objects (PS3.3 C.7.6.16.2.9 and .10) take the place of the top-level
elements where they are present.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from polyclinic.cohort.pixels import Floats, distinct, percentiles, stretch

Window = Literal["percentile", "voi"] | tuple[float, float]


def grey_levels(stored: NDArray[Any], dataset: Dataset, frame: int, window: Window) -> Floats:
    """(rows, columns) stored values -> (rows, columns) in [0, 1], bright where a monitor shows bright.

    Padding takes no part in percentiles and comes out black.

    Args:
        frame: its number in the dataset, from 0.
        window: "percentile": 1st to 99th of the frame; "voi": the file's own LUT or window, percentiles where it has
            none; (centre, width) in the unit that the modality LUT gives, HU for CT.
    """
    values, counts, where = distinct(stored)
    padding = _padding(values, dataset)
    counts = np.where(padding, 0, counts)
    if not counts.any():
        return np.zeros(stored.shape, np.float32)
    units = _modality(values, _group(dataset, frame, "PixelValueTransformationSequence"))
    levels = _window(units, counts, _group(dataset, frame, "FrameVOILUTSequence"), window)
    # Presentation LUT Shape INVERSE is how MONOCHROME1 says once more what it is (PS3.3 C.11.6).
    if dataset.PhotometricInterpretation == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        levels = np.float32(1.0) - levels
    levels[padding] = 0.0
    return levels[where]


def _group(dataset: Dataset, frame: int, name: str) -> Dataset:
    """The frame's own functional group `name`, else the shared one, else the dataset itself."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    holders: list[Dataset] = [
        group.get(name)[0] for group in (*per_frame[frame : frame + 1], *shared[:1]) if group.get(name)
    ]
    return holders[0] if holders else dataset


def _padding(values: NDArray[Any], dataset: Dataset) -> NDArray[np.bool_]:
    """Which of the values are padding: Pixel Padding Value, up to its Range Limit if any (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(len(values), np.bool_)
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return np.asarray((values >= low) & (values <= high))


def _modality(values: NDArray[Any], source: Dataset) -> Floats:
    """Stored values in the modality's unit (PS3.3 C.11.1.1): through the LUT, or value * slope + intercept."""
    if sequence := source.get("ModalityLUTSequence"):
        table, first, _ = _table(sequence[0])
        return _look_up(values, table, first)
    units = values.astype(np.float32)
    slope, intercept = source.get("RescaleSlope"), source.get("RescaleIntercept")
    if slope is not None and intercept is not None:
        units = units * np.float32(slope) + np.float32(intercept)
    return units


def _window(units: Floats, counts: NDArray[np.intp], source: Dataset, window: Window) -> Floats:
    """Units on [0, 1]."""
    if isinstance(window, tuple):
        centre, width = window
        return stretch(units, centre - width / 2, centre + width / 2)
    if window == "voi" and (levels := _voi(units, source)) is not None:
        return levels
    return stretch(units, *percentiles(units, counts))


def _voi(units: Floats, source: Dataset) -> Floats | None:
    """Units through the first VOI LUT, else the first window (PS3.3 C.11.2.1); None without a valid one."""
    if sequence := source.get("VOILUTSequence"):
        table, first, bits = _table(sequence[0])
        return stretch(_look_up(units, table, first), 0.0, 2.0**bits - 1.0)
    centre, width = (_first(source.get(name)) for name in ("WindowCenter", "WindowWidth"))
    function = source.get("VOILUTFunction") or "LINEAR"
    if centre is None or width is None or width < (1.0 if function == "LINEAR" else 1e-6):
        return None
    if function == "SIGMOID":
        # 1 / (1 + exp(-4 (x - centre) / width)), in the form that does not overflow
        sigmoid: Floats = 0.5 + 0.5 * np.tanh(np.float32(2.0 / width) * (units - np.float32(centre)))
        return sigmoid
    if function == "LINEAR":  # its formula maps integers to integers: half a step and a whole one less
        centre, width = centre - 0.5, width - 1.0
    if width == 0.0:
        return (units > centre).astype(np.float32)
    return stretch(units, centre - width / 2, centre + width / 2)


def _first(value: Any) -> float | None:
    """The first of one or more decimal strings."""
    if value is None or value == "":
        return None
    number = float(value) if isinstance(value, int | float | str) else float(value[0])
    return number if np.isfinite(number) else None


def _table(item: Dataset) -> tuple[NDArray[np.unsignedinteger], int, int]:
    """(entries, value that the first entry stands for, bits an entry) of a LUT (PS3.3 C.11.1.1.1 and C.11.2.1.1)."""
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):  # words, or packed bytes where the length says so
        order = ">" if item.original_encoding[1] is False else "<"
        data = np.frombuffer(data, "u1" if len(data) == (entries or 65536) else f"{order}u2")
    return np.asarray(data, np.uint16)[: entries or 65536], first, bits


def _look_up(values: NDArray[Any], table: NDArray[np.unsignedinteger], first: int) -> Floats:
    """Each value's entry; values beyond either end take the end's."""
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
    return np.asarray(table[index], np.float32)
