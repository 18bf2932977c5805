"""MODEL_CARD.md: what the encoder is, what it saw, how it was measured, what it is not for."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from polyclinic.report import facts, words
from polyclinic.report.render import REHEARSALS
from polyclinic.report.run import read_run

MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|#~&"} | {"\n": " ", "\r": " "})


def render_model_card(path: Path) -> str:
    """The model card of a run directory, as Markdown.

    Raises:
        StudyError: the directory holds no readable study.toml.
    """
    run = read_run(path)
    environment = Environment(  # noqa: S701 (Markdown: `finalize` escapes what is written into it)
        loader=PackageLoader("polyclinic.report"), finalize=escape_markdown, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("model_card.md.j2").render(
        run=run,
        study=run.study,
        lede=[facts.what_was_trained(run), facts.how_it_was_trained(run)],
        rounds=facts.rounds_of(run),
        comparison=facts.comparison(run),
        tested={table: facts.tested_on(run, table) for table in ("comparison", "classifier")},
        as_long=facts.as_long(run),
        intervals=facts.intervals(run),
        finetuned=any(stage.kind == "finetune" for stage in run.study.stages),
        classifies=run.study.stages[-1].kind == "finetune",
        classifier=facts.classifier(run),
        rehearsed=run.summary.get("engine") in REHEARSALS,
        warnings=facts.warnings(run),
        rehearsals=[site for site in facts.sites(run) if site["rehearsed"]],
        counted=any(run.sites.values()),
        privacy=facts.privacy(run),
        releases=facts.releases(run),
        spent=facts.spent(run),
        encoder=words.named(words.ENCODERS, run.study.encoder.name),
        methods=words.METHODS,
        ignored=run.study.evaluation.labels.get("ignore", []),
    )


def escape_markdown(value: Any) -> Any:
    """Text with every mark that Markdown or HTML could act upon escaped, on one line.

    >>> escape_markdown("<b>a_b</b>")
    '\\\\<b\\\\>a\\\\_b\\\\</b\\\\>'
    """
    return value.translate(MARKS) if isinstance(value, str) else value
