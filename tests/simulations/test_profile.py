"""A profile: AUC by site, by labels, and of the sites themselves, on features of which the answer is known."""

import numpy as np
import pytest

from polyclinic.evaluation import learn_probe
from polyclinic_simulations.profile import FRACTIONS, Half, Profile, profile, together

from ..tiny import tiny_study

RNG = np.random.default_rng(0)


def half(patients: int, apart: float, shift: float = 0.0, images: int = 2) -> Half:
    """Patients that are "a" and "b" in turn, whose first feature tells which by `apart`; the second is the site's."""
    numbers = np.repeat(np.arange(patients), images)
    ill = numbers % 2
    features = RNG.normal(size=(len(numbers), 4)).astype(np.float32)
    features[:, 0] += apart * ill
    features[:, 1] += shift
    return Half(features, np.where(ill == 1, "b", "a"), numbers)


def of(encoded: dict[str, tuple[Half, Half]], held_out: dict[str, tuple[Half, Half]], own: str = "") -> Profile:
    train = together([halves[0] for halves in encoded.values()])
    return profile(learn_probe(*train, ["a", "b"], seed=1), encoded, held_out, tiny_study(), own)


def test_it_tells_good_sites_from_bad_ones_and_whether_sites_are_known() -> None:
    encoded = {"east": (half(60, 4.0), half(60, 4.0)), "west": (half(60, 4.0, 5.0), half(60, 0.0, 5.0))}
    found = of(encoded, {"away": (half(30, 4.0), half(30, 4.0))})
    assert found.at_sites["east"] > 0.95 and found.at_sites["away"] > 0.95
    assert abs(found.at_sites["west"] - 0.5) < 0.15
    assert found.site_auc == pytest.approx(1.0, abs=0.01)
    assert found.own == {}
    assert found.patients == {"east": 60, "west": 60, "away": 60}
    unknown = Half(*half(60, 4.0))
    unknown.classes[10:] = ""
    assert of({"east": (half(60, 4.0), unknown)}, {}).patients == {"east": 5}
    alike = of({name: (half(80, 1.0), half(80, 1.0)) for name in ("east", "west")}, {})
    assert alike.site_auc is not None and abs(alike.site_auc - 0.5) < 0.15
    assert of({"east": (half(20, 4.0), half(20, 4.0))}, {}).site_auc is None


def test_a_site_alone_is_read_by_its_own_probe() -> None:
    backwards = half(60, 4.0)
    flipped = backwards._replace(classes=np.where(backwards.classes == "a", "b", "a"))
    encoded = {"east": (half(60, 4.0), half(60, 4.0)), "west": (flipped, half(60, 4.0))}
    assert of(encoded, {}, "east").own["west"] > 0.95
    assert of(encoded, {}, "west").own["east"] < 0.05


def test_more_labels_do_no_harm_and_none_is_lost_to_patients_who_have_one_late() -> None:
    train, test = half(200, 1.5), half(200, 1.5)
    late = train._replace(classes=np.where(np.arange(len(train.classes)) % 2 == 0, "", train.classes))
    for given in (train, late):
        curve = of({"east": (given, test)}, {}).labels
        assert set(curve) == {f"{fraction:g}" for fraction in (*FRACTIONS, 1)}
        assert curve["1"] > 0.8 and curve["1"] > curve["0.01"] - 0.05


def test_a_class_that_few_labels_lack_leaves_no_point_of_another_task() -> None:
    """Class "c" stands in second images alone, and goes by the class of the first."""
    train, test = half(40, 3.0), half(40, 3.0)
    second = np.arange(len(train.classes)) % 40 == 1
    train = train._replace(classes=np.where(second, "c", train.classes))
    learnt = learn_probe(*train, ["a", "b", "c"], seed=1)
    curve = profile(learnt, {"east": (train, test)}, {}, tiny_study(), "").labels
    assert "1" in curve and "0.01" not in curve
