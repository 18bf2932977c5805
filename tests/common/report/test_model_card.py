import json

import pytest

from polyclinic.artifacts import write_model_card
from polyclinic.study import resolve


def test_the_card_says_what_it_saw_and_how_it_was_measured(make_run):
    run = make_run(cohort="/home/someone/secret-archive")
    path = write_model_card(run)
    assert path == run / "MODEL_CARD.md"
    text = path.read_text()
    for words in (
        "# rehearsal: a medical-image encoder", "SimCLR (6 rounds), then MAE (4 rounds)", "(n, 1, 96, 96)",
        'polyclinic.load_encoder("encoder.safetensors")', "| north | 101 | 201 |", "30 % were to be held out",
        "| federated | 0.820 | 0.780 – 0.850 | 0.720 |", "| mean single site | 0.722 |", "rehearsed on one machine",
        "No differential privacy was applied", "To be stated by the consortium", "- torch 2.15.0",
        "- labels of two sites differ (2 times)", 'window = "percentile"',
    ):  # fmt: skip
        assert words in text, words
    assert "secret-archive" not in text and str(run) not in text
    assert write_model_card(run).read_text() == text


def test_hostile_names_stay_in_their_cell(make_run):
    sites = ("a|b|c", "<script>alert(1)</script>", "[x](http://evil.example)", "two\n# lines", "`code`")
    lines = write_model_card(make_run(sites=sites)).read_text().splitlines()
    assert r"| a\|b\|c | 100 | 200 |" in lines
    assert r"| \<script\>alert(1)\</script\> | 101 | 201 |" in lines
    assert r"| \[x\](http://evil.example) | 102 | 202 |" in lines
    assert r"| two \# lines | 103 | 203 |" in lines
    assert not any("<script>" in line or line.startswith("# lines") for line in lines)


def test_an_unfinished_run_has_a_card_that_says_so(make_run):
    text = write_model_card(make_run(finished=False)).read_text()
    assert "**This run is not finished**: 5 of 10 rounds have closed." in text
    assert "No comparison could be made." in text


def test_a_deployed_run_is_not_called_a_rehearsal(make_run):
    run = make_run()
    facts = json.loads((run / "summary.json").read_text()) | {"engine": "deployment"}
    (run / "summary.json").write_text(json.dumps(facts))
    text = write_model_card(run).read_text()
    assert "Images stayed at their sites" in text and "rehearsed" not in text


@pytest.mark.parametrize(("norm", "said"), [("group", "group or layer"), ("batch", "batch")])
def test_the_card_says_how_the_encoder_normalises(make_run, norm, said):
    run = make_run()
    stage = {"kind": "pretrain", "method": "simclr", "rounds": 1}
    study = resolve({"study": {"name": "rehearsal"}, "encoder": {"norm": norm}, "stages": [stage]})
    (run / "study.toml").write_text(study.to_toml())
    assert f"Encoder ResNet-18 with {said} normalisation" in write_model_card(run).read_text()


TUNE, PRETRAIN = {"kind": "finetune", "rounds": 1}, {"kind": "pretrain", "method": "simclr", "rounds": 1}


@pytest.mark.parametrize(("stages", "classifies"), [([PRETRAIN, TUNE], True), ([TUNE, PRETRAIN], False)])
def test_the_classifier_is_offered_where_the_last_stage_made_one(make_run, stages, classifies):
    run = make_run()
    labels = {"labels": {"ill": ["x"], "well": ["y"]}}
    settings = resolve({"study": {"name": "rehearsal"}, "stages": stages, "evaluation": labels})
    (run / "study.toml").write_text(settings.to_toml())
    row = {"auc": 0.9, "auc_low": 0.8, "auc_high": 1.0, "accuracy": 0.7, "balanced_accuracy": 0.6, "ece": 0.1}
    facts = json.loads((run / "summary.json").read_text()) | {"classifier": {"federated": row} if classifies else {}}
    (run / "summary.json").write_text(json.dumps(facts))
    text = write_model_card(run).read_text()
    assert ("load_classifier" in text) == classifies
    assert ("`classifier.safetensors` is the federated one" in text) == classifies
    assert "checkpoints" not in text  # a finished run's are for going on with it
    assert "Labels took part in fine-tuning only." in text


def test_rows_without_an_interval_say_so(make_run):
    run = make_run()
    facts = json.loads((run / "summary.json").read_text())
    row = {"auc": 0.825, "auc_low": None, "auc_high": None, "balanced_accuracy": 0.5}
    (run / "summary.json").write_text(json.dumps(facts | {"engine": "deployed", "comparison": {"federated": row}}))
    text = write_model_card(run).read_text()
    assert "| federated | 0.825 | – | 0.500 |" in text
    assert "Patient-weighted mean of the sites' own probes." in text
    assert "bootstrap" not in text and "There are no intervals" in text
