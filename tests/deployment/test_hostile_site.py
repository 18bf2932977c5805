"""A site that is enrolled, has the right key and the right study, and is not what it says it is."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from .consortium import SITES, Consortium
from .processes import until
from .runs import events, finished

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(600)]

HOSTILE = "gamma"

AGENT = """
import sys
from polyclinic import cli
from polyclinic_client import agent

programs = agent._programs

def hostile(hospital):
    warm, supernode = programs(hospital)
    warm._command = lambda: [sys.executable, "-P", "-c", {worker!r}, str(hospital.path / "bin")]
    return [warm, supernode]

agent._programs = hostile
cli.main()
"""
"""`polyclinic` for somebody who has a hospital's machine and works on its answers before they leave."""

WORKER = """
import sys
from pathlib import Path
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict
from polyclinic import wire
from polyclinic_client import clientapp, warm

kept = Path({kept!r})
installed = clientapp.installed

def stored(name):
    return recorddict_from_proto(RecordDict.FromString((kept / name).read_bytes()))

def spoil(content):
    round, tensors = int(content["reply"]["round"]), wire.unpack_tensors(content["update"])
    if not (kept / "attack").exists():
        (kept / "other").write_bytes(recorddict_to_proto(content).SerializeToString())
        return content
    if round == 1:
        (kept / "first").write_bytes(recorddict_to_proto(content).SerializeToString())
        tensors = {{name: value * float("nan") for name, value in tensors.items()}}
    elif round == 2:
        tensors = {{name: value * -1000 for name, value in tensors.items()}}
    elif round == 3:
        return stored("first")
    else:
        return stored("other")
    content["update"] = wire.pack_tensors(tensors)
    return content

def hostile():
    app = installed()
    def answering(message, context):
        reply = app(message, context)
        if reply.has_content() and "update" in reply.content:
            reply.content = spoil(reply.content)
        return reply
    return answering

clientapp.installed = hostile
warm.serve(Path(sys.argv[1]))
"""

REASONS = {
    1: "holds values that are not finite",
    2: "is above the limit",
    3: "it belongs to round 1 and this is round 3: late or replayed",
    4: "it belongs to another study",
}
"""Why each round's update is refused; the last round is of another stage and method."""


@contextmanager
def hostile_agent(consortium: Consortium, kept: Path) -> Iterator[None]:
    """In the stead of the site's own."""
    consortium.stop(HOSTILE)
    (consortium.folder / HOSTILE / "bin" / "warm.sock").unlink(missing_ok=True)
    text = AGENT.format(worker=WORKER.format(kept=str(kept)))
    command = [sys.executable, "-c", text, "site", "start", "--home", HOSTILE]
    with (consortium.folder / f"{HOSTILE}.log").open("ab") as log:
        consortium.processes[HOSTILE] = subprocess.Popen(command, cwd=consortium.folder, stdout=log, stderr=log)
    try:
        until(lambda: (consortium.folder / HOSTILE / "bin" / "warm.sock").exists(), 60, "the hostile worker")
        yield
    finally:
        consortium.stop(HOSTILE)
        consortium.start(HOSTILE)


@pytest.mark.slow
def test_what_an_enrolled_site_spoils_or_sends_again_is_refused_by_name_and_changes_nothing(
    consortium: Consortium, tmp_path: Path
) -> None:
    before, attacked = consortium.study("before", rounds=1), consortium.study("attacked", rounds=3)
    for study in (before, attacked):
        consortium.approve(study)
    with hostile_agent(consortium, tmp_path):
        run = consortium.launch(before)
        finished(run)
        assert {event["site"] for event in events(run, "update_accepted")} == set(SITES)  # it knows how to behave
        assert (tmp_path / "other").exists()
        (tmp_path / "attack").touch()
        run = consortium.launch(attacked)
        finished(run)
    refused = {event["round"]: event for event in events(run, "update_refused")}
    assert list(refused) == list(REASONS)
    for round, reason in REASONS.items():
        assert refused[round]["site"] == HOSTILE
        assert reason in refused[round]["reason"]
    assert [event["accepted"] for event in events(run, "round_closed")] == [2] * len(REASONS)
    alone = consortium.simulate(attacked, sites=[site for site in SITES if site != HOSTILE])
    there, here = (load_file(folder / "encoder.safetensors") for folder in (run, alone))
    assert [(name, value.tobytes()) for name, value in there.items()] == [(n, v.tobytes()) for n, v in here.items()]
