"""Opening a built cohort costs milliseconds, whatever its size."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from polyclinic.cohort import open_cohort
from polyclinic.cohort.index import Member, write_index
from polyclinic.cohort.intake import Facts, Intake
from polyclinic.cohort.scan import Source
from polyclinic.cohort.store import IMAGES, Record


def test_ten_thousand_images_open_in_twenty_milliseconds(tmp_path: Path) -> None:
    intake = Intake(96, 1, "percentile")
    with (tmp_path / IMAGES).open("wb") as file:
        file.truncate(10_000 * intake.stride)
    generator = np.random.default_rng(0)
    members = [
        Member(
            Source(
                f"{k}.dcm", label=f"label {k % 20}", site=f"a hospital with a long name, number {k % 100}", view="PA"
            ),
            generator.bytes(32).hex(),
            Record(Facts(modality="DX", photometric="MONOCHROME2", height=2000, width=2000), first=k, count=1),
            f"{k % 4000}",
        )
        for k in range(10_000)
    ]
    write_index(tmp_path, members, 10_000, json.loads(json.dumps({"intake": asdict(intake)})))
    times = []
    for _ in range(7):
        started = time.perf_counter()
        cohort = open_cohort(tmp_path)
        times.append(time.perf_counter() - started)
    print(f"opened 10,000 images in {1000 * min(times):.1f} ms")
    assert (len(cohort), cohort.n_patients) == (10_000, 4000)
    assert min(times) < 0.02
