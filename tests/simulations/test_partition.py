"""Dealing patients: each to one site, from the seed alone, by the law that was asked for."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from polyclinic.cohort import Cohort
from polyclinic.errors import Refused
from polyclinic.study import Dirichlet, Iid
from polyclinic_simulations.partition import MIN_PATIENTS, partition

from ..tiny import in_memory


def cohort(labels: list[str], images: int = 1) -> Cohort:
    """Patients with these labels; the pixels do not matter."""
    words = np.repeat(np.array(labels), images)
    count = len(words)
    numbers = np.repeat(np.arange(len(labels), dtype=np.int32), images)
    return replace(in_memory(1), rows=np.zeros(count, np.int64), patients=numbers, labels=words)


def shares(parts: list[NDArray[np.int64]], labels: NDArray[np.str_], label: str) -> NDArray[np.float64]:
    """(sites,) the part of a class that each site has."""
    found = np.array([(labels[part] == label).sum() for part in parts], np.float64)
    return found / found.sum()


WAYS = st.just(Iid()) | st.builds(
    lambda alpha: Dirichlet(kind="dirichlet", alpha=alpha), st.sampled_from([1e-300, 1e-6, 0.05, 0.5, 1.0, 1e6])
)


@given(
    st.lists(st.sampled_from(["", "a", "b|c"]), min_size=1, max_size=60),
    st.integers(1, 12),
    WAYS,
    st.integers(0, 2**63 - 1),
)
def test_every_patient_goes_to_exactly_one_site(labels: list[str], sites: int, how: Iid | Dirichlet, seed: int) -> None:
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


@pytest.mark.parametrize("how", [Iid(), Dirichlet(kind="dirichlet", alpha=0.5)])
def test_other_seeds_deal_otherwise(how: Iid | Dirichlet) -> None:
    patients = cohort(["a", "b"] * 50)
    dealt = {tuple(part.tobytes() for part in partition(patients, 4, how, seed)) for seed in range(20)}
    assert len(dealt) == 20


def test_iid_sites_have_the_same_size_and_nearly_the_same_classes() -> None:
    labels = np.array(["a"] * 600 + ["b"] * 400)
    patients = cohort(labels.tolist())
    parts = partition(patients, 4, Iid(), 0)
    assert {len(part) for part in parts} == {250}
    assert shares(parts, labels, "a") == pytest.approx(0.25, abs=0.04)


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
