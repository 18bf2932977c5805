"""The privacy ledger never reads below the truth, and no cap is passed, whatever happens to processes and files."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, tzinfo
from pathlib import Path

import pytest

from polyclinic import chain
from polyclinic.chain import LedgerBroken
from polyclinic.errors import Refused, StorageError
from polyclinic.privacy.accounting import Event, epsilon, rounds_that_fit
from polyclinic.privacy.ledger import BudgetSpent, Cap, Charge, PrivacyLedger, cohort_id

DELTA = 1e-5
CHARGE = Charge("a" * 64, "chest", 0, 1, "m" * 64, "c" * 32, patients=500, noise=1.0, rate=0.05, steps=20)
EVENT = Event(CHARGE.noise, CHARGE.rate, CHARGE.steps)
OTHER = replace(CHARGE, study="b" * 64, name="skin", cohort="d" * 32, noise=2.0, rate=0.1, steps=10)
CAP = Cap(4.0, DELTA)


@pytest.fixture(scope="module")
def fit() -> int:
    """Rounds of CHARGE under CAP."""
    found = rounds_that_fit(CAP.epsilon, DELTA, EVENT)
    assert found > 2
    return found


@pytest.fixture
def ledger(tmp_path: Path) -> PrivacyLedger:
    """Not there yet."""
    return PrivacyLedger(tmp_path / "site" / "privacy")


@pytest.fixture
def used(ledger: PrivacyLedger) -> PrivacyLedger:
    """Of three rounds of two studies, one of them not committed: entries 1, 3 and 5 are reservations."""
    ledger.commit(ledger.reserve(CHARGE, [CAP]), 20)
    ledger.commit(ledger.reserve(OTHER, []), 4)
    ledger.reserve(replace(CHARGE, round=2), [CAP])
    return ledger


def file_of(ledger: PrivacyLedger) -> Path:
    return ledger._chain.folder / "privacy.jsonl"


def test_what_is_reserved_counts_until_less_is_committed(ledger: PrivacyLedger) -> None:
    first = ledger.reserve(CHARGE, [CAP])
    assert ledger.epsilon(DELTA) == epsilon([EVENT], DELTA)
    ledger.commit(first, 15)
    assert ledger.epsilon(DELTA) == epsilon([replace(EVENT, steps=15)], DELTA)
    second = ledger.reserve(CHARGE, [CAP])
    ledger.commit(second, 0)
    assert ledger.events() == [replace(EVENT, steps=15)]
    assert (first, second) == (1, 3)


@pytest.mark.parametrize(
    ("entry", "steps"), [(5, 21), (5, -1), (1, 20), (2, 4), (4, 1), (0, 0), (6, 1), (-1, 1)], ids=str
)
def test_a_commit_that_cannot_be_is_refused_and_changes_nothing(entry: int, steps: int, used: PrivacyLedger) -> None:
    before = file_of(used).read_bytes()
    with pytest.raises(LedgerBroken, match=f"{steps} steps cannot be committed as entry {entry}"):
        used.commit(entry, steps)
    assert file_of(used).read_bytes() == before


def test_studies_and_cohorts_compose(used: PrivacyLedger) -> None:
    ours, theirs = [replace(EVENT, steps=40)], [Event(2.0, 0.1, 4)]
    assert used.events(CHARGE.study) == ours and used.events(OTHER.study) == theirs
    assert used.epsilon(DELTA) == epsilon([*ours, *theirs], DELTA) > used.epsilon(DELTA, CHARGE.study)
    assert used.epsilon(DELTA, "unknown") == 0.0
    chest, skin = used.by_study()
    assert (chest.name, chest.rounds, chest.steps, chest.noise, chest.events) == ("chest", 2, 40, 1.0, ours)
    assert (skin.study, skin.rounds, skin.steps, skin.noise, skin.events) == (OTHER.study, 1, 4, 2.0, theirs)
    assert datetime.fromisoformat(skin.last) <= datetime.fromisoformat(chest.last)


def test_the_ledger_of_many_runs_is_that_of_one_long_one(tmp_path: Path) -> None:
    for number in range(6):
        again = PrivacyLedger(tmp_path)  # as a process that was started anew
        again.commit(again.reserve(replace(CHARGE, round=number, study=f"{number % 2}"), []), 20)
    assert PrivacyLedger(tmp_path).epsilon(DELTA) == epsilon([replace(EVENT, steps=120)], DELTA)


def test_no_round_passes_a_cap(ledger: PrivacyLedger, fit: int) -> None:
    for number in range(fit):
        ledger.reserve(replace(CHARGE, round=number), [CAP])
    with pytest.raises(BudgetSpent) as caught:
        ledger.reserve(CHARGE, [CAP])
    spent = ledger.epsilon(DELTA)
    left = rounds_that_fit(CAP.epsilon, DELTA, replace(EVENT, steps=1), [replace(EVENT, steps=fit * 20)])
    assert f"of 4, {spent:.3f} is spent, and {left} of its 20 steps are left" in str(caught.value)
    assert "polyclinic privacy plan" in caught.value.fix
    assert caught.value.exit_code == 2
    assert spent == epsilon([replace(EVENT, steps=fit * 20)], DELTA) <= CAP.epsilon
    ledger.reserve(replace(CHARGE, steps=left), [CAP])
    assert ledger.epsilon(DELTA) <= CAP.epsilon


def test_the_stricter_cap_wins(used: PrivacyLedger) -> None:
    small, large = Cap(0.5, DELTA), Cap(100.0, DELTA)
    for caps in ([small, large], [large, small], [large, replace(small, study=CHARGE.study)]):
        with pytest.raises(BudgetSpent):
            used.reserve(CHARGE, caps)
    with pytest.raises(BudgetSpent):
        used.reserve(CHARGE, [Cap(used.epsilon(DELTA) * 1.1, 1e-7), large])  # the same number at a smaller delta
    used.reserve(CHARGE, [large, large])


def test_a_cap_of_a_study_is_for_that_study_only(used: PrivacyLedger) -> None:
    room = Cap(epsilon([replace(EVENT, steps=20)], DELTA), DELTA, study="e" * 64)
    fresh = replace(CHARGE, study=room.study)
    used.reserve(fresh, [room])  # whatever the others have spent
    with pytest.raises(BudgetSpent, match="the study may spend"):
        used.reserve(fresh, [room])
    used.reserve(CHARGE, [room])


def test_a_cap_that_was_passed_before_lets_nothing_more_through(used: PrivacyLedger) -> None:
    with pytest.raises(BudgetSpent, match="and 0 of its 1 steps are left"):
        used.reserve(replace(CHARGE, noise=1000.0, rate=1e-6, steps=1), [Cap(0.1, DELTA)])


@pytest.mark.parametrize(
    ("changed", "delta"),
    [({}, 1 / 500), ({}, 0.01), ({"patients": 0}, DELTA), ({"patients": 10**6}, DELTA), ({"noise": 0.0}, DELTA)],
    ids=str,
)
def test_what_promises_nothing_is_not_charged(changed: dict[str, float], delta: float, ledger: PrivacyLedger) -> None:
    with pytest.raises(Refused):
        ledger.reserve(replace(CHARGE, **changed), [Cap(8.0, delta)])  # type: ignore[arg-type]
    assert ledger.verify() == 0


VICTIM = """
import sys, time
from pathlib import Path
from polyclinic.errors import Refused
from polyclinic.privacy.ledger import Cap, Charge, PrivacyLedger
ledger, caps = PrivacyLedger(Path(sys.argv[1])), [Cap(float(cap), 1e-5) for cap in sys.argv[3:]]
while True:
    try:
        print(ledger.reserve({charge!r}, caps), flush=True)
    except Refused:
        break
    time.sleep(float(sys.argv[2]))
"""


def start(ledger: PrivacyLedger, *caps: float, pause_s: float = 0.0) -> subprocess.Popen[str]:
    """A process that reserves rounds of CHARGE until it may no more, and prints each entry."""
    code = VICTIM.format(charge=CHARGE)
    command = [sys.executable, "-c", code, str(ledger._chain.folder), str(pause_s), *map(str, caps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_round_killed_between_reserve_and_commit_counts_in_full(ledger: PrivacyLedger) -> None:
    victim = start(ledger, pause_s=600)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "1\n"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert ledger.epsilon(DELTA) == epsilon([EVENT], DELTA)
    ledger.commit(ledger.reserve(CHARGE, [CAP]), 20)  # it is asked for again
    assert ledger.epsilon(DELTA) == epsilon([EVENT, EVENT], DELTA)


def test_killed_at_any_moment_every_reservation_that_was_answered_is_there(ledger: PrivacyLedger) -> None:
    victim = start(ledger)
    assert victim.stdout is not None
    for _ in range(7):
        victim.stdout.readline()
    victim.send_signal(signal.SIGKILL)
    answered = 7 + len(victim.communicate()[0].split())
    assert ledger.reserve(CHARGE, []) in (answered + 1, answered + 2)
    assert ledger.epsilon(DELTA) >= epsilon([replace(EVENT, steps=20 * (answered + 1))], DELTA)


def test_processes_that_reserve_at_once_never_pass_the_cap_together(ledger: PrivacyLedger, fit: int) -> None:
    processes = [start(ledger, CAP.epsilon) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(int(entry) for answer in answers for entry in answer) == list(range(1, fit + 1))
    assert ledger.epsilon(DELTA) <= CAP.epsilon


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "fewer steps": lambda text: [line.replace('"steps": 20', '"steps": 2') for line in text],
    "more noise": lambda text: [text[0].replace('"noise": 1.0', '"noise": 9.0'), *text[1:]],
    "removed": lambda text: text[:2] + text[4:],
    "reordered": lambda text: [text[2], text[3], text[0], text[1], text[4]],
    "truncated": lambda text: text[:-1],
    "torn": lambda text: [*text[:-1], text[-1][:30]],
    "emptied": lambda text: [],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_ledger_answers_nothing(change: str, used: PrivacyLedger) -> None:
    file_of(used).write_text("".join(CHANGES[change](file_of(used).read_text().splitlines(keepends=True))))
    for use in (
        used.verify,
        used.by_study,
        lambda: used.epsilon(DELTA),
        lambda: used.reserve(CHARGE, []),
        lambda: used.commit(5, 1),
    ):
        with pytest.raises(LedgerBroken):
            use()


def test_a_clock_set_back_changes_nothing(used: PrivacyLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    before = used.epsilon(DELTA)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Clock":
            return cls(1999, 1, 1, tzinfo=tz)

    monkeypatch.setattr(chain, "datetime", Clock)
    used.reserve(CHARGE, [CAP])
    assert used.by_study()[0].last.startswith("1999-01-01")
    assert used.epsilon(DELTA) > before
    with pytest.raises(BudgetSpent):
        used.reserve(CHARGE, [Cap(before, DELTA)])


def test_a_restored_backup_is_noticed_against_the_newest_head(used: PrivacyLedger, tmp_path: Path) -> None:
    folder = used._chain.folder
    shutil.copytree(folder, tmp_path / "backup")
    early = used.head()
    used.commit(5, 20)
    late = used.head()
    assert used.holds(early) and used.holds(late)
    shutil.rmtree(folder)
    assert not used.holds(early)
    shutil.copytree(tmp_path / "backup", folder)
    assert used.verify() == 5  # whole in itself
    assert used.holds(early) and not used.holds(late)
    used.commit(5, 19)
    assert not used.holds(late)


@pytest.mark.parametrize("head", ["", "5", ":", "x:y", "-1:" + "0" * 64, "²:", "5:" + "0" * 64])
def test_a_head_that_is_none_is_not_held(head: str, used: PrivacyLedger) -> None:
    assert not used.holds(head)


def test_a_ledger_of_a_newer_version_is_refused(used: PrivacyLedger) -> None:
    used._chain.append({"version": 2, "kind": "refund", "steps": 20})
    for use in (
        lambda: used.epsilon(DELTA),
        used.by_study,
        lambda: used.reserve(CHARGE, []),
        lambda: used.commit(5, 1),
    ):
        with pytest.raises(Refused, match="entry 6 of the privacy ledger was written by a newer Polyclinic"):
            use()
    assert used.verify() == 6


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_on_a_full_disk_nothing_is_reserved(number: int, used: PrivacyLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    before = used.epsilon(DELTA)

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(chain.os, "fsync", full)
        for use in (lambda: used.reserve(CHARGE, [CAP]), lambda: used.commit(5, 1)):
            with pytest.raises(StorageError):
                use()
    assert used.epsilon(DELTA) == before
    used.commit(5, 20)


@pytest.mark.parametrize("made", [False, True])
def test_in_a_folder_that_is_read_only_nothing_is_reserved(made: bool, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    if made:
        PrivacyLedger(site / "privacy").reserve(CHARGE, [])
    for path in (*site.rglob("*"), site):
        path.chmod(0o555 if path.is_dir() else 0o444)
    child = os.fork()
    if child == 0:
        code = 2
        try:
            os.chdir(site)
            if os.geteuid() == 0:
                os.setuid(65534)  # whom modes bind
            PrivacyLedger(Path("privacy")).reserve(CHARGE, [])
        except StorageError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    site.chmod(0o755)


def test_ten_thousand_entries_are_read_and_decided_on_in_a_second(ledger: PrivacyLedger) -> None:
    ledger.reserve(CHARGE, [CAP])  # its divergences are computed once a process
    folder = file_of(ledger).parent
    pair = {"version": 1, "kind": "commit", "steps": 1}, {"version": 1, "kind": "reserve", **vars(CHARGE)}
    lines, last = [], chain._sha(file_of(ledger).read_bytes().rstrip(b"\n"))
    for number in range(2, 10_001):
        entry = {"entry": number, "time": "2026-01-01T00:00:00+00:00", **pair[number % 2], "before": last}
        entry |= {} if number % 2 else {"reserved": number - 1}
        lines.append(json.dumps(entry, sort_keys=True))
        last = chain._sha(lines[-1].encode())
    with file_of(ledger).open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))
    (folder / "privacy.end").write_text(json.dumps({"entries": 10_000, "sha256": last}))
    started = time.perf_counter()
    assert ledger.reserve(CHARGE, [Cap(100.0, DELTA), Cap(100.0, DELTA, CHARGE.study)]) == 10_001
    assert time.perf_counter() - started < 1
    assert ledger.events() == [replace(EVENT, steps=5_020)]


def test_a_cohort_is_known_by_its_patients_and_the_salt() -> None:
    whole = cohort_id(b"salt", ["b", "a", "c"])
    assert whole == cohort_id(b"salt", ["c", "b", "a", "a"])
    assert len({whole, cohort_id(b"pepper", ["a", "b", "c"]), cohort_id(b"salt", ["a", "b"])}) == 3
    assert len(whole) == 32
