"""DICOM intake against an independent twin: pydicom's own functions in float64, through the documented order."""

import csv
import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataelem import RawDataElement
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag

from polyclinic.cohort import dicom as intake_dicom
from polyclinic.cohort import limits, pool
from polyclinic.cohort.intake import Facts, Intake
from polyclinic.cohort.quarantine import Reason, Unusable
from polyclinic.cohort.worker import decode

KEY = b"k" * 32
RAMP = np.arange(480, dtype=np.uint16).reshape(24, 20)
Write = Callable[..., Path]


def grey(path: Path, window: Any = "percentile", frame: int = 0) -> NDArray[np.float32]:
    """The frame's levels before they are resized."""
    ds = dcmread(path)
    return intake_dicom._frame(ds, intake_dicom._decoder(ds), frame, Intake(32, 1, window))


def read(path: Path, **settings: Any) -> tuple[list[NDArray[np.uint8]], Facts]:
    return decode(path.read_bytes(), Intake(**{"size": 32, "channels": 1, "window": "percentile", **settings}), KEY)


def refused(path: Path, **settings: Any) -> Reason:
    with pytest.raises(Unusable) as error:
        read(path, **settings)
    return error.value.reason


def twin(ds: Dataset, stored: NDArray[Any], window: str) -> NDArray[np.float64]:
    """One monochrome frame on [0, 1], as slowly and plainly as pydicom has it."""
    pad = np.zeros(stored.shape, bool)
    if "PixelPaddingValue" in ds:
        limit = ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue)
        pad = (stored >= min(ds.PixelPaddingValue, limit)) & (stored <= max(ds.PixelPaddingValue, limit))
    units = apply_modality_lut(stored, ds)
    if window == "voi" and ("WindowCenter" in ds or "VOILUTSequence" in ds):
        out = voi_twin(ds, units)
    else:
        low, high = np.percentile(units[~pad].astype(np.float64), (1, 99))
        if low == high:
            low, high = float(units[~pad].min()), float(units[~pad].max())
        out = np.clip((units.astype(np.float64) - low) / (high - low), 0, 1)
    out = 1 - out if ds.PhotometricInterpretation == "MONOCHROME1" else out
    return np.where(pad, 0.0, out)


def voi_twin(ds: Dataset, units: NDArray[Any]) -> NDArray[np.float64]:
    """pydicom spreads a window over the range that the stored bits could take; here it is brought to [0, 1]."""
    low, high = 0.0, 2.0**ds.BitsStored - 1
    if ds.PixelRepresentation:
        low, high = -(2.0 ** (ds.BitsStored - 1)), 2.0 ** (ds.BitsStored - 1) - 1
    if "VOILUTSequence" in ds:
        low, high = 0.0, 2.0 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif "RescaleSlope" in ds:
        low, high = (v * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for v in (low, high))
    return (apply_voi_lut(units, ds) - low) / (high - low)


def sample_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".dcm")


def test_samples_match_pydicom(samples: Path) -> None:
    """Every frame of every decodable sample; at least the 40 files that were decodable when this was written."""
    compared = 0
    for path in sample_files(samples):
        try:
            tensors, _ = read(path, allow_burned_in=True, channels=3)
        except Unusable:
            continue
        ds = dcmread(path)
        frames = ds.pixel_array  # YBR is RGB by now
        frames = frames[None] if int(ds.get("NumberOfFrames") or 1) == 1 else frames
        assert len(tensors) == len(frames), path.name
        for number, stored in enumerate(frames):
            if stored.ndim == 2 and ds.PhotometricInterpretation != "PALETTE COLOR":
                for window in ("percentile", "voi"):
                    np.testing.assert_allclose(grey(path, window, number), twin(ds, stored, window), atol=2e-5)
            else:
                palette = stored.ndim == 2
                colour = apply_color_lut(stored, ds) if palette else stored
                bits = ds.RedPaletteColorLookupTableDescriptor[2] if palette else ds.BitsStored
                np.testing.assert_allclose(grey(path, frame=number), colour / (2.0**bits - 1), atol=1e-6)
        compared += 1
    assert compared >= 40


def test_unusable_samples_have_the_expected_reasons(samples: Path) -> None:
    truncated = samples / "pd_test_files_MR_truncated.dcm"
    assert refused(truncated) is Reason.DAMAGED
    assert refused(samples / "pd_dicomdirtests_DICOMDIR.dcm") is Reason.NO_PIXELS
    assert refused(samples / "pd_test_files_rtdose_expb.dcm") is Reason.DERIVED
    assert refused(samples / "d4c_resources_YBR_422.dcm") is Reason.ULTRASOUND


@pytest.mark.parametrize(
    ("elements", "bright_first"),
    [
        ({}, False),
        ({"PhotometricInterpretation": "MONOCHROME1"}, True),
        ({"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}, True),
        ({"PresentationLUTShape": "INVERSE"}, True),
        ({"PresentationLUTShape": "IDENTITY"}, False),
        ({"RescaleSlope": "-1", "RescaleIntercept": "480"}, True),
        ({"RescaleSlope": "-1", "RescaleIntercept": "0", "PhotometricInterpretation": "MONOCHROME1"}, False),
    ],
)
def test_inversion_happens_once(tmp_path: Path, dicom: Write, elements: dict[str, str], bright_first: bool) -> None:
    levels = grey(dicom(tmp_path / "a", RAMP, **elements))
    assert levels[0, 0] == (1.0 if bright_first else 0.0)
    assert levels[-1, -1] == (0.0 if bright_first else 1.0)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_no_part_of_the_percentiles(tmp_path: Path, dicom: Write, photometric: str) -> None:
    stored = RAMP.astype(np.int16) + 1000
    stored[:6] = -2000
    bare = grey(dicom(tmp_path / "a", stored[6:], PhotometricInterpretation=photometric))
    padded = grey(dicom(tmp_path / "b", stored, PixelPaddingValue=-2000, PhotometricInterpretation=photometric))
    assert (padded[:6] == 0).all()
    np.testing.assert_allclose(padded[6:], bare)


def test_padding_range(tmp_path: Path, dicom: Write) -> None:
    levels = grey(dicom(tmp_path / "a", RAMP, PixelPaddingValue=10, PixelPaddingRangeLimit=0))
    expected = np.percentile(np.arange(11, 480), (1, 99))
    assert (levels.ravel()[:11] == 0).all()
    np.testing.assert_allclose(levels.ravel()[200], (200 - expected[0]) / (expected[1] - expected[0]), rtol=1e-5)


def lut(entries: NDArray[np.uint16], first: int, bits: int) -> Sequence:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries), first, bits], entries.tolist()
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    return Sequence([item])


def test_modality_lut(tmp_path: Path, dicom: Write) -> None:
    table = (np.arange(300) ** 2 % 4000).astype(np.uint16)
    path = dicom(tmp_path / "a", RAMP, ModalityLUTSequence=lut(table, 100, 16))
    np.testing.assert_allclose(grey(path), twin(dcmread(path), RAMP, "percentile"), atol=1e-5)


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowCenter": "200", "WindowWidth": "100"},
        {"WindowCenter": ["200", "50"], "WindowWidth": ["100", "20"]},
        {"WindowCenter": "200.5", "WindowWidth": "1"},
        {"WindowCenter": "200", "WindowWidth": "100", "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": "200", "WindowWidth": "100", "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": "-10", "WindowWidth": "90", "RescaleSlope": "0.5", "RescaleIntercept": "-100"},
        {"VOILUTSequence": lut((np.arange(200) * 5).astype(np.uint16), 150, 10)},
        {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": "200", "WindowWidth": "100"},
    ],
)
def test_voi_matches_pydicom(tmp_path: Path, dicom: Write, elements: dict[str, Any]) -> None:
    path = dicom(tmp_path / "a", RAMP, **elements)
    ds = dcmread(path)
    out = voi_twin(ds, apply_modality_lut(RAMP, ds))
    out = 1 - out if ds.PhotometricInterpretation == "MONOCHROME1" else out
    np.testing.assert_allclose(grey(path, "voi"), out, atol=1e-5)


def test_voi_falls_back_to_percentiles(tmp_path: Path, dicom: Write) -> None:
    plain = grey(dicom(tmp_path / "a", RAMP))
    broken = dicom(tmp_path / "b", RAMP, WindowCenter="100", WindowWidth="0")
    np.testing.assert_array_equal(grey(tmp_path / "a", "voi"), plain)
    np.testing.assert_array_equal(grey(broken, "voi"), plain)


def test_fixed_window_is_in_modality_units(tmp_path: Path, dicom: Write) -> None:
    levels = grey(dicom(tmp_path / "a", RAMP, RescaleSlope="1", RescaleIntercept="-200"), (40.0, 400.0))
    np.testing.assert_allclose(levels.ravel()[[0, 40, 240, 440, 479]], [0, 0, 0.5, 1, 1], atol=1e-6)


def test_functional_groups_take_the_place_of_top_level_elements(tmp_path: Path, dicom: Write) -> None:
    def group(slope: str, centre: str) -> Dataset:
        transformation, voi, holder = Dataset(), Dataset(), Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept, transformation.RescaleType = slope, "0", "US"
        voi.WindowCenter, voi.WindowWidth, voi.VOILUTFunction = centre, "100", "LINEAR_EXACT"
        holder.PixelValueTransformationSequence, holder.FrameVOILUTSequence = [transformation], [voi]
        return holder

    shared = Dataset()
    shared.PixelValueTransformationSequence = group("2", "0").PixelValueTransformationSequence
    per_frame = [group("1", "100"), Dataset()]
    path = dicom(
        tmp_path / "a",
        np.stack([RAMP, RAMP]),
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=per_frame,
        WindowCenter="300",
        WindowWidth="200",
        VOILUTFunction="LINEAR_EXACT",
    )
    values = RAMP.astype(float)
    np.testing.assert_allclose(grey(path, "voi", 0), np.clip((values - 50) / 100, 0, 1), atol=1e-6)
    np.testing.assert_allclose(grey(path, "voi", 1), np.clip((2 * values - 200) / 200, 0, 1), atol=1e-6)


def test_each_frame_is_an_image_up_to_a_number(tmp_path: Path, dicom: Write) -> None:
    frames = np.stack([RAMP + 7 * k for k in range(limits.MAX_FRAMES * 3)]).astype(np.uint16)
    tensors, _ = read(dicom(tmp_path / "a", frames, WindowCenter="400", WindowWidth="900"), window="voi")
    assert len(tensors) == limits.MAX_FRAMES
    brightness = [int(t.astype(int).sum()) for t in tensors]
    assert brightness == sorted(brightness) and brightness[0] < brightness[-1]


def test_frames_without_contrast_are_left_out(tmp_path: Path, dicom: Write) -> None:
    flat = np.full_like(RAMP, 9)
    assert len(read(dicom(tmp_path / "a", np.stack([RAMP, flat, RAMP])))[0]) == 2
    assert refused(dicom(tmp_path / "b", flat)) is Reason.CONSTANT


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"BurnedInAnnotation": "YES"}, Reason.BURNED_IN),
        ({"Modality": "US"}, Reason.ULTRASOUND),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"}, Reason.ULTRASOUND),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, Reason.SECONDARY_CAPTURE),
    ],
)
def test_burned_in_text_is_for_the_site_to_allow(
    tmp_path: Path, dicom: Write, elements: dict[str, str], reason: Reason
) -> None:
    path = dicom(tmp_path / "a", **elements)
    assert refused(path) is reason
    assert len(read(path, allow_burned_in=True)[0]) == 1


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"Rows": 65535, "Columns": 65535, "NumberOfFrames": 1000}, Reason.TOO_LARGE),
        ({"Rows": 65535, "Columns": 65535}, Reason.TOO_LARGE),
        ({"Rows": 4000, "Columns": 4000, "NumberOfFrames": 2_000_000_000}, Reason.TOO_LARGE),
        ({"Rows": 600, "Columns": 600}, Reason.DAMAGED),
        ({"Rows": 0}, Reason.DAMAGED),
        ({"NumberOfFrames": -3}, Reason.DAMAGED),
        ({"PhotometricInterpretation": "HSV"}, Reason.UNSUPPORTED),
        ({"PhotometricInterpretation": "JOHN DOE"}, Reason.DAMAGED),
        ({"Modality": "SEG"}, Reason.DERIVED),
        ({"HighBit": 14}, Reason.UNSUPPORTED),
        ({"BitsStored": 12, "HighBit": 15}, Reason.UNSUPPORTED),
    ],
)
def test_refusals(tmp_path: Path, dicom: Write, elements: dict[str, Any], reason: Reason) -> None:
    assert refused(dicom(tmp_path / "a", **elements)) is reason


def test_no_decoder_is_said_as_such(tmp_path: Path, dicom: Write) -> None:
    path = dicom(tmp_path / "a")
    ds = dcmread(path)
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2: no decoder anywhere
    ds["PixelData"].is_undefined_length = True
    from pydicom.encaps import encapsulate

    ds.PixelData = encapsulate([b"\0\1"])
    ds.save_as(path)
    assert refused(path) is Reason.NO_DECODER


@pytest.mark.parametrize("keep", [0, 100, 131, 132, 140, 200, 400, 700, -1])
def test_cut_files_are_refused(tmp_path: Path, dicom: Write, keep: int) -> None:
    whole = dicom(tmp_path / "a").read_bytes()
    with pytest.raises(Unusable):
        decode(whole[:keep], Intake(32, 1, "percentile"), KEY)


def test_flipped_bytes_never_escape(tmp_path: Path, dicom: Write) -> None:
    """Whatever a damaged file does, the outcome is an image or a reason."""
    whole = bytearray(dicom(tmp_path / "a", WindowCenter="100", WindowWidth="50").read_bytes())
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        damaged = whole.copy()
        for position in generator.integers(132, 900, 3):
            damaged[position] = generator.integers(256)
        try:
            decode(bytes(damaged), Intake(32, 1, "voi"), KEY)
            outcomes.add("image")
        except Unusable as error:
            outcomes.add(error.reason)
    assert {"image", Reason.DAMAGED} <= outcomes


def test_facts_hold_codes_and_no_text(tmp_path: Path, dicom: Write) -> None:
    elements = {"Modality": "DX", "ViewPosition": "PA", "PatientName": "Mustermann^Erika", "PatientID": "ID-4711"}
    _, facts = read(dicom(tmp_path / "a", **elements))
    assert (facts.modality, facts.view, facts.height, facts.width) == ("DX", "PA", 24, 20)
    assert len(facts.patient) == 32 and "4711" not in str(facts)
    _, facts = read(dicom(tmp_path / "b", Modality="MUSTERMANN ERIKA", PatientID=" "))
    assert (facts.modality, facts.view, facts.patient) == ("", "", "")
    for name in ("LEE", "SMITH", "SMITH JOHN", "JSMITH", "P1"):  # as code strings go
        _, facts = read(dicom(tmp_path / "c", Modality=name, ViewPosition=name))
        assert (facts.modality, facts.view) == ("", "")
    for view in ("PA", "LATERAL", "MLO"):
        assert read(dicom(tmp_path / "d", ViewPosition=view))[1].view == view


@pytest.mark.parametrize(
    ("sex", "age", "expected"),
    [
        ("F", "058Y", ("F", 58.0)),
        ("M ", "018M", ("M", 1.5)),
        ("O", "104Y", ("O", 90.0)),
        ("", "", ("", None)),
        ("ERIKA", "58 years", ("", None)),
        ("F\\M", "058Y\\059Y", ("", None)),
        ("\xc4", "414Y", ("", None)),
        (None, None, ("", None)),
    ],
)
def test_sex_and_age_are_those_of_the_header(
    tmp_path: Path, dicom: Write, sex: str | None, age: str | None, expected: tuple[str, float | None]
) -> None:
    """Patient's Sex (0010,0040) and Age (0010,1010), written as bytes, as no writer of ours would let junk pass."""
    ds = dcmread(dicom(tmp_path / "a"))
    for tag, form, text in ((0x00100040, "CS", sex), (0x00101010, "AS", age)):
        if text is not None:
            value = text.encode("latin-1")
            value += b" " * (len(value) % 2)
            ds[tag] = RawDataElement(BaseTag(tag), form, len(value), value, 0, False, True)
    ds.save_as(tmp_path / "a")
    facts = read(tmp_path / "a")[1]
    assert (facts.sex, facts.age) == expected
    assert Facts(**json.loads(json.dumps(facts.to_json()))) == facts


def test_a_scanner_is_a_keyed_word_of_all_that_names_the_machine(tmp_path: Path, dicom: Write) -> None:
    names = ("Manufacturer", "ManufacturerModelName", "DeviceSerialNumber")
    machines = [each.split("/") for each in ("Erika/M/1", "Erika/M/2", "Erika/N/1", "F/M/1", "//1", "/1/")]
    words = [read(dicom(tmp_path / "a", **dict(zip(names, each, strict=True))))[1].scanner for each in machines]
    assert len(set(words)) == len(machines)
    assert all(re.fullmatch("scanner-[0-9a-f]{8}", word) for word in words)
    path = dicom(tmp_path / "b", Manufacturer="Erika ", ManufacturerModelName="M", DeviceSerialNumber="1")
    assert read(path)[1].scanner == words[0]
    assert decode(path.read_bytes(), Intake(32, 1, "percentile"), b"x" * 32)[1].scanner not in words
    for nameless in (dicom(tmp_path / "c"), dicom(tmp_path / "d", Manufacturer="", DeviceSerialNumber=" ")):
        assert read(nameless)[1].scanner == ""


def test_free_text_of_a_machine_in_no_form_of_its_own_does_no_harm(tmp_path: Path, dicom: Write) -> None:
    """Text without a character set and longer than LO allows, of which pydicom warns: bytes are all that is needed."""
    ds = dcmread(dicom(tmp_path / "a"))
    value = b"M\xfcller\\" + b"x" * 100
    ds[0x00080070] = RawDataElement(BaseTag(0x00080070), "LO", len(value), value, 0, False, True)
    ds.save_as(tmp_path / "a")
    assert read(tmp_path / "a")[1].scanner


def test_a_newborn_has_an_age(tmp_path: Path, dicom: Write) -> None:
    assert read(dicom(tmp_path / "a", PatientAge="000D"))[1].to_json()["age"] == 0.0


def test_terms_of_the_samples_pass(samples: Path) -> None:
    for row in csv.DictReader((samples / "index.csv").read_text().splitlines()):
        assert row["modality"] in intake_dicom.MODALITIES | {""}


def test_issuers_tell_equal_identifiers_apart(tmp_path: Path, dicom: Write) -> None:
    patients = {read(dicom(tmp_path / i, IssuerOfPatientID=i))[1].patient for i in ("north", "south")}
    assert len(patients | {read(dicom(tmp_path / "x"))[1].patient}) == 3


def test_padding_below_zero_in_implicit_vr(tmp_path: Path, dicom: Write) -> None:
    """Implicit files leave open whether Pixel Padding Value is signed; Pixel Representation says."""
    stored = RAMP.astype(np.int16)
    stored[:3] = -2000
    ds = dcmread(dicom(tmp_path / "a", stored, PixelPaddingValue=-2000))
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"
    ds.save_as(tmp_path / "b", implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(grey(tmp_path / "b"), grey(tmp_path / "a"))
    assert (grey(tmp_path / "b")[:3] == 0).all()


@pytest.mark.parametrize("bits", [8, 12])
def test_lut_in_words_of_either_order_and_in_bytes(tmp_path: Path, dicom: Write, bits: int) -> None:
    table = (np.arange(400) * 7 % 2**bits).astype(np.uint16)
    expected = table[np.clip(RAMP.astype(int) - 20, 0, 399)] / (2**bits - 1)
    for order, name in (("<", "1.2.840.10008.1.2.1"), (">", "1.2.840.10008.1.2.2")):
        sequence = lut(table, 20, bits)
        sequence[0].add_new("LUTData", "OW", table.astype(f"{order}u2").tobytes())
        ds = dcmread(dicom(tmp_path / "a", RAMP, VOILUTSequence=sequence))
        ds.file_meta.TransferSyntaxUID = name
        ds.PixelData = RAMP.astype(f"{order}u2").tobytes()
        dcmwrite(tmp_path / "b", ds, implicit_vr=False, little_endian=order == "<")
        np.testing.assert_allclose(grey(tmp_path / "b", "voi"), expected, atol=1e-6)
    if bits == 8:
        sequence[0].add_new("LUTData", "OW", table.astype(np.uint8).tobytes())
        path = dicom(tmp_path / "c", RAMP, VOILUTSequence=sequence)
        np.testing.assert_allclose(grey(path, "voi"), expected, atol=1e-6)


def test_inflation_stops_at_the_memory_limit(tmp_path: Path, dicom: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deflated file of a megabyte that would fill a gigabyte and more is too large, in a worker of its own."""
    path = tmp_path / "bomb"
    path.write_bytes(bomb(dicom(path), 1 << 30))
    worker = (
        "from polyclinic.cohort import limits\nlimits.MAX_MEMORY = 1 << 30\n"
        "from polyclinic.cohort import worker\nworker.main()\n"
    )
    (tmp_path / "small_worker.py").write_text(worker)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pool, "WORKER", "small_worker")
    setup = {"intake": {"size": 32, "channels": 1, "window": "percentile"}, "key": KEY.hex(), "known": []}
    ((_, reply, _),) = pool.Pool(setup, 1, 60.0).read([path])
    assert reply["reason"] == Reason.TOO_LARGE


def bomb(path: Path, size: int) -> bytes:
    """The file at `path` with `size` deflated zeros for a dataset."""
    ds = dcmread(path)
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    file = io.BytesIO()
    ds.save_as(file, implicit_vr=False, little_endian=True)
    (meta,) = struct.unpack("<I", file.getvalue()[140:144])
    head = file.getvalue()[: 144 + meta]
    press = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    return head + b"".join(press.compress(bytes(1 << 24)) for _ in range(size >> 24)) + press.flush()
