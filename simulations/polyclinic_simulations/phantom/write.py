"""Write synthetic patients as the DICOM archive of a hospital, with the labels beside it.

    site/labels.csv                                image,label,view,age
    site/Quorzybvex_Wugnyx_PID123456789/….dcm      1 to 4 images of one patient

The labels hold no patient and no sex: whoever reads the archive takes those from the header, as at a real hospital.
The age is no header's, where it would have to agree with the few dates that are invented.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from polyclinic import __version__
from polyclinic.errors import Refused, StorageError
from polyclinic.files import make_folder, storage, write_atomic
from polyclinic.seeding import numpy_generator, seed_for
from polyclinic_simulations.phantom.age import draw_age
from polyclinic_simulations.phantom.anatomy import Anatomy, Pose
from polyclinic_simulations.phantom.difficulty import LATERAL
from polyclinic_simulations.phantom.findings import draw_finding, draw_labels
from polyclinic_simulations.phantom.headers import Person, Place, uid
from polyclinic_simulations.phantom.render import FIELD, render
from polyclinic_simulations.phantom.scanner import Scanner

SITES = ("north", "east", "south", "west", "harbour", "hillside", "lakeside", "riverside")
"""Names of the first sites of a consortium; further ones are numbered."""

Progress = Callable[[int, int], None]
"""Called with the patients written and the patients in all."""


def site_names(sites: int) -> list[str]:
    """The names of a consortium's sites."""
    return [SITES[k] if k < len(SITES) else f"site-{k + 1}" for k in range(sites)]


def write_consortium(
    folder: Path, sites: int, patients: int, seed: int, progress: Progress | None = None
) -> dict[str, int]:
    """Write `sites` hospitals of `patients` each, a folder each under `folder`; returns the images of each site.

    Raises Refused when `folder` holds anything, StorageError when the disk is full.
    """
    counts = {}
    names = site_names(sites)
    _empty(folder)
    for number, site in enumerate(names):

        def count(done: int, _: int, before: int = number * patients) -> None:
            if progress:
                progress(before + done, sites * patients)

        counts[site] = write_site(folder / site, site, patients, seed, number=number, progress=count)
    return counts


def write_site(
    folder: Path, site: str, patients: int, seed: int, *, number: int = 0, progress: Progress | None = None
) -> int:
    """Write one hospital into `folder` and return how many images it has.

    The same arguments give the same bytes. `number` sets the kind of files that the site's machine writes.
    Raises Refused when `folder` holds anything, StorageError when the disk is full.
    """
    _empty(folder)
    scanner = Scanner.of(site, number, seed)
    place = Place.draw(numpy_generator(seed_for(seed, "phantom place", site=site)))
    labels = draw_labels(patients, numpy_generator(seed_for(seed, "phantom labels", site=site)))
    lines = ["image,label,view,age"]
    for k, label in enumerate(labels):
        rng = numpy_generator(seed_for(seed, f"phantom patient {k}", site=site))
        anatomy, written = _write_patient(folder, label, scanner, place, rng)
        age = draw_age(anatomy, label, numpy_generator(seed_for(seed, f"phantom age {k}", site=site)))
        lines += [f"{path.relative_to(folder).as_posix()},{label},{view},{age}" for path, view in written]
        if progress:
            progress(k + 1, patients)
    write_atomic(folder / "labels.csv", "\n".join(lines) + "\n")
    return len(lines) - 1


def keep_site(
    state: Path, site: str, patients: int, seed: int, *, number: int = 0, progress: Progress | None = None
) -> Path:
    """The folder of such a hospital in `state`: written once for what it is made from, whole or not there."""
    made_from = [__version__, site, patients, seed, number]
    folder = state / f"phantom-{sha256(json.dumps(made_from).encode()).hexdigest()[:16]}"
    if not folder.exists():
        make_folder(state)
        unfinished = Path(mkdtemp(prefix=".phantom-", dir=state))
        try:
            write_site(unfinished, site, patients, seed, number=number, progress=progress)
            if not folder.exists():
                with suppress(OSError):  # another process has been faster
                    unfinished.rename(folder)
            if not folder.exists():
                raise StorageError(f"cannot keep invented patients in {state}", "give another --state")
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _empty(folder: Path) -> None:
    """Make `folder`, or refuse it when there is something in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(f"{folder} is not an empty folder", "name a new or empty folder; nothing was written")
    make_folder(folder)


def _write_patient(
    folder: Path, label: str, scanner: Scanner, place: Place, rng: np.random.Generator
) -> tuple[Anatomy, list[tuple[Path, str]]]:
    """Write all images of another patient; returns the anatomy, and each image's path and view."""
    person, anatomy, finding = Person.draw(rng), Anatomy.draw(rng), draw_finding(label, rng)
    home = folder / f"{person.file_stem}_{person.id}"
    written = []
    for k in range(int(rng.integers(1, 4, endpoint=True))):
        pose = Pose.draw(rng, "LATERAL" if k and rng.random() < LATERAL else "PA")
        water = render(anatomy, finding, pose, scanner.rows, scanner.columns, rng)
        stored = scanner.expose(water, int(rng.choice([-1, 1])), rng)
        path = home / f"{person.file_stem}_{k + 1}.dcm"
        with storage(path):
            home.mkdir(exist_ok=True)
            _dataset(stored, scanner, place, person, pose.view, k + 1, rng).save_as(path, enforce_file_format=True)
        written.append((path, pose.view))
    return anatomy, written


def _dataset(
    stored: NDArray[np.unsignedinteger], scanner: Scanner, place: Place, person: Person, view: str, number: int,
    rng: np.random.Generator,
) -> Dataset:  # fmt: skip
    """A whole DICOM file: PS3.3 A.26 (DX) or A.2 (CR), as far as archives fill it."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.SOPClassUID, ds.SOPInstanceUID = scanner.sop_class, uid(rng)
    ds.StudyInstanceUID, ds.SeriesInstanceUID = person.study_uid, uid(rng)
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = person.study_date
    ds.StudyTime = ds.ContentTime = f"{rng.integers(7, 20):02d}{rng.integers(60):02d}{rng.integers(60):02d}"
    ds.AccessionNumber, ds.StudyID = person.accession, person.study_id
    ds.SeriesNumber, ds.InstanceNumber = number, 1
    ds.Modality, ds.Manufacturer = scanner.modality, "Phantom"
    ds.InstitutionName, ds.InstitutionAddress = place.institution, place.address
    ds.StationName, ds.DeviceSerialNumber = place.station, place.serial
    ds.ReferringPhysicianName, ds.OperatorsName = person.physician, person.operator
    ds.PatientName, ds.PatientID = person.name, person.id
    ds.PatientBirthDate, ds.PatientSex = person.birth_date, person.sex
    ds.BodyPartExamined, ds.ViewPosition, ds.PatientOrientation = "CHEST", view, ""
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    _pixels(ds, stored, scanner)
    return ds


def _pixels(ds: Dataset, stored: NDArray[np.unsignedinteger], scanner: Scanner) -> None:
    """The pixels and all that is said of them (PS3.3 C.7.6.3)."""
    top = 2**scanner.bits - 1
    spacing = round(FIELD / scanner.columns, 4)
    ds.PixelSpacing = ds.ImagerPixelSpacing = [spacing, spacing]
    ds.WindowCenter, ds.WindowWidth = (top + 1) / 2, top + 1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "US"
    ds.PresentationLUTShape = "INVERSE" if scanner.inverted else "IDENTITY"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = scanner.syntax if not scanner.syntax.is_compressed else ExplicitVRLittleEndian
    photometric = "MONOCHROME1" if scanner.inverted else "MONOCHROME2"
    ds.set_pixel_data(stored, photometric, scanner.bits, generate_instance_uid=False)
    if scanner.syntax.is_compressed:
        ds.compress(scanner.syntax, generate_instance_uid=False)
