"""Seeds: the same for the same question, different for every other, and pinned, since resumed runs depend on them."""

import itertools

import torch

from polyclinic.seeding import forked, numpy_generator, seed_for, torch_generator


def test_known_seeds() -> None:
    # A change of these figures makes every stored run unrepeatable.
    assert seed_for(7, "views", site="north", stage=1, round=3) == SEED
    assert numpy_generator(SEED).integers(0, 2**31, 2).tolist() == DRAWN


SEED = 6_356_696_774_094_198_617
DRAWN = [1_684_017_099, 165_097_845]


def test_every_part_of_the_question_counts() -> None:
    parts = [(1, 2), ("views", "batches"), ("", "a", "b"), (0, 1), (0, 1, 11)]
    seeds = [seed_for(s, p, site=n, stage=t, round=r) for s, p, n, t, r in itertools.product(*parts)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_parts_do_not_run_into_each_other() -> None:
    assert seed_for(1, "a', 'b") != seed_for(1, "a", site="b")
    assert seed_for(1, "a", stage=1) != seed_for(1, "a", round=1)
    assert seed_for(11, "a") != seed_for(1, "1a")


def test_generators_repeat() -> None:
    one, two = (torch.rand(3, generator=torch_generator(5)) for _ in range(2))
    assert torch.equal(one, two)


def test_forked_repeats_and_leaves_torchs_state() -> None:
    before = torch.random.get_rng_state()
    drawn = []
    for _ in range(2):
        with forked(9):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(before, torch.random.get_rng_state())
