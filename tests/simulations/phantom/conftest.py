"""A consortium on disk, written once for all tests of this folder, which only read it."""

from pathlib import Path

import pytest

from polyclinic_simulations.phantom import write_consortium

SITES, PATIENTS, SEED = 5, 10, 3


@pytest.fixture(scope="session")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "consortium"
    write_consortium(folder, SITES, PATIENTS, SEED)
    return folder
