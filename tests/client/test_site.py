"""A site from its folder."""

from pathlib import Path

import pytest

from polyclinic.cohort import build_cohort
from polyclinic.errors import CohortError, Refused
from polyclinic_client.site import open_site, write_site

from ..tiny import SIMCLR, tiny_study, write_cohort

STUDY = tiny_study()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    return build_cohort(write_cohort(folder / "images", 8), STUDY.images, folder / "state", workers=1).folder


def test_a_site_is_its_cohort_or_some_of_its_patients(cohort: Path, tmp_path: Path) -> None:
    write_site(tmp_path / "all", "north", cohort)
    write_site(tmp_path / "some", "south", cohort, [1, 2, 5, 6])
    everyone, some = open_site(tmp_path / "all"), open_site(tmp_path / "some")
    assert (everyone.name, everyone.cohort.n_patients) == ("north", 8)
    assert (some.name, some.cohort.n_patients) == ("south", 4)
    assert open_site(tmp_path / "all") is everyone


@pytest.mark.parametrize("tested", [True, False])
def test_a_pair_that_is_kept_for_measuring_is_none_to_train_on(tested: bool, tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "images", 8, images=1)
    lines = (folder / "labels.csv").read_text().splitlines()
    pair = [1, 2] if tested else [3, 4]
    words = [f"{line.rpartition(',')[0]},paired,{'test' if k < 3 else 'train'}" if k in pair else
             f"{line},{'test' if k < 3 else 'train'}" for k, line in enumerate(lines) if k]  # fmt: skip
    (folder / "labels.csv").write_text("\n".join([f"{lines[0]},split", *words]))
    study = tiny_study(stages=[{**SIMCLR, "method": "micle"}], evaluation={"split": "column"})
    built = build_cohort(folder, study.images, tmp_path / "state", workers=1).folder
    write_site(tmp_path / "site", "north", built)
    site = open_site(tmp_path / "site")
    assert not site.cohort.unpaired
    assert site.unpaired(study) == tested
    assert not site.unpaired(STUDY), "no other method wants pairs"


def test_a_site_whose_patients_have_changed_is_refused(tmp_path: Path) -> None:
    """Another patient renumbers them all, and the split with them: who has trained would be tested on."""
    images, state = write_cohort(tmp_path / "images", 4), tmp_path / "state"
    write_site(tmp_path / "site", "north", build_cohort(images, STUDY.images, state, workers=1).folder)
    with pytest.raises(Refused, match="have changed since this run began"):
        write_site(tmp_path / "site", "north", build_cohort(images, STUDY.images, state, workers=1).folder, [0, 1])
    moved = build_cohort(images, STUDY.images, tmp_path / "elsewhere", workers=1).folder  # other keys, the same content
    write_site(tmp_path / "site", "north", moved)
    next(images.rglob("*.png")).unlink()
    changed = build_cohort(images, STUDY.images, tmp_path / "elsewhere", workers=1).folder
    with pytest.raises(Refused, match="have changed since this run began"):
        write_site(tmp_path / "site", "north", changed)
    open_site.cache_clear()
    with pytest.raises(CohortError, match="changed since the site was made"):
        open_site(tmp_path / "site")


def test_the_split_is_by_patient_and_the_sites_own(cohort: Path, tmp_path: Path) -> None:
    for name in ("north", "south"):
        write_site(tmp_path / name, name, cohort)
    whole = open_site(tmp_path / "north").cohort
    owner = dict(zip(whole.rows.tolist(), whole.patients.tolist(), strict=True))
    splits = [open_site(tmp_path / name).split(STUDY) for name in ("north", "north", "south")]
    rows = [tuple(half.rows.tolist() for half in split) for split in splits]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]  # other seeds, though the images are the same
    for train, test in rows:
        assert sorted(train + test) == list(range(16))
        assert not {owner[row] for row in train} & {owner[row] for row in test}
