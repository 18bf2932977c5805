"""The data-fitness card: what a site should know of its cohort before it trains on it. Counts and words, no patient."""

import html
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.cohort.cohort import Cohort
from polyclinic.cohort.duplicates import NEAR, near_duplicates
from polyclinic.cohort.index import open_cohort, read_facts, read_meta

BINS = 32
HISTOGRAM_IMAGES = 2_000
"""Enough for a histogram; evenly spaced over the cohort."""
COLOUR = ("RGB", "YBR", "CMYK", "P")
"""How the photometric interpretation of colour begins: DICOM's, and Pillow's modes."""
MOST = 20
"""Words listed of a kind; the others are summed up as "other"."""


def make_card(folder: Path, cohort: Cohort | None = None, test: Cohort | None = None) -> dict[str, Any]:
    """The card of a built cohort, ready for JSON; of some of its patients if `cohort` is a selection from it.

    With `test`, those of its patients who are not trained on, near-duplicates are also counted `across_split`.

    `files`, `files_used`, `quarantine` and `warnings` are always those of the whole cohort; `selection` says that the
    rest is not.

    Raises:
        CohortError: there is no cohort in `folder`.
    """
    whole = open_cohort(folder)
    cohort, meta, facts = whole if cohort is None else cohort, read_meta(folder), read_facts(folder)
    position = np.zeros(len(whole.images), np.int64)
    position[whole.rows] = np.arange(len(whole))
    facts = {name: values[position[cohort.rows]] for name, values in facts.items()}
    return {
        "selection": len(cohort) < len(whole),
        "files": meta["files"],
        "files_used": meta["files_used"],
        "images": len(cohort),
        "patients": cohort.n_patients,
        "images_per_patient": _per_patient(cohort),
        "labels": _labels(cohort),
        "sites": _count(cohort.sites),
        "modalities": _count(facts["modalities"]),
        "views": _count(cohort.views),
        "splits": _count(cohort.splits),
        "photometric": _count(facts["photometric"]),
        "sizes": _sizes(facts["height"], facts["width"]),
        "tensor": list(cohort.images.shape[1:]),
        "histogram": _histogram(cohort),
        "near_duplicates": _near_duplicates(cohort, test),
        "quarantine": meta["quarantine"],
        "warnings": meta["warnings"],
    }


def _per_patient(cohort: Cohort) -> dict[str, Any]:
    images = np.bincount(cohort.patients, minlength=1)
    sizes, patients = np.unique(images, return_counts=True)
    return {
        "mean": round(float(images.mean()), 2),
        "most": int(images.max()),
        "patients_by_images": {str(n): int(count) for n, count in zip(sizes, patients, strict=True)},
    }


def _labels(cohort: Cohort) -> dict[str, dict[str, int]]:
    """Images and patients by label; a cell of several labels counts for each of them. "" is unlabelled."""
    pairs = [
        (word, int(patient))
        for cell, patient in zip(cohort.labels.tolist(), cohort.patients.tolist(), strict=True)
        for word in cell.split("|")
    ]
    images, patients = Counter(word for word, _ in pairs), Counter(word for word, _ in set(pairs))
    return {word: {"images": n, "patients": patients[word]} for word, n in images.most_common()}


def _count(words: Iterable[str]) -> dict[str, int]:
    """How often each word stands, the most frequent first; those beyond MOST as "other"."""
    ranked = Counter(map(str, words)).most_common()
    rest = sum(count for _, count in ranked[MOST:])
    return dict(ranked[:MOST]) | ({"other": rest} if rest else {})


def _sizes(height: NDArray[Any], width: NDArray[Any]) -> dict[str, Any]:
    """Of the original images, in pixels."""
    return {
        name: {"least": int(side.min()), "median": int(np.median(side)), "most": int(side.max())}
        for name, side in (("height", height), ("width", width))
    } | {"different": len({*zip(height.tolist(), width.tolist(), strict=True)})}


def _histogram(cohort: Cohort) -> list[float]:
    """The fraction of pixels in each of BINS equal ranges of grey level or channel value."""
    chosen = np.unique(np.linspace(0, len(cohort) - 1, min(len(cohort), HISTOGRAM_IMAGES)).astype(np.int64))
    counts = np.bincount(cohort.images[cohort.rows[chosen]].ravel() // (256 // BINS), minlength=BINS)
    return [round(float(fraction), 5) for fraction in counts / counts.sum()]


def _near_duplicates(cohort: Cohort, test: Cohort | None = None) -> dict[str, int]:
    tested = np.isin(cohort.rows, [] if test is None else test.rows)
    _, labels = np.unique(cohort.labels, return_inverse=True)  # numbers for words: blocks hold many pairs
    pairs = across_patients = across_labels = across_split = 0
    for first, second in near_duplicates(cohort):
        pairs += len(first)
        across_patients += int((cohort.patients[first] != cohort.patients[second]).sum())
        across_labels += int((labels[first] != labels[second]).sum())
        across_split += int((tested[first] != tested[second]).sum())
    counted = {"pairs": pairs, "across_patients": across_patients, "across_labels": across_labels, "bits": NEAR}
    return counted if test is None else counted | {"across_split": across_split}


def card_html(card: Mapping[str, Any]) -> str:
    """The card as a fragment of HTML, with an inline SVG histogram and no scripts, styles or addresses."""
    duplicates, sizes, per = card["near_duplicates"], card["sizes"], card["images_per_patient"]
    files = "files of the whole source" if card.get("selection") else "files"
    numbers = {
        files: f"{card['files']}, {card['files_used']} used",
        "images": card["images"],
        "patients": card["patients"],
        "images per patient": f"{per['mean']} on average, at most {per['most']}",
        "original size": f"{size_text(sizes)} pixels",
        "near-duplicates": near_text(duplicates),
    }
    tables = [
        _table("cohort", numbers),
        _table("labels (images)", {word: count["images"] for word, count in card["labels"].items()}),
        *(_table(name, card[name]) for name in ("modalities", "views", "sites", "photometric")),
        _table(f"quarantine ({files})", card["quarantine"]),
    ]
    warnings = "".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in card["warnings"])
    return f'<div class="card">{warnings}{"".join(tables)}{_svg(card["histogram"])}</div>'


def near_text(twins: Mapping[str, int]) -> str:
    """
    >>> near_text({"pairs": 1, "across_patients": 1, "across_labels": 0})
    '1 pair: 1 across patients, 0 across labels'
    """
    pairs = f"{twins['pairs']} pair{'s' * (twins['pairs'] != 1)}"
    return f"{pairs}: {twins['across_patients']} across patients, {twins['across_labels']} across labels"


def in_colour(card: Mapping[str, Any]) -> bool:
    """Whether most of a cohort's images are stored in colour, and are read as grey."""
    kinds: Mapping[str, int] = card["photometric"]
    colour = sum(count for kind, count in kinds.items() if kind.startswith(COLOUR))
    return bool(card["tensor"][0] == 1) and 2 * colour > sum(kinds.values())


def size_text(sizes: Mapping[str, Any]) -> str:
    """Height and width of the originals, as ranges where they differ.

    >>> size_text({"height": {"least": 9, "most": 9}, "width": {"least": 7, "most": 8}})
    '9 × 7–8'
    """
    ends = ((sizes[side]["least"], sizes[side]["most"]) for side in ("height", "width"))
    return " × ".join(str(most) if least == most else f"{least}–{most}" for least, most in ends)


def _table(title: str, rows: Mapping[str, Any]) -> str:
    if not rows or set(rows) == {""}:
        return ""
    cells = (f"<tr><th>{html.escape(k) or '(none)'}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table><caption>{html.escape(title)}</caption>{''.join(cells)}</table>"


def _svg(histogram: list[float]) -> str:
    """Intensities from black at the left to white at the right."""
    top = max(histogram)
    bars = (
        f'<rect x="{10 * k}" y="{100 - 100 * part / top:.1f}" width="9" height="{100 * part / top:.1f}"/>'
        for k, part in enumerate(histogram)
    )
    svg = f'<svg viewBox="0 0 {10 * len(histogram)} 100" width="320" height="100" role="img">{"".join(bars)}</svg>'
    return f"<figure>{svg}<figcaption>intensities, dark to bright</figcaption></figure>"
