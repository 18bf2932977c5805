"""Modules and the tensors that travel: alike wherever they are built, and checked when they are put back."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from polyclinic.encoders import ENCODERS
from polyclinic.model import build_stage, encoder_of, initial_tensors, load_tensors, shared_tensors
from polyclinic.wire import Malformed, digest

from ..tiny import SIMCLR, TinyEncoder, same_bits, tiny_study

STUDY = tiny_study(stages=[SIMCLR, {**SIMCLR, "projection": 4}])


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
    yield


def test_initial_tensors_are_the_same_wherever_they_are_made() -> None:
    one = initial_tensors(STUDY, 0, None)
    torch.manual_seed(123)
    torch.rand(10)
    state = torch.random.get_rng_state()
    assert same_bits(one, initial_tensors(STUDY, 0, None))
    assert torch.equal(state, torch.random.get_rng_state())
    assert list(one) == sorted(one)
    assert all(value.dtype == np.float32 for value in one.values())
    assert digest(one) != digest(initial_tensors(tiny_study(study={"name": "tiny", "seed": 4}), 0, None))


def test_the_next_stage_keeps_the_encoder_and_has_fresh_heads() -> None:
    trained = {name: value + 1 for name, value in initial_tensors(STUDY, 0, None).items()}
    follow = initial_tensors(STUDY, 1, trained)
    fresh = initial_tensors(STUDY, 1, None)
    for name, value in follow.items():
        if name.startswith("encoder."):
            assert np.array_equal(value, trained[name])
        else:
            assert np.array_equal(value, fresh[name])
    assert follow["head.2.weight"].shape == (4, 8)


def test_heads_of_equal_stages_differ() -> None:
    twice = tiny_study(stages=[SIMCLR, SIMCLR])
    one, two = initial_tensors(twice, 0, None), initial_tensors(twice, 1, None)
    assert np.array_equal(one["encoder.conv.weight"], two["encoder.conv.weight"])
    assert not np.array_equal(one["head.0.weight"], two["head.0.weight"])


def test_tensors_come_back_from_a_module_as_they_were_put_in() -> None:
    method, module = build_stage(STUDY, 0)
    tensors = {name: value * 2 + 1 for name, value in shared_tensors(method, module).items()}
    load_tensors(module, tensors)
    copied = shared_tensors(method, module)
    assert same_bits(copied, tensors)
    load_tensors(module, {name: value * 0 for name, value in tensors.items()})
    assert same_bits(copied, tensors), "what was handed out changed with the module"


@pytest.mark.parametrize(
    "hostile", [{"encoder.nothing": np.zeros(1, np.float32)}, {"encoder.out.bias": np.zeros(9, np.float32)}]
)
def test_tensors_that_the_module_has_not_are_malformed(hostile: dict[str, np.ndarray]) -> None:
    with pytest.raises(Malformed, match="the module has no tensor 'encoder"):
        load_tensors(build_stage(STUDY, 0)[1], hostile)


def test_the_encoder_alone() -> None:
    tensors = {name: value + 1 for name, value in initial_tensors(STUDY, 0, None).items()}
    trained, untrained = encoder_of(STUDY, tensors), encoder_of(STUDY, None)
    assert not trained.training
    for name, value in untrained.state_dict().items():
        assert torch.equal(trained.state_dict()[name], torch.from_numpy(tensors[f"encoder.{name}"]))
        assert torch.equal(value + 1, trained.state_dict()[name])
