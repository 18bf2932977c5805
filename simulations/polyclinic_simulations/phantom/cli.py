"""`polyclinic phantom`: synthetic hospitals, to try everything else on.

What is slow to load loads inside the command.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress


def phantom(
    folder: Annotated[Path, typer.Argument(help="New or empty folder; each site becomes a folder in it.")],
    sites: Annotated[int, typer.Option(min=1, max=1000, help="Hospitals.")] = 4,
    patients: Annotated[int, typer.Option(min=1, max=100_000, help="Patients at each, 1 to 4 images each.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same bytes.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts as JSON.")] = False,
) -> None:
    """Write synthetic chest radiographs as the DICOM archives of several hospitals, with labels.

    Example: polyclinic phantom phantoms --sites 4 --patients 60
    """
    from polyclinic_simulations.phantom.write import write_consortium

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("patients", total=sites * patients)
        counts = write_consortium(folder, sites, patients, seed, lambda done, _: bar.update(task, completed=done))
    if as_json:
        print(json.dumps({"folder": str(folder), "patients": patients, "seed": seed, "images": counts}))
        return
    for site, images in counts.items():
        print(f"{folder / site}: {images} images of {patients} patients")
    print(f"Look at one: polyclinic cohort inspect {folder / next(iter(counts))}")


def register(app: typer.Typer) -> None:
    """Add the command to the root app."""
    app.command()(phantom)
