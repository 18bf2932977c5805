"""What a site keeps between messages: found again, forgotten in time, and never trusted when damaged."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polyclinic_client.state import KEPT, SiteState


def keep(state: SiteState, round: int, stage: int = 0, model: str = "m", own: bool = False) -> None:
    kept = tensors(100 * round) if own else None
    state.keep(round, stage, tensors(round), {"model": model, "facts": "{}"}, tensors(-round), kept)


def tensors(value: int) -> dict[str, Tensor]:
    return {"w": torch.full((3,), float(value)), "w.step": torch.tensor(float(value))}


def same(found: dict[str, Tensor] | None, value: int) -> bool:
    return found is not None and all(torch.equal(found[name], tensor) for name, tensor in tensors(value).items())


def test_an_update_comes_back_for_the_tensors_it_was_trained_from_only(tmp_path: Path) -> None:
    state = SiteState(tmp_path / "new")
    assert state.update(1, "m") is None
    keep(state, 1)
    found = state.update(1, "m")
    assert found is not None
    assert same(found[0], 1)
    assert state.update(1, "other") is None
    assert state.update(2, "m") is None


def test_moments_belong_to_a_round_and_its_stage(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    keep(state, 3, stage=1)
    assert same(state.moments_before(4, 1), -3)
    assert state.moments_before(4, 0) is None
    assert state.moments_before(3, 1) is None


def test_a_site_that_missed_a_round_goes_on_from_the_one_before_it(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    keep(state, 9_999)
    keep(state, 10_000)
    assert same(state.moments_before(10_002, 0), -10_000)
    assert same(state.moments_before(10_000, 0), -9_999)


def test_a_round_that_is_repeated_after_missed_ones_starts_from_what_it_started_from(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    for round in (1, 2, 4, 9, 9):
        keep(state, round, own=True)
    assert same(state.moments_before(9, 0), -4)
    assert same(state.own_before(9), 400)
    assert same(state.own_before(10), 900)


def test_what_is_the_sites_own_goes_on_from_stage_to_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = SiteState(tmp_path)
    assert state.own_before(1) == {}
    for round, stage in ((1, 0), (2, 1)):
        keep(state, round, stage, own=True)
    assert state.moments_before(2, 1) is None
    assert same(state.own_before(2), 100)
    (tmp_path / "own-0002.safetensors").write_bytes(b"")
    assert same(state.own_before(3), 100)
    assert "the site's own tensors after round 2 are damaged" in caplog.text


def test_the_last_rounds_are_kept_and_what_a_kill_left_half_written_goes(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    for round in range(9_997, 10_002):
        (tmp_path / f".update-{round}.safetensors.17.tmp").write_bytes(b"half")
        keep(state, round)
    kept = [f"{kind}-{round:04d}.safetensors" for kind in ("moments", "update") for round in (10_000, 10_001)]
    assert len(kept) == 2 * KEPT
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


@pytest.mark.parametrize("kind", ["update", "moments"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_damaged_file_is_as_if_the_round_had_not_been_made(kind: str, share: float, tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    keep(state, 1)
    path = tmp_path / f"{kind}-0001.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert (state.update(1, "m") is None) == (kind == "update")
    assert (state.moments_before(2, 0) is None) == (kind == "moments")


def test_moments_that_a_power_cut_left_under_a_newer_name_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that was written over keeps its old content, with a hash that fits, until the disk has the new one."""
    state = SiteState(tmp_path)
    for round in (1, 2):
        keep(state, round)
    shutil.copyfile(tmp_path / "moments-0001.safetensors", tmp_path / "moments-0003.safetensors")
    assert same(state.moments_before(4, 0), -2)
    assert "after round 3 are damaged" in caplog.text


def test_a_note_of_an_unfinished_round_is_found_by_its_own_round_tensors_and_version_and_goes_with_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SiteState(tmp_path / "new")
    midway = state.midway(2, "m")
    assert midway.load() is None
    midway.save(tensors(5))
    assert same(state.midway(2, "m").load(), 5)
    assert state.midway(2, "other").load() is None
    assert state.midway(3, "m").load() is None
    data = midway.path.read_bytes()
    midway.path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert midway.load() is None
    midway.path.write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr("polyclinic_client.state.__version__", "another")
        assert midway.load() is None
    keep(state, 2)
    assert not midway.path.exists()
