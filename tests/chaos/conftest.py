"""The tiny encoder stands in for the real one, and nobody waits between looks."""

from collections.abc import Iterator

import pytest

from polyclinic.encoders import ENCODERS
from polyclinic_server import mail

from ..tiny import TinyEncoder


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
    monkeypatch.setattr(mail, "POLL_S", 0.01)
    yield
