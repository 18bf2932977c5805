"""A grid from one file: which studies it makes, which rows they share, what comes out, and what is refused before."""

import json
import shutil
import tomllib
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tomli_w
from rich.console import Console

from polyclinic import cli
from polyclinic.encoders import ENCODERS
from polyclinic.errors import QuorumLost, Refused, StudyError
from polyclinic.study import Study
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.sweep import cli as module
from polyclinic_simulations.sweep import run
from polyclinic_simulations.sweep.figures import Table
from polyclinic_simulations.sweep.grid import Grid, read_grid
from polyclinic_simulations.sweep.run import Place

from ...tiny import SIMCLR, SITES, TinyEncoder, tiny_study, write_cohort

ROWS = ["random", "alone", "pooled"]


def write_grid(path: Path, grid: dict[str, Any], rows: list[str] = ROWS, **changes: Any) -> Path:
    """A grid over a study of three sites dealt from one cohort, of one round."""
    settings: dict[str, Any] = {
        "stages": [{**SIMCLR, "rounds": 1}],
        "evaluation": {"rows": rows, "every": 0},
        "simulation": {"sites": 3, "cohort": "all"},
    }
    plain = tiny_study(**{**settings, **changes}).model_dump(mode="json", exclude_defaults=True)
    path.write_text(tomli_w.dumps({**plain, "grid": grid}))
    return path


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
    yield


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_cohort(tmp_path / "data" / "all", 24)
    return tmp_path / "data"


def cells(grid: Grid) -> list[dict[str, str]]:
    return [cell.values for cell in grid.cells]


def test_every_value_meets_every_other_and_each_study_says_its_own(tmp_path: Path) -> None:
    rules = ["fedavg", {"rule": "fedprox", "mu": 0.5}]
    grid = {
        "rule": rules,
        "partition": [{"kind": "dirichlet", "alpha": 0.1}],
        "stages.0.batch_size": [4, 8],
        "seed": [1, 2],
    }
    read = read_grid(write_grid(tmp_path / "grid.toml", grid))
    assert len(cells(read)) == len({tuple(values.values()) for values in cells(read)}) == 8
    assert read.axes["rule"] == ["fedavg", "fedprox mu=0.5"]
    last = read.cells[-1].study
    assert (last.aggregation.rule, last.aggregation.mu, last.aggregation.min_sites) == ("fedprox", 0.5, 2)  # type: ignore[union-attr]
    assert (last.simulation.partition.alpha, last.stages[0].batch_size, last.seed) == (0.1, 8, 2)  # type: ignore[union-attr]
    assert len({cell.name for cell in read.cells}) == 8
    assert read.conditions == ["partition"]
    assert read.choices == ["rule", "stages.0.batch_size"]
    assert read.axes_of("pooled") == ["partition", "stages.0.batch_size", "seed"]
    assert read.axes_of("scratch") == read.axes_of("federated") == list(read.axes)


def test_severity_scales_every_shift_and_method_changes_pretraining_only(tmp_path: Path) -> None:
    shift = {"kind": "response", "severity": 0.8}
    site = [{"name": name, "cohort": name, "shift": [shift]} for name in SITES]
    plain = tiny_study(
        stages=[SIMCLR, {"kind": "finetune", "rounds": 1}],
        evaluation={"labels": {"a": ["a"], "b": ["b"]}},
        simulation={"site": site, "shift": [{**shift, "severity": 0.2}]},
    ).model_dump(mode="json", exclude_defaults=True)
    path = tmp_path / "grid.toml"
    path.write_text(tomli_w.dumps({**plain, "grid": {"severity": [0, 0.5], "method": ["simclr", "micle"]}}))
    read = read_grid(path)
    study = read.cells[-1].study
    assert [shift.severity for shift in study.simulation.shifts_of("east")] == [0.1, 0.4]
    assert [stage.method for stage in study.stages] == ["micle", "supervised"]
    assert read.conditions == ["severity"]


def test_a_named_value_sets_several_keys_and_a_dotted_name_needs_no_quotes(tmp_path: Path) -> None:
    small = {"name": "small and short", "set": {"stages.0.batch_size": 4, "stages.0.rounds": 2}}
    path = write_grid(tmp_path / "grid.toml", {"schedule": [{"name": "as it is", "set": {}}, small]})
    path.write_text(path.read_text() + "encoder.name = ['resnet18', 'resnet50']\n")
    read = read_grid(path)
    assert read.axes["schedule"] == ["as it is", "small and short"]
    assert read.axes["encoder.name"] == ["resnet18", "resnet50"]
    assert (read.cells[-1].study.stages[0].batch_size, read.cells[-1].study.rounds) == (4, 2)


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({}, "has no \\[grid\\]"),
        ({"rule": []}, "rule has no value"),
        ({"rule": ["fedavg", "fedavg"]}, "names 'fedavg' twice"),
        ({"rule": ["fedavg", {"name": "", "set": {"aggregation.rule": "median"}}]}, "a value without a name"),
        ({"rules": ["fedavg"]}, "no axis 'rules'"),
        ({"severity": [0.5]}, "no shift to scale"),
        ({"rule": ["fedavg", "fedbest"]}, "cell rule = fedbest"),
        ({"partition": [{"kind": "dirichlet", "alpha": 0.0}]}, "alpha"),
        ({"stages.7.rounds": [1]}, "no place for 'stages.7.rounds'"),
        ({"rule": ["fedavg"], "method": []}, "method has no value"),
        ({"seed": list(range(10_001))}, "10001 cells"),
        ({"seed": 3}, r"seed is 3\n  fix: give a list, such as \[3\]"),
        ({"rule": "median"}, "rule is 'median'"),
        ({"study.seed": [1, 2]}, "both set study.seed"),
        ({"rule": ["fedavg"], "aggregation.rule": ["median"]}, "both set aggregation.rule"),
        ({"simulation.partition": [{"kind": "iid"}], "partition": ["iid"]}, "both set simulation.partition"),
        ({"evaluation.rows": [["random"], []]}, "varies evaluation.rows"),
    ],
)  # fmt: skip
def test_what_makes_no_grid_is_refused_by_name(grid: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=said):
        read_grid(write_grid(tmp_path / "grid.toml", grid))


@pytest.mark.parametrize("factor", [1.5, -0.1, "all"])
def test_a_severity_out_of_range_is_refused(factor: object, tmp_path: Path) -> None:
    shift = [{"kind": "response", "severity": 0.5}]
    simulation = {"sites": 3, "cohort": "all", "shift": shift}
    path = write_grid(tmp_path / "grid.toml", {"severity": [0.5, factor]}, simulation=simulation)
    with pytest.raises(StudyError, match=rf"severity is {factor!r}\n  fix: give numbers from 0 to 1"):
        read_grid(path)


def sweep(grid: Path, out: Path, data: Path, *options: str) -> int:
    return cli.run(
        ["sweep", str(grid), "--out", str(out), "--data", str(data), "--state", str(out.parent / "state"), *options]
    )


def test_rows_that_no_rule_changes_are_trained_once_and_all_goes_into_one_table(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(tmp_path / "grid.toml", {"rule": ["fedavg", "median"], "partition": ["iid"], "seed": [0, 1]})
    out = tmp_path / "out"
    assert sweep(grid, out, data, "--engine", "local", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    [condition] = said["conditions"]
    assert (condition["condition"], said["failed"]) == ("iid", {})
    assert {row["choice"] for row in condition["ranking"]} == {"fedavg", "median"}
    assert all(row["seeds"] == 2 for row in condition["ranking"])
    assert {row["row"] for row in condition["others"]} >= {"mean single site", "all sites pooled"}
    table = pd.read_csv(out / "results.csv", keep_default_na=False)
    overall = table[(table["metric"] == "auc") & (table["site"] == "") & (table["label_fraction"] == 1)]
    assert len(overall[overall["row"] == "federated"]) == 4
    for row in ("random", "pooled", "alone:site-1", "alone:site-3"):
        assert len(own := overall[overall["row"] == row]) == 2, row
        assert set(own["rule"]) == {""}
    federated = table[(table["row"] == "federated") & (table["cell"] == table["cell"].iloc[0])]
    assert set(federated["site"]) == {"", "site-1", "site-2", "site-3"}
    assert set(federated["label_fraction"]) == {0.01, 0.05, 0.1, 0.3, 1.0}
    assert {"site_auc", "bytes_up", "bytes_down", "site_seconds", "wall_s"} <= set(federated["metric"])
    matrix = table[table["metric"] == "auc_own_probe"]
    assert set(matrix["row"]) == {"alone:site-1", "alone:site-2", "alone:site-3"}
    page = (out / "sweep.html").read_text()
    assert "4 of 4 studies trained" in page
    assert "does not ask for, in [evaluation]: 16 × 16 pixels, no pretraining." in page
    assert "From site to site" in page and "median" in page
    kept = {path.name for path in next((out / "cells").iterdir()).iterdir()}
    assert {"encoder.safetensors", "report.html", "summary.json"} <= kept
    assert not kept & {"sites", "rows", "checkpoints"}


def test_rows_that_no_fault_changes_stand_beside_every_condition(data: Path, tmp_path: Path) -> None:
    attacks = [{"name": "flip", "set": {"simulation.fault": [{"kind": "sign_flip", "sites": ["site-1"]}]}}]
    attacks += [{"name": "none, ever", "set": {"simulation.fault": []}}]
    read = read_grid(write_grid(tmp_path / "grid.toml", {"attack": attacks}))
    assert (read.conditions, read.faults) == (["attack"], ["attack"])
    place = Place(tmp_path / "out", data, tmp_path / "state")
    assert [study.evaluation.rows for _, study in run.tasks(read, place)] == [[], ROWS]  # by the one without a fault
    assert sweep(tmp_path / "grid.toml", tmp_path / "out", data, "--engine", "local") == 0
    table = Table(pd.read_csv(tmp_path / "out" / "results.csv", keep_default_na=False), read)
    assert table.conditions == [("flip",), ("none, ever",)]
    for condition in table.conditions:
        assert [name for name, _ in table.ranked(condition)] == [()]
        assert {"all sites pooled", "untrained encoder", "mean single site"} == {
            n for n, _ in table.other_rows(condition)
        }


def test_pretraining_is_compared_with_none_by_the_same_rule(tmp_path: Path) -> None:
    stages = [SIMCLR, {"kind": "finetune", "rounds": 1}]
    evaluation = {"rows": [*ROWS, "scratch"], "labels": {"a": ["a"], "b": ["b"]}}
    rules = {"rule": ["median", "fedavg"]}
    grid = write_grid(tmp_path / "grid.toml", rules, stages=stages, evaluation=evaluation)
    wanted = run.tasks(read_grid(grid), Place(tmp_path / "out", tmp_path, tmp_path))
    assert [study.evaluation.rows for _, study in wanted] == [["scratch"], [*ROWS, "scratch"]]


def test_a_grid_that_grows_at_its_front_keeps_the_rows_where_they_are(data: Path, tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    assert sweep(write_grid(grid, {"rule": ["median"]}, ["random"]), out, data, "--engine", "local") == 0
    write_grid(grid, {"rule": ["fedavg", "median"]}, ["random"])
    [(cell, study)] = run.tasks(read_grid(grid), Place(out, data, tmp_path / "state"))
    assert (cell.values["rule"], study.evaluation.rows) == ("fedavg", [])


def test_other_patients_are_another_sweep(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, out = write_grid(tmp_path / "grid.toml", {"seed": [0]}, []), tmp_path / "out"
    assert sweep(grid, out, data, "--engine", "local") == 0
    write_cohort(tmp_path / "others" / "all", 20, seed=1)
    assert sweep(grid, out, tmp_path / "others", "--engine", "local") == 2
    assert "begun with other patients" in capsys.readouterr().err


def test_a_grid_of_which_nothing_can_be_trained_fails(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {"kind": "dropout", "sites": ["site-1", "site-2"]}
    simulation = {"sites": 3, "cohort": "all", "fault": [gone], "clock": {"images_per_s": 100.0}}
    path = write_grid(tmp_path / "grid.toml", {"seed": [0]}, [], aggregation={"min_sites": 2})
    plain = tomllib.loads(path.read_text())
    path.write_text(tomli_w.dumps({**plain, "simulation": simulation}))
    assert sweep(path, tmp_path / "out", data, "--engine", "local", "--json") == 1
    told = capsys.readouterr()
    assert "only 1 of at least 2 sites" in next(iter(json.loads(told.out)["failed"].values()))
    assert "1 studies could not be trained" in told.err
    assert "No study is finished yet" in (tmp_path / "out" / "sweep.html").read_text()


def test_what_is_finished_is_not_made_again_and_a_grid_may_grow(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    real, made = run.make_cell, list[str]()

    def noting(task: Any, place: Any, listen: Any) -> None:
        made.append(task[0].values["seed"])
        if made[-1] == "1" and made.count("1") == 1:
            raise KeyboardInterrupt
        real(task, place, listen)

    monkeypatch.setattr(run, "make_cell", noting)
    grid = write_grid(tmp_path / "grid.toml", {"seed": [0, 1]}, [])
    assert sweep(grid, out, data, "--engine", "local") == 130
    assert "go on with" in capsys.readouterr().err
    before = pd.read_csv(out / "results.csv")
    assert set(before["seed"]) == {0}
    assert sweep(write_grid(tmp_path / "grid.toml", {"seed": [0, 1, 2]}, []), out, data, "--engine", "local") == 0
    assert made == ["0", "1", "1", "2"]
    after = pd.read_csv(out / "results.csv")
    assert after[after["seed"] == 0].reset_index(drop=True).equals(before)


def test_a_study_that_cannot_be_trained_is_a_result(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    time = {"simulation.clock.images_per_s": 100.0}
    gone = {"name": "gone", "set": {"simulation.fault": [{"kind": "dropout", "sites": ["site-1", "site-2"]}], **time}}
    there = {"name": "there", "set": {"simulation.fault": []}}
    grid = write_grid(
        tmp_path / "grid.toml", {"sites": [gone, there]}, aggregation={"min_sites": 2, "round_deadline_s": 1.0}
    )
    out = tmp_path / "out"
    for _ in range(2):  # the second time it is tried again
        assert sweep(grid, out, data, "--engine", "local") == 1
        told = capsys.readouterr()
        assert "not trained: gone-3" in told.out and "only 1 of at least 2 sites" in told.out
        assert "1 studies could not be trained" in told.err
    assert "only 1 of at least 2 sites" in (out / "sweep.html").read_text()
    (failed,) = (out / "cells").glob("gone-*")
    assert not {"sites", "rows", "checkpoints"} & {path.name for path in failed.iterdir()}
    table = pd.read_csv(out / "results.csv")
    assert set(table.loc[table["row"] == "federated", "sites"]) == {"there"}
    assert {"random", "pooled"} <= set(table["row"])


def test_rows_of_a_cell_that_failed_are_taken_over_or_told_of(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = run.simulate

    def failing(study: Study, folder: Path, *places: Path, **options: Any) -> Any:
        if study.aggregation.rule != "fedavg":
            return real(study, folder, *places, **options)
        RunDir(folder).create(study)
        raise QuorumLost("too few sites", "ask more")

    monkeypatch.setattr(run, "simulate", failing)
    path, out = tmp_path / "grid.toml", tmp_path / "out"
    place = Place(out, data, tmp_path / "state")

    def wanted() -> dict[str, list[Any]]:
        found = run.tasks(read_grid(path), place)
        return {cell.values["rule"]: study.evaluation.rows for cell, study in found}

    write_grid(path, {"rule": ["fedavg", "fedprox"]}, ["random"])
    assert wanted() == {"fedavg": ["random"], "fedprox": []}
    assert sweep(path, out, data, "--engine", "local", "--json") == 1
    [told] = json.loads(capsys.readouterr().out)["failed"].values()
    [made] = (out / "cells").glob("fedprox-*")
    assert told.startswith("too few sites; the rows that others share with it (random) are missing as well: ")
    assert f"remove cells/{made.name} and run again" in told and told in (out / "sweep.html").read_text()
    assert wanted() == {"fedavg": ["random"]}, "nobody is left to take it over"
    write_grid(path, {"rule": ["fedavg", "fedprox", "median"]}, ["random"])
    assert wanted() == {"fedavg": ["random"], "median": ["random"]}, "one that is not begun does"
    write_grid(path, {"rule": ["fedavg", "fedprox"]}, ["random"])
    shutil.rmtree(made)
    assert wanted() == {"fedavg": ["random"], "fedprox": ["random"]}, "as it has been advised"
    run._lines.cache_clear()  # of the folder that was removed
    assert sweep(path, out, data, "--engine", "local", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert list(said["failed"].values()) == ["too few sites"]
    assert [row["row"] for row in said["conditions"][0]["others"]] == ["untrained encoder"]


def test_what_cannot_be_done_is_said_before_anything_is_trained(data: Path, tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path / "grid.toml", {"simulation.sites": [3, 300]}))
    place = Place(tmp_path / "out", data, tmp_path / "state")
    with pytest.raises(
        Refused, match=r"cell simulation.sites = 300, seed = 3: 24 patients cannot be dealt to 300 sites"
    ):
        run.prepare(grid, run.tasks(grid, place), place, 1, lambda what, done, total: None)
    grid = read_grid(write_grid(tmp_path / "grid.toml", {"rule": ["fedavg", "krum"]}))
    with pytest.raises(StudyError, match=r"cell rule = krum, seed = 3: .* needs updates of 5 sites, and there are 3"):
        run.prepare(grid, run.tasks(grid, place), place, 1, lambda what, done, total: None)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    assert sweep(write_grid(tmp_path / "grid.toml", {"seed": [0]}), tmp_path / "out", data) == 2
    assert "holds no sweep" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert sweep(tmp_path / "grid.toml", tmp_path / "out" / "thesis.txt", data) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_dry_run_lists_the_studies_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(tmp_path / "grid.toml", {"rule": ["fedavg", "median"], "seed": [0, 1]})
    assert sweep(grid, tmp_path / "out", data, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "4 studies, 4 still to be made" in said and "random, alone, pooled" in said
    assert sweep(grid, tmp_path / "out", data, "--dry-run", "--json") == 0
    studies = json.loads(capsys.readouterr().out)["studies"]
    assert [study["axes"]["rule"] for study in studies] == ["fedavg", "fedavg", "median", "median"]
    assert {row for study in studies for row in study["rows"]} == {"random", "alone", "pooled"}
    assert not (tmp_path / "out").exists()


def test_it_runs_where_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(8)))
    assert module._at_once(module.Engine.AUTO, 2) == 4
    assert module._at_once(module.Engine.LOCAL, 2) == 1
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0})
    assert module._at_once(module.Engine.AUTO, 2) == 1


def test_each_study_in_hand_has_a_bar_until_it_ends() -> None:
    one, other = (f"{rule}_dirichlet-alpha-0.1_encoder-with-a-long-name_0-0123456789" for rule in ("fedavg", "median"))
    with module._Bars(Console(file=StringIO(), force_terminal=True), 3, 1) as bars:

        def shown(width: int = 80) -> list[str]:
            console = Console(file=StringIO(), width=width)
            console.print(bars._bars.get_renderable())
            return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]

        bars.event(one, {"event": "run_started", "rounds": 4})
        bars.event(other, {"event": "run_resumed", "rounds": 6, "round": 3})
        bars.event(one, {"event": "row_started", "row": "alone:site-1"})
        bars.event(one, {"event": "run_started", "rounds": 5, "row": "alone:site-1"})
        bars.event(one, {"event": "round_closed", "round": 2, "row": "alone:site-1"})
        whole, first, second = shown()
        assert "studies" in whole and "1/3" in whole
        assert "fedavg_dirich" in first and "alone:site-1" in first and "2/5" in first
        assert "median_dirich" in second and "3/6" in second and "0123456789" not in "".join(shown(200))
        bars.finished(one, True)
        whole, second = shown()
        assert "2/3" in whole and "median_dirich" in second


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "simulations" / "studies").glob("grid-*.toml")))
def test_every_ready_grid_is_one(path: Path) -> None:
    head = path.read_text().partition("\n\n")[0]
    assert f"polyclinic sweep simulations/studies/{path.name} --out DIR" in head
    assert "Cost:" in head and "Result:" in head
    assert "not measured" not in head
    assert len(read_grid(path).axes["seed"]) >= 3


def test_a_method_needs_a_stage_to_change(tmp_path: Path) -> None:
    plain = tiny_study(
        stages=[{"kind": "finetune", "rounds": 1}], evaluation={"labels": {"a": ["a"], "b": ["b"]}}
    ).model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "grid.toml").write_text(tomli_w.dumps({**plain, "grid": {"method": ["simclr", "micle"]}}))
    with pytest.raises(StudyError, match="method has no pretrain stage"):
        read_grid(tmp_path / "grid.toml")


def test_studies_of_another_grid_are_told_of(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def of(*rounds: int) -> int:
        return sweep(
            write_grid(tmp_path / "grid.toml", {"stages.0.rounds": rounds}, []), out, data, "--engine", "local"
        )

    assert of(1) == 0
    made = (out / "results.csv").read_bytes()
    assert of(2) == 2
    assert "holds the sweep of another grid, and no study of this one" in capsys.readouterr().err
    assert (out / "results.csv").read_bytes() == made
    assert of(1, 2) == of(2) == 0
    assert "holds 1 folder of studies that are none of this grid's" in capsys.readouterr().err
