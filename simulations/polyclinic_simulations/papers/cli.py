"""`polyclinic papers`."""

import os
import platform
import re
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

PATIENCE_S = 5.0
"""Between two looks at what other processes make."""


class Family(StrEnum):
    """Whose names tensors have."""

    TORCHVISION = "torchvision"
    TIMM = "timm"
    POLYCLINIC = "polyclinic"


class TierName(StrEnum):
    """How large the networks and how long the training."""

    CPU = "cpu"
    GPU = "gpu"


class Size(StrEnum):
    """Encoders of the size axis."""

    VIT_TINY = "vit_tiny"
    VIT_SMALL = "vit_small"
    VIT_BASE = "vit_base"
    RESNET18 = "resnet18"
    RESNET50 = "resnet50"
    BIT_RESNET50 = "bit_resnet50"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(papers)


def papers(
    data: Annotated[Path, typer.Option(help="The folder that holds the datasets, each with its labels.csv.")],
    tier: Annotated[TierName, typer.Option(help="cpu: small, for two cores; gpu: full size.")] = TierName.CPU,
    table: Annotated[list[int] | None, typer.Option(help="Make rows of these tables only.")] = None,
    encoder: Annotated[
        Size | None, typer.Option(help="In place of each table's own; rows of methods that it is not for are left out.")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Supervised weights, a safetensors file: makes table 4 start from them too.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    family: Annotated[Family, typer.Option(help="Whose names the tensors of --init have.")] = Family.TORCHVISION,
    out: Annotated[Path, typer.Option(help="Where papers.csv and papers.html go.")] = Path("papers"),
    work: Annotated[Path, typer.Option(help="Cohorts, encoders and finished rows.")] = Path(".polyclinic/papers"),
    minutes: Annotated[float, typer.Option(help="Begin no row after so many minutes.", min=0.0)] = 1e6,
) -> None:
    """Measure the four papers' methods on real images, row by row.

    Rows that stand in papers.csv or in --work are not made again: stopped at any moment, the same command goes on, on
    another machine too if it is given papers.csv. A row of the cpu tier keeps one core busy: the same command in a
    second terminal makes other rows meanwhile.

    Examples:

      polyclinic papers --data ../images

      polyclinic papers --data ../images --table 1 --minutes 60

      polyclinic papers --data ../images --table 4 --init resnet18.safetensors

      polyclinic papers --data ../images --tier gpu --encoder vit_base --out papers-vit-base
    """
    import hashlib
    import time

    import torch

    from polyclinic.files import make_folder, write_atomic
    from polyclinic.study import Weights
    from polyclinic_simulations.checks import check_weights
    from polyclinic_simulations.display import Display
    from polyclinic_simulations.papers.page import render_page
    from polyclinic_simulations.papers.plans import Plan, plans, settings_of, trainable
    from polyclinic_simulations.papers.run import protocol_study, run_plan
    from polyclinic_simulations.papers.workshop import Workshop, as_table, finished, take_back

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    tiers = settings_of(tier.value, encoder and encoder.value)
    every = [plan for plan in plans() if trainable(plan, tiers[plan.table])]
    weights = None
    if init is not None:
        with init.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        weights = Weights(file=str(init.resolve()), family=family.value, sha256=found)
    wanted = [
        plan
        for plan in every
        if (not table or plan.table in table) and (weights is not None or plan.init != "supervised")
    ]
    end = time.monotonic() + minutes * 60
    with Display() as display:
        workshops = {
            number: Workshop(
                settings,
                data,
                work / f"{tier.value}-{settings.digest}",
                f"{tier.value} tier {settings.digest}, {where}",
                weights,
                display.reading,
                lambda e: display.event({"row": "this row", **e}),
                display.steps,
            )
            for number, settings in tiers.items()
        }

        for plan in [plan for plan in wanted if plan.init == "supervised"][:1]:
            check_weights(protocol_study(plan, workshops[plan.table]))
        make_folder(out)

        def publish(before: set[Plan] | None) -> set[Plan]:
            """Which rows are finished; they are written if they are not those of `before`.

            What other processes have written meanwhile is taken back, so that nothing of theirs is lost.
            """
            others = take_back(out / "papers.csv", workshops) if (out / "papers.csv").exists() else {}
            found = {plan: others.get(plan) or finished(plan, workshops[plan.table]) for plan in every}
            results = {plan: result for plan, result in found.items() if result is not None}
            if set(results) != before:
                table = as_table(results)
                write_atomic(out / "papers.csv", table.to_csv(index=False))
                without = {plan: plan in results for plan in every if not results.get(plan, {}).get("metrics")}
                write_atomic(out / "papers.html", render_page(table, without, tiers))
            return set(results)

        made: set[Plan] | None = None
        while True:
            made = publish(made)
            left = [plan for plan in wanted if plan not in made]
            if not left or time.monotonic() >= end:
                break
            for plan in left:
                if (done := run_plan(plan, workshops[plan.table])) is not None:
                    value, *_ = done["metrics"].get("auc", [float("nan")])
                    display.event({"event": "row_finished", "row": plan.name, "auc": value})
                    break
            else:
                time.sleep(PATIENCE_S)  # other processes make all that is left
    Console().print(f"{len(made)} of {len(every)} rows: {out / 'papers.html'}", soft_wrap=True, highlight=False)


def _processor() -> str:
    """Its name, where the system tells it, and how many cores this process may use."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return f"{found[1]}, {len(os.sched_getaffinity(0))} cores"
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
