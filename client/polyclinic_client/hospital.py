"""A hospital's folder: its settings, its key, the answer of the coordinator, the studies that it approved.

site.toml          name, data, and what a study may do here
node.key           EC P-384, OpenSSH, 0600; never leaves
request.json       for the coordinator; join.json, authority.crt: its answer
approved/HASH.json a study that may run: who approved it, when, and which cohort it works on
state/             cohorts, the key of the patient hashes, and what a study keeps between messages
"""

import getpass
import json
import os
import tomllib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polyclinic import __version__
from polyclinic.bundle import bundle_hash
from polyclinic.cohort import Cohort, build_cohort, open_cohort
from polyclinic.cohort.index import read_meta
from polyclinic.enrolment import Join, Request, read_file
from polyclinic.errors import CohortError, Refused
from polyclinic.explain import explain
from polyclinic.files import storage, write_atomic
from polyclinic.study import Name, Study, parse_canonical
from polyclinic.wire import describe
from polyclinic_client.ledger import Ledger
from polyclinic_client.site import Site

SETTINGS = "site.toml"

TEMPLATE = """\
# A Polyclinic site. Every line may be changed; the site reads it whenever it is asked for something.

name = {name}                 # what the coordinator enrols this site as
data = {data}                 # images: a folder with labels.csv, a folder of classes, or DICOM files
allow_burned_in = false       # use files whose pixels may show a patient's name

[policy]                      # a study outside these limits is refused, approved or not
methods = ["simclr", "micle", "mlvicx", "mae", "sssd", "supervised"]   # what may be trained
max_rounds = 1000             # of one study, all stages together
min_patients = 2              # with fewer patients than this the site takes no part
"""


class Policy(BaseModel):
    """`[policy]` of site.toml: what no approval goes beyond."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    methods: list[str] = Field(default=["simclr", "micle", "mlvicx", "mae", "sssd", "supervised"])
    max_rounds: int = Field(default=1000, ge=1)
    min_patients: int = Field(default=2, ge=2)

    def check(self, study: Study) -> None:
        """Refuse a study that is outside.

        Raises:
            Refused: it is; the text says which limit.
        """
        fix = "ask the site to widen [policy] in its site.toml, or change the study"
        for stage in study.stages:
            if stage.method not in self.methods:
                raise Refused(f"the site's policy does not allow {stage.method}", fix)
        if study.rounds > self.max_rounds:
            raise Refused(f"the site's policy allows {self.max_rounds} rounds; the study has {study.rounds}", fix)


class Settings(BaseModel):
    """site.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    data: str
    allow_burned_in: bool = False
    policy: Policy = Policy()


@dataclass(frozen=True)
class Approval:
    """approved/HASH.json: `study` is the canonical form, `cohort` the folder of the built cohort."""

    study: str
    approved: str
    by: str
    cohort: str
    digest: str


class Hospital:
    """A hospital's folder that exists; as a node's site, it serves the studies that it approved."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        try:
            self.settings = Settings.model_validate(tomllib.loads((self.path / SETTINGS).read_text()))
        except FileNotFoundError as error:
            raise Refused(
                f"there is no site in {path}", "make one: polyclinic site init --name NAME --data DIR"
            ) from error
        except ValidationError as error:
            problem, fix = explain(error, Settings)
            raise Refused(f"{path / SETTINGS}: {problem}", fix) from error
        except ValueError as error:
            raise Refused(f"{path / SETTINGS} is not TOML: {error}", "correct the line it names") from error

    @property
    def name(self) -> str:
        """Of the site."""
        return self.settings.name

    @property
    def joined(self) -> Join | None:
        """The coordinator's answer, once it is here."""
        path = self.path / "join.json"
        return read_file(path, Join) if path.exists() else None

    def join(self, file: Path) -> Join:
        """Keep the coordinator's answer.

        Raises:
            Refused: it is for another site, or expects a bundle that is not this installation's.
        """
        answer = read_file(file, Join)
        if answer.name != self.name:
            raise Refused(
                f"{file} is for {answer.name!r} and this is {self.name!r}", "take the answer to this site's request"
            )
        if answer.bundle != bundle_hash():
            raise Refused(
                "the coordinator runs another version of Polyclinic, whose bundle this site would refuse",
                f"install the coordinator's version; this is {__version__}",
            )
        write_atomic(self.path / "authority.crt", answer.authority)
        write_atomic(self.path / "join.json", answer.model_dump_json(indent=2))
        return answer

    def cohort_for(self, study: Study, progress: Any = None) -> Cohort:
        """The site's images as the study wants them; built where they are not yet."""
        return build_cohort(
            Path(self.settings.data),
            study.images,
            self.path / "state",
            allow_burned_in=self.settings.allow_burned_in,
            progress=progress,
        )

    def approve(self, study: Study, cohort: Cohort, by: str | None = None) -> Approval:
        """Record that a study may run here, on that cohort."""
        now, who = datetime.now(UTC).isoformat(timespec="seconds"), by or getpass.getuser()
        approval = Approval(study.canonical(), now, who, str(cohort.folder), read_meta(cohort.folder)["digest"])
        with storage(self.path):
            (self.path / "approved").mkdir(mode=0o700, exist_ok=True)
        write_atomic(self._approval(study.hash), json.dumps(asdict(approval), indent=2))
        return approval

    def approved(self, study_hash: str) -> Approval | None:
        """The approval of a study; None where there is none."""
        path = self._approval(study_hash)
        return Approval(**json.loads(path.read_text())) if path.exists() else None

    def approves(self, study_hash: str) -> bool:
        """Whether a study is approved."""
        return self.approved(study_hash) is not None

    def withdraw(self, study_hash: str) -> None:
        """Take an approval back.

        Raises:
            Refused: there is none.
        """
        try:
            self._approval(study_hash).unlink()
        except FileNotFoundError as error:
            raise Refused(f"no study {study_hash[:16]} is approved here", "see polyclinic site status") from error

    def _approval(self, study_hash: str) -> Path:
        return self.path / "approved" / f"{study_hash}.json"

    @property
    def ledger(self) -> Ledger:
        """Of what has left."""
        return Ledger(self.path / "ledger")

    def leaving(self, kind: str, content: object) -> None:
        """Enter into the ledger what is about to leave.

        Raises:
            LedgerBroken, StorageError: it cannot be entered, and must not leave.
        """
        to = self.joined.address if self.joined else ""
        facts = {"error": content} if isinstance(content, str) else describe(content)
        self.ledger.append({"to": to, "kind": kind, **facts})

    def serve(self, text: str) -> Site:
        """The site as a study in its canonical form finds it.

        Raises:
            Refused: the study is not approved here, or goes beyond the policy.
            CohortError: the cohort has changed since, or is too small.
        """
        study = parse_canonical(text, "the study that came with the order")
        approval = self.approved(study.hash)
        if approval is None:
            raise Refused(
                f"the study {study.name!r} ({study.hash[:16]}) is not approved at this site",
                "ask the site to approve it: polyclinic site approve study.toml",
            )
        self.settings.policy.check(study)
        cohort = open_cohort(Path(approval.cohort))
        if read_meta(cohort.folder)["digest"] != approval.digest:
            raise CohortError("the site's images have changed since it approved the study", "approve it again")
        if cohort.n_patients < self.settings.policy.min_patients:
            raise CohortError("the site has too few patients for its own policy", "leave the site out")
        return Site(self.name, cohort, self.path / "state")


def make_hospital(path: Path, name: str, data: Path) -> Request:
    """Make a site's folder: settings, a key of its own, and the request to join.

    Raises:
        Refused: there is something in it already, or no data where it says.
    """
    if path.exists() and any(path.iterdir()):
        raise Refused(f"{path} is not empty", "give another --home; nothing there is ever overwritten")
    if not data.exists():
        raise Refused(f"there are no images in {data}", "correct --data")
    with storage(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    request = Request(name=name, public_key=public.decode(), version=__version__)
    before = os.umask(0o077)
    try:
        write_atomic(path / "node.key", private)
    finally:
        os.umask(before)
    write_atomic(path / "request.json", request.model_dump_json(indent=2))
    text = TEMPLATE.format(name=json.dumps(name), data=json.dumps(str(data.resolve())))
    write_atomic(path / SETTINGS, text)  # last: with it, it is a site's folder
    return request
