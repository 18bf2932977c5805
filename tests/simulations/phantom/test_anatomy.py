"""What is drawn: one patient's images show one anatomy, findings take air where they lie, pixels alone say little."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from polyclinic.evaluation.probes import linear_probe
from polyclinic_simulations.phantom import findings
from polyclinic_simulations.phantom.age import draw_age
from polyclinic_simulations.phantom.anatomy import Anatomy, Pose
from polyclinic_simulations.phantom.difficulty import SHARES
from polyclinic_simulations.phantom.findings import draw_finding, draw_labels
from polyclinic_simulations.phantom.render import render
from polyclinic_simulations.phantom.scanner import Scanner
from polyclinic_simulations.phantom.shapes import Texture, bone, chord, ellipse, segment

STRAIGHT = Pose("PA", turn=0.0, roll=0.0, shift=(0.0, 0.0), zoom=1.0, breath=0.0, facing=1)
ILL = [label for label in SHARES if label != "normal"]


def draw(seed: int, label: str, pose: Pose) -> NDArray[np.floating]:
    """Patient `seed` with `label`, without devices (that generator draws none)."""
    anatomy = Anatomy.draw(np.random.default_rng(seed))
    finding = draw_finding(label, np.random.default_rng(seed + 1))
    return render(anatomy, finding, pose, 96, 96, np.random.default_rng(0))


def likeness(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_images_of_one_patient_show_the_same_anatomy() -> None:
    breathing = replace(STRAIGHT, breath=6.0, turn=0.03)
    own = [likeness(draw(k, "normal", STRAIGHT), draw(k, "normal", breathing)) for k in range(6)]
    others = [likeness(draw(k, "normal", STRAIGHT), draw(k + 1, "normal", STRAIGHT)) for k in range(6)]
    assert min(own) > max(others)


def test_a_lateral_looks_unlike_a_pa() -> None:
    lateral = replace(STRAIGHT, view="LATERAL")
    assert likeness(draw(0, "normal", STRAIGHT), draw(0, "normal", lateral)) < 0.8
    turned = draw(0, "normal", replace(lateral, facing=-1))
    assert np.abs(draw(0, "normal", lateral) - turned).max() > 10


@pytest.mark.parametrize("view", ["PA", "LATERAL"])
@pytest.mark.parametrize("label", ILL)
def test_a_finding_takes_air_in_both_views(label: str, view: str) -> None:
    pose = replace(STRAIGHT, view=view)
    for seed in range(4):
        gained = draw(seed, label, pose) - draw(seed, "normal", pose)
        assert gained.min() >= -1e-2
        assert (gained > 5).mean() > 0.01


def test_an_effusion_hides_the_diaphragm_and_a_nodule_does_not_reach_it() -> None:
    fluid = draw(2, "effusion", STRAIGHT) - draw(2, "normal", STRAIGHT)
    balls = draw(2, "nodule", STRAIGHT) - draw(2, "normal", STRAIGHT)
    rows = np.arange(96)[:, None]
    assert (fluid * rows).sum() / fluid.sum() > (balls * rows).sum() / balls.sum() + 8


def test_maps_stay_in_single_precision() -> None:
    for view in ("PA", "LATERAL"):
        for label in SHARES:
            assert draw(1, label, replace(STRAIGHT, view=view)).dtype == np.float32


def test_labels_come_in_the_shares_asked_for() -> None:
    labels = draw_labels(60, np.random.default_rng(0))
    assert {label: labels.count(label) / 60 for label in SHARES} == pytest.approx(SHARES)
    assert labels != draw_labels(60, np.random.default_rng(1))
    assert len(draw_labels(7, np.random.default_rng(0))) == 7


def test_age_shows_in_aorta_and_bones_and_goes_with_effusions() -> None:
    rng = np.random.default_rng(0)
    anatomies = [Anatomy.draw(rng) for _ in range(3000)]
    normal, ill = (np.array([draw_age(each, label, rng) for each in anatomies]) for label in ("normal", "effusion"))
    signs = np.array([[each.aorta, each.mineral] for each in anatomies]).T
    whole = np.sqrt(9**2 + 9**2 + 7**2)  # standard deviation before it is cut to 18 and 89
    assert normal.mean() == pytest.approx(55.5, abs=1)  # 56 in completed years
    assert normal.std() == pytest.approx(whole, rel=0.05)
    assert np.corrcoef(normal, signs[0])[0, 1] == pytest.approx(9 / whole, abs=0.05)
    assert np.corrcoef(normal, signs[1])[0, 1] == pytest.approx(-9 / whole, abs=0.05)
    assert 6.5 < ill.mean() - normal.mean() < 8
    assert normal.min() == 18 and normal.max() == ill.max() == 89


def test_solids_have_the_paths_of_geometry() -> None:
    x, y = np.float32([[0.0, 3.0, 5.0, 6.0]]), np.zeros((1, 4), np.float32)
    assert chord(x / 5) == pytest.approx(np.sqrt(np.maximum(25 - x**2, 0)) / 5)
    turned = ellipse(x, y, (0.0, 0.0), (5.0, 2.0), np.pi / 2)
    assert turned == pytest.approx(ellipse(y, x, (0.0, 0.0), (5.0, 2.0)), abs=1e-6)
    assert bone(np.float32([0.0, 4.9, 5.1]), 5.0) == pytest.approx([4.5, 1.99, 0], abs=0.01)
    distance, along = segment(x, y + 2, (0.0, 0.0), (4.0, 0.0))
    assert distance[0] == pytest.approx([2, 2, np.hypot(1, 2), np.hypot(2, 2)])
    assert along[0] == pytest.approx([0, 0.75, 1, 1])


def test_texture_repeats_and_meets_its_table() -> None:
    texture = Texture.draw(np.random.default_rng(0), 8)
    whole = np.arange(8, dtype=np.float32)
    u, v = np.meshgrid(whole, whole)
    assert np.array_equal(texture(u, v), texture.table)
    assert texture(u + 8.25, v - 16.5) == pytest.approx(texture(u + 0.25, v - 0.5))


def film(label: str, scanner: Scanner, rng: np.random.Generator) -> NDArray[np.floating]:
    """(256,) grey levels on 16 x 16 pixels of one image of another patient."""
    water = render(Anatomy.draw(rng), draw_finding(label, rng), Pose.draw(rng, "PA"), 96, 96, rng)
    grey = scanner.expose(water, 1, rng) / (2**scanner.bits - 1)
    return (1 - grey if scanner.inverted else grey).reshape(16, 6, 16, 6).mean(axis=(1, 3)).ravel()


def pixel_auc(rng: np.random.Generator) -> float:
    labels = np.array(draw_labels(240, rng))
    scanner = Scanner.of("north", 0, 0)
    x, patients = np.stack([film(str(label), scanner, rng) for label in labels]), np.arange(240)
    train, test = patients < 170, patients >= 170
    return linear_probe(
        x[train], labels[train], patients[train], x[test], labels[test], patients[test], seed=0
    ).auc  # fmt: skip


def test_a_straight_line_on_pixels_does_poorly_but_not_when_the_finding_is_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 0.5 < pixel_auc(np.random.default_rng(0)) < 0.78
    monkeypatch.setattr(findings, "FLUID_HEIGHT", (0.6, 0.7))
    monkeypatch.setattr(findings, "PATCH_DENSITY", 1.0)
    monkeypatch.setattr(findings, "NODULE_DIAMETER", (60.0, 80.0))
    assert pixel_auc(np.random.default_rng(0)) > 0.82
