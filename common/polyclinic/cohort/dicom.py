"""DICOM files: a header by allow-list, then pixels through one documented order.

    stored values -> mask pixel padding -> modality LUT or rescale -> window -> invert MONOCHROME1 -> resize

References: PS3.3 C.7.6.3 (Image Pixel), C.11.1 (Modality LUT), C.11.2 (VOI LUT), C.11.6 (Presentation LUT);
PS3.4 N.2 (the order of the grey-scale transformations).
"""

import io
from collections.abc import Callable, Set
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.pixels.common import PhotometricInterpretation
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import UID, JPEGExtended12Bit

from polyclinic.cohort import limits
from polyclinic.cohort.attributes import Meaningless, parse_age, parse_sex
from polyclinic.cohort.grey import grey_levels
from polyclinic.cohort.identity import keyed
from polyclinic.cohort.intake import Facts, Intake
from polyclinic.cohort.pixels import Floats, to_tensor
from polyclinic.cohort.quarantine import Reason, Unusable

T = TypeVar("T")

HEADER = [
    "PatientID", "IssuerOfPatientID", "PatientSex", "PatientAge",
    "Manufacturer", "ManufacturerModelName", "DeviceSerialNumber",
    "SOPClassUID", "Modality", "ViewPosition", "BurnedInAnnotation",
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
"""The only elements read. The patient's identifier and the machine's three leave `_facts` as HMACs; the groups are
looked into for LUTs only."""
BODY = [
    *HEADER, "PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    *(f"{c}PaletteColorLookupTableDescriptor" for c in ("Red", "Green", "Blue")),
    *(f"{s}{c}PaletteColorLookupTableData" for s in ("", "Segmented") for c in ("Red", "Green", "Blue")),
]  # fmt: skip

MODALITIES = frozenset({
    "ANN", "AR", "ASMT", "AU", "BDUS", "BI", "BMD", "CFM", "CR", "CT", "CTPROTOCOL", "DG", "DMS", "DOC", "DX", "ECG",
    "EEG", "EMG", "EOG", "EPS", "ES", "FID", "GM", "HC", "HD", "IO", "IOL", "IVOCT", "IVUS", "KER", "KO", "LEN", "LS",
    "M3D", "MG", "MR", "NM", "OAM", "OCT", "OP", "OPM", "OPT", "OPTBSV", "OPTENF", "OPV", "OSS", "OT", "PA", "PLAN",
    "POS", "PR", "PT", "PX", "REG", "RESP", "RF", "RG", "RTDOSE", "RTIMAGE", "RTINTENT", "RTPLAN", "RTRAD", "RTRECORD",
    "RTSEGANN", "RTSTRUCT", "RWV", "SEG", "SM", "SMR", "SR", "SRF", "STAIN", "TEXTUREMAP", "TG", "US", "VA", "XA",
    "XAPROTOCOL", "XC", "AS", "CD", "CF", "CP", "CS", "DD", "DF", "DM", "DS", "EC", "FA", "FS", "LP", "MA", "MS", "OPR",
    "ST", "VF",
})  # fmt: skip
"""Modality (PS3.3 C.7.3.1.1.1): its defined terms, from AS on the retired ones."""
VIEWS = frozenset({
    "AP", "PA", "LL", "RL", "RLD", "LLD", "RLO", "LLO", "LAT", "LATERAL", "LAO", "RAO", "LPO", "RPO", "CC", "MLO", "ML",
    "LM", "LMO", "FB", "SIO", "ISO", "XCC", "XCCL", "XCCM", "CV", "AT",
})  # fmt: skip
"""View Position: the defined terms of PS3.3 C.8.1.1 up to LLO, usual words for lateral and oblique views, and from CC
on the abbreviations of the mammographic views (PS3.16 CID 4014 and 4015)."""
PHOTOMETRIC = frozenset(term.value for term in PhotometricInterpretation)

SOP = "1.2.840.10008.5.1.4.1.1."
SECONDARY_CAPTURE = (f"{SOP}7", f"{SOP}7.1", f"{SOP}7.2", f"{SOP}7.3", f"{SOP}7.4")
ULTRASOUND = (f"{SOP}3", f"{SOP}3.1", f"{SOP}6", f"{SOP}6.1", f"{SOP}6.2", f"{SOP}6.3")
DERIVED = (f"{SOP}66.4", f"{SOP}66.7", f"{SOP}481.2", f"{SOP}30")
"""Segmentation, label map segmentation, RT dose, parametric map (PS3.4 B.5)."""


def read(data: bytes, intake: Intake, key: bytes) -> tuple[list[NDArray[np.uint8]], Facts]:
    """The images of a DICOM file, each (channels, size, size), one a frame, and its facts.

    Frames without contrast are left out.

    Raises:
        Unusable: with the reason; its facts are those that were read before.
    """
    facts = Facts(kind="dicom")
    try:
        header = dcmread(io.BytesIO(data), specific_tags=HEADER, stop_before_pixels=True)
        facts = _facts(header, key)
        _refuse(header, facts, intake)
        dataset = dcmread(io.BytesIO(data), specific_tags=BODY)
        images = _images(dataset, intake)
    except Unusable as error:
        raise Unusable(error.reason, facts) from error
    except NotImplementedError as error:
        raise Unusable(Reason.UNSUPPORTED, facts) from error
    except MemoryError as error:
        raise Unusable(Reason.TOO_LARGE, facts) from error
    except Exception as error:  # a damaged file can raise anything in a parser or decoder
        raise Unusable(Reason.DAMAGED, facts) from error
    if not images:
        raise Unusable(Reason.CONSTANT, facts)
    return images, facts


def _facts(header: Dataset, key: bytes) -> Facts:
    syntax = UID(header.file_meta.get("TransferSyntaxUID", ""))
    return Facts(
        kind="dicom",
        patient=_patient(header, key),
        modality=_code(header, "Modality", MODALITIES),
        photometric=_code(header, "PhotometricInterpretation", PHOTOMETRIC),
        view=_code(header, "ViewPosition", VIEWS),
        scanner=_scanner(header, key),
        transfer_syntax=str(syntax) if syntax.is_transfer_syntax and not syntax.is_private else "",
        height=_number(header, "Rows"),
        width=_number(header, "Columns"),
        sex=_meaning(header, "PatientSex", parse_sex) or "",
        age=_meaning(header, "PatientAge", parse_age),
    )


def _patient(header: Dataset, key: bytes) -> str:
    """The patient's keyed HMAC; "" without an identifier. Equal to a CSV's unless the header names who issued it."""
    patient, issuer = (str(header.get(name) or "").strip() for name in ("PatientID", "IssuerOfPatientID"))
    return keyed(key, "patient", f"{issuer}\0{patient}" if issuer else patient) if patient else ""


def _scanner(header: Dataset, key: bytes) -> str:
    """A keyed word for the machine, since its elements are free text (PS3.3 C.7.5.1); "" where all three are absent."""
    machine = "\0".join(_text(header, name) for name in ("Manufacturer", "ManufacturerModelName", "DeviceSerialNumber"))
    return f"scanner-{keyed(key, 'scanner', machine)[:8]}" if machine.strip("\0") else ""


def _code(header: Dataset, name: str, terms: Set[str]) -> str:
    """A code string that is one of the element's terms; "" for anything else, which might be a name."""
    value = str(header.get(name) or "").strip()
    return value if value in terms else ""


def _meaning(header: Dataset, name: str, parse: Callable[[str], T]) -> T | None:
    """What an element says of the patient; None where it is missing, unknown or means nothing."""
    try:
        return parse(_text(header, name))
    except Meaningless:
        return None


def _text(header: Dataset, name: str) -> str:
    """An element's bytes as they stand, "" without it: pydicom would warn of an age of another form than nnnY."""
    found = header.get_item(name)
    value = b"" if found is None else found.value
    return value.decode("ascii", "surrogateescape").strip("\0 ") if isinstance(value, bytes) else str(value or "")


def _number(header: Dataset, name: str) -> int:
    value = header.get(name)
    return int(value) if isinstance(value, int) else 0  # a damaged header may hold several


def _refuse(header: Dataset, facts: Facts, intake: Intake) -> None:
    """Raise Unusable for what must not or cannot be decoded; only the header is known yet."""
    sop = str(header.get("SOPClassUID", ""))
    if sop in DERIVED or facts.modality in ("SEG", "RTDOSE"):
        raise Unusable(Reason.DERIVED)
    if not intake.allow_burned_in:
        if str(header.get("BurnedInAnnotation", "")).strip().upper() == "YES":
            raise Unusable(Reason.BURNED_IN)
        if sop in ULTRASOUND or facts.modality in ("US", "IVUS"):
            raise Unusable(Reason.ULTRASOUND)
        if sop in SECONDARY_CAPTURE:
            raise Unusable(Reason.SECONDARY_CAPTURE)
    frames, samples = (int(header.get(name) or 1) for name in ("NumberOfFrames", "SamplesPerPixel"))
    pixels = facts.height * facts.width
    if pixels > limits.MAX_PIXELS or pixels * frames * samples > limits.MAX_VOLUME:
        raise Unusable(Reason.TOO_LARGE)
    if header.get("HighBit") is not None and header.HighBit != header.BitsStored - 1:  # PS3.5 section 8.1.1
        raise Unusable(Reason.UNSUPPORTED)


def _images(dataset: Dataset, intake: Intake) -> list[NDArray[np.uint8]]:
    """The dataset's frames as tensors, at most MAX_FRAMES of them, evenly spaced."""
    if "PixelData" not in dataset:
        raise Unusable(Reason.NO_PIXELS)
    decoder, frames = _decoder(dataset), int(dataset.get("NumberOfFrames") or 1)
    chosen = np.unique(np.linspace(0, frames - 1, min(frames, limits.MAX_FRAMES)).round().astype(int))
    images = (_frame(dataset, decoder, int(index), intake) for index in chosen)  # one at a time in memory
    return [to_tensor(image, intake.size, intake.channels) for image in images if np.ptp(image) > 0]


def _decoder(dataset: Dataset) -> Decoder:
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise Unusable(Reason.NO_DECODER) from error
    # Pillow registers for JPEG Extended but decodes its 8-bit form only.
    deep = syntax == JPEGExtended12Bit and dataset.BitsStored > 8 and decoder.available_plugins == ("pillow",)
    if deep or not decoder.is_available:
        raise Unusable(Reason.NO_DECODER)
    return decoder


def _frame(dataset: Dataset, decoder: Decoder, index: int, intake: Intake) -> Floats:
    """One frame in [0, 1]: (rows, columns) grey, or (rows, columns, 3) red, green and blue."""
    stored, properties = decoder.as_array(dataset, index=index)
    photometric = properties["photometric_interpretation"]
    if photometric in ("MONOCHROME1", "MONOCHROME2") and stored.ndim == 2:
        return grey_levels(stored, dataset, index, intake.window)
    if photometric == "PALETTE COLOR" and stored.ndim == 2:
        colours = apply_color_lut(stored, dataset)[..., :3]
        return _unit(colours, int(dataset.RedPaletteColorLookupTableDescriptor[2]))
    if photometric == "RGB" and stored.ndim == 3:  # YBR has become RGB in the decoder
        return _unit(stored, int(properties["bits_stored"]))
    raise Unusable(Reason.UNSUPPORTED)


def _unit(colours: NDArray[np.unsignedinteger], bits: int) -> Floats:
    """Unsigned values of so many bits on [0, 1]."""
    unit: Floats = colours.astype(np.float32) / np.float32(2.0**bits - 1.0)
    return np.clip(unit, 0.0, 1.0, out=unit)
