"""Files for cohort tests: PNGs and DICOM objects made on the spot, and the DICOM samples where they are at hand."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from polyclinic.study import Images

DATA = Path(os.environ.get("POLYCLINIC_DATA", Path(__file__).resolve().parents[3].parent / "shared" / "data"))
CR_IMAGE = "1.2.840.10008.5.1.4.1.1.1"


@pytest.fixture
def images() -> Images:
    """Small tensors, so that tests are fast."""
    return Images(size=32)


@pytest.fixture(scope="session")
def samples() -> Path:
    """Real DICOM files of every kind."""
    folder = DATA / "dicom-samples"
    if not folder.is_dir():
        pytest.skip("needs the DICOM samples: set POLYCLINIC_DATA to the folder that holds dicom-samples")
    return folder


@pytest.fixture
def png() -> Callable[..., Path]:
    """`png(path, seed)` writes a 40 x 48 grey image with something to see in it."""

    def write(path: Path, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(seed).integers(0, 256, (5, 6)).astype(np.uint8)
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(path)
        return path

    return write


def dataset(stored: NDArray[Any], **elements: Any) -> FileDataset:
    """A CR image of stored values, (rows, columns) or (frames, rows, columns); `elements` are added or replaced."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CR_IMAGE
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality, ds.PatientID = CR_IMAGE, generate_uid(), "CR", "P1"
    ds.Rows, ds.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        ds.NumberOfFrames = len(stored)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8 * stored.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(stored.dtype.kind == "i")
    ds.PixelData = stored.tobytes()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


@pytest.fixture
def dicom() -> Callable[..., Path]:
    """`dicom(path, stored, **elements)` writes a DICOM file; `stored` may be a seed."""

    def write(path: Path, stored: NDArray[Any] | int = 0, **elements: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(stored, int):
            stored = np.random.default_rng(stored).integers(0, 4096, (24, 20)).astype(np.uint16)
        dataset(stored, **elements).save_as(path, enforce_file_format=True)
        return path

    return write
