"""The chain of entries: who decides on one is alone and sees them all, and a head tells an old copy from the newest."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from polyclinic.chain import START, Chain, Entry, LedgerBroken


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """Of five entries."""
    made = Chain(tmp_path / "book", "book")
    for k in range(5):
        assert made.append({"k": k}) == k + 1
    return made


def refuse(entries: list[Entry]) -> dict[str, Any]:
    raise ValueError(f"not after {len(entries)}")


def contents(chain: Chain) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in chain.folder.iterdir()}


def test_two_chains_share_a_folder(chain: Chain) -> None:
    other = Chain(chain.folder, "other")
    other.append({"k": "x"})
    assert [entry["k"] for entry in chain.entries()] == list(range(5))
    assert [entry["k"] for entry in other.entries()] == ["x"]
    assert set(contents(chain)) == {"book.jsonl", "book.end", "other.jsonl", "other.end"}


def test_an_entry_is_decided_on_by_all_before_it(chain: Chain) -> None:
    assert chain.append(lambda entries: {"k": sum(entry["k"] for entry in entries)}) == 6
    assert list(chain.entries())[-1]["k"] == 10


def test_decisions_do_not_overlap(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "book", "book")
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: chain.append(lambda entries: {"k": len(entries)}), range(24)))
    assert [entry["k"] for entry in chain.entries()] == list(range(24))


def test_a_decision_against_an_entry_leaves_the_chain_as_it_is(chain: Chain) -> None:
    before = contents(chain)
    with pytest.raises(ValueError, match="not after 5"):
        chain.append(refuse)
    assert contents(chain) == before


def test_nothing_is_decided_on_a_changed_entry(chain: Chain) -> None:
    lines = (chain.folder / "book.jsonl").read_text().replace('"k": 1', '"k": 7')
    (chain.folder / "book.jsonl").write_text(lines)
    with pytest.raises(LedgerBroken, match="entry 3"):
        chain.append(refuse)


@pytest.mark.parametrize("last", ["\0", "[]", '{"entry": "x"}', "7"])
def test_a_last_line_that_is_no_entry_is_told_as_such(last: str, chain: Chain) -> None:
    with (chain.folder / "book.jsonl").open("a") as file:
        file.write(last + "\n")
    for use in (chain.verify, lambda: chain.append({"k": 5})):
        with pytest.raises(LedgerBroken):
            use()


def test_a_head_is_held_by_what_follows_it_only(chain: Chain, tmp_path: Path) -> None:
    assert Chain(tmp_path / "none", "book").head() == (0, START)
    early = chain.head()
    assert early[0] == 5
    shutil.copytree(chain.folder, tmp_path / "backup")
    chain.append({"k": 5})
    late = chain.head()
    assert chain.holds(0, START) and chain.holds(*early) and chain.holds(*late)
    assert not chain.holds(6, early[1])
    assert not chain.holds(7, late[1])
    assert not chain.holds(-1, late[1])
    backup = Chain(tmp_path / "backup", "book")
    assert backup.verify() == 5  # whole in itself
    assert backup.holds(*early) and not backup.holds(*late)
    backup.append({"k": "another"})
    assert backup.holds(*early) and not backup.holds(*late)


def test_who_reads_while_another_writes_sees_a_whole_chain(chain: Chain) -> None:
    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(lambda: [chain.append({"k": k}) for k in range(30)])
        seen = [chain.verify()]
        while not writing.done():
            seen.append(chain.verify())
        writing.result()
    assert seen == sorted(seen)
    assert chain.verify() == 35


def test_the_entries_are_plain_lines(chain: Chain) -> None:
    line = json.loads((chain.folder / "book.jsonl").read_text().splitlines()[0])
    assert {**line, "time": ""} == {"entry": 1, "time": "", "k": 0, "before": START}
