"""From the words that sites use to the classes that a probe tells apart."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.str_]

MIN_TEST_PATIENTS = 2
"""Of a class that is measured: with one, every resample of patients repeats that one and no interval means anything."""


class NotMeasurable(Exception):
    """A probe or a health figure that these images cannot give; the message says why."""


def classes_of(labels: Words, mapping: dict[str, list[str]]) -> Words:
    """(images,) the class of every image; "" where it is unlabelled or ignored.

    `mapping` is `[evaluation] labels`: class = its words, `ignore` = words to leave out. A word that it does not
    mention is a class of its own, so sites with other vocabularies share the union of classes. A cell of several
    labels ("a|b", in any order) is one word of its own: it belongs to a class only where the mapping lists it.

    >>> classes_of(np.array(["Pneumonia", "todo", "", "b|a"]), {"positive": ["Pneumonia"], "ignore": ["todo"]}).tolist()
    ['positive', '', '', 'a|b']
    """
    classes = {_word(word): name for name, words in mapping.items() for word in words}
    classes |= dict.fromkeys((_word(word) for word in mapping.get("ignore", [])), "")
    words, places = np.unique(labels, return_inverse=True)
    named = [classes.get(_word(str(word)), _word(str(word))) for word in words]
    return np.array(named, dtype=np.str_)[places] if named else np.array([], dtype=np.str_)


def unmapped(mapping: dict[str, list[str]], labels: Iterable[str]) -> list[str]:
    """What a mapping of labels passes over, in words: those that nobody uses, and those that it does not name.

    >>> unmapped({"ill": ["flu", "flue"]}, ["flu", "well", "well"])[1]
    "[evaluation] labels does not name 'well' (2 images): each such word is a class of its own"
    """
    if not mapping:
        return []
    counts = Counter(_word(cell) for cell in labels)
    named = {_word(word): word for words in mapping.values() for word in words}
    known = {part for word in counts for part in (word, *word.split("|"))}
    texts = [
        f"[evaluation] labels names {_listed(named[word] for word in sorted(named.keys() - known))}, which no image has"
    ] * bool(named.keys() - known)
    strange = {word: n for word, n in counts.most_common() if word and not {word, *word.split("|")} & named.keys()}
    if strange:
        found = _listed(f"{word!r} ({n} image{'s' * (n != 1)})" for word, n in strange.items())
        texts.append(f"[evaluation] labels does not name {found}: each such word is a class of its own")
    return texts


def _listed(words: Iterable[str], most: int = 8) -> str:
    every = list(words)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def targets_of(labels: Words, mapping: dict[str, list[str]], multi_label: bool) -> NDArray[np.float32]:
    """(images, classes) 1 where an image is of a class that `mapping` names, 0 where not, NaN where nobody knows.

    Classes stand in alphabetical order, whatever the mapping's: it differs between a study file and its canonical form.

    With one label an image, nobody knows where its cell is none of the mapping's words; with several, where it is
    empty or holds a word to ignore, and other words than the mapping's are no class.

    >>> targets_of(np.array(["a|c", "b", ""]), {"first": ["a"], "second": ["b"]}, multi_label=True).tolist()
    [[1.0, 0.0], [0.0, 1.0], [nan, nan]]
    """
    classes = sorted(mapping.keys() - {"ignore"})
    if not multi_label:
        found = classes_of(labels, mapping)
        targets: NDArray[np.float32] = (found[:, None] == np.array(classes)).astype(np.float32)
        targets[targets.sum(axis=1) == 0] = np.nan
        return targets
    words = [{part.strip() for part in str(cell).split("|")} - {""} for cell in labels]
    rows = [[float(bool(cell & set(mapping[name]))) for name in classes] for cell in words]
    targets = np.array(rows, np.float32).reshape(len(words), len(classes))
    targets[[not cell or bool(cell & set(mapping.get("ignore", []))) for cell in words]] = np.nan
    return targets


def _word(cell: str) -> str:
    """A cell with its labels in one order, free of blanks."""
    return "|".join(sorted({part.strip() for part in cell.split("|")} - {""}))


def measurable_classes(train_y: Words, test_y: Words, test_patients: NDArray[np.integer]) -> list[str]:
    """The classes, sorted, that can be learnt and measured: seen in training, and in enough test patients.

    Images of other classes take no part. Rows that are compared share patients, hence classes.

    Raises:
        NotMeasurable: fewer than two such classes.
    """
    train, test = set(train_y.tolist()) - {""}, set(test_y.tolist()) - {""}
    if not train or not test:
        raise NotMeasurable(f"no labelled {'training' if not train else 'test'} patients")
    tested = {name for name in test if len(np.unique(test_patients[test_y == name])) >= MIN_TEST_PATIENTS}
    classes = sorted(train & tested)
    if len(classes) >= 2:
        return classes
    if len(train | test) == 1:
        raise NotMeasurable(f"all labelled patients are of one class, {classes[0] if classes else min(train)!r}")
    lacking = [f"{name!r} has no training patient" for name in sorted(test - train)]
    lacking += [f"{name!r} has fewer than {MIN_TEST_PATIENTS} test patients" for name in sorted(train - tested)]
    raise NotMeasurable("fewer than two classes can be measured: " + ", ".join(lacking[:4]))
