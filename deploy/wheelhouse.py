"""Make a folder from which Polyclinic is installed without a network: its wheel and those that it needs.

    .venv/bin/python deploy/wheelhouse.py dist/wheelhouse

Run it in a checkout after `make test`, on a machine with a package index and with the system, processor and Python
version of those that it is for. What is needed is read from what is installed here; versions and hashes are those of
requirements.lock, so neither development tools nor Ray come along. Beside the wheels stand requirements.txt with every
hash, install.sh, and SHA256SUMS, whose own hash is printed: read it out to whoever installs.
"""

import argparse
import hashlib
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "polyclinic"
SUMS = "SHA256SUMS"

INSTALL = """\
#!/bin/sh
# Installs Polyclinic {version} from this folder alone:  sh install.sh /opt/polyclinic/{version}
# Another Python than python3:  PYTHON=python{python} sh install.sh ...
set -eu
[ $# -eq 1 ] || {{ echo "error: where to?" >&2; echo "  fix: sh install.sh /opt/polyclinic/{version}" >&2; exit 2; }}
mkdir -p "$1"
target=$(cd "$1" && pwd)
cd "$(dirname "$0")"
sha256sum --check --strict --quiet {sums}
found=$("${{PYTHON:-python3}}" -c 'import sys; print("{{}}.{{}}".format(*sys.version_info))')
if [ "$found" != {python} ]; then
    echo "error: these wheels are for Python {python} and this is $found" >&2
    echo "  fix: PYTHON=python{python} sh install.sh $target" >&2
    exit 2
fi
"${{PYTHON:-python3}}" -m venv "$target"
"$target/bin/python" -m pip install --quiet --disable-pip-version-check --isolated \\
    --no-index --find-links . --only-binary :all: --require-hashes --requirement requirements.txt
"$target/bin/polyclinic" --version
"""


def needed(project: str) -> set[str]:
    """The names of all that `project` needs on this machine, itself left out, as its installed metadata say.

    Raises:
        importlib.metadata.PackageNotFoundError: something of it is not installed here.
    """
    found: set[str] = set()
    waiting = [Requirement(project)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found.add(name)
        for line in requires(name) or []:
            below = Requirement(line)
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                waiting.append(below)
    return found - {canonicalize_name(project)}


def locked(lock: str, names: set[str]) -> str:
    """The entries of a lock file for `names` that hold on this machine, whole: version, marker, hashes.

    Raises:
        SystemExit: there is none for one of them.
    """
    found = {}
    for entry in re.findall(r"^[a-z0-9].*\n(?: .*\n)*", lock, re.MULTILINE):
        pinned = Requirement(entry.partition("\\")[0])
        if pinned.name in names and (pinned.marker is None or pinned.marker.evaluate()):
            found[pinned.name] = entry
    if missing := sorted(names - found.keys()):
        sys.exit(f"error: requirements.lock does not hold {', '.join(missing)}\n  fix: make lock, then make test")
    return "".join(found.values())


def make(folder: Path, names: set[str]) -> str:
    """Fill `folder` with our wheel, the locked wheels of `names` and what installs them; the SHA-256 of its SHA256SUMS.

    Raises:
        SystemExit: there is something in it already.
        subprocess.CalledProcessError: a wheel cannot be built or had.
    """
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"error: {folder} is not empty\n  fix: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    _python("hatchling", "build", "-t", "wheel", "-d", str(folder.resolve()))
    (wheel,) = folder.glob("*.whl")
    version = str(parse_wheel_filename(wheel.name)[1])
    requirements = folder / "requirements.txt"
    requirements.write_text(locked((ROOT / "requirements.lock").read_text(), names))
    options = ["--only-binary", ":all:", "--no-deps", "--require-hashes", "--quiet", "--disable-pip-version-check"]
    _python("pip", "download", *options, "--dest", str(folder), "--requirement", str(requirements))
    with requirements.open("a") as file:
        file.write(f"{PROJECT}=={version} \\\n    --hash=sha256:{_sha256(wheel)}\n")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "install.sh").write_text(INSTALL.format(version=version, python=python, sums=SUMS))
    lines = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines))
    return _sha256(folder / SUMS)


def _python(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)  # noqa: S603 (no shell)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    target = parser.parse_args().folder
    digest = make(target, needed(PROJECT))
    print(f"{target}: {len(list(target.glob('*.whl')))} wheels; {SUMS} has the SHA-256\n{digest}")
