"""Who may import whom, and what product code never does. The rules are the tables; the checks read the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGES = {
    "polyclinic": ("common", set()),
    "polyclinic_client": ("client", {"polyclinic"}),
    "polyclinic_server": ("server", {"polyclinic"}),
    "polyclinic_simulations": ("simulations", {"polyclinic", "polyclinic_client", "polyclinic_server"}),
}
"""package: (its folder, the other packages that it may import)."""

LAYERS = [
    {"errors", "__version__"},
    {"files", "seeding", "explain", "processes", "bundle"},
    {"chain"},
    {"settings"},
    {"stages", "rules", "faults"},
    {"simulation"},
    {"study"},
    {"augment", "cohort", "encoders", "wire", "enrolment", "reference"},
    {"methods"},
    {"training", "model"},
    {"evaluation", "privacy"},
    {"report"},
    {"artifacts"},
    {"cli", ""},
    {"__main__"},
]
"""Parts of the library, lowest first; each may import what is below it, and itself. "" is the rest of `__init__.py`."""

FLWR = (
    "polyclinic.wire",
    "polyclinic.bundle",
    "polyclinic_client.app",
    "polyclinic_client.clientapp",
    "polyclinic_client.superexec",
    "polyclinic_client.supernode",
    "polyclinic_server.app",
    "polyclinic_server.rounds",
    "polyclinic_server.mail",
    "polyclinic_server.gate",
    "polyclinic_server.superlink",
    "polyclinic_server.aggregation",
    "polyclinic_simulations.engines",
)
"""Modules and packages that may import Flower."""

FORBIDDEN_IMPORTS = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "torch.load", "torch.hub")
FORBIDDEN_CALLS = ("eval", "exec", "__import__", "torch.load", "os.system", "os.popen", "PrivacyEngine.load_checkpoint")
FORBIDDEN_ARGUMENTS = ("shell=True", "force=True", "allow_pickle=True", "weights_only=False")
IGNORING_WARNINGS = ("filterwarnings", "simplefilter")


def violations(module: str, text: str) -> list[str]:
    """Every rule that a module of product code breaks, with its line."""
    tree = ast.parse(text)
    return [*_imports(module, tree), *_calls(tree)]


def _imports(module: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"line {node.lineno}: a relative import"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for name in (prefix + alias.name for alias in node.names):
                if reason := _may_not_import(module, name):
                    yield f"line {node.lineno}: imports {name}: {reason}"


def _may_not_import(module: str, name: str) -> str:
    package, other = module.partition(".")[0], name.partition(".")[0]
    if within(name, FORBIDDEN_IMPORTS):
        return "never in product code"
    if other == "flwr" and not within(module, FLWR):
        return "Flower is imported in a few modules only"
    if other in PACKAGES and other != package and other not in PACKAGES[package][1]:
        return f"{package} does not import {other}"
    if package == other == "polyclinic" and layer(name) > layer(module) - (part(name) != part(module)):
        return f"{part(module) or 'the package'!r} stands below or beside it"
    return ""


def _calls(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in FORBIDDEN_CALLS:
            yield f"line {node.lineno}: calls {called}"
        for argument in node.keywords:
            if ast.unparse(argument) in FORBIDDEN_ARGUMENTS:
                yield f"line {node.lineno}: passes {ast.unparse(argument)}"
        if called.rpartition(".")[2] in IGNORING_WARNINGS and "'ignore'" in [ast.unparse(a) for a in node.args]:
            yield f"line {node.lineno}: ignores warnings"


def within(name: str, allowed: tuple[str, ...]) -> bool:
    """Is `name` one of `allowed`, or inside one of them?"""
    return any(f"{name}.".startswith(f"{one}.") for one in allowed)


def part(name: str) -> str:
    """`cohort` for polyclinic.cohort.scan; "" for what the package itself exports."""
    first = name.partition(".")[2].partition(".")[0]
    return first if any(first in parts for parts in LAYERS) else ""


def layer(name: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part(name) in parts)


def sources() -> Iterator[tuple[str, Path]]:
    """(module name, file) of all product code."""
    for package, (folder, _) in PACKAGES.items():
        for path in sorted((ROOT / folder / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT / folder).with_suffix("").parts).removesuffix(".__init__"), path


@pytest.mark.parametrize(("module", "path"), [pytest.param(*source, id=source[0]) for source in sources()])
def test_product_code_keeps_the_rules(module: str, path: Path) -> None:
    assert violations(module, path.read_text(encoding="utf-8")) == []


def test_every_part_of_the_library_has_a_layer() -> None:
    parts = {module.split(".")[1] for module, _ in sources() if module.startswith("polyclinic.")}
    assert parts - set().union(*LAYERS) == set()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("polyclinic.cohort.scan", "from polyclinic_client import site"),
        ("polyclinic_client.app", "import polyclinic_server.rounds"),
        ("polyclinic_server.app", "def f():\n    from polyclinic_client.app import app"),
        ("polyclinic_server.app", "from polyclinic_simulations import phantom"),
        ("polyclinic.study", "from polyclinic.cohort import Cohort"),
        ("polyclinic.study", "from polyclinic import training"),
        ("polyclinic.study", "import polyclinic.training"),
        ("polyclinic.encoders.vit", "from polyclinic.cohort import Cohort"),
        ("polyclinic.errors", "from polyclinic.files import atomic"),
        ("polyclinic.cohort.scan", "from polyclinic import load_encoder"),
        ("polyclinic.cohort.scan", "from . import index"),
        ("polyclinic.training", "from flwr.app import Message"),
        ("polyclinic_server.rundir", "import flwr"),
        ("polyclinic.files", "import pickle"),
        ("polyclinic.artifacts", "from torch import load"),
        ("polyclinic.artifacts", "import torch\ntorch.load('x')"),
        ("polyclinic.artifacts", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        ("polyclinic_client.agent", "import subprocess\nsubprocess.run('x', shell=True)"),
        ("polyclinic.cohort.dicom", "import pydicom\npydicom.dcmread('x', force=True)"),
        ("polyclinic.study", "eval('1')"),
        ("polyclinic.training", "import warnings\nwarnings.filterwarnings('ignore', module='torch')"),
        ("polyclinic.training", 'from warnings import simplefilter\nsimplefilter("ignore")'),
    ],
)
def test_the_check_sees_a_planted_violation(module: str, text: str) -> None:
    assert len(violations(module, text)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("polyclinic.cohort.scan", "from polyclinic.cohort.index import Index"),
        ("polyclinic.training", "from polyclinic.cohort import Cohort\nfrom polyclinic import study"),
        ("polyclinic_server.aggregation.fedavg", "from flwr.app import Message"),
        ("polyclinic_simulations.compare", "import polyclinic_client.site, polyclinic_server.rounds"),
        ("polyclinic.model", "model.eval()\nimport re\nre.compile('x')"),
        ("polyclinic.cohort.index", "import numpy as np\nnp.load('x', allow_pickle=False)"),
        ("polyclinic.training", "import warnings\nwarnings.filterwarnings('error')"),
    ],
)
def test_the_check_lets_the_rest_pass(module: str, text: str) -> None:
    assert violations(module, text) == []


@pytest.mark.parametrize(
    "module",
    [
        "polyclinic",
        "polyclinic.study",
        "polyclinic.cohort.worker",
        "polyclinic_client.overview",
        "polyclinic_server.overview",
    ],
)
def test_what_starts_often_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
