"""The outbound ledger: whole after any kill, and every later change is found."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from polyclinic import chain as module
from polyclinic import wire
from polyclinic.chain import LedgerBroken
from polyclinic.errors import StorageError
from polyclinic_client.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Of eight entries."""
    made = Ledger(tmp_path / "ledger")
    for k in range(8):
        made.append({"kind": "train", "round": k, "tensors": [{"name": "w", "norm": float(k)}], "bytes": 4})
    return made


def lines(ledger: Ledger) -> list[str]:
    return (ledger.folder / "ledger.jsonl").read_text().splitlines(keepends=True)


def write(ledger: Ledger, changed: list[str]) -> None:
    (ledger.folder / "ledger.jsonl").write_text("".join(changed))


def test_what_was_written_stands_there_in_order(ledger: Ledger) -> None:
    assert ledger.verify() == 8
    assert [entry["round"] for entry in ledger.entries()] == list(range(8))
    assert [entry["entry"] for entry in ledger.entries()] == list(range(1, 9))


def test_it_is_read_on_from_where_it_was(ledger: Ledger) -> None:
    whole = list(ledger.since(0))
    assert [entry for entry, _ in whole] == list(ledger.entries())
    for number, (_, end) in enumerate(whole, start=1):
        assert [entry["entry"] for entry, _ in ledger.since(end)] == list(range(number + 1, 9))


def test_an_empty_ledger_is_whole(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "none").verify() == 0
    assert list(Ledger(tmp_path / "none").entries()) == []


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "edited": lambda text: [line.replace('"round": 3', '"round": 9') for line in text],
    "removed": lambda text: text[:3] + text[4:],
    "the first removed": lambda text: text[1:],
    "reordered": lambda text: [*text[:2], text[3], text[2], *text[4:]],
    "doubled": lambda text: text[:4] + text[3:],
    "cut short": lambda text: text[:-1],
    "cut short by two": lambda text: text[:-2],
    "emptied": lambda text: [],
    "one added": lambda text: [*text, text[-1].replace('"entry": 8', '"entry": 9')],
    "torn": lambda text: [*text[:-1], text[-1][:20]],
    "not JSON": lambda text: [*text[:4], "\0\n", *text[5:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_ledger_is_found_and_nothing_more_leaves(change: str, ledger: Ledger) -> None:
    write(ledger, CHANGES[change](lines(ledger)))
    with pytest.raises(LedgerBroken):
        ledger.verify()
    if change in ("cut short", "cut short by two", "emptied", "one added", "torn"):
        with pytest.raises(LedgerBroken):
            ledger.append({"kind": "train"})


def test_the_last_entry_changed_is_found_at_the_next(ledger: Ledger) -> None:
    text = lines(ledger)
    write(ledger, [*text[:-1], text[-1].replace('"round": 7', '"round": 9')])
    with pytest.raises(LedgerBroken):
        ledger.append({"kind": "train"})


@pytest.mark.parametrize("moment", ["after the line", "in the line"])
def test_a_power_cut_leaves_a_ledger_that_goes_on(moment: str, ledger: Ledger) -> None:
    end = (ledger.folder / "ledger.end").read_bytes()
    ledger.append({"kind": "train", "round": 8})
    intended = {**json.loads(end), "next": json.loads((ledger.folder / "ledger.end").read_text())["sha256"]}
    (ledger.folder / "ledger.end").write_text(json.dumps(intended))
    if moment == "in the line":
        text = lines(ledger)
        write(ledger, [*text[:-1], text[-1][:-9]])
    ledger.append({"kind": "train", "round": 9})
    rounds = [entry["round"] for entry in ledger.entries()]
    assert rounds == [*range(8), 8, 9] if moment == "after the line" else [*range(8), 9]
    assert ledger.verify() == len(rounds)


def test_a_line_that_was_never_intended_is_not_taken_in(ledger: Ledger) -> None:
    last = lines(ledger)[-1]
    forged = {**json.loads(last), "entry": 9, "before": module._sha(last.rstrip("\n").encode())}
    write(ledger, [*lines(ledger), json.dumps(forged, sort_keys=True) + "\n"])
    for use in (ledger.verify, lambda: ledger.append({"kind": "train"})):
        with pytest.raises(LedgerBroken):
            use()


def test_a_refused_ledger_is_left_as_it_was_found(ledger: Ledger) -> None:
    text = "".join(lines(ledger)).rstrip("\n")  # as an editor may leave it
    (ledger.folder / "ledger.jsonl").write_text(text)
    with pytest.raises(LedgerBroken):
        ledger.append({"kind": "train"})
    assert (ledger.folder / "ledger.jsonl").read_text() == text


@pytest.mark.parametrize("end", ["", "{", "[]", '{"entries": "x", "sha256": 1}'])
def test_a_damaged_end_is_told_as_such(end: str, ledger: Ledger) -> None:
    (ledger.folder / "ledger.end").write_text(end)
    with pytest.raises(LedgerBroken):
        ledger.verify()


def test_many_at_once_each_have_their_place(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda k: ledger.append({"round": k}), range(40)))
    assert ledger.verify() == 40
    assert {entry["round"] for entry in ledger.entries()} == set(range(40))


VICTIM = """
import sys
from pathlib import Path
from polyclinic_client.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for k in range(10**6):
    ledger.append({"round": k})
    print(k, flush=True)
"""


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_what_had_left_is_there(seed: int, tmp_path: Path) -> None:
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, tmp_path / "l"], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    for _ in range(random.Random(seed).randint(1, 30)):
        victim.stdout.readline()
    victim.send_signal(signal.SIGKILL)
    rest = victim.communicate()[0].split()
    ledger = Ledger(tmp_path / "l")
    ledger.append({"round": -1})
    assert ledger.verify() >= len(rest) + 2
    rounds = [entry["round"] for entry in ledger.entries()]
    assert rounds[:-1] == list(range(len(rounds) - 1))


def test_a_full_disk_lets_nothing_leave(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(StorageError):
        ledger.append({"kind": "train"})


def test_the_table_has_a_line_an_entry(ledger: Ledger) -> None:
    table = ledger.to_csv().splitlines()
    assert len(table) == 9
    assert table[0].startswith("entry,time,to,kind,study,stage,round")
    assert table[3].split(",")[6:10] == ["2", "", "1", "4"]


def test_a_reply_is_described_by_tensor_and_figure() -> None:
    reply = wire.Reply("hash", 0, 3, "north", 12, {"loss": 0.5}, {"probe_auc": 0.7})
    update = {"w": np.array([3.0, 4.0], np.float32), "b": np.zeros((1, 2), np.float32)}
    found = json.loads(json.dumps(wire.describe(wire.pack_reply(reply, update))))
    assert (found["study"], found["round"], found["patients"], found["bytes"]) == ("hash", 3, 12, 8 + 64 + 16)
    assert found["metrics"] == {"loss": 0.5, "probe_auc": 0.7}
    assert [(t["name"], t["shape"], t["norm"]) for t in found["tensors"]] == [("w", [2], 5.0), ("b", [1, 2], 0.0)]
