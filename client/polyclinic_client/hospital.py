"""A hospital's folder: its settings, its key, the answer of the coordinator, the studies that it approved.

site.toml          name, data, and what a study may do here
node.key           EC P-384, OpenSSH, 0600; never leaves
request.json       for the coordinator; join.json, authority.crt: its answer
approved/HASH.json a study that may run: who approved it, when, which cohort it works on, and what will leave
approved/HASH.orders   how often it has been asked for since
ledger/            everything that has left; privacy/: what studies have spent of patients' privacy
health.json, metrics.prom   for monitoring: see monitor.py
state/             cohorts, the key of the patient hashes, and what a study keeps between messages
"""

import getpass
import json
import math
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, ValidationError

from polyclinic import __version__
from polyclinic.bundle import bundle_hash
from polyclinic.cohort import Cohort, build_cohort, open_cohort
from polyclinic.cohort.index import read_meta, require_patients
from polyclinic.enrolment import Join, Request, read_file
from polyclinic.errors import CohortError, Refused
from polyclinic.explain import explain
from polyclinic.files import locked, storage, write_atomic, write_secret
from polyclinic.privacy.ledger import PrivacyLedger
from polyclinic.settings import Name
from polyclinic.stages import Finetune, Stage
from polyclinic.study import Study, parse_canonical
from polyclinic.wire import describe
from polyclinic_client import policy as limits
from polyclinic_client.ledger import Ledger
from polyclinic_client.policy import Policy
from polyclinic_client.site import Site

SETTINGS = "site.toml"

TEMPLATE = """\
# A Polyclinic site. Every line may be changed; the site reads it whenever it is asked for something.

name = {name}  # what the coordinator enrols this site as
data = {data}  # images: a folder with labels.csv, a folder of classes, or DICOM files
allow_burned_in = false       # use files whose pixels may show a patient's name

"""
PATIENCE_S = 60.0
"""For which an order waits to be counted while another is."""


class Settings(BaseModel):
    """site.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    data: str
    allow_burned_in: bool = False
    policy: Policy = Policy()


@dataclass(frozen=True)
class Approval:
    """approved/HASH.json: `study` is the canonical form, `cohort` the folder of the built cohort.

    `leaves` holds, for each stage, the tensors of an update by name, each with its bytes.
    """

    study: str
    approved: str
    by: str
    cohort: str
    digest: str
    patients: int
    leaves: list[dict[str, int]]


@dataclass(frozen=True)
class Orders:
    """approved/HASH.orders: how often a study was carried out since it was approved, and when last."""

    count: int = 0
    last: str = ""


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
        """Record that a study may run here, on that cohort; its orders are counted from none again.

        Raises:
            Refused, CohortError: the study, what would leave, or the cohort is beyond the policy.
        """
        leaves = what_leaves(study)
        self.permit(study, leaves, cohort)
        before, digest = self.approvals(study.hash).get(study.hash), read_meta(cohort.folder)["digest"]
        if before is None or before.digest != digest:  # what it keeps was made from other patients
            self._forget(study.hash)
        approval = Approval(
            study=study.canonical(),
            approved=_now(),
            by=by or getpass.getuser(),
            cohort=str(cohort.folder),
            digest=digest,
            patients=cohort.n_patients,
            leaves=leaves,
        )
        with storage(self.path):
            (self.path / "approved").mkdir(mode=0o700, exist_ok=True)
            self._orders(study.hash).unlink(missing_ok=True)
        write_atomic(self._approval(study.hash), json.dumps(asdict(approval), indent=2))
        return approval

    def permit(self, study: Study, leaves: Sequence[Mapping[str, int]], cohort: Cohort) -> None:
        """Refuse what is beyond the policy as it stands now."""
        self.settings.policy.check(study)
        if study.privacy.mode == "patient":
            require_patients(cohort.folder)
        for tensors in leaves:
            self.settings.policy.check_update(tensors)
        everyone = self.site(cohort).split(study)[0]
        trained = [training or everyone for training in self.trains_on(study, cohort)]
        self.settings.policy.check_cohort(min(training.n_patients for training in trained))

    def trains_on(self, study: Study, cohort: Cohort) -> list[Cohort | None]:
        """What each stage trains on here; None for one that needs labels where no training patient has any.

        Raises:
            CohortError: the cohort cannot be split into patients to train on and patients to measure by.
        """
        site = self.site(cohort)
        everyone = site.split(study)[0]

        def training(stage: Stage) -> Cohort | None:
            if not isinstance(stage, Finetune):
                return everyone
            with suppress(CohortError):
                return site.labelled(study, stage)[0]
            return None

        return [training(stage) for stage in study.stages]

    def approved(self, study_hash: str) -> Approval | None:
        """The approval of a study; None where there is none."""
        return self.approvals(study_hash).get(study_hash)

    def approvals(self, study_hash: str = "*") -> dict[str, Approval]:
        """Every approval, or that of one study, by the study's hash.

        Raises:
            Refused: one is damaged, or another version's.
        """
        found = {}
        for path in sorted((self.path / "approved").glob(f"{study_hash}.json")):
            try:
                found[path.stem] = Approval(**json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                fix = f"polyclinic site withdraw {path.stem}; then approve it again"
                raise Refused(f"the approval of {path.stem[:16]} cannot be read", fix) from error
        return found

    def approves(self, study_hash: str) -> bool:
        """Whether a study is approved."""
        return self.approved(study_hash) is not None

    def withdraw(self, study_hash: str) -> None:
        """Take an approval back, and remove what the site has kept to go on with the study.

        Raises:
            Refused: there is none.
        """
        try:
            self._approval(study_hash).unlink()
        except FileNotFoundError as error:
            raise Refused(f"no study {study_hash[:16]} is approved here", "see polyclinic site status") from error
        self._forget(study_hash)

    def _forget(self, study_hash: str) -> None:
        shutil.rmtree(self.path / "state" / study_hash[:16], ignore_errors=True)

    def _approval(self, study_hash: str) -> Path:
        return self.path / "approved" / f"{study_hash}.json"

    def _orders(self, study_hash: str) -> Path:
        return self._approval(study_hash).with_suffix(".orders")

    def orders(self, study_hash: str) -> Orders:
        """How often a study was asked for."""
        path = self._orders(study_hash)
        return Orders(**json.loads(path.read_text())) if path.exists() else Orders()

    @property
    def ledger(self) -> Ledger:
        """Of what has left."""
        return Ledger(self.path / "ledger")

    def leaving(self, kind: str, content: object) -> None:
        """Take out of a message's content what is withheld, and enter what is about to leave into the ledger.

        Raises:
            Refused: the policy keeps its tensors here.
            LedgerBroken, StorageError: it cannot be entered, and must not leave.
        """
        facts: dict[str, Any] = {"error": content}
        if not isinstance(content, str):
            self.settings.policy.withhold(content)
            facts = describe(content)
            if "tensors" in facts:
                sizes = {tensor["name"]: 4 * math.prod(tensor["shape"]) for tensor in facts["tensors"]}
                self.settings.policy.check_update(sizes)
                if not self.approves(facts["study"]):
                    self._forget(facts["study"])  # the round that was under way has kept it
                    raise Refused("the site has withdrawn its approval meanwhile", "ask the site")
        to = self.joined.address if self.joined else ""
        self.ledger.append({"to": to, "kind": kind, **facts})

    def serve(self, text: str) -> Site:
        """The site as an order finds it that brings a study in its canonical form; the order is counted.

        Raises:
            Refused: the study is not approved here, goes beyond the policy, or has been asked for too often; or the
                site does not work at this hour.
            CohortError: the cohort has changed since, or is too small.
        """
        study = parse_canonical(text, "the study that came with the order")
        approval = self.approved(study.hash)
        if approval is None:
            raise Refused(
                f"the study {study.name!r} ({study.hash[:16]}) is not approved at this site",
                "ask the site to approve it: polyclinic site approve study.toml",
            )
        cohort = open_cohort(Path(approval.cohort))
        self.permit(study, approval.leaves, cohort)
        if read_meta(cohort.folder)["digest"] != approval.digest:
            raise CohortError("the site's images have changed since it approved the study", "approve it again")
        self.settings.policy.check_hours()
        self._count(study)
        return self.site(cohort)

    def site(self, cohort: Cohort) -> Site:
        return Site(self.name, cohort, self.path / "state", self.path / "privacy", self.settings.policy.caps)

    @property
    def spending(self) -> PrivacyLedger:
        """Of its patients' privacy, by all studies."""
        return PrivacyLedger(self.path / "privacy")

    def _count(self, study: Study) -> None:
        """Count an order, durably, before anything is done for it.

        Raises:
            Refused: there have been as many as there may be.
        """
        with locked(self.path / "approved", PATIENCE_S) as free:
            if not free:
                raise Refused("the site counts another order for too long", "see which process holds the site's folder")
            made, most = self.orders(study.hash).count, self.settings.policy.orders(study)
            if made >= most:
                fix = "ask the site to approve the study again, or to raise max_orders in its site.toml"
                raise Refused(f"the site has carried out {made} orders of this study, all that it allows", fix)
            write_atomic(self._orders(study.hash), json.dumps(asdict(Orders(made + 1, _now()))))


def what_leaves(study: Study) -> list[dict[str, int]]:
    """For each stage: the tensors of an update by name, each with its bytes."""
    from polyclinic.model import initial_tensors  # torch

    stages = range(len(study.stages))
    return [{name: value.nbytes for name, value in initial_tensors(study, stage, None).items()} for stage in stages]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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
    write_secret(path / "node.key", private)
    write_atomic(path / "request.json", request.model_dump_json(indent=2))
    text = TEMPLATE.format(name=json.dumps(name), data=json.dumps(str(data.resolve())))
    write_atomic(path / SETTINGS, text + limits.TEMPLATE)  # last: with it, it is a site's folder
    return request
