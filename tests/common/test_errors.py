"""The error tree is the one that its docstring draws."""

import copy
import re

from polyclinic import errors
from polyclinic.errors import PolyclinicError, StudyError


def drawn() -> dict[str, tuple[str, int]]:
    """name -> (parent, exit code), read from the drawing in the module's docstring."""
    tree, above = {}, {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ([│├└─ ]*)([A-Z]\w+) +(\d+) ", line):
            depth = len(match[1]) // 4
            above[depth] = match[2]
            tree[match[2]] = (above.get(depth - 1, "Exception"), int(match[3]))
    return tree


def test_every_class_stands_in_the_drawing_with_its_parent_and_exit_code() -> None:
    classes = [item for item in vars(errors).values() if isinstance(item, type)]
    assert len(classes) >= 9
    assert drawn() == {item.__name__: (item.__base__.__name__, item.exit_code) for item in classes}


def test_text_says_what_is_wrong_and_what_to_do() -> None:
    assert str(PolyclinicError("the disk is full", "free some space")) == "the disk is full\n  fix: free some space"


def test_errors_survive_the_way_back_from_a_worker_process() -> None:
    error = copy.copy(StudyError("rounds is -1", "give at least 1"))  # as multiprocessing rebuilds it
    assert type(error) is StudyError
    assert (error.problem, error.fix, error.exit_code) == ("rounds is -1", "give at least 1", 2)
