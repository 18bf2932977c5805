"""`polyclinic simulate --dry-run`: the sites as they would be, and nothing run."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from polyclinic import cli

from ..tiny import write_cohort

STUDY = """
[study]
name = "tiny"
[images]
size = 24
[evaluation.labels]
ill = ["spot"]
well = ["clear"]
[[stages]]
kind = "pretrain"
method = "simclr"
rounds = 1
[simulation]
cohort = "all"
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cohort(tmp_path / "all", 24)


def dry(simulation: str, *more: str) -> int:
    Path("study.toml").write_text(STUDY + simulation)
    return cli.run(["simulate", "study.toml", "--dry-run", *more])


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


def test_sites_classes_and_shifts_are_shown_and_no_run_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    simulation = 'sites = 3\npartition = { kind = "classes", per_site = 1 }'
    assert dry(simulation, "--json") == 0
    before = shown(capsys)["sites"]
    assert sum(site["patients"] for site in before.values()) == 24
    assert all(site["images"] == 2 * site["patients"] and len(site["classes"]) == 1 for site in before.values())
    assert not any(site["shift"] for site in before.values())
    assert dry(simulation, "--out", "run", "--state", "there") == 0
    assert {path.name for path in Path().iterdir()} == {"all", "study.toml", ".polyclinic", "there"}
    assert "unknown" not in capsys.readouterr().out, "a table of nothing but what is not known"


@pytest.mark.parametrize(("images", "warned"), [(1, True), (2, False)])
def test_sites_without_pairs_are_named_where_micle_wants_them(
    images: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("all")
    write_cohort(Path("all"), 24, images=images)
    micle = STUDY.replace("simclr", "micle") + "sites = 2"
    Path("study.toml").write_text(micle)
    assert cli.run(["simulate", "study.toml", "--dry-run"]) == 0
    assert ("site-2: no patient to train on has two images" in capsys.readouterr().out) == warned
    assert cli.run(["simulate", "study.toml", "--dry-run", "--json"]) == 0
    assert all(bool(site["warnings"]) == warned for site in shown(capsys)["sites"].values())


def test_prevalence_and_labels_are_those_after_the_shifts(capsys: pytest.CaptureFixture[str]) -> None:
    simulation = 'sites = 2\nshift = [{ kind = "prevalence", severity = 1, value = "spot", sites = ["site-2"] }]'
    assert dry(simulation, "--json") == 0
    found = shown(capsys)
    assert (found["study"], found["seed"], found["partition"]) == ("tiny", 0, {"kind": "iid"})
    one, two = found["sites"]["site-1"], found["sites"]["site-2"]
    assert one["patients"] == sum(one["classes"].values()) == 12
    assert set(one["classes"]) == {"ill", "well"}
    assert two["classes"] == {"well": two["patients"]}
    assert 0 < two["patients"] < 12
    assert two["shift"] == [{"kind": "prevalence", "severity": 1.0, "value": "spot", "becomes": ""}]
    flipped = 'sites = 2\nshift = [{ kind = "label_noise", severity = 1 }]'
    assert dry(flipped, "--json") == 0
    turned = shown(capsys)["sites"]["site-1"]["classes"]
    assert turned == {"ill": one["classes"]["well"], "well": one["classes"]["ill"]}


def test_the_table_has_a_row_a_site_and_a_column_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry('sites = 2\nshift = [{ kind = "noise", severity = 0.5, sites = ["site-2"] }]') == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if "patients" in line and "images" in line)
    assert [word for word in ("site", "patients", "images", "ill", "well", "shift") if word not in head] == []
    one, two = (next(line for line in lines if name in line) for name in ("site-1", "site-2"))
    assert "12" in one
    assert "24" in one
    assert "noise" not in one
    assert "noise 0.5" in two


def test_sites_of_ages_and_those_held_out_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("all/labels.csv")
    rows = path.read_text().splitlines()
    told = (
        f"{row},{20 + k - k % 2:03}Y,{'M' if k < 4 else 'F'},{'AP' if k % 2 else 'PA'}"
        for k, row in enumerate(rows[1:])
    )
    path.write_text("\n".join([f"{rows[0]},age,sex,view", *told]))
    simulation = 'partition = { kind = "column", by = "age", edges = [32, 44] }\nheld_out = ["32-43"]'
    assert dry(simulation, "--json") == 0
    found = shown(capsys)["sites"]
    assert {name: (site["patients"], site["held_out"]) for name, site in found.items()} == {
        "under-32": (6, False), "32-43": (6, True), "44-and-over": (12, False)
    }  # fmt: skip
    young = found["under-32"]  # its patients are 20, 22, ... and 30 years old
    assert (young["ages"], young["sexes"], young["views"]) == ([22.5, 25, 27.5], {"F": 4, "M": 2}, {"AP": 6, "PA": 6})
    assert dry(simulation) == 0
    shown_rows = capsys.readouterr().out.splitlines()
    assert any("4 F · 2 M" in line and "6 AP · 6 PA" in line and "22.5 – 25 – 27.5" in line for line in shown_rows)
    assert [line.split("(held out)")[0].strip("│ ") for line in shown_rows if "(held out)" in line] == ["32-43"]
    assert dry(simulation.replace("32-43", "32-45")) == 2
    assert "simulation.held_out names '32-45', which is no site" in capsys.readouterr().err


def test_each_scanner_is_a_site_and_a_column_without_values_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("all/labels.csv")
    first, *rows = path.read_text().splitlines()
    path.write_text("\n".join([f"{first},scanner", *(f"{row},Room {1 + k // 20}" for k, row in enumerate(rows))]))
    assert dry('partition = { kind = "column", by = "scanner" }', "--json") == 0
    sites = shown(capsys)["sites"]
    assert {name: site["patients"] for name, site in sites.items()} == {"Room-1": 10, "Room-2": 10, "Room-3": 4}
    assert dry('partition = { kind = "column", by = "room" }') == 2
    assert "set partition.by to 'scanner'" in capsys.readouterr().err


def test_views_alone_have_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("all/labels.csv")
    first, *rows = path.read_text().splitlines()
    path.write_text("\n".join([f"{first},view", *(f"{row},PA" for row in rows)]))
    assert dry("sites = 2") == 0
    assert sum("12 PA" in line for line in capsys.readouterr().out.splitlines()) == 2


def test_words_of_a_cohort_are_no_markup_and_many_of_them_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("all/labels.csv")
    first, *rows = path.read_text().replace("clear", "[/x]").splitlines()
    path.write_text("\n".join([f"{first},view", *(f"{row},[b]{k:02}" for k, row in enumerate(rows))]))
    study = STUDY.replace("clear", "[/x]")
    Path("study.toml").write_text(
        study + 'sites = 2\nshift = [{ kind = "prevalence", severity = 0.1, value = "[/x]" }]'
    )
    assert cli.run(["simulate", "study.toml", "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "prevalence 0.1 [/x]" in told
    assert "1 [b]" in told and "rarer ones" in told


def test_many_or_long_classes_stand_in_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("all/labels.csv")
    path.write_text(path.read_text().replace("spot", "a very long name of what a finding is called"))
    Path("study.toml").write_text(
        STUDY.replace('ill = ["spot"]\nwell = ["clear"]', "")
        + 'sites = 2\npartition = { kind = "quantity", alpha = 9.0 }'
    )
    assert cli.run(["simulate", "study.toml", "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "tiny, dealt by quantity alpha" in told and "classes" in told
    assert re.search(r"\d+ a very long name", told) and re.search(r"\d+ clear", told)


def test_a_site_held_out_and_each_in_turn_are_two_protocols(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry('sites = 3\nheld_out = ["site-3"]', "--leave-one-site-out") == 2
    assert "leave held_out out, or --leave-one-site-out" in capsys.readouterr().err


def test_rare_classes_share_no_column(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("all/labels.csv")
    rows = path.read_text().splitlines()
    named = [f"{row.split(',')[0]},w{k // 4:02},{row.split(',')[2]}" for k, row in enumerate(rows[1:])]
    path.write_text("\n".join([rows[0], *named]))
    assert dry("sites = 2") == 0
    assert "4 rarer classes are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("simulation", "said"),
    [
        ("sites = 13", "24 patients cannot be dealt to 13 sites"),
        ('sites = 2\npartition = { kind = "classes", per_site = 3 }', "3 classes a site are asked for"),
        ('partition = { kind = "column", by = "site" }', "no image has a value in the column 'site'"),
        (
            'sites = 2\npartition = { kind = "classes", per_site = 1 }\n'
            'shift = [{ kind = "prevalence", severity = 1, value = "spot" }]',
            "patients",
        ),
        ("sites = 1", "1 sites can never be aggregation.min_sites = 2"),
        ('sites = 2\nshift = [{ kind = "nois", severity = 1 }]', "the nearest is 'noise'"),
        ('sites = 2\nshift = [{ kind = "prevalence", severity = 1, value = "spots" }]', "the nearest is 'spot'"),
        ('sites = 2\nshift = [{ kind = "age_mix", severity = 1 }]', "no patient has an age"),
        ('sites = 2\nheld_out = ["site-2"]', "1 sites beside 1 held out can never be aggregation.min_sites = 2"),
        ('sites = 3\nheld_out = ["site-4"]', "the nearest is 'site-3'"),
        ('partition = { kind = "column", by = "age", edges = [40] }', "no image has a value in the column 'age'"),
    ],
)
def test_what_would_be_refused_is_refused_dry(simulation: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry(simulation) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("theirs.pth", "write it as safetensors"),
        ("other.safetensors", "they lack bn1.weight"),
        ("cut.safetensors", "cannot read cut.safetensors"),
    ],
)
@pytest.mark.parametrize("more", [["--dry-run"], ["--out", "run"]])
def test_initial_weights_that_do_not_serve_are_refused_before_anything_is_made(
    name: str, said: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    torch.save(weights, "theirs.pth")
    save_file(weights, "other.safetensors")
    Path("cut.safetensors").write_bytes(Path("other.safetensors").read_bytes()[:-8])
    init = f'[encoder]\ninit = {{ file = "{name}", family = "torchvision" }}\n'
    Path("study.toml").write_text(init + STUDY + "sites = 3")
    assert cli.run(["simulate", "study.toml", *more]) == 2
    assert said in capsys.readouterr().err
    assert not Path("run").exists()
    assert not Path(".polyclinic").exists(), "cohorts are read later"
