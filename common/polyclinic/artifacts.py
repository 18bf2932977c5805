"""What a run leaves for others: tensors on disk without pickle, the encoder in one line, the model card."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from polyclinic import __version__
from polyclinic.cohort.intake import Intake
from polyclinic.cohort.quarantine import MEANING, Unusable
from polyclinic.cohort.worker import decode
from polyclinic.encoders import build_encoder
from polyclinic.errors import CheckpointError, CohortError, StudyError
from polyclinic.files import atomic, write_atomic
from polyclinic.model import initial_tensors
from polyclinic.seeding import forked
from polyclinic.stages import Finetune
from polyclinic.study import Encoder, Images, Study, Weights
from polyclinic.wire import Tensors

ENCODER = "encoder.safetensors"
MODEL_CARD = "MODEL_CARD.md"
CLASSIFIER = "classifier.safetensors"
FORMAT = "polyclinic-encoder-1"
CLASSIFIER_FORMAT = "polyclinic-classifier-1"
CHECKSUM = "crc32"
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], durable: bool = True, recycle: Path | None = None
) -> None:
    """Write a safetensors file, all or nothing; the same content gives the same bytes.

    `durable` and `recycle` are those of `files.atomic`.

    The library's own writer puts metadata in random order and holds a second copy of the tensors; this one sorts and
    streams. The metadata gains a CRC-32 of header and data, so that a damaged file is refused, not loaded; a site
    writes and reads three times its model in every round, and SHA-256 would take as long as all else around training.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    # Widest first, as the format asks, so that every tensor starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    checksum = zlib.crc32(_canonical(header))
    for block in _blocks(tensors, names):
        checksum = zlib.crc32(block, checksum)
    header["__metadata__"][CHECKSUM] = f"{checksum:08x}"
    text = _canonical(header)
    with atomic(path, durable, recycle) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in _blocks(tensors, names):
            file.write(block)


def _canonical(header: dict[str, Any]) -> bytes:
    """Sorted JSON, padded with blanks to a multiple of 8 bytes."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _blocks(tensors: dict[str, Tensor], names: list[str]) -> Iterator[memoryview]:
    """The bytes of each tensor; a copy is made only of what is not contiguous in main memory."""
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU, in memory of their own) and metadata of a safetensors file.

    Raises:
        CheckpointError: there is no such file, or it is truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            _verify(path)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path.name}: {error}",
            "use an earlier checkpoint, or copy the file again from where it was made",
        ) from error
    metadata.pop(CHECKSUM, None)
    return tensors, metadata


def _verify(path: Path) -> None:
    """Compare the content with the checksum in its header; a file that another program wrote has none."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        expected = (header.get("__metadata__") or {}).pop(CHECKSUM, None)
        checksum = zlib.crc32(_canonical(header))
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    if expected is not None and f"{checksum:08x}" != expected:
        raise ValueError("its content does not match its checksum")


def first_tensors(study: Study) -> Tensors:
    """The global tensors that a study's first stage starts from, random or of the file that `[encoder] init` names.

    Raises:
        StudyError: the file is not here, cannot be read, is another, or does not fit the encoder.
    """
    init = study.encoder.init
    return initial_tensors(study, 0, None, None if init == "random" else load_weights(init))


def load_weights(init: Weights) -> dict[str, Tensor]:
    """The tensors of `[encoder] init`.

    Raises:
        StudyError: the study does not say where the file is here, or it cannot be read, or is another.
    """
    if not init.file:
        raise StudyError("the study's initial weights are not here", "name their file as encoder.init.file")
    try:
        tensors, _ = load_tensors(path := Path(init.file))
    except CheckpointError as error:
        fix = "copy it again, or write it as safetensors if it is PyTorch's own kind of file: README.md"
        raise StudyError(error.problem, fix) from error
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != init.sha256:
            raise StudyError(f"{path.name} is not the file that the study names", "put that file there")
    return tensors


def save_encoder(path: Path, encoder: nn.Module, study: Study) -> None:
    """Write an encoder's weights with what is needed to build it and to feed it: `load_encoder` reads it back."""
    save_tensors(path, encoder.state_dict(), {"format": FORMAT, **_facts(study)})


def save_classifier(path: Path, classifier: nn.Module, study: Study, stage: Finetune) -> None:
    """Write the encoder and head that `stage` has made: `load_classifier` reads them back."""
    answers = {"classes": json.dumps(study.evaluation.classes), "multi_label": json.dumps(stage.multi_label)}
    save_tensors(path, classifier.state_dict(), {"format": CLASSIFIER_FORMAT, **_facts(study), **answers})


def _facts(study: Study) -> dict[str, str]:
    return {
        "encoder": json.dumps(study.plain()["encoder"]),
        "images": study.images.model_dump_json(),
        "study": study.name,
        "hash": study.hash,
        "polyclinic": __version__,
    }


def load_encoder(path: str | Path) -> nn.Module:
    """The encoder of a run directory or of an `encoder.safetensors`, in evaluation mode.

    It takes (images, channels, size, size) float32 in [0, 1] and returns (images, dim) features; `dim` is an attribute.
    Size, channels and window, as the images were prepared for training, stand in the file's metadata and the study.

    Raises:
        CheckpointError: no such file, damaged, or not an encoder that Polyclinic saved.
    """
    tensors, metadata = load_tensors(file := _file(path, ENCODER))
    with _ours(file, "an encoder"):
        if metadata.get("format") != FORMAT:
            raise ValueError("its metadata do not say how to build the encoder")
        encoder = _encoder(metadata)
        encoder.load_state_dict(tensors)
    return encoder.eval()


class Predictor(nn.Module):
    """A fine-tuned encoder with its head: (images, channels, size, size) in [0, 1] -> (images, classes) probabilities.

    Attributes:
        classes: their names. Probabilities add up to 1, unless the study let an image be of several classes.
    """

    def __init__(self, encoder: nn.Module, classes: list[str], multi_label: bool) -> None:
        super().__init__()
        self.classes, self._multi_label = classes, multi_label
        self.encoder = encoder
        self.head = nn.Linear(int(encoder.dim), len(classes))  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.head(self.encoder(images)).float()
        return logits.sigmoid() if self._multi_label else logits.softmax(dim=1)


def load_classifier(path: str | Path) -> Predictor:
    """The classifier of a run directory whose study ended in fine-tuning, in evaluation mode.

    Raises:
        CheckpointError: no such file, damaged, or not a classifier that Polyclinic saved.
    """
    tensors, metadata = load_tensors(file := _file(path, CLASSIFIER))
    with _ours(file, "a classifier"):
        if metadata.get("format") != CLASSIFIER_FORMAT:
            raise ValueError("its metadata do not say how to build the classifier")
        words = TypeAdapter(list[str]).validate_json(metadata.get("classes", ""))
        head = tensors.get("head.bias", torch.empty(0))
        if not words or len(words) != len(set(words)) or head.shape != (len(words),):  # before memory is taken for them
            raise ValueError(f"its {len(words)} names of classes do not fit its head of {list(head.shape)}")
        with forked(0):
            found = Predictor(_encoder(metadata), words, metadata.get("multi_label") == "true")
        found.load_state_dict(tensors)
    return found.eval()


def _encoder(metadata: dict[str, str]) -> nn.Module:
    """The untrained encoder that a file's metadata describe."""
    images = Images.model_validate_json(metadata.get("images", ""))
    settings = Encoder.model_validate_json(metadata.get("encoder", ""))
    if settings.name.startswith("vit") and images.size % settings.patch:
        raise ValueError(f"its patches of {settings.patch} pixels do not divide its images of {images.size}")
    with forked(0):
        return build_encoder(settings, images)


@contextmanager
def _ours(file: Path, what: str) -> Iterator[None]:
    """What does not fit is told of the file, which someone else may have written."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = "; ".join(item["msg"] for item in error.errors()) if isinstance(error, ValidationError) else error
        raise CheckpointError(
            f"{file.name} is not {what} that polyclinic saved: {reason}",
            "give a run directory or the file in it; the version that wrote it stands in its metadata",
        ) from error


def _file(path: str | Path, name: str) -> Path:
    file = Path(path)
    file = file / name if file.is_dir() else file
    if not file.is_file():
        raise CheckpointError(f"there is no {file}", f"give the directory of a finished run that has {name}")
    return file


def load_images(files: Iterable[str | Path], like: str | Path) -> Tensor:
    """(images, channels, size, size) float32 in [0, 1]: DICOM, PNG or JPEG files, prepared as for the encoder `like`.

    `like` is what `load_encoder` takes. A file of several frames gives as many images. What a site keeps out of its
    cohort, since names may be burned in, is read as well.

    Raises:
        CheckpointError: as `load_encoder`. CohortError: a file cannot be used; the error says which, and why.
    """
    _, metadata = load_tensors(file := _file(like, ENCODER))
    with _ours(file, "an encoder"):
        wanted = Images.model_validate_json(metadata.get("images", ""))
    intake = Intake(wanted.size, wanted.channels, wanted.window, allow_burned_in=True)
    found = [image for path in files for image in _decoded(Path(path), intake)]
    if not found:
        raise CohortError("there are no files to read", "name at least one")
    return torch.from_numpy(np.stack(found)).float() / 255


def _decoded(path: Path, intake: Intake) -> list[NDArray[np.uint8]]:
    try:
        return decode(path.read_bytes(), intake, b"")[0]
    except OSError as error:
        raise CohortError(f"cannot read {path}: {error.strerror}", "give the path of an image file") from error
    except Unusable as error:
        raise CohortError(f"{path} cannot be used: {MEANING[error.reason]}", "leave it out") from error


def write_model_card(run: Path) -> Path:
    """Write MODEL_CARD.md of a run directory from its study.toml and summary.json; returns its path."""
    from polyclinic.report.model_card import render_model_card

    card = run / MODEL_CARD
    write_atomic(card, render_model_card(run))
    return card
