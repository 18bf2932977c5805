"""The command: what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from polyclinic.errors import Refused
from polyclinic_simulations.phantom.cli import register

runner = CliRunner()


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return app


def test_json_counts_what_was_written(app: typer.Typer, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    result = runner.invoke(app, ["phantom", str(folder), "--sites", "2", "--patients", "3", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["images"] == {p.name: len(list(p.rglob("*.dcm"))) for p in folder.iterdir()}
    assert set(facts["images"]) == {"north", "east"}


def test_text_names_every_site(app: typer.Typer, tmp_path: Path) -> None:
    result = runner.invoke(app, ["phantom", str(tmp_path / "new"), "--sites", "2", "--patients", "1"])
    assert result.exit_code == 0
    assert "north" in result.stdout and "east" in result.stdout


def test_a_folder_in_use_is_refused_with_exit_code_2(app: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = runner.invoke(app, ["phantom", str(tmp_path)])
    assert isinstance(result.exception, Refused) and result.exception.exit_code == 2


def test_help_shows_an_example(app: typer.Typer) -> None:
    assert "Example: polyclinic phantom" in runner.invoke(app, ["phantom", "--help"]).stdout
