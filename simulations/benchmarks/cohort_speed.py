"""How fast a cohort opens, and how fast it is built from DICOM files beside a plain pydicom loop.

Opening: how long `open_cohort` takes in a fresh process, its files in the page cache, at 10,000 images (PNG files,
since the index does not depend on what they were read from).

Building: `build_cohort` (scan, worker processes, store, index) against one process that does with each file what
pydicom's documentation says: dcmread, pixel_array, apply_modality_lut, apply_voi_lut, then Pillow's resize. Both read
the same files from the page cache, a folder for each transfer syntax: as the phantom writes them, and enlarged to the
size of a radiograph. The loop stores nothing and keeps no patient apart; the cohort does both. Starting the workers
takes a while, whatever the number of files, so the rate from the first file on is given beside the whole.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from machine import RESULTS, describe, keep
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian

from polyclinic.cohort import build_cohort
from polyclinic.study import Images
from polyclinic_simulations.phantom import write_site

SIZE = 96
OPEN = """
import sys, time
from pathlib import Path
from polyclinic.cohort import open_cohort
started = time.perf_counter()
cohort = open_cohort(Path(sys.argv[1]))
print(time.perf_counter() - started, len(cohort))
"""


def opening(folder: Path, images: int, repeats: int) -> dict[str, Any]:
    """Milliseconds to open a cohort of so many images, each time in a new process; the first is left out."""
    generator = np.random.default_rng(0)
    lines = ["image,label,patient"]
    (folder / "source").mkdir(parents=True)
    for k in range(images):
        pixels = generator.integers(0, 256, (16, 16), np.uint8)
        Image.fromarray(pixels).save(folder / "source" / f"{k}.png", compress_level=0)
        lines.append(f"{k}.png,{('normal', 'nodule', 'effusion')[k % 3]},{k // 2}")
    (folder / "source" / "labels.csv").write_text("\n".join(lines) + "\n")
    cohort = build_cohort(folder / "source", Images(size=SIZE), folder / "state")
    command = [sys.executable, "-c", OPEN, str(cohort.folder)]
    answers = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(repeats + 1)]
    assert all(int(answer.split()[1]) == images for answer in answers)
    milliseconds = [1000 * float(answer.split()[0]) for answer in answers[1:]]
    return {"images": images, "median_ms": round(median(milliseconds), 1), "worst_ms": round(max(milliseconds), 1)}


def plain_loop(source: Path) -> NDArray[np.uint8]:
    """(images, size, size): every DICOM file of a folder, one after another."""
    return np.stack([plain_image(path) for path in sorted(source.rglob("*.dcm"))])


def plain_image(path: Path) -> NDArray[np.uint8]:
    """One file as pydicom's documentation does it, stretched to 0..255 and resized."""
    dataset = dcmread(path)
    values = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        values = values.max() - values
    grey = ((values - values.min()) / np.ptp(values) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def enlarge(source: Path, target: Path, files: int, factor: int) -> None:
    """Copy some files of an archive with each pixel repeated factor x factor times and a little noise on it."""
    generator = np.random.default_rng(0)
    for path in sorted(source.rglob("*.dcm"))[:files]:
        dataset = dcmread(path)
        stored = np.kron(dataset.pixel_array, np.ones((factor, factor), np.uint8)).astype(dataset.pixel_array.dtype)
        stored ^= generator.integers(0, 4, stored.shape, stored.dtype)
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        _replace_pixels(dataset, stored)
        dataset.save_as(copy)


def _replace_pixels(dataset: Dataset, stored: NDArray[np.unsignedinteger]) -> None:
    syntax, bits = dataset.file_meta.TransferSyntaxUID, dataset.BitsStored
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.set_pixel_data(stored, dataset.PhotometricInterpretation, bits, generate_instance_uid=False)
    if syntax.is_compressed:
        dataset.compress(syntax, generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax


def building(source: Path, state: Path) -> dict[str, Any]:
    """Images per second of both sides on one folder, which both have read before."""
    files = sorted(source.rglob("*.dcm"))
    first = dcmread(files[0], stop_before_pixels=True)
    contents = [path.read_bytes() for path in files]
    done: list[float] = []  # when each file was
    settings = Images(size=SIZE, window="voi")
    started = perf_counter()
    cohort = build_cohort(source, settings, state, progress=lambda *_: done.append(perf_counter()))
    built = perf_counter()
    plain = plain_loop(source)
    ended = perf_counter()
    assert len(cohort) == len(plain) == len(contents)
    whole, alone = len(plain) / (built - started), len(plain) / (ended - built)
    running = (len(plain) - 1) / (built - done[0])
    return {
        "transfer_syntax": first.file_meta.TransferSyntaxUID.name,
        "pixels": f"{first.Columns} x {first.Rows}",
        "bits": int(first.BitsStored),
        "images": len(plain),
        "cohort_images_per_s": round(whole, 1),
        "cohort_images_per_s_once_started": round(running, 1),
        "plain_images_per_s": round(alone, 1),
        "ratio": round(whole / alone, 2),
        "ratio_once_started": round(running / alone, 2),
    }


def measure(folder: Path, wanted: argparse.Namespace) -> dict[str, Any]:
    """Generate, then time: the files of each transfer syntax as they are, then enlarged."""
    built = []
    for number in range(wanted.syntaxes):
        small, large = folder / f"small-{number}", folder / f"large-{number}"
        write_site(small, f"site-{number}", wanted.patients, seed=0, number=number)
        enlarge(small, large, wanted.large_files, wanted.factor)
        built += [building(source, folder / f"state-{source.name}") for source in (small, large)]
    built.sort(key=lambda row: int(row["pixels"].split()[0]) > 1000)
    return {"opening": opening(folder / "open", wanted.images, wanted.repeats), "building": built}


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="of the cohort that is opened")
    parser.add_argument("--repeats", type=int, default=9, help="processes that open it")
    parser.add_argument("--syntaxes", type=int, default=5, help="consecutive phantom sites differ in transfer syntax")
    parser.add_argument("--patients", type=int, default=100, help="for each transfer syntax, 1 to 4 images each")
    parser.add_argument("--large-files", type=int, default=64, help="for each transfer syntax")
    parser.add_argument("--factor", type=int, default=10, help="by which they are enlarged: to about 2000 x 2000")
    parser.add_argument("--out", type=Path, default=RESULTS / "cohort_speed.json")
    wanted = parser.parse_args()
    machine = describe()
    with TemporaryDirectory() as folder:
        keep(wanted.out, machine, measure(Path(folder), wanted))


if __name__ == "__main__":
    main()
