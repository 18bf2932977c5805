"""Every attack meets the same consortium: three sites of the tiny encoder, no waiting between looks."""

from collections.abc import Iterator

import pytest

from polyclinic.encoders import ENCODERS
from polyclinic_server import mail

from ..tiny import TinyEncoder


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
    monkeypatch.setattr(mail, "POLL_S", 0.01)
    monkeypatch.setattr(mail, "AGAIN_S", 0.02)
    monkeypatch.setattr(mail, "AGAIN_LONGEST_S", 0.04)
    yield
