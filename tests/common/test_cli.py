"""The command starts fast, finds its groups, and ends every error as two lines and an exit code."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from polyclinic import __version__, cli
from polyclinic.errors import QuorumLost, StudyError
from polyclinic.study import load_study

STUDY = """
[study]
name = "small"
[[stages]]
kind = "pretrain"
method = "simclr"
rounds = 2
[simulation]
sites = 3
cohort = "images"
"""


class Group:
    """An installed package that adds one command, `go`, which does `action`."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.name, self.action = "elsewhere", action

    def load(self) -> Callable[[typer.Typer], Any]:
        return lambda app: app.command("go")(self.action)


class BrokenGroup:
    """An installed package that lacks a module."""

    name = "broken"

    def load(self) -> None:
        raise ModuleNotFoundError("No module named 'gone'")


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study file, and no installed commands but those that look at one."""
    installed(monkeypatch)
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    return path


def installed(monkeypatch: pytest.MonkeyPatch, *groups: Group | BrokenGroup) -> None:
    study = type("Entry", (), {"name": "study", "load": lambda self: cli.register})()
    monkeypatch.setattr(cli, "entry_points", lambda group: [study, *groups])
    monkeypatch.delenv(cli.DEBUG, raising=False)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (StudyError("rounds is -1", "give at least 1"), 2, "error: rounds is -1\n  fix: give at least 1\n"),
        (QuorumLost("all features are equal", "lower the rate"), 1, "error: all features are equal\n  fix: lower the"),
        (
            PermissionError(13, "Permission denied", "/x/y"),
            1,
            "error: Permission denied: /x/y\n  fix: see that you may",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted; what was finished is kept"),
        (typer.Abort(), 130, "error: interrupted"),
        (
            ValueError("bad luck"),
            1,
            "error: unexpected ValueError: bad luck\n  fix: see the traceback with `polyclinic --d",
        ),
        (typer.Exit(1), 1, ""),
    ],
)
def test_an_error_ends_as_problem_fix_and_exit_code(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch, Group(raising(error)))
    assert cli.run(["go"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(said)
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("ask", ["flag", "environment"])
def test_the_traceback_is_shown_on_request(
    ask: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch, Group(raising(ValueError("bad luck"))))
    monkeypatch.setenv(cli.DEBUG, "1" if ask == "environment" else "")
    assert cli.run(["--debug", "go"] if ask == "flag" else ["go"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stdy"], "No such command 'stdy'"),
        (["study", "shw"], "Did you mean 'show'?\n  fix: `polyclinic study --help`"),
        (["study", "show"], "Missing argument 'FILE'"),
        (["study", "show", "--hsh", "x"], "No such option: --hsh"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch)
    assert cli.run(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_group_that_does_not_load_is_reported_and_the_others_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch, BrokenGroup(), Group(lambda: print("done")))
    assert cli.run(["go"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "done\n"
    assert "the commands of 'broken' did not load: ModuleNotFoundError: No module named 'gone'" in printed.err


def test_the_command_is_named_as_it_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "on-path"))
    for folder in ("on-path", ".venv/bin", "with blank"):
        script = tmp_path / folder / "polyclinic"
        script.parent.mkdir(parents=True)
        script.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    for called, said in (
        (".venv/bin/polyclinic", ".venv/bin/polyclinic"),
        (str(tmp_path / ".venv/bin/polyclinic"), ".venv/bin/polyclinic"),
        (str(tmp_path / "with blank/polyclinic"), "'with blank/polyclinic'"),
        ("/opt/polyclinic", "/opt/polyclinic"),
        (str(tmp_path / "on-path/polyclinic"), "polyclinic"),
        ("/lib/polyclinic/__main__.py", ".venv/bin/python -m polyclinic"),
        ("polyclinic", "./polyclinic"),
        ("-c", "polyclinic"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        assert cli.program() == said


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    installed(monkeypatch)
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"polyclinic {__version__}\n"


def test_a_group_alone_shows_its_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    installed(monkeypatch)
    assert cli.run(["study"]) == 2
    assert "show" in "".join(capsys.readouterr())


def test_study_show_writes_every_default_out_as_the_same_study(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["study", "show", str(study)]) == 0
    shown = capsys.readouterr().out
    assert tomllib.loads(shown)["stages"][0]["temperature"] == 0.1
    study.write_text(shown)
    assert cli.run(["study", "show", str(study)]) == 0
    assert capsys.readouterr().out == shown


def test_study_show_json_and_hash(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_study(study)
    assert cli.run(["study", "show", str(study), "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown == loaded.canonical() + "\n"
    assert "simulation" not in json.loads(shown)
    assert cli.run(["study", "show", str(study), "--hash"]) == 0
    assert capsys.readouterr().out == loaded.hash + "\n"


def test_study_show_refuses_a_bad_study(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study.write_text(STUDY.replace("rounds = 2", "rounds = -2"))
    assert cli.run(["study", "show", str(study)]) == 2
    assert capsys.readouterr().err == f"error: {study}: stages.0.rounds is -2\n  fix: give at least 1\n"


def test_study_show_refuses_a_missing_file(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study.unlink()
    assert cli.run(["study", "show", str(study)]) == 2
    assert "No such file" in capsys.readouterr().err


def test_help_loads_every_installed_group_quickly_and_without_torch() -> None:
    code = (
        "import sys, time\nfrom polyclinic.cli import run\ncode = run(['--help'])\n"
        "print(code, 'torch' in sys.modules, time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    exit_code, torch, seconds = done.stdout.splitlines()[-1].split()
    assert (exit_code, torch, done.stderr) == ("0", "False", "")
    assert float(seconds) < 0.9


def test_a_reader_that_leaves_ends_the_command_quietly(study: Path) -> None:
    command = [sys.executable, "-c", "from polyclinic.cli import main; main()", "study", "show", str(study)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, "")
