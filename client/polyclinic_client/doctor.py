"""`polyclinic site doctor`: whether this site can take part, check by check, each with what to do about it.

Every check looks at one thing and trusts none of the others; those of the network (network.py) go from the name of the
coordinator outwards, and the first that fails names the layer that fails.
"""

import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from cryptography.hazmat.primitives import serialization
from pydicom.uid import UID

from polyclinic import __version__
from polyclinic.bundle import bundle_hash
from polyclinic.enrolment import Join, Request, fingerprint, read_file
from polyclinic.errors import PolyclinicError
from polyclinic.stages import UNPAIRED
from polyclinic.study import load_study
from polyclinic_client.findings import Finding
from polyclinic_client.hospital import Hospital, what_leaves
from polyclinic_client.network import EXPIRY_DAYS, Way, certificate_days
from polyclinic_client.rehearsal import duration, rehearse

DISK_GB, MEMORY_GB = 10.0, 4.0
"""Below which a site is warned."""
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container finds how much memory it may take, bytes: of cgroups 2, and 1."""

Check = Callable[[Hospital], Finding]


def examine(path: Path, study: Path | None = None) -> Iterator[Finding]:
    """All findings about the site in a folder, as they are made; with a study file, about that too."""
    try:
        hospital = Hospital(path)
    except PolyclinicError as error:
        yield Finding("configuration", "FAIL", error.problem, error.fix)
        return
    yield Finding("configuration", "PASS", f"site {hospital.name}")
    for name, check in CHECKS.items():
        yield from _tried(name, _one(check, hospital))
    if study is not None:
        yield from _tried("study", _rehearsal(hospital, study))
    yield from _tried("answer", _coordinator(hospital))


def _one(check: Check, hospital: Hospital) -> Iterator[Finding]:
    yield check(hospital)


def _tried(name: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Findings as they are made, the last of them what has kept their check from going on."""
    try:
        yield from findings
    except PolyclinicError as error:
        yield Finding(name, "FAIL", error.problem, error.fix)
    except OSError as error:
        yield Finding(name, "FAIL", f"cannot be checked: {error.strerror}", "see who may read the site's folder")


def _coordinator(hospital: Hospital) -> Iterator[Finding]:
    """Whether the coordinator's answer is here, is of this version, and leads to it."""
    joined = hospital.joined
    if joined is None:
        yield Finding("answer", "FAIL", "the coordinator has not answered yet", "polyclinic site join join-NAME.json")
        return
    if joined.bundle == bundle_hash():
        yield Finding("version", "PASS", f"{__version__}, with the coordinator's bundle")
    else:
        fix = f"install the coordinator's version (this is {__version__}), or join again once it has this one"
        yield Finding("version", "FAIL", "the coordinator's bundle is another version's: nothing of it runs here", fix)
    days = certificate_days(joined.authority)
    if days < EXPIRY_DAYS:
        yield Finding(
            "authority", "WARN", f"its certificate expires in {days} days", "ask the coordinator for a new one"
        )
    yield from Way(joined).check()


def _data(hospital: Hospital) -> Finding:
    data = Path(hospital.settings.data)
    if not data.exists() or not os.access(data, os.R_OK):
        return Finding("data", "FAIL", f"{data} cannot be read", "mount it, or correct `data` in site.toml")
    if os.access(data, os.W_OK):
        return Finding(
            "data", "WARN", f"{data} could be written to", "mount it read-only: Polyclinic never writes there"
        )
    return Finding("data", "PASS", f"{data} can be read and not written to")


def _decoders(hospital: Hospital) -> Finding:
    """From the cohorts that were built: which files no decoder could read, by transfer syntax."""
    missing: Counter[str] = Counter()
    lists = list((hospital.path / "state" / "cohorts").glob("*/quarantine.csv"))
    for path in lists:
        table = pd.read_csv(path, keep_default_na=False)
        missing.update(table.loc[table["reason"] == "no_decoder", "transfer_syntax"])
    if not lists:
        return Finding(
            "decoders", "WARN", "no images have been read yet", "approve a study, or `polyclinic cohort inspect`"
        )
    if missing:
        named = ", ".join(f"{count} files of {UID(uid).name or 'an unknown kind'}" for uid, count in missing.items())
        return Finding(
            "decoders", "WARN", f"no decoder for {named}", "install the extra gpl-decoders, or leave them out"
        )
    return Finding("decoders", "PASS", "every kind of file that was found can be decoded")


def _disk(hospital: Hospital) -> Finding:
    free = shutil.disk_usage(hospital.path).free / 1e9
    if free < DISK_GB:
        return Finding("disk", "WARN", f"{free:.1f} GB free", f"free {DISK_GB:.0f} GB where the site's folder is")
    return Finding("disk", "PASS", f"{free:.0f} GB free")


def _memory(hospital: Hospital) -> Finding:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 / 1e9
        limits = [path.read_text().strip() for path in LIMITS if path.exists()]
        most = min((int(limit) / 1e9 for limit in limits if limit.isdigit()), default=free)
        free, words = (most, "at most, in this container") if most < free else (free, "free")
    except OSError:
        return Finding("memory", "WARN", "cannot be told on this system", f"see that {MEMORY_GB:.0f} GB are free")
    if free < MEMORY_GB:
        return Finding("memory", "WARN", f"{free:.1f} GB {words}", f"training wants {MEMORY_GB:.0f} GB or more")
    return Finding("memory", "PASS", f"{free:.0f} GB {words}")


def _compute(hospital: Hospital) -> Finding:
    import torch

    from polyclinic.training import has_bf16, pick_device

    policy, device = hospital.settings.policy, pick_device()
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "a Mac's GPU" if device.type == "mps" else ""
    bf16 = "with" if has_bf16(torch.device("cpu")) else "without"
    said = f"{os.cpu_count()} processors {bf16} bf16; {gpu or 'no GPU that torch can use'}"
    if policy.threads > (os.cpu_count() or 1):
        return Finding("compute", "WARN", said, f"`threads` in site.toml is {policy.threads}: lower it")
    return Finding("compute", "PASS", said + ("" if policy.gpu or not gpu else ", which the policy leaves out"))


def _key(hospital: Hospital) -> Finding:
    path = hospital.path / "node.key"
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Finding("key", "FAIL", f"node.key may be read by others (mode {mode:o})", f"chmod 600 {path}")
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except ValueError:
        return Finding("key", "FAIL", "node.key is no private key", "restore it from a backup, or make the site anew")
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    own = fingerprint(key.public_key().public_bytes(*form).decode())
    if own != read_file(hospital.path / "request.json", Request).fingerprint:
        return Finding("key", "FAIL", "node.key is not the one of request.json", "restore both from one backup")
    return Finding("key", "PASS", own)


def _ledger(hospital: Hospital) -> Finding:
    return Finding("ledger", "PASS", f"{hospital.ledger.verify()} entries, each after the one before")


def _spending(hospital: Hospital) -> Finding:
    return Finding("privacy ledger", "PASS", f"{hospital.spending.verify()} entries, each after the one before")


def _studies(hospital: Hospital) -> Finding:
    found = len(list((hospital.path / "approved").glob("*.json")))
    if not found:
        return Finding("studies", "WARN", "none is approved", "polyclinic site approve study.toml")
    return Finding("studies", "PASS", f"{found} approved")


CHECKS: dict[str, Check] = {
    "data": _data,
    "decoders": _decoders,
    "disk": _disk,
    "memory": _memory,
    "compute": _compute,
    "key": _key,
    "ledger": _ledger,
    "privacy ledger": _spending,
    "studies": _studies,
}


def _rehearsal(hospital: Hospital, path: Path) -> Iterator[Finding]:
    """A study's dry run on the site's own images."""
    study = load_study(path)
    hospital.settings.policy.check(study)
    cohort = hospital.cohort_for(study)
    hospital.permit(study, what_leaves(study), cohort)
    yield Finding("study", "PASS", f"within the policy, on {len(cohort)} images of {cohort.n_patients} patients")
    found = rehearse(hospital, study, cohort)
    for stage in found.stages:
        if not stage.images_s:
            said = f"{stage.method}: no patient to train on has its labels here; the site sits these rounds out"
            yield Finding("labels", "WARN", said, "ask the coordinator to name the site's words in [evaluation] labels")
    if hospital.site(cohort).unpaired(study):
        yield Finding("pairs", "WARN", UNPAIRED, "give the labels.csv that says which images are of one patient")
    paces = "; ".join(
        f"{stage.method}: {stage.images_s:.0f} images a second, {duration(stage.round_s)} a round"
        for stage in found.stages
        if stage.images_s
    )
    said = f"{paces}; {found.memory_mb / 1e3:.1f} GB of memory, on the {found.device} (an estimate from a few batches)"
    if late := found.later_than(study):
        fix = "give the site more processors or a GPU, or ask the coordinator to raise round_deadline_s"
        yield Finding("dry run", "WARN", f"{late}: {said}", fix)
    else:
        yield Finding("dry run", "PASS", said)


def firewall_note(joined: Join) -> str:
    """One page for the firewall team."""
    host, _, port = joined.address.rpartition(":")
    return f"""\
What this machine needs of the network
======================================

One rule: outbound TCP to {host} port {port}. Nothing inbound.

Why         Polyclinic trains a model across hospitals. This machine asks the coordinator for work and sends back
            changes of the model's weights and a fixed list of figures. Images, names and file headers stay here;
            every answer is listed: polyclinic site ledger show --csv.
How         HTTPS (TLS 1.2 or later), requests every few seconds, up to some hundred MB a training round.
Who         The other end shows a certificate of the coordinator's own authority, which this machine checks. A proxy
            that opens TLS and closes it again would break that check, as it is meant to: let the connection pass.
            A forward proxy that tunnels it (CONNECT) will do: set HTTPS_PROXY where `polyclinic site start` runs.
Without it  The site takes no part; nothing else here is affected.
"""
