"""The study file: what the coordinator writes, every site approves by its hash, and every message carries.

`load_study` reads TOML, refuses what it does not know, and writes out every default. The canonical form is the
resolved study without `[simulation]`, so a rehearsed study and the deployed one have the same SHA-256.
"""

import hashlib
import json
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from polyclinic.errors import StudyError
from polyclinic.explain import explain
from polyclinic.rules import AnyAggregation, FedAvgRule
from polyclinic.settings import Name, Settings
from polyclinic.simulation import Simulation
from polyclinic.stages import SEPARABLE_METHODS, TOKEN_METHODS, AnyStage, Finetune, with_defaults


def _is_power_of_two(value: int) -> int:
    if value.bit_count() != 1:
        raise ValueError(f"give a power of two, such as {1 << value.bit_length() - 1}")
    return value


EncoderName = Literal["resnet18", "resnet50", "bit_resnet50", "vit_tiny", "vit_small", "vit_base"]
Norm = Literal["group", "batch"]
Row = Literal["pixels", "random", "alone", "pooled", "scratch"]
Precision = Literal["fp32", "bf16"]

BATCH_NORM_ENCODERS = ("resnet18", "resnet50")
OVERSHOOTING_RULES = ("fedavgm", "fedadam")
"""Whose step may go beyond all updates of a round."""
MAX_CHARACTERS = 256_000
"""Of a study; a site reads what a coordinator sends."""
ONE_PIXEL = 16
"""Side of an image, pixels, up to which a ResNet halves a map of one pixel. torch 2.15 on a processor then computes a
weight's bf16 gradient from memory that nobody has written."""
MAX_LINE = 4_000
"""Characters; the time to read TOML grows with the square of the number of parts in a dotted key."""


def _window(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One error for `Images.window` instead of one for each type that it may have."""
    try:
        window = check(tuple(value) if isinstance(value, list) else value)
    except ValidationError:
        window = None
    if window is None or (isinstance(window, tuple) and window[1] <= 0):
        raise ValueError("give 'percentile', 'voi' or [centre, width] in HU with a width above 0")
    return window


class Head(Settings):
    """`[study]`."""

    name: Name
    """What reports and folders call the study."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of all that is drawn, but for what differential privacy draws in secret."""


class Images(Settings):
    """`[images]`: how every site turns files into tensors."""

    size: int = Field(default=96, ge=16, le=1024)
    """Side of the square that every image is resized to, pixels."""
    channels: Literal[1, 3] = 1
    """1 for grey images such as radiographs, 3 for colour."""
    window: Annotated[Literal["percentile", "voi"] | tuple[float, float], WrapValidator(_window)] = "percentile"
    """How stored values become grey: 1st to 99th percentile, the file's own VOI window, or [centre, width] in HU."""


def _init(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One error for `Encoder.init` where it is neither "random" nor a table."""
    if value == "random" or isinstance(value, dict | Weights):
        return check(value)
    raise ValueError('give "random" or { file = "weights.safetensors", family = "timm" }')


class Weights(Settings):
    """`[encoder] init`: weights of an encoder of the same shape, read where the rounds are led and sent from there."""

    family: Literal["polyclinic", "torchvision", "timm"]
    """Whose names the tensors have; timm's are those of ViTs, ResNets and BiT ResNet-v2, torchvision's of ResNets."""
    file: str = ""
    """A safetensors file; relative to the study's folder. Not part of the study's hash."""
    sha256: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    """Of the file; filled in when the study is read."""


class Encoder(Settings):
    """`[encoder]`."""

    name: EncoderName = "resnet18"
    """The Vision Transformers are for every method, ResNets for all but mae and sssd."""
    init: Annotated[Literal["random"] | Weights, WrapValidator(_init)] = "random"
    """What training starts from: random weights, drawn with the study's seed, or those of a file: a table."""
    patch: int = Field(default=8, ge=2, le=64)
    """Side of a Vision Transformer's patches, pixels; not used by a ResNet."""
    context: bool = False
    """Context bottlenecks behind every level (encoders/context.py). On by default where a stage trains mlvicx."""
    norm: Norm = "group"
    """Of resnet18 and resnet50 (encoders/resnet.py): batch normalisation is there to compare with."""

    @model_validator(mode="after")
    def _norm_is_there(self) -> Self:
        if self.norm == "batch" and self.name not in BATCH_NORM_ENCODERS:
            raise ValueError(
                f"encoder.norm is 'batch', and {self.name!r} has no batch normalisation: leave encoder.norm out, or "
                f"use {' or '.join(BATCH_NORM_ENCODERS)}"
            )
        return self


class Evaluation(Settings):
    """`[evaluation]`: probes on the frozen encoder, on patients that no stage trains on."""

    labels: dict[str, list[str]] = Field(default_factory=dict)
    """class = the words that sites use for it; `ignore` collects words to leave out. Empty: each word is a class."""
    split: Literal["patient", "column"] = "patient"
    """`patient`: drawn here, stratified; `column`: the cohort's own `split` column (train, val, test)."""
    test_fraction: float = Field(default=0.3, gt=0, lt=1)
    """Of each site's patients, with split = "patient"."""
    every: int = Field(default=1, ge=0)
    """Rounds between probes at the sites, which also see a collapse; 0: only after a pretrain stage and at the end."""
    neighbours: int = Field(default=10, ge=1, le=1_000)
    """k of the kNN probe."""
    rows: list[Row] = Field(default_factory=lambda: list(get_args(Row)))
    """Rows beside `federated`; alone and pooled exist in simulation only. They take time: `pooled` as long as the
    federation, `alone` all sites together as long again, `scratch` its fine-tuning; pixels and random train nothing."""

    @model_validator(mode="after")
    def _one_class_a_word(self) -> Self:
        seen: dict[str, str] = {}
        for name, words in self.labels.items():
            for word in words:
                if word in seen:
                    raise ValueError(
                        f"the label {word!r} stands under both {seen[word]!r} and {name!r}: keep it in one"
                    )
                seen[word] = name
        return self

    @property
    def classes(self) -> list[str]:
        """The classes that `labels` names, in alphabetical order: the one that its canonical form keeps."""
        return sorted(self.labels.keys() - {"ignore"})


class Compute(Settings):
    """`[compute]`: resolved here and never timed, so that all sites and engines compute alike."""

    threads: int = Field(default=1, ge=1, le=256)
    """torch threads a site; other numbers give other bits."""
    precision: Precision = "bf16"
    """`bf16` is used where the processor or GPU has bf16 units; where it has not, a site computes in fp32."""
    layout: Literal["contiguous", "channels_last"] = "contiguous"
    """Of images and weights in memory; which one is faster depends on encoder and device."""


class NoPrivacy(Settings):
    """No promise: the change of the weights may tell something about single images."""

    mode: Literal["none"] = "none"


class Gaussian(Settings):
    """Settings that both promises share: what is bounded by `clip` is covered by noise of `noise` times that."""

    noise: float = Field(default=1.0, gt=0, le=1_000)
    """Standard deviation of the noise, as a multiple of `clip`."""
    clip: float = Field(default=1.0, ge=1e-6, le=1e6)
    """Largest norm of what one patient (or site) adds to a sum; far smaller ones would be lost, and noise with them."""
    epsilon: float = Field(default=8.0, gt=0, le=1_000)
    """The most that this study may spend at a site, whatever the site's own limit."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    """At which `epsilon` is meant."""


class PatientPrivacy(Gaussian):
    """Differential privacy of every patient, made at the site: DP-SGD with one image of each patient that is drawn.

    `batch_size` is the number of patients that a step expects.
    """

    mode: Literal["patient"]
    physical_batch: Annotated[int, Field(ge=1, le=65_536), AfterValidator(_is_power_of_two)] = 16
    """Images whose gradients are in memory at once, a power of two.

    Every pass has as many rows; the last one is filled up. Then one patient more changes no other's rounding.
    """


class SitePrivacy(Gaussian):
    """Differential privacy of every site, made at the coordinator: whole updates are clipped, their sum gets noise."""

    mode: Literal["site"]


def _is_private(where: str, stage: AnyStage) -> None:
    """Refuse a stage that privacy.mode "patient" cannot cover."""
    if stage.method not in SEPARABLE_METHODS:
        raise ValueError(
            f"{where} trains {stage.method!r}, whose loss is not separable: one patient changes the terms of all "
            "others, so no bound holds for what a patient adds. Train mae, sssd or supervised, or protect whole sites "
            "with privacy.mode 'site'"
        )
    if isinstance(stage, Finetune) and stage.class_weights != "none":
        raise ValueError(
            f"{where}.class_weights are computed from patients, and no noise covers them: set them to 'none', or leave "
            "them out"
        )


class Study(Settings):
    """A study with every default written out. `hash` is its identity."""

    study: Head
    images: Images = Images()
    encoder: Encoder = Encoder()
    stages: list[AnyStage] = Field(min_length=1, max_length=100)
    evaluation: Evaluation = Evaluation()
    aggregation: AnyAggregation = FedAvgRule()
    compute: Compute = Compute()
    privacy: Annotated[NoPrivacy | PatientPrivacy | SitePrivacy, Field(discriminator="mode")] = NoPrivacy()
    simulation: Simulation = Simulation()

    @model_validator(mode="after")
    def _methods_fit_the_encoder(self) -> Self:
        vit = self.encoder.name.startswith("vit")
        for number, stage in enumerate(self.stages):
            if stage.method in TOKEN_METHODS and not vit:
                raise ValueError(
                    f"stages.{number} trains {stage.method!r}, which needs an encoder that can skip tokens, and "
                    f"encoder.name is {self.encoder.name!r}: use vit_tiny, vit_small or vit_base"
                )
            if stage.method in TOKEN_METHODS and self.encoder.context:
                raise ValueError(
                    f"stages.{number} trains {stage.method!r}, which skips tokens, and encoder.context looks at all: "
                    "leave encoder.context out, or train this stage in a study of its own"
                )
            if isinstance(stage, Finetune) and len(self.evaluation.classes) < (1 if stage.multi_label else 2):
                raise ValueError(
                    f"stages.{number} fine-tunes and evaluation.labels names {len(self.evaluation.classes)} classes: "
                    'name them all there, such as labels = { positive = ["Pneumonia"], negative = ["NORMAL"] }; '
                    "invented patients are normal, or have an effusion, a consolidation or a nodule"
                )
        if not vit and self.images.size <= ONE_PIXEL and self.compute.precision == "bf16":
            raise ValueError(
                f"images.size is {self.images.size}, at which torch's bf16 gradients of a ResNet are not the same "
                f"twice: set it to {ONE_PIXEL + 8}, or compute.precision to 'fp32'"
            )
        if vit and self.images.size % self.encoder.patch:
            raise ValueError(
                f"encoder.patch is {self.encoder.patch} and does not divide images.size {self.images.size}: "
                "choose a divisor"
            )
        return self

    @model_validator(mode="after")
    def _privacy_holds(self) -> Self:
        if self.privacy.mode == "site" and self.aggregation.rule != "fedavg":
            raise ValueError(
                f"aggregation.rule is {self.aggregation.rule!r}, and privacy.mode 'site' bounds what a site adds to a "
                "plain mean only: set the rule to 'fedavg', or leave it out"
            )
        if self.privacy.mode != "none" and self.aggregation.weighting != "equal":
            raise ValueError(
                f"aggregation.weighting is {self.aggregation.weighting!r}, which tells of patients, and privacy.mode "
                f"is {self.privacy.mode!r}: set it to 'equal', or leave it out"
            )
        if self.privacy.mode != "none" and self.evaluation.every:
            raise ValueError(
                f"evaluation.every is {self.evaluation.every}, and no noise covers what sites measure on their "
                "patients: set it to 0, or leave it out"
            )
        if self.privacy.mode != "none" and any(getattr(stage, "patience", 0) for stage in self.stages):
            raise ValueError(
                "a stage's patience is above 0, and no noise covers the losses that would stop it: set it to 0, or "
                "leave it out"
            )
        if self.privacy.mode == "patient":
            for number, stage in enumerate(self.stages):
                _is_private(f"stages.{number}", stage)
            if self.compute.precision != "fp32":
                raise ValueError(
                    "compute.precision is 'bf16', in which a clipped gradient may be longer than privacy.clip: set it "
                    "to 'fp32', or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _batch_statistics_hold(self) -> Self:
        if self.encoder.norm != "batch":
            return self
        if self.privacy.mode == "patient":
            raise ValueError(
                "encoder.norm is 'batch', by which a patient's gradient depends on the others in the batch, and "
                "privacy.mode 'patient' bounds what one patient adds: set encoder.norm to 'group', or leave it out"
            )
        if self.privacy.mode == "site":
            raise ValueError(
                "encoder.norm is 'batch', and the noise of privacy.mode 'site' could take a running variance below "
                "zero: set encoder.norm to 'group', or leave it out"
            )
        if self.aggregation.rule in OVERSHOOTING_RULES:
            raise ValueError(
                f"encoder.norm is 'batch', and a step of aggregation.rule {self.aggregation.rule!r} may go beyond all "
                "updates and take a running variance below zero: set encoder.norm to 'group', or the rule to 'fedavg'"
            )
        return self

    @property
    def name(self) -> str:
        """Of the study."""
        return self.study.name

    @property
    def seed(self) -> int:
        """From which all repeatable random choices come."""
        return self.study.seed

    @property
    def rounds(self) -> int:
        """Of all stages together."""
        return sum(stage.rounds for stage in self.stages)

    def stage_of(self, round: int) -> tuple[int, int]:
        """(stage, round within the stage), both from 0, of a round counted from 0 across stages."""
        for number, stage in enumerate(self.stages):
            if round < stage.rounds:
                return number, round
            round -= stage.rounds
        raise IndexError(f"round beyond the study's {self.rounds}")

    def canonical(self) -> str:
        """The form that is hashed, sent and approved: sorted JSON with every default, without `[simulation]`."""
        return json.dumps(self.plain(), sort_keys=True, separators=(",", ":"))

    def plain(self) -> dict[str, Any]:
        """Plain values, less what names folders and files of the machine where the study was written."""
        plain = self.model_dump(mode="json", exclude={"simulation"})
        if isinstance(self.encoder.init, Weights):
            del plain["encoder"]["init"]["file"]
        return plain

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical form, hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def to_toml(self, simulation: bool = True) -> str:
        """The resolved study as a file that `load_study` reads back to an equal study.

        Without `[simulation]` and the path of initial weights, which name folders of the machine it ran on, the hash
        is the same.
        """
        return tomli_w.dumps(self.model_dump(mode="json") if simulation else self.plain())


def load_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        StudyError: it cannot be read, holds an unknown key or a value out of bounds; the error names each.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CHARACTERS * 4 + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"cannot read the study file {path}: {error}", "give the path of a TOML file") from error
    return with_weights(parse_study(text, str(path)), path)


def with_weights(study: Study, path: Path) -> Study:
    """`study` with the absolute path and the SHA-256 of its initial weights, where it names a file of them.

    Where the study states the SHA-256 itself, the file is not opened: that is compared where the rounds begin.
    """
    init = study.encoder.init
    if init == "random" or not init.file:
        return study
    file = (path.parent / init.file).resolve()
    found = init.sha256
    if not found:
        try:
            if not file.is_file():
                raise FileNotFoundError(2, "there is no such file")
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise StudyError(
                f"{path}: cannot read the initial weights {file}: {error.strerror}", "correct encoder.init.file"
            ) from error
    weights = init.model_copy(update={"file": str(file), "sha256": found})
    return study.model_copy(update={"encoder": study.encoder.model_copy(update={"init": weights})})


def parse_study(text: str, where: str) -> Study:
    """A study from TOML text; `where` names it in errors."""
    _refuse_long(text, where)
    longest = max(map(len, text.splitlines()), default=0)
    if longest > MAX_LINE:
        raise StudyError(f"{where} has a line of {longest} characters", f"break it into lines of at most {MAX_LINE}")
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{where} is not TOML: {error}", "correct the line it names") from error
    if "grid" in data:
        raise StudyError(f"{where} has a [grid]: it is many studies", f"polyclinic sweep {where} --out DIR")
    return resolve(data, where)


def parse_canonical(text: str, where: str) -> Study:
    """A study from its canonical form, as a message carries it; `where` names it in errors."""
    _refuse_long(text, where)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{where} is not JSON: {error}", "send the study's canonical form") from error
    return resolve(data, where)


def resolve(data: Any, where: str = "the study") -> Study:
    """A study from plain values (as TOML or the canonical JSON give them), defaults filled in."""
    try:
        # Through JSON: strict mode then still takes a list for a tuple.
        return Study.model_validate_json(json.dumps(_with_stage_defaults(data), default=_refuse_date))
    except RecursionError as error:
        raise StudyError(f"{where} nests tables or lists too deeply", "use only the tables of a study") from error
    except ValidationError as error:
        problem, fix = explain(error, Study)
        raise StudyError(f"{where}: {problem}", fix) from error
    except ValueError as error:  # what JSON cannot hold, such as a number of thousands of digits
        raise StudyError(f"{where} holds a value that no study has: {error}", "give plain numbers and texts") from error


def _refuse_long(text: str, where: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise StudyError(f"{where} has more than {MAX_CHARACTERS} characters", "give a shorter study")


def _refuse_date(value: Any) -> None:
    raise StudyError(f"the study holds the date or time {value}", "no key takes one; put a text in quotes")


def _with_privacy_defaults(data: dict[str, Any], stages: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """(data, stages) with the defaults that a promise of privacy calls for, under the user's own."""
    privacy = data.get("privacy")
    mode = privacy.get("mode") if isinstance(privacy, dict) else None
    if mode not in ("patient", "site"):
        return data, stages
    needed: dict[str, dict[str, Any]] = {"aggregation": {"weighting": "equal"}, "evaluation": {"every": 0}}
    if mode == "patient":
        needed["compute"] = {"precision": "fp32"}
        stages = [
            {"class_weights": "none", **s} if isinstance(s, dict) and s.get("kind") == "finetune" else s for s in stages
        ]
    given = {key: data.get(key, {}) for key in needed}
    return data | {k: {**needed[k], **v} if isinstance(v, dict) else v for k, v in given.items()}, stages


def _with_stage_defaults(data: Any) -> Any:
    """`data` with the defaults that depend on method, channels, privacy and rule; wrong types stay as they are."""
    stages = data.get("stages") if isinstance(data, dict) else None
    if not isinstance(stages, list):
        return data
    data, stages = _with_privacy_defaults(data, stages)
    rule = data.get("aggregation", {})
    if isinstance(rule, dict):
        data = {**data, "aggregation": {"rule": "fedavg", **rule}}
    encoder = data.get("encoder", {})
    if isinstance(encoder, dict) and any(isinstance(s, dict) and s.get("method") == "mlvicx" for s in stages):
        data = {**data, "encoder": {"context": True, **encoder}}
    images = data.get("images")
    channels = images.get("channels", 1) if isinstance(images, dict) else 1
    return {**data, "stages": [with_defaults(s, channels) if isinstance(s, dict) else s for s in stages]}
