"""What makes a simulated site differ from its cohort: at intake, image by image or patient by patient.

Pixel shifts are functions (images, severity, generators) -> images: (n, channels, size, size) uint8 both, one generator
an image, severity in (0, 1]. Lengths are fractions of the side, so that a study means the same at any size. At severity
0 nothing is called, and images are the cohort's own, bit for bit. Each rounds to whole grey levels, as files do; so two
shifts may not be exchanged.

Shifts of labels and of who comes are functions of the whole cohort's patients, and all images of a patient go or stay.

What is drawn for an image or a patient comes from the study's seed, the site, the shift's place among the site's own
and the number in the whole cohort, so it is the same in every engine and however patients are dealt. Whom a
shift of a part of them concerns does not depend on the severity: whom a weak one changes, a stronger one changes too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polyclinic.cohort import Cohort
from polyclinic.errors import CohortError
from polyclinic.seeding import numpy_generator, seed_for
from polyclinic.settings import nearest
from polyclinic.simulation import MixShift, PixelShift, Shift
from polyclinic_simulations.partition import class_of_patients

Pixels = NDArray[np.uint8]
Generators = Sequence[np.random.Generator]

GAMMA = 2.5
BLUR = 0.02
"""Standard deviation, sides."""
NOISE = 0.15
"""Standard deviation at white, as a part of it."""
FEWEST_BITS = 2
BORDER = 0.2
"""Widest, sides."""
LETTER = 0.15
"""Height, sides."""
UNSHARP, UNSHARP_RADIUS = 1.5, 0.06
"""Gain, and standard deviation of the mean that it is against, sides."""
COARSEST = 4.0
"""Widest pixel, in pixels of the image."""
STROKES: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {
    "L": [((0, 0), (1, 0)), ((1, 0), (1, 0.6))],
    "R": [((0, 0), (1, 0)), ((0, 0), (0, 0.6)), ((0, 0.6), (0.5, 0.6)), ((0.5, 0.6), (0.5, 0)), ((0.5, 0.2), (1, 0.6))],
}
"""Lines of a letter from (down, right) to (down, right), in letter heights."""


def response(images: Pixels, severity: float, rngs: Generators) -> Pixels:
    """Response curve of detector and display: grey^gamma on [0, 1], gamma from 1 to 2.5 (2.5^severity)."""
    levels = (np.arange(256) / 255) ** (GAMMA**severity)
    return _grey(255 * levels)[images]


def sharpness(images: Pixels, severity: float, rngs: Generators) -> Pixels:
    """A softer system: Gaussian MTF(f) = exp(-2 (pi sigma f)^2), sigma up to 2 % of the side (focal spot, screen)."""
    return _grey(_blurred(images, severity * BLUR))


def noise(images: Pixels, severity: float, rngs: Generators) -> Pixels:
    """Quantum noise: photons ~ Poisson(dose * grey), white = 1, and grey = photons / dose.

    The dose falls with severity so that noise at white is 15 % of it times severity (44 photons a pixel at 1); at other
    greys it is as the square root of grey.
    """
    dose = (NOISE * max(severity, 1e-4)) ** -2  # less changes no grey level, and more photons cannot be drawn
    return _grey(
        np.stack([rng.poisson(image * (dose / 255)) for image, rng in zip(images, rngs, strict=True)]) * (255 / dose)
    )


def bit_depth(images: Pixels, severity: float, rngs: Generators) -> Pixels:
    """Fewer bits stored: 8 - 6 * severity, evenly spaced grey levels, black and white kept."""
    steps = round(2 ** (8 - (8 - FEWEST_BITS) * severity)) - 1
    return _grey(np.round(np.arange(256) / 255 * steps) / steps * 255)[images]


def inversion(images: Pixels, severity: float, rngs: Generators) -> Pixels:
    """MONOCHROME1 shown as it is stored, white for black, in this part of the images."""
    chosen = _chosen(severity, rngs)
    return np.where(chosen[:, None, None, None], 255 - images, images)


def collimation(images: Pixels, severity: float, rngs: Generators) -> Pixels:
    """Shutters of the collimator: a black border, on each side up to 20 % of the side, at least half of that."""
    out, size = images.copy(), images.shape[-1]
    for image, rng in zip(out, rngs, strict=True):
        top, bottom, left, right = np.round(severity * BORDER * size * rng.uniform(0.5, 1.0, 4)).astype(int)
        image[:, :top] = image[:, size - bottom :] = 0
        image[:, :, :left] = image[:, :, size - right :] = 0
    return out


def marker(images: Pixels, severity: float, rngs: Generators) -> Pixels:
    """A burnt-in side marker, a white L or R of 15 % of the side in an upper corner, in this part of the images."""
    out, chosen = images.copy(), _chosen(severity, rngs)
    for image, rng, marked in zip(out, rngs, chosen, strict=True):
        letter, right, inset = rng.choice(list(STROKES)), rng.random() < 0.5, rng.uniform(0.03, 0.1, 2)
        if marked:
            image[:, _letter(str(letter), bool(right), inset, image.shape[-1])] = 255
    return out


def local_contrast(images: Pixels, severity: float, rngs: Generators) -> Pixels:
    """A vendor's processing: unsharp mask, grey + 1.5 * severity * (grey - its Gaussian mean, sigma 6 % of a side)."""
    return _grey(images + UNSHARP * severity * (images - _blurred(images, UNSHARP_RADIUS)))


def resolution(images: Pixels, severity: float, rngs: Generators) -> Pixels:
    """Larger detector elements: averaged to pixels up to 4 times as wide, then interpolated to the old size."""
    size = images.shape[-1]
    coarse = round(size / (1 + (COARSEST - 1) * severity))
    planes = [
        Image.fromarray(plane).resize((coarse, coarse), Image.Resampling.BOX)
        for plane in images.reshape(-1, size, size)
    ]
    fine = [np.asarray(plane.resize((size, size), Image.Resampling.BILINEAR)) for plane in planes]
    return np.stack(fine).reshape(images.shape)


SHIFTS: dict[PixelShift, Callable[[Pixels, float, Generators], Pixels]] = {
    "response": response,
    "sharpness": sharpness,
    "noise": noise,
    "bit_depth": bit_depth,
    "inversion": inversion,
    "collimation": collimation,
    "marker": marker,
    "local_contrast": local_contrast,
    "resolution": resolution,
}


def shift_pixels(images: Pixels, numbers: NDArray[np.int64], shifts: Sequence[Shift], seed: int, site: str) -> Pixels:
    """(n, channels, size, size): `images`, which have these numbers in the whole cohort, with a site's pixel shifts."""
    for place, shift in pixel_shifts(shifts):
        own = seed_for(seed, "shift", site=site, stage=place)
        rngs = [np.random.default_rng([own, number]) for number in numbers.tolist()]
        images = SHIFTS[cast(PixelShift, shift.kind)](images, shift.severity, rngs)
    return images


def pixel_shifts(shifts: Sequence[Shift]) -> Iterator[tuple[int, Shift]]:
    """Those of a site's shifts that change pixels, each with its place among all of them."""
    for place, shift in enumerate(shifts):
        if shift.kind in get_args(PixelShift) and shift.severity > 0:
            yield place, shift


def shift_patients(
    cohort: Cohort, patients: NDArray[np.int64], shifts: Sequence[Shift], seed: int, site: str
) -> tuple[Cohort, NDArray[np.int64]]:
    """(the whole cohort with the site's labels, the site's patients): the shifts of labels and of who comes.

    Raises:
        CohortError: there is no other class to flip labels to, or nobody of those that a shift concerns.
    """
    for place, shift in enumerate(shifts):
        rng = numpy_generator(seed_for(seed, "shift", site=site, stage=place))
        if shift.kind == "label_noise" and shift.severity > 0:
            cohort = _flipped(cohort, patients, shift.severity, rng)
        elif shift.kind == "label_policy":
            cohort = _called_otherwise(cohort, patients, shift, rng)
        elif shift.kind in MIXES:
            away = shift.severity * MIXES[shift.kind](cohort, shift.value)
            patients = patients[~(rng.random(cohort.n_patients) < away)[patients]]
    return cohort, patients


def _flipped(cohort: Cohort, patients: NDArray[np.int64], severity: float, rng: np.random.Generator) -> Cohort:
    """Label noise: this part of the site's labelled images has another of the cohort's words, all equally likely."""
    words, codes = np.unique(cohort.labels, return_inverse=True)
    first = int(words[0] == "")  # what has no label gets none
    classes = len(words) - first
    if classes < 2:
        raise CohortError("labels cannot be flipped: the cohort has fewer than two", 'leave out shift "label_noise"')
    draws, steps = rng.random(len(cohort)), rng.integers(1, classes, len(cohort))
    wrong = (draws < severity) & (codes >= first) & np.isin(cohort.patients, patients)
    other = first + (codes - first + steps) % classes
    return replace(cohort, labels=words[np.where(wrong, other, codes)])


def _called_otherwise(cohort: Cohort, patients: NDArray[np.int64], shift: Shift, rng: np.random.Generator) -> Cohort:
    """Label policy: another reading convention, by which the site calls this part of its patients of a class otherwise.

    As where borderline cases are read as the one finding here and as the other there. All images of such a patient
    change, and of several labels only that one. Who is borderline is drawn, not seen.
    """
    cells, codes = np.unique(cohort.labels, return_inverse=True)
    known = {word for cell in cells.tolist() for word in cell.split("|")}
    _require_known("label", shift.value, f"which should become {shift.becomes!r}", known)
    _require_known("label", shift.becomes, f"which {shift.value!r} should become", known)
    drawn = np.intersect1d(patients, np.flatnonzero(rng.random(cohort.n_patients) < shift.severity))
    renamed = [
        "|".join(dict.fromkeys(shift.becomes if word == shift.value else word for word in cell.split("|")))
        for cell in cells.tolist()
    ]
    changed = np.isin(cohort.patients, drawn)
    return replace(cohort, labels=np.where(changed, np.array(renamed)[codes], cohort.labels))


def _of_label(cohort: Cohort, label: str) -> NDArray[np.float64]:
    """Prevalence: a disease is rarer among those whom the site sees. 1 for patients whose first image has the label."""
    words = [set(cell.split("|")) for cell in map(str, class_of_patients(cohort))]
    _require_known("label", label, "which should grow rare", set().union(*words))
    return np.array([label in found for found in words], float)


def _of_view(cohort: Cohort, view: str) -> NDArray[np.float64]:
    """View mix: another protocol, as where no lateral is taken. 1 for patients with an image of the view."""
    return _with_an_image_of("view", cohort, cohort.views, view)


def _of_sex(cohort: Cohort, sex: str) -> NDArray[np.float64]:
    """Sex mix: whom the site serves, as a veterans' or a women's hospital. 1 for patients of the sex."""
    return _with_an_image_of("sex", cohort, cohort.sexes, sex)


def _with_an_image_of(what: str, cohort: Cohort, values: NDArray[np.str_], value: str) -> NDArray[np.float64]:
    _require_known(what, value, "which should grow rare", set(np.unique(values).tolist()))
    there = np.zeros(cohort.n_patients)
    there[cohort.patients[values == value]] = 1.0
    return there


def _of_age(cohort: Cohort, _: str) -> NDArray[np.float64]:
    """Age mix: a paediatric or a screening clinic, which the old do not go to.

    The part of the patients of known age who are younger, ties counted half: about 0 for the youngest and 1 for the
    oldest. A patient's age is the mean over the images; one of unknown age never stays away.
    """
    known = ~np.isnan(cohort.ages)
    images = np.bincount(cohort.patients[known], minlength=cohort.n_patients)
    sums = np.bincount(cohort.patients[known], cohort.ages[known], minlength=cohort.n_patients)
    aged = images > 0
    if not aged.any():
        raise CohortError("no patient has an age, and the older ones should grow rare", "leave the shift out")
    ages = sums[aged] / images[aged]
    shares = np.zeros(cohort.n_patients)
    ranks = (np.searchsorted(np.sort(ages), ages, side) for side in ("left", "right"))
    shares[aged] = sum(ranks) / (2 * len(ages))
    return shares


MIXES: dict[MixShift, Callable[[Cohort, str], NDArray[np.float64]]] = {
    "prevalence": _of_label,
    "view_mix": _of_view,
    "sex_mix": _of_sex,
    "age_mix": _of_age,
}
"""(patients,) with which probability, at severity 1, each of the whole cohort's patients stays away."""


def _require_known(what: str, value: str, why: str, known: set[str]) -> None:
    if value not in known - {""}:
        fix = nearest(value, sorted(known - {""})) if known - {""} else "leave the shift out"
        raise CohortError(f"no patient has the {what} {value!r}, {why}", fix)


def _grey(values: NDArray[np.float64]) -> Pixels:
    """The nearest grey levels."""
    return np.round(np.clip(values, 0, 255)).astype(np.uint8)


def _chosen(severity: float, rngs: Generators) -> NDArray[np.bool_]:
    """(images,) whether a shift of a part of the images is made to each."""
    return np.array([rng.random() < severity for rng in rngs], bool)


def _blurred(images: Pixels, sigma: float) -> NDArray[np.float64]:
    """Convolved with a Gaussian of `sigma` sides, in the frequency domain; mirrored at the edges."""
    size = images.shape[-1]
    margin = min(size, int(np.ceil(4 * sigma * size)))
    padded = np.pad(images, ((0, 0), (0, 0), (margin, margin), (margin, margin)), mode="symmetric")
    length = padded.shape[-1]
    down, right = np.fft.fftfreq(length)[:, None], np.fft.rfftfreq(length)[None]  # cycles a pixel
    mtf = np.exp(-2 * (np.pi * sigma * size) ** 2 * (down**2 + right**2))
    inside = slice(margin, margin + size)
    blurred: NDArray[np.float64] = np.fft.irfft2(np.fft.rfft2(padded) * mtf, s=(length, length), axes=(-2, -1))[
        ..., inside, inside
    ]
    return blurred


def _letter(letter: str, right: bool, inset: NDArray[np.float64], size: int) -> NDArray[np.bool_]:
    """(size, size) the pixels of a letter, `inset` (down, inwards) sides from an upper corner."""
    down, along = (np.indices((size, size)) + 0.5) / size / LETTER
    top, left = inset / LETTER
    left = 1 / LETTER - left - 0.6 if right else left
    width = max(0.1, 0.6 / (size * LETTER))  # half of a stroke: at least a pixel in all
    drawn = np.zeros((size, size), bool)
    for (y0, x0), (y1, x1) in STROKES[letter]:
        length = (y1 - y0) ** 2 + (x1 - x0) ** 2
        y, x = down - top - y0, along - left - x0
        at = np.clip((y * (y1 - y0) + x * (x1 - x0)) / length, 0, 1)
        drawn |= np.hypot(y - at * (y1 - y0), x - at * (x1 - x0)) <= width
    return drawn
