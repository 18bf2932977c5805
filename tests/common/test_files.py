"""Files are whole or not there, and a disk that cannot take them says so."""

import errno
import os
import resource
from pathlib import Path

import pytest

from polyclinic.errors import StorageError
from polyclinic.files import atomic, make_folder, storage, tentative, write_atomic


def test_writing_replaces_the_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "result"
    write_atomic(target, "much longer than what follows")
    write_atomic(target, b"short")
    assert target.read_bytes() == b"short"
    assert list(tmp_path.iterdir()) == [target]


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    write_atomic(tmp_path / "result", "µ")
    assert (tmp_path / "result").read_bytes() == b"\xc2\xb5"


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "result"
    write_atomic(target, "old")
    with pytest.raises(ZeroDivisionError), atomic(target) as file:
        file.write(b"half of the ne")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "result"
    write_atomic(target, "old")
    child = os.fork()
    if child == 0:
        with atomic(target) as file:
            file.write(b"half of the ne")
            file.flush()
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert target.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_is_a_storage_error_that_says_so() -> None:
    with (
        pytest.raises(StorageError, match=r"no space left on the disk of cache\.bin") as caught,
        storage(Path("/somewhere/cache.bin")),
    ):
        Path("/dev/full").write_bytes(b"x")
    assert "/somewhere" not in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_disk_that_may_not_be_written_is_a_storage_error(number: int) -> None:
    with pytest.raises(StorageError, match=r"cannot write cache\.bin"), storage(Path("cache.bin")):
        raise OSError(number, os.strerror(number))


def test_a_file_larger_than_the_limit_is_a_storage_error_that_says_so(tmp_path: Path) -> None:
    target = tmp_path / "result"
    write_atomic(target, "old")
    child = os.fork()
    if child == 0:
        code = 2
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
            write_atomic(target, "more than ten bytes")
        except StorageError as error:
            code = 0 if "ulimit -f" in error.fix else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_tentative_folders_go_with_an_error_that_leaves_them_empty(tmp_path: Path) -> None:
    inner, outer = tmp_path / "outer" / "inner", tmp_path / "outer"
    for content, kept in ((), False), (("outer/file",), True), (("outer/inner/file",), True):
        inner.mkdir(parents=True)
        for name in content:
            (tmp_path / name).write_text("")
        with pytest.raises(ZeroDivisionError), tentative([inner, outer]):
            raise ZeroDivisionError
        assert outer.exists() == kept
        assert inner.exists() == ("outer/inner/file" in content)
        for path in [*map(tmp_path.joinpath, content), inner, outer]:
            if path.exists():
                path.rmdir() if path.is_dir() else path.unlink()
    inner.mkdir(parents=True)
    with tentative([inner, outer]):
        pass
    assert inner.exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make one")
def test_a_folder_that_cannot_be_made_is_named_whole() -> None:
    with pytest.raises(StorageError, match="cannot make the directory /proc/y/deep") as caught:
        make_folder(Path("/proc/y/deep"))
    assert "give another directory" in caught.value.fix


def test_a_folder_is_made_with_those_above_it_and_a_file_is_none(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(StorageError, match=f"{path} is not a directory"):
            make_folder(path)


def test_other_errors_of_the_operating_system_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "missing" / "result", "x")


def test_a_file_no_longer_needed_is_written_over(tmp_path: Path) -> None:
    old, new = tmp_path / "round-1", tmp_path / "round-3"
    old.write_bytes(b"the longer content of old")
    place = old.stat().st_ino
    with atomic(new, recycle=old) as file:
        assert not old.exists()
        file.write(b"new")
    assert new.read_bytes() == b"new"
    assert new.stat().st_ino == place
    with atomic(tmp_path / "round-4", recycle=tmp_path / "round-2") as file:  # there is none
        file.write(b"newer")
    assert (tmp_path / "round-4").read_bytes() == b"newer"
    assert len(list(tmp_path.iterdir())) == 2
