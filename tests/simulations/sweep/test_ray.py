"""Studies side by side on Ray: the table that one after another makes, and what happens in them is heard of here."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tomli_w

from polyclinic_simulations.sweep import run
from polyclinic_simulations.sweep.grid import read_grid
from polyclinic_simulations.sweep.run import Place

from ...tiny import SIMCLR, tiny_study, write_cohort

pytest.importorskip("ray")

pytestmark = pytest.mark.alone

SCRIPT = """
import json, sys
from pathlib import Path
from polyclinic_simulations.sweep import run
from polyclinic_simulations.sweep.grid import read_grid

grid, place, heard = read_grid(Path(sys.argv[1])), run.Place(*map(Path, sys.argv[2:])), []
made = list(run.side_by_side(run.tasks(grid, place), place, lambda cell, event: heard.append((cell, event))))
print(json.dumps([sorted(cell.name for cell in made), heard]))
"""


def names(heard: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, list[str]]:
    """{cell: its own events, without those of its rows}."""
    found = defaultdict(list)
    for cell, event in heard:
        if "row" not in event:
            found[cell].append(event["event"])
    return found


def figures(table: pd.DataFrame) -> pd.DataFrame:
    """All but times."""
    return table[~table["metric"].isin(["site_seconds", "wall_s"])].reset_index(drop=True)


def test_side_by_side_makes_the_table_of_one_by_one(tmp_path: Path) -> None:
    write_cohort(tmp_path / "data" / "all", 12)
    plain = tiny_study(
        encoder={"name": "vit_tiny"},
        stages=[{**SIMCLR, "rounds": 1}],
        evaluation={"rows": ["random"], "every": 0},
        simulation={"sites": 2, "cohort": "all"},
    ).model_dump(mode="json", exclude_defaults=True)
    path = tmp_path / "grid.toml"
    path.write_text(tomli_w.dumps({**plain, "grid": {"seed": [0, 1]}}))
    grid = read_grid(path)
    near, far = (
        Place(tmp_path / engine, tmp_path / "data", tmp_path / f"{engine} state") for engine in ("near", "far")
    )
    command = [sys.executable, "-c", SCRIPT, path, far.out, far.data, far.state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        expected = list[tuple[str, dict[str, Any]]]()
        cells = list(run.one_by_one(run.tasks(grid, near), near, lambda cell, event: expected.append((cell, event))))
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    made, heard = json.loads(out)
    assert made == sorted(cell.name for cell in cells)
    assert names(heard) == names(expected)
    pd.testing.assert_frame_equal(figures(run.results(grid, far)), figures(run.results(grid, near)))
