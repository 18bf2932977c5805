import base64
import json
import re
from html.parser import HTMLParser

import pytest

from polyclinic.artifacts import write_model_card
from polyclinic.errors import StudyError
from polyclinic.report import render_report, render_shared
from polyclinic.study import load_study, resolve

VOID = {"meta", "br", "img", "link", "input", "hr"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "';--{{7*7}}{% raw %}",
    "javascript:alert(1)",
    "http://evil.example/x.png",
    "NA",
    "x" * 64,
)


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not nest."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.open += [tag] if tag not in VOID else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def assert_offline(page):
    """Nothing in the page makes a browser ask for anything."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
            assert value.startswith(("#", "data:image/png;base64,")), value
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert ("http-equiv", "Content-Security-Policy") in page.attributes


def assert_finite(page):
    for name, value in page.attributes:
        if name in ("d", "x", "y", "width", "height", "cx", "cy", "viewbox"):
            assert not re.search(r"nan|inf|e[+-]", value, re.I), (name, value)
    assert not re.search(r"\b(nan|NaN|inf|None|Undefined)\b", page.text)


def test_a_finished_run_tells_everything_offline(make_run):
    run = make_run()
    page = Page(render_report(run))
    assert_offline(page)
    assert_finite(page)
    assert "http://" not in page.source and "https://" not in page.source
    for words in (
        "SimCLR (6 rounds), then MAE (4 rounds) of a ViT-Ti for 96 × 96 grey images, across 5 sites with 510 patients",
        "untrained encoder", "16 × 16 pixels", "north alone", "all sites pooled", "mean single site 0.722", "+0.098",
        "Loss, stage 1: SimCLR", "Loss, stage 2: MAE", "Linear probe AUC", "kNN probe AUC", "Effective rank",
        "Feature spread", "Seconds by round", "Megabytes by round", "Coloured by site", "Coloured by label",
        "unlabelled", "Data card: university", "update refused: its norm is 812 <times> too large", "no reply in time",
        "labels of two sites differ (2 times)", "a note of the run", "torch 2.15.0", "7 min 11 s", "1.8 GB",
    ):  # fmt: skip
        assert words in page.text, words
    images = [value for name, value in page.attributes if name == "src"]
    assert base64.b64decode(images[0].partition(",")[2]) == (run / "report" / "views.png").read_bytes()


def test_the_same_run_gives_the_same_page(make_run):
    run = make_run()
    first = render_report(run).read_bytes()
    assert render_report(run).read_bytes() == first


def test_the_federated_row_stands_out_and_the_table_agrees_with_the_summary(make_run):
    page = Page(render_report(make_run()))
    assert ("class", "row federated") in page.attributes and ("class", "federated") in page.attributes
    assert "federated 0.820 0.780 – 0.850 0.720" in page.text


def test_hostile_names_are_text(make_run):
    page = Page(render_report(make_run(sites=HOSTILE, label="<b onmouseover=alert(1)>")))
    assert_offline(page)
    assert_finite(page)
    for name in HOSTILE:
        assert name in page.text
    assert "<b onmouseover=alert(1)>" in page.text and "<b onmouseover" not in page.source
    assert page.tags.count("img") == 1


def test_an_unfinished_run_reports_what_stands(make_run):
    page = Page(render_report(make_run(finished=False)))
    assert_offline(page)
    assert_finite(page)
    assert "not finished: 5 of 10 rounds have closed" in page.text
    assert "Loss, stage 1: SimCLR" in page.text and "Loss, stage 2" not in page.text
    assert "What the encoder is worth" not in page.text and "load_encoder" not in page.text
    assert "across 5 sites with 510 patients." in page.text


def test_a_run_that_has_just_begun_has_only_its_study(make_run):
    run = make_run()
    for path in [*run.rglob("*")]:
        if path.is_file() and path.name != "study.toml":
            path.unlink()
    page = Page(render_report(run))
    assert_finite(page)
    assert "0 of 10 rounds" in page.text and "across 0 sites" in page.text


def test_no_study_is_refused(tmp_path):
    with pytest.raises(StudyError):
        render_report(tmp_path)


def test_torn_last_lines_are_left_out(make_run):
    run = make_run(finished=False)
    for name, torn in (("metrics.csv", "0,6,north,lo"), ("events.jsonl", '{"event": "round_clo')):
        with (run / name).open("a") as file:
            file.write(torn)
    assert_finite(Page(render_report(run)))


def test_a_stage_that_was_stopped_early_says_so(make_run):
    run = make_run()
    assert "stopped" not in Page(render_report(run)).text
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "stopped_early", "stage": 1, "round": 9, "patience": 2}) + "\n")
    text = Page(render_report(run)).text
    assert "SimCLR (6 rounds), then MAE (stopped after 3 of 4 rounds) of a ViT-Ti" in text
    assert "10 of 10, stopped early" in text
    assert "| 2 | MAE | stopped after 3 of 4 |" in write_model_card(run).read_text()


ROW = {"auc": 0.9, "auc_low": 0.8, "auc_high": 1.0, "accuracy": 0.7, "balanced_accuracy": 0.6, "ece": 0.1}


def test_each_table_says_of_which_classes_and_patients_it_is(make_run):
    run = make_run()
    facts = json.loads((run / "summary.json").read_text())
    facts["measured"] = {
        "comparison": {"classes": ["a", "b", "c"], "patients": 48, "images": 96},
        "classifier": {"classes": ["<a>", "b"], "patients": 30, "images": 60},
    }
    (run / "summary.json").write_text(json.dumps(facts | {"classifier": {"federated": ROW}}))
    for text in (Page(render_report(run)).text, write_model_card(run).read_text().replace("\\", "")):
        assert "Classes: a, b and c; 48 test patients with 96 images." in text
        assert "Classes: <a> and b; 30 test patients with 60 images." in text
        assert "Single sites and all pooled trained for the same rounds and epochs as the federation." in text


@pytest.mark.parametrize("metric", ["alignment", "uniformity"])
def test_alignment_and_uniformity_are_drawn_where_they_were_measured(make_run, metric):
    run = make_run()
    assert f">{metric.capitalize()}</h3>" in render_report(run).read_text()
    lines = (run / "metrics.csv").read_text().splitlines()
    (run / "metrics.csv").write_text("".join(f"{line}\n" for line in lines if metric not in line))
    assert f">{metric.capitalize()}</h3>" not in render_report(run).read_text()


def test_operating_points_stand_with_the_classifier(make_run):
    run = make_run()
    facts = json.loads((run / "summary.json").read_text()) | {"classifier": {"federated": ROW}}
    point = {"threshold": 0.1234, "sensitivity": 0.9, "specificity": 0.55, "ppv": 0.4, "npv": 0.95}
    for operating in ([{"class": "<ill>", "wanted": 0.85, **point}], []):
        (run / "summary.json").write_text(json.dumps(facts | {"operating": operating}))
        page = Page(render_report(run))
        assert_finite(page)
        assert "What the fine-tuned classifier is worth" in page.text
        assert ("Operating points" in page.text) == bool(operating)
        assert ("<ill> 85 % 0.123 0.900 0.550 0.400 0.950" in page.text) == bool(operating)


def test_the_tile_of_the_mean_single_site_names_the_best(make_run):
    assert "against the mean single site; the best, university, has 0.724" in Page(render_report(make_run())).text


def test_the_snippet_loads_the_run_from_where_it_was_made(make_run, monkeypatch):
    run = make_run()
    assert 'load_encoder("run") # in the folder that holds this run' in Page(render_report(run)).text
    monkeypatch.chdir(run.parent.parent)
    given = run.relative_to(run.parent.parent)
    assert f'load_encoder("{given}")' in render_report(given).read_text().replace("&#34;", '"')
    shared = render_shared(given)
    assert "encoder.safetensors" in shared and str(given) not in shared


def test_a_run_of_several_attempts_says_so(make_run):
    run = make_run()
    assert "attempts" not in Page(render_report(run)).text
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "run_resumed", "round": 3}) + "\n")
    assert "7 min 11 s in 2 attempts" in Page(render_report(run)).text


def test_what_is_not_finite_is_not_drawn(make_run):
    run = make_run()
    with (run / "metrics.csv").open("a") as file:
        file.write("1,11,north,loss,nan\n1,11,south,loss,inf\n1,11,north,effective_rank,-inf\n")
    facts = json.loads((run / "summary.json").read_text())
    facts["comparison"]["alone:north"]["auc_low"] = float("nan")
    (run / "summary.json").write_text(json.dumps(facts))
    page = Page(render_report(run))
    assert_finite(page)
    assert "south alone" in page.text and "north alone" not in page.text


@pytest.mark.parametrize("count", [1, 7, 8, 100])
def test_any_number_of_sites_stays_legible(make_run, count):
    sites = tuple(f"hospital-{k:03d}" for k in range(count))
    path = render_report(make_run(sites=sites))
    page = Page(path)
    assert_finite(page)
    assert path.stat().st_size < 1_000_000
    assert ("range over sites" in page.text) == (count > 7)
    assert ("100 sites alone" in page.text) == (count == 100)
    assert all(site in page.text for site in sites)


def test_one_round_and_constant_values_can_be_drawn(make_run):
    run = make_run(sites=("only",), rounds=(1,))
    lines = ["stage,round,site,metric,value"]
    lines += [
        f"0,1,{site},{m},1.0" for site in ("only", "") for m in ("loss", "probe_auc", "seconds", "effective_rank")
    ]
    lines += ["0,1,only,feature_spread,0.0", "0,1,only,bytes_up,0"]
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    assert_finite(Page(render_report(run)))


def test_a_collapsed_site_is_named(make_run):
    run = make_run()
    with (run / "metrics.csv").open("a") as file:
        file.write("0,3,north,feature_spread,0.0001\n")
    text = Page(render_report(run)).text
    assert "north: features collapsed after round 3" in text and "south: features collapsed" not in text


def test_a_run_without_probes_says_why(make_run):
    run = make_run()
    assert "No site could probe" not in Page(render_report(run)).text
    lines = (run / "metrics.csv").read_text().splitlines()
    (run / "metrics.csv").write_text("".join(f"{line}\n" for line in lines if "probe_auc" not in line))
    assert "No site could probe the encoder by itself" in Page(render_report(run)).text


def test_what_was_simulated_is_told_of_every_site_and_of_the_patients(make_run):
    run = make_run()
    sites = list(json.loads((run / "seats.json").read_text()))
    plain = load_study(run / "study.toml").plain()
    assert "invented" not in Page(render_report(run)).text and "shifts and faults" not in Page(render_report(run)).text
    simulation = {
        "clock": {"images_per_s": 1.0},
        "site": [{"name": name, "phantom": 9} for name in sites],
        "shift": [{"kind": "noise", "severity": 0.5, "sites": ["north"]}],
        "fault": [{"kind": "sign_flip", "sites": ["north"]}, {"kind": "dropout", "probability": 0.25}],
    }
    (run / "study.toml").write_text(resolve({**plain, "simulation": simulation}).to_toml())
    late = {"event": "site_late", "round": 2, "site": sites[0], "arrives_s": 9000, "late_s": 7260}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(late) + "\n")
    page = Page(render_report(run))
    assert "images, all of them invented." in page.text and "of simulated time in all" in page.text
    assert "noise 0.5, sign_flip, dropout (0.25 of rounds)" in page.text
    assert "answered 2 h 1 min late" in page.text and "no reply in time" not in page.text
    struck = {"event": "site_struck", "round": 2, "site": sites[0], "faults": ["dropout"]}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(struck) + "\n")
    assert "dropped out" in Page(render_report(run)).text
    write_model_card(run)
    card = (run / "MODEL_CARD.md").read_text()
    assert (
        "\n\nWhat the simulation did to sites:\n\n- " in card
        and "\n- north: noise 0.5, sign\\_flip, dropout (0.25 of rounds)" in card
    )
    assert "all of them invented" in card
    simulation["site"][0] = {"name": sites[0], "cohort": "real"}
    (run / "study.toml").write_text(resolve({**plain, "simulation": simulation}).to_toml())
    assert f"those of {', '.join(sites[1:4])} and {sites[4]} invented" in Page(render_report(run)).text


def test_where_cohorts_lie_is_not_told(make_run):
    run = make_run(cohort="/home/someone/secret-archive")
    assert "secret-archive" in (run / "study.toml").read_text()
    assert "secret-archive" not in render_report(run).read_text()
    assert str(run.parent) not in (run / "report.html").read_text()


def test_rows_without_an_interval_are_shown_without(make_run):
    run = make_run()
    facts = json.loads((run / "summary.json").read_text())
    row = {"auc": 0.825, "auc_low": None, "auc_high": None, "balanced_accuracy": 0.5}
    facts["comparison"]["federated"] = row
    (run / "summary.json").write_text(json.dumps(facts))
    page = Page(render_report(run))  # of a few rows with intervals and one without
    assert_finite(page)
    assert "federated 0.825 – 0.500" in page.text
    (run / "summary.json").write_text(json.dumps(facts | {"engine": "deployed", "comparison": {"federated": row}}))
    page = Page(render_report(run))
    assert_finite(page)
    assert "0.825 federated AUC, mean of the sites' own probes" in page.text
    assert "federated 0.825 – 0.500" in page.text and ("class", "whisker") not in page.attributes
    assert "There are no intervals" in page.text and "bootstrap" not in page.text
    assert "AUC with 95 % interval" not in page.text


def test_a_deployed_run_says_how_its_rows_were_measured(make_run):
    run = make_run()
    facts = json.loads((run / "summary.json").read_text())
    facts |= {"engine": "deployment", "comparison": {"federated": facts["comparison"]["federated"]}}
    (run / "summary.json").write_text(json.dumps(facts))
    text = Page(render_report(run)).text
    assert "Patient-weighted mean of the sites' own linear probes" in text and "rehearsed" not in text
    assert "mean single site" not in text


def private(run, mode, engine="deployed", spent=("north", "south")):
    """Make a run one of a private study, as its files would then be."""
    settings = load_study(run / "study.toml").model_dump(mode="json")
    equal = {**settings["aggregation"], "weighting": "equal"}
    stages = [{**stage, "method": "mae"} for stage in settings["stages"][1:]]
    changed = {"privacy": {"mode": mode, "clip": 0.5}, "aggregation": equal, "stages": stages,
               "evaluation": {**settings["evaluation"], "every": 0},
               "compute": {**settings["compute"], "precision": "fp32"}}  # fmt: skip
    (run / "study.toml").write_text(resolve({**settings, **changed}).to_toml())
    lines = (run / "metrics.csv").read_text().splitlines()
    kept = [line for line in lines if line.split(",")[3] in ("metric", "seconds", "bytes_up", "bytes_down")]
    kept += [f"0,{k},{site},epsilon,{k / 7}" for site in spent for k in (1, 2, 3, 4)]
    (run / "metrics.csv").write_text("\n".join(kept) + "\n")
    facts = json.loads((run / "summary.json").read_text())
    told = {"engine": engine, "epsilon": dict.fromkeys(spent, 4 / 7)}
    if engine == "deployed":
        told |= {"comparison": {}, "sites": {site: {} for site in facts["sites"]}}
    (run / "summary.json").write_text(json.dumps(facts | told))
    return run


@pytest.mark.parametrize("mode", ["patient", "site"])
def test_a_private_run_says_what_it_promises_and_has_no_figures(make_run, mode):
    run = private(make_run(), mode)
    page = Page(render_report(run))
    assert_offline(page)
    assert_finite(page)
    card = write_model_card(run).read_text().replace("\\", "")
    for text in (page.text, card):
        assert f"with differential privacy of every {mode}" in text
        assert f"Differential privacy of every {mode}, made at the" in text
        assert "0.572 at north, 0.572 at south, at delta = 1e-05; nothing is known of east-general" in text
        assert "losses, probes, all other figures" in text and "drops unseen what comes all the same" in text
        assert "no release of the study" not in text
    assert "epsilon spent" in page.text and "last loss" not in page.text and "Loss" not in page.text
    assert "<th>site</th><th>updates" in page.source and "| site | patients |" not in card
    assert "| north | 0.572 |" in card and "withheld under differential privacy" in card


def test_what_a_rehearsal_measures_is_no_release_of_a_private_study(make_run):
    run = private(make_run(), "patient", engine="local")
    assert "no release of the study" in Page(render_report(run)).text
    assert "no release of the study" in write_model_card(run).read_text()


def test_a_run_without_privacy_says_so(make_run):
    run = make_run()
    assert "No differential privacy was applied: no epsilon can be stated" in Page(render_report(run)).text
    with (run / "metrics.csv").open("a") as file:
        file.write("0,1,north,epsilon,0.1\n")  # as a site might claim
    text = Page(render_report(run)).text
    assert "epsilon spent" not in text and "0.100" not in text


def test_a_study_that_ended_as_its_epsilon_was_spent_says_how_far_it_came(make_run):
    run = make_run()
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "epsilon_spent", "round": 4, "epsilon": 7.9, "limit": 8.0}) + "\n")
    text = Page(render_report(run)).text
    assert "SimCLR (stopped after 4 of 6 rounds), then MAE (stopped after 0 of 4 rounds)" in text


def test_sites_in_a_private_paragraph_are_text(make_run):
    run = private(make_run(sites=HOSTILE), "patient", spent=HOSTILE[:1])
    page = Page(render_report(run))
    assert_offline(page)
    assert all(name in page.text for name in HOSTILE)
    card = write_model_card(run).read_text()
    assert r"epsilon = 0.572 at \<script\>alert(1)" in card and "<script>" not in card


def test_every_site_is_told_what_it_gets_and_who_is_held_out(make_run):
    run = make_run()
    assert "Site by site" not in Page(render_report(run)).text  # as of a run across a network
    summary = json.loads((run / "summary.json").read_text())
    sites = {"north": 0.7, "south": 0.812, "away": 0.654}
    tested = {"north": 1, "south": 12, "away": 1_200}
    found = {"at_sites": sites, "own": {}, "labels": {}, "site_auc": 0.934, "patients": tested}
    (run / "summary.json").write_text(
        json.dumps(
            {
                **summary,
                "held_out": ["away"],
                "profiles": {"federated": found, "random": {**found, "at_sites": {}}},
                "classifier": {"federated": ROW},
                "classifier_at_sites": {"federated": {"away": 0.625, "north": 0.75}},
            }
        )
    )
    page = Page(render_report(run))
    assert_finite(page)
    assert "at north, 1 patient at south, 12 patients at away (held out), 1,200 patients sites told apart" in page.text
    assert "federated 0.700 0.812 0.654 0.934" in page.text
    assert "untrained encoder – – – 0.934" in page.text
    assert "classifier at north at away (held out) federated 0.750 0.625" in page.text
