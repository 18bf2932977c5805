"""Runs last of all that share a consortium: a revoked site does not come back."""

from pathlib import Path

import pytest

from polyclinic_server.home import Home

from .consortium import Consortium
from .processes import until
from .runs import events, finished

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(600)]


def test_a_revoked_site_takes_no_part(honest: tuple[Path, Path], consortium: Consortium) -> None:
    consortium.command("coordinator", "revoke", "gamma")
    until(lambda: Home(consortium.home).sites()["gamma"].node == 0, 60, "revocation")
    study = consortium.study("two", rounds=1)
    consortium.approve(study, "alpha", "beta", "gamma")
    run = consortium.launch(study)
    finished(run)
    assert all(event["sites"] == ["alpha", "beta"] for event in events(run, "round_started"))
    assert "revoked" in consortium.command("coordinator", "status", "--json")
