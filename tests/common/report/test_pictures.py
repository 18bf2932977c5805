import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.evaluation import NotMeasurable
from polyclinic.report import embedding_table, save_views_figure


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 96, 224])
def test_views_stand_beside_their_originals(tmp_path, channels, size):
    originals, *views = torch.rand(4, 5, channels, size, size)
    save_views_figure(tmp_path / "views.png", originals, views)
    factor = max(1, 96 // size)
    cell = factor * size + 4
    with Image.open(tmp_path / "views.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (5 * cell - 4, 4 * cell - 4, 4)
    for column, tensor in enumerate([originals, *views]):
        for row in range(5):
            got = sheet[row * cell :, column * cell :][: factor * size : factor, : factor * size : factor]
            assert (got[..., 3] == 255).all()
            expected = tensor[row].expand(3, -1, -1).permute(1, 2, 0).numpy() * 255
            assert np.abs(got[..., :3] - expected).max() <= 0.51
    assert (sheet[cell - 4 : cell, :, 3] == 0).all()


def groups(images):
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b"])[np.arange(images) % 2]
    features = rng.normal(size=(images, 20)).astype(np.float32) + 6 * (labels == "a")[:, None]
    return features, np.array(["north", "south", "west"])[np.arange(images) % 3], labels


def test_the_map_keeps_groups_apart_and_repeats_itself():
    features, sites, labels = groups(60)
    table = embedding_table(features, sites, labels, seed=3)
    assert list(table.columns) == ["x", "y", "site", "label"]
    assert table["site"].tolist() == sites.tolist() and table["label"].tolist() == labels.tolist()
    centres = table.groupby("label")[["x", "y"]].mean()
    spread = table.groupby("label")[["x", "y"]].std().to_numpy().max()
    assert np.linalg.norm(centres.loc["a"] - centres.loc["b"]) > 2 * spread
    assert embedding_table(features, sites, labels, seed=3).equals(table)


def test_a_large_cohort_is_sampled(monkeypatch):
    monkeypatch.setattr("polyclinic.report.pictures.MAX_POINTS", 50)
    features, sites, labels = groups(400)
    table = embedding_table(features, sites, labels, seed=2**62 + 1)
    assert len(table) == 50 and set(table["site"]) == {"north", "south", "west"}


@pytest.mark.parametrize("images", [0, 1, 3, 4, 5])
def test_few_images_have_a_place(images):
    table = embedding_table(*groups(images), seed=0)
    assert len(table) == images and np.isfinite(table[["x", "y"]].to_numpy(float)).all()


def test_a_collapsed_encoder_has_one_place_and_a_broken_one_none():
    _, sites, labels = groups(40)
    assert (embedding_table(np.ones((40, 8)), sites, labels, seed=0)[["x", "y"]] == 0).all().all()
    with pytest.raises(NotMeasurable, match="not finite"):
        embedding_table(np.full((40, 8), np.nan), sites, labels, seed=0)
