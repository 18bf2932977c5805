"""Dealing patients: each to one site, from the seed alone, by the law that was asked for."""

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from polyclinic.cohort import Cohort
from polyclinic.errors import Refused
from polyclinic.simulation import Classes, Column, Dirichlet, Iid, Quantity
from polyclinic_simulations.partition import MIN_PATIENTS, age_groups, by_column, partition

from ..tiny import in_memory


def cohort(labels: list[str], images: int = 1) -> Cohort:
    """Patients with these labels; the pixels do not matter."""
    words = np.repeat(np.array(labels), images)
    count = len(words)
    numbers = np.repeat(np.arange(len(labels), dtype=np.int32), images)
    unknown = {**dict.fromkeys(("scanners", "sexes"), np.full(count, "")), "ages": np.full(count, np.nan)}
    return replace(in_memory(1), rows=np.zeros(count, np.int64), patients=numbers, labels=words, **unknown)


def by_age(*edges: int) -> Column:
    return Column(kind="column", by="age", edges=list(edges))


def shares(parts: list[NDArray[np.int64]], labels: NDArray[np.str_], label: str) -> NDArray[np.float64]:
    """(sites,) the part of a class that each site has."""
    found = np.array([(labels[part] == label).sum() for part in parts], np.float64)
    return found / found.sum()


ALPHAS = st.sampled_from([1e-300, 1e-6, 0.05, 0.5, 1.0, 1e6])
WAYS = (
    st.just(Iid())
    | st.builds(lambda alpha: Dirichlet(kind="dirichlet", alpha=alpha), ALPHAS)
    | st.builds(lambda alpha: Quantity(kind="quantity", alpha=alpha), ALPHAS)
)
Way = Iid | Dirichlet | Quantity | Classes
BY_SITE, BY_VIEW, BY_SCANNER, BY_SEX = (Column(kind="column", by=by) for by in ("site", "view", "scanner", "sex"))


@given(
    st.lists(st.sampled_from(["", "a", "b|c"]), min_size=1, max_size=60),
    st.integers(1, 12),
    WAYS,
    st.integers(0, 2**63 - 1),
)
def test_every_patient_goes_to_exactly_one_site(labels: list[str], sites: int, how: Way, seed: int) -> None:
    patients = cohort(labels, images=2)
    if len(labels) < sites * MIN_PATIENTS:
        with pytest.raises(Refused, match=f"{len(labels)} patients cannot be dealt to {sites} sites"):
            partition(patients, sites, how, seed)
        return
    parts = partition(patients, sites, how, seed)
    assert len(parts) == sites
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all(len(part) >= MIN_PATIENTS and (np.diff(part) > 0).all() for part in parts)
    again = partition(patients, sites, how, seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@pytest.mark.parametrize(
    "how",
    [
        Iid(),
        Dirichlet(kind="dirichlet", alpha=0.5),
        Quantity(kind="quantity", alpha=0.5),
        Classes(kind="classes", per_site=1),
    ],
)
def test_other_seeds_deal_otherwise(how: Way) -> None:
    patients = cohort(["a", "b"] * 50)
    dealt = {tuple(part.tobytes() for part in partition(patients, 4, how, seed)) for seed in range(20)}
    assert len(dealt) == 20


def test_iid_sites_have_the_same_size_and_draw_their_patients_without_looking_at_labels() -> None:
    """How many of a class a site has is hypergeometric, with its variance; a stratified deal has less."""
    sites, size, ill, draws = 4, 25, 60, 400
    labels = np.array(["ill"] * ill + ["well"] * (sites * size - ill))
    patients = cohort(labels.tolist())
    dealt = [partition(patients, sites, Iid(), seed) for seed in range(draws)]
    assert {len(part) for parts in dealt for part in parts} == {size}
    found = np.array([[(labels[part] == "ill").sum() for part in parts] for parts in dealt])
    share = ill / (sites * size)
    variance = size * share * (1 - share) * (sites * size - size) / (sites * size - 1)
    assert found.mean(axis=0) == pytest.approx(size * share, abs=4 * np.sqrt(variance / draws))
    assert found.var(axis=0).mean() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
def test_shares_of_a_class_follow_dirichlets_law(alpha: float) -> None:
    sites, draws = 4, 400
    labels = np.array(["a", "b"] * 400)
    patients = cohort(labels.tolist())
    how = Dirichlet(kind="dirichlet", alpha=alpha)
    found = np.array([shares(partition(patients, sites, how, seed), labels, "a") for seed in range(draws)])
    variance = (sites - 1) / (sites**2 * (sites * alpha + 1))  # of one share
    assert found.mean(axis=0) == pytest.approx(1 / sites, abs=4 * np.sqrt(variance / draws))
    assert found.var(axis=0).mean() == pytest.approx(variance, rel=0.15)


def test_classes_are_dealt_independently() -> None:
    labels = np.array(["a", "b"] * 400)
    how = Dirichlet(kind="dirichlet", alpha=0.5)
    pairs = []
    for seed in range(200):
        parts = partition(cohort(labels.tolist()), 4, how, seed)
        pairs.append((shares(parts, labels, "a")[0], shares(parts, labels, "b")[0]))
    assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 0.25


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_sizes_of_sites_follow_dirichlets_law_and_their_labels_are_alike(alpha: float) -> None:
    sites, draws = 4, 400
    labels = np.array(["a", "a", "b", "a"] * 200)
    patients = cohort(labels.tolist())
    how = Quantity(kind="quantity", alpha=alpha)
    dealt = [partition(patients, sites, how, seed) for seed in range(draws)]
    sizes = np.array([[len(part) for part in parts] for parts in dealt]) / len(labels)
    variance = (sites - 1) / (sites**2 * (sites * alpha + 1))  # of one share
    assert sizes.mean(axis=0) == pytest.approx(1 / sites, abs=4 * np.sqrt(variance / draws))
    assert sizes.var(axis=0).mean() == pytest.approx(variance, rel=0.15)
    z = [
        ((labels[part] == "a").mean() - 0.75) / np.sqrt(0.75 * 0.25 / len(part) * (1 - len(part) / len(labels)))
        for parts in dealt
        for part in parts
        if 50 <= len(part) <= 750
    ]
    assert np.mean(z) == pytest.approx(0, abs=0.2)
    assert np.std(z) == pytest.approx(1, abs=0.1)  # as drawn without looking at labels


@given(
    st.lists(st.integers(12, 30), min_size=1, max_size=6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32)
)
def test_a_site_sees_as_many_classes_as_asked_for(counts: list[int], sites: int, per_site: int, seed: int) -> None:
    """With classes large enough for all: each has as many shards as any other, or one less."""
    labels = np.repeat([f"class {n}" for n in range(len(counts))], counts)
    patients, how = cohort(labels.tolist()), Classes(kind="classes", per_site=per_site)
    if per_site > len(counts):
        with pytest.raises(Refused, match=f"have {len(counts)}: 'class 0'"):
            partition(patients, sites, how, seed)
        return
    if sites * per_site < len(counts):
        with pytest.raises(Refused, match=rf"to nobody\n  fix: .* at least {ceil(len(counts) / sites)},"):
            partition(patients, sites, how, seed)
        return
    parts = partition(patients, sites, how, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all(len(np.unique(labels[part])) == per_site for part in parts)
    shards = [sum(label in labels[part] for part in parts) for label in np.unique(labels)]
    assert max(shards) - min(shards) <= 1


def test_all_pairs_of_classes_meet_equally_often() -> None:
    """One site of two classes among four: each of the six pairs in a sixth of the draws."""
    labels = np.repeat(["a", "b", "c", "d"], 10)
    how, found = Classes(kind="classes", per_site=2), []
    for seed in range(600):
        first = partition(cohort(labels.tolist()), 2, how, seed)[0]
        found.append("".join(np.unique(labels[first])))
    counts = np.unique(found, return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 100) ** 2 / 100).sum() < 20.5  # chi-squared, 5 degrees of freedom, p = 0.001


def test_classes_too_rare_for_their_sites_are_refused() -> None:
    labels = ["a"] * 40 + ["b"]
    with pytest.raises(Refused, match="would have 0 patients"):
        partition(cohort(labels), 4, Classes(kind="classes", per_site=1), 0)


def test_sites_of_a_column_have_its_values_and_a_patient_the_one_of_most_images() -> None:
    patients = cohort(["a"] * 8, images=3)
    one = np.array([["PA"] * 3, ["PA", "LL/2", "LL/2"], ["", "", "PA"], [""] * 3] * 2).ravel()
    parts = by_column(replace(patients, views=one), BY_VIEW)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "LL-2": [1, 5],
        "PA": [0, 2, 4, 6],
        "unknown": [3, 7],
    }


def test_sites_of_scanners_are_their_patients() -> None:
    machines = np.repeat(["scanner-2", "scanner-1", ""], 4)
    parts = by_column(replace(cohort(["a"] * 6, images=2), scanners=machines), BY_SCANNER)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "scanner-1": [2, 3], "scanner-2": [0, 1], "unknown": [4, 5]
    }  # fmt: skip


def test_values_that_give_the_same_name_are_numbered() -> None:
    values = np.repeat(["é", "ö", "AP erect", "AP/erect", "x" * 90, "x" * 91], 2)
    parts = by_column(replace(cohort(["a"] * 12), sites=values), BY_SITE)
    assert set(parts) == {"AP-erect", "AP-erect-2", "unknown", "unknown-2", "x" * 48, "x" * 48 + "-2"}


@given(st.lists(st.sampled_from(["", "north", "south"]), min_size=1, max_size=40), st.integers(1, 3))
def test_a_column_loses_no_patient(values: list[str], images: int) -> None:
    values = values[: len(values) // images * images] or [*"nnn"][:images]
    patients = cohort(["a"] * (len(values) // images), images)
    try:
        parts = by_column(replace(patients, sites=np.array(values)), BY_SITE)
    except Refused as error:
        assert "fewer than 2 patients" in error.problem or set(values) == {""}
        return
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(patients.n_patients))
    assert all(len(part) >= MIN_PATIENTS and (np.diff(part) > 0).all() for part in parts.values())


def test_sites_of_sexes_and_of_ages_hold_whom_their_names_say() -> None:
    patients = cohort(["a"] * 12, images=2)
    sexes = np.repeat(["F", "M", "", "O"] * 3, 2)
    parts = by_column(replace(patients, sexes=sexes), BY_SEX)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "unknown": [2, 6, 10], "F": [0, 4, 8], "M": [1, 5, 9], "O": [3, 7, 11]
    }  # fmt: skip
    ages = np.array(
        [[0, 0], [39.9, 41], [np.nan, 39], [40, 40], [np.nan, 59.9], [60, 60], [90, 90]] + [[np.nan] * 2] * 5
    )
    parts = by_column(replace(patients, ages=ages.ravel()), by_age(40, 60))
    assert list(parts) == ["unknown", "under-40", "40-59", "60-and-over"]
    assert [part.tolist() for part in parts.values()] == [[7, 8, 9, 10, 11], [0, 1, 2], [3, 4], [5, 6]]


@given(
    st.lists(st.none() | st.floats(0, 90), min_size=1, max_size=40),
    st.lists(st.integers(1, 90), min_size=1, max_size=6, unique=True).map(sorted),
)
def test_every_age_is_in_the_group_that_counting_edges_gives(ages: list[float | None], edges: list[int]) -> None:
    def group(age: float | None) -> str:
        passed = [edge for edge in edges if age is not None and edge <= age]
        ahead = [edge for edge in edges if edge not in passed]
        if age is None or not passed:
            return "" if age is None else f"under-{ahead[0]}"
        if not ahead:
            return f"{passed[-1]}-and-over"
        return f"{passed[-1]}-{ahead[0] - 1}" if ahead[0] - passed[-1] > 1 else str(passed[-1])

    words, codes = age_groups(np.array(ages, np.float64), edges)
    assert len(set(words.tolist())) == len(edges) + 2
    assert words[codes].tolist() == [group(age) for age in ages]


def test_a_group_of_ages_with_one_patient_is_refused_and_columns_with_values_are_named() -> None:
    patients = replace(cohort(["a"] * 5), ages=np.array([30.0, 31, 50, 70, 71]))
    with pytest.raises(Refused, match=r"'age' gives 1 sites fewer than 2 patients: '40-59'\n  fix: move the edges"):
        by_column(patients, by_age(40, 60))
    with pytest.raises(Refused, match=r"column 'sex'\n  fix: set partition.by to 'age'"):
        by_column(patients, BY_SEX)
    with pytest.raises(Refused, match=r"column 'age'\n  fix: set partition.by to 'sex'"):
        by_column(replace(cohort(["a"] * 2), sexes=np.array(["F", "M"])), by_age(50))


def test_a_column_without_values_is_refused_and_those_with_values_are_named() -> None:
    patients = replace(cohort(["a"] * 4), views=np.array(["PA", "PA", "AP", "AP"]))
    for column in ("site", "scanner", "ward"):
        with pytest.raises(Refused, match=rf"column '{column}'\n  fix: set partition.by to 'view'"):
            by_column(patients, Column(kind="column", by=column))
    with pytest.raises(Refused, match="use another partition"):
        by_column(cohort(["a"] * 4), BY_VIEW)
    with pytest.raises(Refused, match=r"1 sites fewer than 2 patients: 'AP'"):
        by_column(replace(patients, views=np.array(["PA", "PA", "PA", "AP"])), BY_VIEW)
