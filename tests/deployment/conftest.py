"""The consortium that all tests here share, and what is shown of it when a test fails or the tests end."""

import shutil
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from .consortium import SITES, Consortium, healthy
from .processes import until
from .runs import finished

SHOWN_LINES = 15
"""Of each of the members' logs, where a test fails."""
STUDIES = {
    "honest": ("vit_tiny", 2, ["mae", "simclr"]),
    "distilled": ("vit_tiny", 1, ["sssd", "supervised"]),
    "levelled": ("resnet18", 1, ["micle", "mlvicx", "supervised"]),
}
"""{study: (encoder, rounds of the first method, methods)}: together, every method that there is."""
MADE: list[Consortium] = []
"""What the fixture has made, whether or not it started."""


@pytest.fixture(scope="session")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """Enrolled, joined and started. Without nginx it fails: nothing here is shown by leaving the gateway out."""
    assert shutil.which("nginx"), "nginx is not installed"
    made = Consortium(tmp_path_factory.mktemp("consortium"))
    MADE.append(made)
    made.start("coordinator", *SITES)
    try:
        until(lambda: healthy(made), 60, "the gateway")
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def undisturbed(consortium: Consortium) -> Callable[[str], tuple[Path, Path]]:
    """Gives (deployed, simulated) run directories of one of STUDIES that nothing disturbed, made once."""

    @cache
    def runs(name: str) -> tuple[Path, Path]:
        encoder, rounds, methods = STUDIES[name]
        study = consortium.study(name, rounds, encoder=encoder, methods=methods)
        consortium.approve(study)
        run = consortium.launch(study)
        finished(run)
        return run, consortium.simulate(study)

    return runs


@pytest.fixture(scope="session")
def honest(undisturbed: Callable[[str], tuple[Path, Path]]) -> tuple[Path, Path]:
    """Those of the study that the other tests spoil, kill and revoke in."""
    return undisturbed("honest")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows which members have been stopped, or ended with what code, and what each has told last."""
    report = yield
    for made in MADE if report.failed else []:
        for name in ("coordinator", *SITES):
            process = made.processes.get(name)
            ended = ": stopped" if process is None else "" if process.poll() is None else f": {process.returncode}"
            for path in (made.folder / f"{name}.log", *sorted((made.folder / name / "logs").glob("*.log"))):
                last = path.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
                report.sections.append((f"{name}{ended}, {path.name}", "\n".join(last)))
    return report


RECOVERIES: list[tuple[str, str, float, int, bool]] = []
"""(fault, moment, seconds until the study has got on, rounds redone, whether the bits are those undisturbed)."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What `make chaos` shows: every fault, and how the study got over it."""
    if RECOVERIES:
        terminalreporter.section("faults")
    for fault, moment, seconds, redone, same in RECOVERIES:
        told = f"recovered in {seconds:5.1f} s, {redone} rounds redone, {'same' if same else 'OTHER'} bits"
        terminalreporter.write_line(f"{fault:24} {moment:14} {told}")
