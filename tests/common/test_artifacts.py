import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import polyclinic
from polyclinic.artifacts import (
    FORMAT,
    load_encoder,
    load_images,
    load_tensors,
    save_classifier,
    save_encoder,
    save_tensors,
)
from polyclinic.cohort import build_cohort
from polyclinic.encoders import build_encoder
from polyclinic.errors import CheckpointError, CohortError, StorageError
from polyclinic.model import build_stage
from polyclinic.seeding import forked
from polyclinic.study import resolve

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a": torch.tensor(3, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
}


def study(encoder="resnet18", **images):
    stage = {"kind": "pretrain", "method": "simclr", "rounds": 1}
    return resolve({"study": {"name": "s"}, "images": images, "encoder": {"name": encoder}, "stages": [stage]})


def saved(folder, settings):
    with forked(1):
        encoder = build_encoder(settings.encoder, settings.images).eval()
    save_encoder(folder / "encoder.safetensors", encoder, settings)
    return encoder


def test_tensors_and_metadata_come_back(tmp_path):
    save_tensors(tmp_path / "t.safetensors", TENSORS, {"round": "3", "ä": "ö|\n"})
    tensors, metadata = load_tensors(tmp_path / "t.safetensors")
    assert metadata == {"round": "3", "ä": "ö|\n"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
        assert tensors[name].is_contiguous()


def test_other_programs_read_it_and_theirs_are_read(tmp_path):
    save_tensors(tmp_path / "ours.safetensors", TENSORS, {"k": "v"})
    theirs = load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata()["k"] == "v"
    save_file({"x": torch.ones(3)}, tmp_path / "theirs.safetensors")
    tensors, metadata = load_tensors(tmp_path / "theirs.safetensors")
    assert torch.equal(tensors["x"], torch.ones(3)) and metadata == {}


def test_same_content_same_bytes_in_any_order_and_process(tmp_path):
    metadata = {f"k{k}": str(k) for k in range(20)}
    save_tensors(tmp_path / "a", TENSORS, metadata)
    backwards = dict(reversed(TENSORS.items())), dict(reversed(metadata.items()))
    save_tensors(tmp_path / "b", *backwards)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_loaded_tensor_outlives_its_file(tmp_path):
    path = tmp_path / "t"
    save_tensors(path, {"x": torch.ones(1000)}, {})
    tensor = load_tensors(path)[0]["x"]
    with path.open("r+b") as file:
        file.truncate(16)
    assert tensor.sum() == 1000


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path, share):
    path = tmp_path / "round-0003.safetensors"
    save_tensors(path, {"x": torch.ones(1000)}, {"a": "b"})
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"cannot read round-0003\.safetensors"):
        load_tensors(path)


def test_one_flipped_bit_anywhere_is_refused(tmp_path):
    path = tmp_path / "t"
    save_tensors(path, {"x": torch.ones(16)}, {"round": "3"})
    data = path.read_bytes()
    key = data.index(b"crc32")  # without its key, the file looks like another program's
    for place in set(range(len(data))) - set(range(key, key + 6)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_tensors(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=path.name):
            load_tensors(path)


def test_a_failed_write_leaves_what_stood(tmp_path, monkeypatch):
    path = tmp_path / "t"
    save_tensors(path, {"x": torch.ones(3)}, {})
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError):
        save_tensors(path, {"x": torch.zeros(3)}, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "images"), [("resnet18", {"size": 64, "channels": 3}), ("vit_tiny", {"size": 48, "channels": 1})]
)
def test_an_encoder_comes_back_in_one_line(tmp_path, name, images):
    settings = study(name, **images)
    encoder = saved(tmp_path, settings)
    batch = torch.rand(2, images["channels"], images["size"], images["size"])
    state = torch.random.get_rng_state()
    for path in (tmp_path, str(tmp_path / "encoder.safetensors")):
        loaded = polyclinic.load_encoder(path)
        assert not loaded.training and loaded.dim == encoder.dim
        with torch.no_grad():
            assert torch.equal(loaded(batch), encoder(batch))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_encoder_file_says_what_it_is_and_repeats_itself(tmp_path):
    settings = study(size=64)
    saved(tmp_path, settings)
    first = (tmp_path / "encoder.safetensors").read_bytes()
    metadata = load_tensors(tmp_path / "encoder.safetensors")[1]
    assert metadata["hash"] == settings.hash
    assert json.loads(metadata["images"]) == {"size": 64, "channels": 1, "window": "percentile"}
    saved(tmp_path, settings)
    assert (tmp_path / "encoder.safetensors").read_bytes() == first
    assert str(tmp_path).encode() not in first


GOOD = {
    "format": FORMAT,
    "encoder": '{"name": "vit_tiny", "init": "random", "patch": 8}',
    "images": '{"size": 64, "channels": 1, "window": "percentile"}',
}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "pickle"},
        {"encoder": "not JSON"},
        {"encoder": '{"name": "__import__"}'},
        {"encoder": '{"name": "vit_tiny", "weights": "/etc/passwd"}'},
        {"encoder": '{"name": "vit_tiny", "patch": 7}'},
        {"encoder": "[" * 10_000},
        {"images": '{"size": 1000000000}'},
        {"images": '{"size": 64, "channels": -1}'},
        {"images": ""},
        {},
    ],
)
def test_hostile_metadata_and_foreign_weights_are_refused(tmp_path, change):
    save_tensors(tmp_path / "e.safetensors", {"x": torch.ones(2)}, GOOD | change)
    with pytest.raises(CheckpointError, match=r"e\.safetensors is not an encoder that polyclinic saved"):
        load_encoder(tmp_path / "e.safetensors")


def test_importing_polyclinic_does_not_import_torch():
    code = "import polyclinic, sys; assert 'torch' not in sys.modules and hasattr(polyclinic, '__version__')"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        polyclinic.nothing  # noqa: B018


def test_files_come_as_they_stand_in_a_cohort(tmp_path):
    (tmp_path / "files").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "files" / "a.png")
    settings = study(size=32)
    encoder = saved(tmp_path, settings)
    images = load_images([tmp_path / "files" / "a.png"], like=tmp_path)
    cohort = build_cohort(tmp_path / "files", settings.images, tmp_path / "state", workers=1)
    assert torch.equal(images, cohort.pixels([0]).float() / 255)
    assert encoder(images).shape == (1, encoder.dim)


def test_files_that_are_no_images_are_named_with_the_reason(tmp_path):
    saved(tmp_path, study(size=32))
    (tmp_path / "notes.png").write_text("text")
    for file, why in (("notes.png", "neither DICOM"), ("none.png", "No such file")):
        with pytest.raises(CohortError, match=f"{file}.*{why}"):
            load_images([tmp_path / file], like=tmp_path)
    with pytest.raises(CheckpointError, match="there is no"):
        load_images([tmp_path / "notes.png"], like=tmp_path / "none")


def classifier(folder, multi_label=False):
    stage = {"kind": "finetune", "rounds": 1, "multi_label": multi_label}
    labels = {"labels": {"ill": ["x"], "well": ["y"]}}
    images = {"size": 32}
    settings = resolve({"study": {"name": "s"}, "images": images, "stages": [stage], "evaluation": labels})
    _, module = build_stage(settings, 0)
    save_classifier(folder / "classifier.safetensors", module, settings, settings.stages[0])
    return module.eval()


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_classifier_comes_back_and_gives_probabilities(tmp_path, multi_label):
    module, found = classifier(tmp_path, multi_label), polyclinic.load_classifier(tmp_path)
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, probabilities = module(images), found(images)
    assert found.classes == ["ill", "well"]
    assert torch.equal(probabilities, logits.sigmoid() if multi_label else logits.softmax(dim=1))


def test_an_encoder_is_no_classifier_and_a_missing_one_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no .*classifier\.safetensors"):
        polyclinic.load_classifier(tmp_path)
    saved(tmp_path, study())
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors is not a classifier that polyclinic saved"):
        polyclinic.load_classifier(tmp_path / "encoder.safetensors")
    classifier(tmp_path)
    with pytest.raises(CheckpointError, match=r"classifier\.safetensors is not an encoder that polyclinic saved"):
        polyclinic.load_encoder(tmp_path / "classifier.safetensors")


@pytest.mark.parametrize(
    "classes", ["[]", '["ill", "ill"]', '["ill"]', json.dumps([str(k) for k in range(1_000_000)]), '"ill"', ""]
)
def test_names_of_classes_that_do_not_fit_the_head_are_refused_before_memory_is_taken(tmp_path, monkeypatch, classes):
    classifier(tmp_path)
    tensors, metadata = load_tensors(tmp_path / "classifier.safetensors")
    save_tensors(tmp_path / "classifier.safetensors", tensors, metadata | {"classes": classes})
    monkeypatch.setattr("polyclinic.artifacts.Predictor", None)  # it would be called
    with pytest.raises(CheckpointError, match=r"classifier\.safetensors is not a classifier that polyclinic saved"):
        polyclinic.load_classifier(tmp_path)


def test_a_classifier_without_a_head_is_refused(tmp_path):
    classifier(tmp_path)
    tensors, metadata = load_tensors(tmp_path / "classifier.safetensors")
    del tensors["head.bias"]
    save_tensors(tmp_path / "classifier.safetensors", tensors, metadata | {"classes": "[]"})
    with pytest.raises(CheckpointError, match="is not a classifier"):
        polyclinic.load_classifier(tmp_path)
