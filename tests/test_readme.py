"""What the README tells its readers to type is there."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18  # type: ignore[import-untyped]
from typer.testing import CliRunner

from polyclinic.artifacts import load_tensors
from polyclinic.cli import build
from polyclinic.encoders import build_encoder
from polyclinic.encoders.weights import adopt
from polyclinic.errors import StudyError
from polyclinic.study import Encoder, Images, parse_study
from polyclinic_simulations.sweep.grid import read_grid

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = re.findall(r"^    \.venv/bin/polyclinic (.+?)(?: +#.*)?$", README, re.MULTILINE)
STUDIES = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_knows_its_options(line: str) -> None:
    words = line.split()
    names = list(itertools.takewhile(lambda word: re.fullmatch("[a-z]+", word), words))
    help_of = CliRunner().invoke(build(), [*names, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert help_of.exit_code == 0, names
    assert all(option in help_of.output for option in words if option.startswith("--"))


def test_the_studies_are_studies(tmp_path: Path) -> None:
    first, last, dealt, unreliable, grid, promise = STUDIES
    assert [stage.method for stage in parse_study(first, "README").stages] == ["simclr"]
    whole = parse_study(first + last, "README")
    assert [stage.method for stage in whole.stages] == ["simclr", "supervised"]
    assert whole.evaluation.classes == ["ill", "well"]
    pretraining = first[: first.index("[[simulation.site]]")]
    shifts = parse_study(pretraining + dealt, "README").simulation.shift
    assert [shift.kind for shift in shifts] == ["noise", "response"]
    faults = parse_study(pretraining + unreliable, "README").simulation.fault
    assert [fault.kind for fault in faults] == ["dropout", "sign_flip"]
    (tmp_path / "grid.toml").write_text(pretraining + unreliable + grid)
    assert len(read_grid(tmp_path / "grid.toml").cells) == 2 * 2 * 2 * 3
    masked = first.replace('"simclr"', '"mae"') + '[encoder]\nname = "vit_tiny"\n'
    assert parse_study(masked + promise, "README").privacy.mode == "patient"
    with pytest.raises(StudyError, match="not separable"):
        parse_study(first + promise, "README")


def test_weights_become_safetensors_as_it_says(tmp_path: Path) -> None:
    weights = resnet18().state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    [line] = re.findall(r"^    \.venv/bin/python (-c '.+\.safetensors)$", README, re.MULTILINE)
    subprocess.run([sys.executable, *shlex.split(line)], cwd=tmp_path, check=True)
    found, _ = load_tensors(tmp_path / "resnet18.safetensors")
    encoder = build_encoder(Encoder(), Images(size=32))
    adopt(encoder, found, "torchvision")
    assert torch.equal(encoder.state_dict()["layer4.1.conv2.weight"], weights["layer4.1.conv2.weight"])


def test_the_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert all((root / link).exists() for link in links)
