"""Shifts at intake: what each does in figures, that it can be seen, and that a site keeps it from run to run."""

import runpy
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from polyclinic.cohort import Cohort, build_cohort
from polyclinic.encoders import ENCODERS
from polyclinic.errors import CohortError, Refused, StudyError
from polyclinic.evaluation import probes
from polyclinic.simulation import PixelShift, Shift
from polyclinic.study import Images, Study, resolve
from polyclinic_client.site import Site, open_site
from polyclinic_simulations import consortium
from polyclinic_simulations import simulate as simulations
from polyclinic_simulations.consortium import IMAGES, gather, settle
from polyclinic_simulations.phantom import write_site
from polyclinic_simulations.phantom.scanner import Scanner
from polyclinic_simulations.shift import SHIFTS, shift_patients, shift_pixels
from polyclinic_simulations.simulate import simulate, who_is_tested

from ..tiny import SIMCLR, TinyEncoder, in_memory, measured, open_run, tiny_study, write_cohort

BENCHMARKS = Path(__file__).parents[2] / "simulations" / "benchmarks"
KINDS: tuple[PixelShift, ...] = get_args(PixelShift)
DRAWN = {"noise", "inversion", "collimation", "marker"}
"""Those that differ from image to image."""


def shifts(kind: str, severity: float, value: str = "") -> list[Shift]:
    return [Shift.model_validate({"kind": kind, "severity": severity, "value": value})]


def shifted(images: NDArray[np.uint8], kind: str, severity: float, seed: int = 7, site: str = "north") -> Any:
    return shift_pixels(images, np.arange(len(images)), shifts(kind, severity), seed, site)


def flat(grey: int, count: int = 1, size: int = 32) -> NDArray[np.uint8]:
    """Images of one grey."""
    return np.full((count, 1, size, size), grey, np.uint8)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Fifty invented patients of one scanner, whose detector is no larger than its images need be here."""
    folder, scanner = tmp_path_factory.mktemp("phantom"), Scanner.of("north", 0, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scanner, "of", lambda *_: replace(scanner, rows=128, columns=128))
        write_site(folder / "north", "north", 50, 3)
    return build_cohort(folder / "north", Images(size=48), folder / "state", workers=1)


@pytest.fixture(scope="module")
def images(phantom: Cohort) -> NDArray[np.uint8]:
    return phantom.pixels(slice(None)).numpy()


@pytest.fixture(scope="module")
def domain_auc() -> Any:
    """The benchmark's: how well images of shifted patients are told from others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return runpy.run_path(str(BENCHMARKS / "shifts.py"))["domain_auc"]


@pytest.fixture(scope="module")
def unshifted(phantom: Cohort, images: NDArray[np.uint8], domain_auc: Any) -> list[float]:
    """By seed, at severity 0, where no kind changes an image."""
    return [domain_auc(images, phantom.patients, "noise", 0.0, seed) for seed in range(4)]


def test_a_domain_classifier_sees_nothing_where_there_is_no_shift(unshifted: list[float]) -> None:
    assert np.mean(unshifted) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_domain_classifier_sees_each_shift_the_better_the_stronger_it_is(
    kind: str, phantom: Cohort, images: NDArray[np.uint8], domain_auc: Any, unshifted: list[float]
) -> None:
    found = [domain_auc(images, phantom.patients, kind, severity, 0) for severity in (0.2, 0.5, 1.0)]
    assert all(stronger > weaker - 0.01 for weaker, stronger in pairwise([unshifted[0], *found]))
    assert found[1] > unshifted[0] + 0.1
    assert found[2] > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_the_effect_grows_from_nothing(kind: str, images: NDArray[np.uint8]) -> None:
    assert shifted(images, kind, 0.0).tobytes() == images.tobytes()
    effects = [np.abs(shifted(images, kind, s).astype(int) - images).mean() for s in (0.1, 0.3, 0.6, 1.0)]
    assert 0 < effects[0] < effects[1] < effects[2] < effects[3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("severity", [5e-324, 1e-200, 1e-9])
def test_hardly_any_severity_changes_hardly_anything(kind: str, severity: float, images: NDArray[np.uint8]) -> None:
    made = shifted(images[:5], kind, severity).astype(int)
    assert np.abs(made - images[:5]).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_shifted_alike_again_alone_and_not_alike_elsewhere(kind: str, images: NDArray[np.uint8]) -> None:
    some = images[:20]
    whole = shifted(some, kind, 0.6)
    assert whole.dtype == np.uint8
    assert whole.shape == some.shape
    for number in (0, 7, 19):
        alone = shift_pixels(some[number : number + 1], np.array([number]), shifts(kind, 0.6), 7, "north")
        assert alone[0].tobytes() == whole[number].tobytes()
    before = shift_pixels(some, np.arange(20), [*shifts("response", 0.0), *shifts(kind, 0.6)], 7, "north")
    for other in (shifted(some, kind, 0.6, seed=8), shifted(some, kind, 0.6, site="south"), before):
        assert (other.tobytes() == whole.tobytes()) == (kind not in DRAWN)


@pytest.mark.parametrize("kind", KINDS)
def test_colour_channels_are_kept_in_place(kind: str, images: NDArray[np.uint8]) -> None:
    """All but noise do the same to each channel."""
    colour = np.repeat(images[:4], 3, axis=1)
    made = shifted(colour, kind, 0.6)
    assert made.shape == colour.shape
    if kind != "noise":
        assert (made == shifted(images[:4], kind, 0.6)).all()


def test_shifts_compose_in_the_order_given(images: NDArray[np.uint8]) -> None:
    numbers, (dim, coarse) = np.arange(9), (shifts(kind, 0.5)[0] for kind in ("response", "bit_depth"))
    both = shift_pixels(images[:9], numbers, [dim, coarse], 7, "north")
    by_hand = SHIFTS["bit_depth"](SHIFTS["response"](images[:9], 0.5, []), 0.5, [])
    assert (both == by_hand).all()
    assert (both != shift_pixels(images[:9], numbers, [coarse, dim], 7, "north")).any()


def test_the_response_curve_is_a_gamma() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    for severity, gamma in ((0.5, np.sqrt(2.5)), (1.0, 2.5)):
        assert (shifted(ramp, "response", severity).ravel() == np.round(255 * (np.arange(256) / 255) ** gamma)).all()


def test_a_wave_loses_the_contrast_that_the_mtf_says() -> None:
    size, severity = 64, 0.5
    sigma = 0.02 * severity * size  # pixels
    at = np.arange(size) + 0.5
    for waves in (4, 8, 16):  # half-waves in phase with the mirrored edges
        frequency = waves / size / 2
        wave = np.round(127.5 + 100 * np.cos(2 * np.pi * frequency * at))
        image = np.broadcast_to(wave, (1, 1, size, size)).astype(np.uint8)
        left = shifted(image, "sharpness", severity)[0, 0, 0].astype(float) - 127.5
        amplitude = 2 * (left * np.cos(2 * np.pi * frequency * at)).mean()
        assert amplitude == pytest.approx(100 * np.exp(-2 * (np.pi * sigma * frequency) ** 2), abs=0.5)


@pytest.mark.parametrize("severity", [0.2, 1.0])
def test_quantum_noise_is_that_of_its_dose(severity: float) -> None:
    for grey in (20, 100):
        made = shifted(flat(grey, count=40), "noise", severity).astype(float)
        assert made.mean() == pytest.approx(grey, rel=0.02)
        assert made.std() == pytest.approx(0.15 * severity * np.sqrt(grey * 255), rel=0.05)
    assert (shifted(flat(0), "noise", severity) == 0).all()


@pytest.mark.parametrize(("severity", "levels"), [(0.5, 32), (5 / 6, 8), (1.0, 4)])
def test_bits_are_lost_and_black_and_white_are_kept(severity: float, levels: int) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    made = np.unique(shifted(ramp, "bit_depth", severity))
    assert (made == np.round(np.linspace(0, 255, levels))).all()


def test_a_part_of_the_images_is_inverted() -> None:
    made = shifted(flat(10, count=2000, size=2), "inversion", 0.3)
    assert set(np.unique(made)) == {10, 245}
    assert (made[:, 0, 0, 0] == 245).mean() == pytest.approx(0.3, abs=0.04)
    assert (shifted(flat(10, count=50), "inversion", 1.0) == 245).all()


def test_the_collimator_leaves_a_window() -> None:
    made = shifted(flat(200, count=300, size=100), "collimation", 0.5)[:, 0] == 200
    for lit in (made.any(axis=1), made.any(axis=2)):  # (images, 100) columns, rows
        first, last = lit.argmax(axis=1), lit[:, ::-1].argmax(axis=1)
        for border in (first, last):
            assert border.min() == 5
            assert border.max() == 10
            assert border.mean() == pytest.approx(7.5, abs=0.3)
    assert (made == (made.any(axis=1)[:, None, :] & made.any(axis=2)[:, :, None])).all()


def test_markers_are_letters_in_the_upper_corners() -> None:
    made = shifted(flat(0, count=400, size=96), "marker", 0.5)[:, 0]
    assert set(np.unique(made)) == {0, 255}
    marked = made[made.any(axis=(1, 2))] > 0
    assert len(marked) / 400 == pytest.approx(0.5, abs=0.1)
    sides = []
    for image in marked:
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        assert rows[-1] < 0.3 * 96
        assert 12 <= rows[-1] - rows[0] + 1 <= 20  # a letter of 14.4 pixels, and its stroke
        assert columns[-1] < 0.3 * 96 or columns[0] > 0.7 * 96
        stem, upper = image[rows[0] : rows[-1] + 1, columns[0]], image[rows[0] + 4, columns[0] + 5 :]
        assert stem.mean() > 0.7
        sides.append((bool(columns[0] > 48), bool(upper.any())))  # (on the right, an R: L has nothing beside its stem)
    counts = [sides.count(each) for each in set(sides)]
    assert len(counts) == 4
    assert min(counts) > 0.15 * len(marked)


def test_local_contrast_leaves_flat_parts_and_widens_an_edge() -> None:
    assert (shifted(flat(90), "local_contrast", 1.0) == 90).all()
    edge = flat(100, size=64)
    edge[..., 32:] = 140
    made = shifted(edge, "local_contrast", 0.5)[0, 0, 30].astype(int)
    assert made[0] == 100
    assert made[-1] == 140
    assert made[31] < 90
    assert made[32] > 150


def test_resolution_averages_and_keeps_the_mean() -> None:
    assert (shifted(flat(90), "resolution", 1.0) == 90).all()
    board = flat(0, size=32)
    board[0, 0] = 200 * (np.indices((32, 32)).sum(axis=0) % 2)
    assert (shifted(board, "resolution", 1.0) == 100).all()  # squares of a pixel are lost in those of four


def patients_of(cohort: Cohort) -> NDArray[np.int64]:
    return np.arange(cohort.n_patients)


def test_label_noise_flips_its_part_of_the_sites_labels_to_other_words_of_the_cohort() -> None:
    cohort = in_memory(3000, images=1)
    words = np.array(["a", "b", "c", ""] * 750)
    cohort = replace(cohort, labels=words)
    own = patients_of(cohort)[:2000]
    wrong = {}
    for severity in (0.0, 0.2, 0.6):
        made, patients = shift_patients(cohort, own, shifts("label_noise", severity), 7, "north")
        assert (patients == own).all()
        changed = made.labels != words
        assert not changed[2000:].any()
        assert not changed[words == ""].any()
        assert changed[:2000][words[:2000] != ""].mean() == pytest.approx(severity, abs=0.03)
        wrong[severity] = changed
        again = shift_patients(cohort, own, shifts("label_noise", severity), 7, "north")[0]
        assert (again.labels == made.labels).all()
        if severity == 0.6:
            became = made.labels[(words == "a") & changed]
            assert (became == "b").mean() == pytest.approx(0.5, abs=0.1)
            assert set(became) == {"b", "c"}
    assert not (wrong[0.2] & ~wrong[0.6]).any()
    with pytest.raises(CohortError, match="fewer than two"):
        shift_patients(replace(cohort, labels=np.full(3000, "a")), own, shifts("label_noise", 0.5), 7, "north")


MIX_VALUES = {"prevalence": "b", "view_mix": "LL", "sex_mix": "F"}
"""Each the value of some patients of `mixed`."""


@pytest.fixture(scope="module")
def mixed() -> Cohort:
    """2,000 patients with two images each; of each attribute every fifth patient's is unknown."""
    images = 2 * np.arange(2000) + np.array([[0], [1]])  # (2, patients)
    rng = np.random.default_rng(0)

    def dealt(*words: str) -> NDArray[np.str_]:
        return np.repeat(rng.permutation(np.tile(np.array(words), 400)), 2)

    views = dealt("PA", "PA", "AP", "LL", "")
    views[images[0]] = np.where(views[images[0]] == "LL", "PA", views[images[0]])  # a lateral is never the first
    return replace(
        in_memory(2000),
        labels=dealt("a", "b", "a|b", "c", ""),
        views=views,
        sexes=dealt("F", "M", "M", "O", ""),
        ages=np.repeat(np.where(np.arange(2000) % 5, rng.permutation(2000) / 25, np.nan), 2),
    )


@pytest.mark.parametrize("kind", MIX_VALUES)
def test_patients_of_one_value_stay_away_with_the_severity(kind: str, mixed: Cohort) -> None:
    own, value = patients_of(mixed)[:1600], MIX_VALUES[kind]
    words = {"prevalence": mixed.labels, "view_mix": mixed.views, "sex_mix": mixed.sexes}[kind]
    concerned = np.unique(mixed.patients[[value in word.split("|") for word in words.tolist()]])
    concerned = concerned[concerned < 1600]
    left = {}
    for severity in (0.0, 0.3, 0.7, 1.0):
        made, patients = shift_patients(mixed, own, shifts(kind, severity, value), 7, "north")
        assert made is mixed
        gone = np.setdiff1d(own, patients)
        assert set(gone) <= set(concerned)
        error = 4 * np.sqrt(severity * (1 - severity) / len(concerned))
        assert len(gone) / len(concerned) == pytest.approx(severity, abs=error)
        left[severity] = set(patients.tolist())
    assert left[0.0] == set(own.tolist())
    assert left[0.0] > left[0.3] > left[0.7] > left[1.0]
    assert not left[1.0] & set(concerned.tolist())


def test_the_older_patients_are_the_rarer_they_grow(mixed: Cohort) -> None:
    """With severity s the share 1 - s u of those at the rank u stays: 1 - s / 2 of all, of mean rank below."""
    own = patients_of(mixed)
    ages = mixed.ages[::2]
    ranks = ages * 25 / 2000
    left = {}
    for severity in (0.0, 0.5, 1.0):
        _, patients = shift_patients(mixed, own, shifts("age_mix", severity), 7, "north")
        staying = np.zeros(2000, bool)
        staying[patients] = True
        assert staying[np.isnan(ages)].all()
        aged = ~np.isnan(ages)
        assert staying[aged].mean() == pytest.approx(1 - severity / 2, abs=4 * np.sqrt(0.25 / aged.sum()))
        mean_rank = (1 / 2 - severity / 3) / (1 - severity / 2)
        assert ranks[aged & staying].mean() == pytest.approx(
            mean_rank, abs=4 * np.sqrt(1 / 12 / (aged & staying).sum())
        )
        left[severity] = set(patients.tolist())
    assert left[0.0] == set(own.tolist())
    assert left[0.0] > left[0.5] > left[1.0]
    alike = replace(mixed, ages=np.full(len(mixed), 50.0))  # nobody is older: half of what the severity says
    assert len(shift_patients(alike, own, shifts("age_mix", 1.0), 7, "north")[1]) == pytest.approx(1000, abs=90)


def test_a_label_policy_calls_its_part_of_a_class_otherwise_patient_by_patient(mixed: Cohort) -> None:
    own = patients_of(mixed)[:1600]
    policy = [Shift(kind="label_policy", severity=0.0, value="b", becomes="c")]
    assert (shift_patients(mixed, own, policy, 7, "north")[0].labels == mixed.labels).all()
    changed = {}
    for severity in (0.4, 0.8):
        policy = [Shift(kind="label_policy", severity=severity, value="b", becomes="c")]
        made, patients = shift_patients(mixed, own, policy, 7, "north")
        assert (patients == own).all()
        other = (made.labels != mixed.labels).reshape(2000, 2)
        assert (other[:, 0] == other[:, 1]).all()
        assert not other[1600:].any()
        before, after = mixed.labels[::2][other[:, 0]], made.labels[::2][other[:, 0]]
        assert set(zip(before.tolist(), after.tolist(), strict=True)) == {("b", "c"), ("a|b", "a|c")}
        read = np.isin(mixed.labels[::2][:1600], ["b", "a|b"])
        assert other[:1600, 0][read].mean() == pytest.approx(severity, abs=4 * np.sqrt(0.25 / read.sum()))
        changed[severity] = other
    assert not (changed[0.4] & ~changed[0.8]).any()
    merged = [Shift(kind="label_policy", severity=1.0, value="b", becomes="a")]
    assert set(shift_patients(mixed, patients_of(mixed), merged, 7, "north")[0].labels) == {"", "a", "c"}


def test_shifts_of_patients_and_labels_compose(mixed: Cohort) -> None:
    own = patients_of(mixed)[:1600]
    both = [*shifts("sex_mix", 1.0, "F"), Shift(kind="label_policy", severity=1.0, value="b", becomes="c")]
    made, patients = shift_patients(mixed, own, both, 7, "north")
    assert (patients == shift_patients(mixed, own, both[:1], 7, "north")[1]).all()
    there = np.isin(mixed.patients, patients)
    assert not {"b", "a|b"} & set(made.labels[there])
    assert (made.labels[~there] == mixed.labels[~there]).all()


def test_who_does_not_exist_cannot_grow_rare_nor_be_called_otherwise(mixed: Cohort) -> None:
    own = patients_of(mixed)

    def refused(shift: Shift, cohort: Cohort = mixed) -> str:
        with pytest.raises(CohortError) as caught:
            shift_patients(cohort, own, [shift], 7, "north")
        return str(caught.value)

    for kind, what, known in (
        ("prevalence", "label", "'a', 'b', 'c'"),
        ("view_mix", "view", "'AP', 'LL', 'PA'"),
        ("sex_mix", "sex", "'F', 'M', 'O'"),
    ):
        said = refused(shifts(kind, 0.5, "xyz")[0])
        assert f"{what} 'xyz', which should grow rare" in said
        assert f"give one of {known}" in said
    assert "the nearest is 'b'" in refused(shifts("prevalence", 0.5, "bb")[0])
    assert "'xyz', which should become 'c'" in refused(Shift(kind="label_policy", severity=0, value="xyz", becomes="c"))
    assert "'xyz', which 'b' should become" in refused(Shift(kind="label_policy", severity=0, value="b", becomes="xyz"))
    unknown = replace(in_memory(4), labels=np.full(8, ""))
    assert "no patient has an age" in refused(shifts("age_mix", 0.5)[0], unknown)
    assert "leave the shift out" in refused(shifts("sex_mix", 0.5, "F")[0], unknown)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Study]:
    """Three sites dealt from one cohort: one as it is, one noisy, one with two shifts and wrong labels."""
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
    monkeypatch.setattr(consortium, "BLOCK", 7)
    write_cohort(tmp_path / "data", 36)
    yield with_shifts(
        {"kind": "noise", "severity": 0.5, "sites": ["site-2", "site-3"]},
        {"kind": "label_noise", "severity": 0.3, "sites": ["site-3"]},
        {"kind": "response", "severity": 1.0, "sites": ["site-3"]},
        {"kind": "collimation", "severity": 0.0},
    )


def with_shifts(*shifts: dict[str, Any]) -> Study:
    return tiny_study(
        stages=[{**SIMCLR, "rounds": 2}], simulation={"sites": 3, "cohort": "data", "shift": list(shifts)}
    )


def settled(study: Study, at: Path, out: str = "run") -> dict[str, Site]:
    members = gather(study, at, at / "state", lambda what, done, total: None)
    return settle(members, study, open_run(at / out, study))


def test_a_site_opens_with_its_shifted_images_and_labels(study: Study, tmp_path: Path) -> None:
    plain, made = settled(with_shifts(), tmp_path, "plain"), settled(study, tmp_path)
    whole = build_cohort(tmp_path / "data", study.images, tmp_path / "state")
    for name, site in made.items():
        cohort, before = site.cohort, plain[name].cohort
        assert (cohort.rows == before.rows).all()  # an image has the same number everywhere
        numbers = np.flatnonzero(np.isin(whole.rows, cohort.rows))
        expected = shift_pixels(
            before.pixels(slice(None)).numpy(), numbers, study.simulation.shifts_of(name), study.seed, name
        )
        assert cohort.pixels(slice(None)).numpy().tobytes() == expected.tobytes()
        some = cohort.select([1, 3])
        assert (some.pixels([0]).numpy() == expected[np.flatnonzero(cohort.patients == 1)[:1]]).all()
        assert (cohort.labels != before.labels).any() == (name == "site-3")
        stored = tmp_path / "run" / "sites" / name / IMAGES
        assert stored.exists() == (name != "site-1")
        assert not stored.exists() or stored.stat().st_size == len(cohort) * 16 * 16
    assert isinstance(made["site-1"].cohort.images, np.memmap)
    first = {name: made[name] for name in ("site-1", "site-2")}
    assert who_is_tested(first, study) == who_is_tested({name: plain[name] for name in first}, study)


def test_the_shifted_images_are_made_once_and_again_where_that_was_cut_short(study: Study, tmp_path: Path) -> None:
    settled(study, tmp_path)
    folder = tmp_path / "run" / "sites" / "site-2"
    bits, when = (folder / IMAGES).read_bytes(), (folder / IMAGES).stat().st_mtime_ns
    settled(study, tmp_path)
    assert (folder / IMAGES).stat().st_mtime_ns == when
    (folder / IMAGES).rename(folder / f".{IMAGES}.1.tmp")
    open_site.cache_clear()
    with pytest.raises(CohortError, match="own images are gone"):
        open_site(folder)
    settled(study, tmp_path)
    assert (folder / IMAGES).read_bytes() == bits
    assert {path.name for path in folder.iterdir()} == {IMAGES, "site.json"}


def test_a_site_with_other_labels_or_images_is_not_the_one_that_began(study: Study, tmp_path: Path) -> None:
    settled(study, tmp_path)
    with pytest.raises(Refused, match="site 'site-2' have changed since this run began"):
        settled(with_shifts(), tmp_path)
    with pytest.raises(Refused, match="site 'site-3' have changed since this run began"):
        settled(with_shifts(*[s.model_dump() for s in study.simulation.shift if s.kind != "label_noise"]), tmp_path)


def test_a_shifted_run_goes_on_to_the_same_bits_without_the_site_that_it_holds_out(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "STRENGTHS", (0.01,))  # half of the time, and another matter
    monkeypatch.setattr(simulations, "_pictures", lambda *_: None)

    def stop(event: Any) -> None:
        if event["event"] == "round_closed":
            raise KeyboardInterrupt

    study = study.model_copy(update={"simulation": study.simulation.model_copy(update={"held_out": ["site-1"]})})
    where = tmp_path, tmp_path / "state"
    whole = simulate(study, tmp_path / "whole", *where)
    with pytest.raises(KeyboardInterrupt):
        simulate(study, tmp_path / "run", *where, listen=stop)
    assert simulate(study, tmp_path / "run", *where, resume=True)["comparison"] == whole["comparison"]
    bits = {(tmp_path / run / "encoder.safetensors").read_bytes() for run in ("whole", "run")}
    assert len(bits) == 1
    assert (whole["held_out"], set(whole["sites"])) == (["site-1"], {"site-2", "site-3"})
    assert {cells[2] for cells in measured(tmp_path / "whole")} == {"site-2", "site-3", ""}


def test_sites_that_share_patients_are_refused_though_prevalence_differs(tmp_path: Path) -> None:
    write_cohort(tmp_path / "data", 20)
    rare = {"kind": "prevalence", "severity": 0.5, "value": "spot"}
    sites = [{"name": "a", "cohort": "data"}, {"name": "b", "cohort": "data", "shift": [rare]}]
    with pytest.raises(StudyError, match="sites 'a' and 'b' have the same patients"):
        settled(tiny_study(simulation={"site": sites}), tmp_path)


def test_a_shift_of_a_site_that_the_column_does_not_make_is_refused(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "data", 12)
    lines = (folder / "labels.csv").read_text().splitlines()
    views = ["view", *(["PA"] * 12 + ["AP"] * 12)]
    (folder / "labels.csv").write_text("\n".join(f"{row},{view}" for row, view in zip(lines, views, strict=True)))
    simulation: dict[str, Any] = {"cohort": "data", "partition": {"kind": "column", "by": "view"}}
    assert {
        m.name for m in gather(tiny_study(simulation=simulation), tmp_path, tmp_path / "state", lambda *_: None)
    } == {
        "PA",
        "AP",
    }
    simulation["shift"] = [{"kind": "noise", "severity": 0.5, "sites": ["PAA"]}]
    with pytest.raises(StudyError, match=r"names 'PAA', which is no site\n  fix: the nearest is 'PA'"):
        gather(
            resolve(tiny_study().plain() | {"simulation": simulation}), tmp_path, tmp_path / "state", lambda *_: None
        )
