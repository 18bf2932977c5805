"""The stages of a study: what every stage has, and the settings that each method adds with their defaults.

A new method adds its class here, its file under `methods/` and one line in `METHODS`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from polyclinic.settings import Settings

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Views(Settings):
    """Random views of an image; every draw is made anew for each sample. Fractions are of the image's side or range."""

    crop: tuple[Fraction, Fraction] = (0.3, 1.0)
    """Smallest and largest area of the random resized crop, as a fraction of the image's."""
    flip: bool = True
    """Mirror left and right, p 0.5. Turn off where laterality is the label."""
    rotation: float = Field(default=15.0, ge=0.0, le=180.0)
    """Largest rotation either way, degrees. [A] uses 45."""
    elastic: float = Field(default=0.0, ge=0.0, le=0.2)
    """Largest elastic displacement, fraction of the side [R]."""
    jitter: Fraction = 0.5
    """Strength of brightness and contrast jitter (and of saturation on colour images)."""
    hue: float = Field(default=0.0, ge=0.0, le=0.5)
    """Largest turn of the hue circle; colour images only."""
    equalise: Fraction = 0.0
    """Probability of histogram equalisation [R]."""
    noise: float = Field(default=0.0, ge=0.0, le=0.5)
    """Largest standard deviation of added Gaussian noise."""
    blur: Fraction = 0.0
    """Probability of Gaussian blur; colour images only: it hides the local texture of radiographs [A]."""
    grey: Fraction = 0.0
    """Probability of dropping colour; colour images only."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.crop[0] <= self.crop[1]:
            raise ValueError(f"crop is {list(self.crop)}: give [smallest, largest] with 0 < smallest <= largest")
        return self


RADIOGRAPH = Views(elastic=0.03, equalise=0.2, noise=0.03)
COLOUR = Views(crop=(0.4, 1.0), rotation=180.0, jitter=0.2)
"""[A] has jitter 0.8, hue 0.2, grey 0.2 and blur 0.5, and smaller crops: with these an encoder learns not to see the
colours that tell skin lesions apart (simulations/benchmarks/README.md)."""


class Stage(Settings):
    """What every stage has. Learning rates are those of the optimizer, not per 256 images."""

    rounds: int = Field(ge=1, le=10_000)
    """How often sites train and their updates are aggregated."""
    local_epochs: int = Field(default=1, ge=1, le=1_000)
    """Passes of a site over its images in a round; over its patients with micle or under their privacy."""
    batch_size: int = Field(default=64, ge=2, le=65_536)
    """Images in a batch; a site with fewer takes them all."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """At the sites, which keep its state from round to round of the stage."""
    learning_rate: float = Field(default=1e-3, gt=0, le=100)
    """At its height."""
    weight_decay: float = Field(default=1e-4, ge=0, le=10)
    """Of matrices and convolutions; biases and normalisation have none."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate, over all rounds of the stage."""
    warmup_rounds: float = Field(default=1.0, ge=0)
    """Rounds over which the learning rate rises from zero; at most a quarter of the stage."""

    @field_validator("kind", mode="before", check_fields=False)
    @classmethod
    def _known_kind(cls, kind: Any) -> Any:
        if kind not in ("pretrain", "finetune"):
            raise ValueError("give 'pretrain' or 'finetune'")
        return kind


class Pretrain(Stage):
    """Self-supervised pretraining: the method's class adds its own settings."""

    kind: Literal["pretrain"] = "pretrain"
    method: str
    views: Views | None = None
    """Defaults by channels: see RADIOGRAPH and COLOUR."""


class Contrastive(Pretrain):
    """Settings that SimCLR and MICLe share."""

    learning_rate: float = Field(default=3e-4, gt=0, le=100)
    """At 1e-3 a group-normalised ResNet starts by collapsing and recovers slowly (tried on radiographs)."""
    temperature: float = Field(default=0.1, gt=0, le=10)
    """By which similarities are divided: the lower, the more the nearest negatives count."""
    projection: int = Field(default=128, ge=1, le=65_536)
    """Width of the projection that the loss compares."""


class SimCLRStage(Contrastive):
    """Settings of methods/simclr.py."""

    method: Literal["simclr"]


UNPAIRED = "no patient to train on has two images: micle trains as simclr"
"""What to say to the site of such a cohort."""


class MICLeStage(Contrastive):
    """Settings of methods/micle.py. `batch_size` counts patients, each with two images."""

    method: Literal["micle"]


class MLVICXStage(Pretrain):
    """Settings of methods/mlvicx.py."""

    method: Literal["mlvicx"]
    learning_rate: float = Field(default=3e-4, gt=0, le=100)
    weight: float = Field(default=1.0, ge=0, le=1_000)
    """Of the places beside the whole image; 0 leaves VICReg."""
    projection: int = Field(default=512, ge=1, le=65_536)
    """Width of the projections that the loss compares. The paper's is 4,096."""
    common: int = Field(default=128, ge=1, le=65_536)
    """Channels to which every level is mapped. The paper's are 512."""


class Masked(Pretrain):
    """Settings that MAE and SSSD share."""

    learning_rate: float = Field(default=1e-3, gt=0, le=100)
    weight_decay: float = Field(default=0.05, ge=0, le=10)
    mask: float = Field(default=0.75, gt=0, lt=1)
    """Fraction of the patches that the encoder does not see."""
    decoder_depth: int = Field(default=2, ge=1, le=64)
    """Blocks of the decoder, which is not exported."""
    decoder_width: int = Field(default=128, ge=32, le=8_192, multiple_of=32)
    """Length of the decoder's tokens, a multiple of 32."""
    views: Views | None = None
    """Defaults to crop and flip only: the masking is the augmentation."""


class MAEStage(Masked):
    """Settings of methods/mae.py."""

    method: Literal["mae"]


class SSSDStage(Masked):
    """Settings of methods/sssd.py."""

    method: Literal["sssd"]
    weight: float = Field(default=1.0, ge=0, le=1_000)
    """Of the distillation beside the reconstruction."""


class Finetune(Stage):
    """Settings of methods/supervised.py: a classifier of the classes in `[evaluation] labels`, encoder and all."""

    kind: Literal["finetune"]
    method: Literal["supervised"]
    learning_rate: float = Field(default=5e-4, gt=0, le=100)
    weight_decay: float = Field(default=0.05, ge=0, le=10)
    label_fraction: float = Field(default=1.0, gt=0, le=1)
    """Of each site's training patients with a label, class by class, at least one of each."""
    multi_label: bool = False
    """An image may be of several classes, its labels separated by "|", or of none."""
    probe_rounds: int = Field(default=1, ge=0, le=10_000)
    """First rounds of the stage, in which the encoder is frozen: with few labels it would follow a random head [R]."""
    layer_decay: float = Field(default=0.75, gt=0, le=1)
    """Each layer's learning rate, as a fraction of the next one's: the first layers change least [H]."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Probability of leaving out a Vision Transformer's block, for each sample."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """`balanced`: a class counts as much as any other at the site, however rare."""
    patience: int = Field(default=0, ge=0, le=10_000)
    """Rounds after which the stage ends, with the best tensors it had, if most sites found no lower loss on their
    validation patients; the rounds of a frozen encoder do not count. 0: nobody is kept for validation. A stage that is
    not stopped ends with its last tensors, which are not measured."""
    validation_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Of each site's labelled training patients, with patience above 0."""
    views: Views | None = None
    """Defaults to gentle ones: crop, flip, rotation and jitter at half strength."""

    @model_validator(mode="after")
    def _patience_can_end(self) -> Self:
        if self.patience and self.patience >= self.rounds - self.probe_rounds - 1:
            raise ValueError(
                f"patience is {self.patience} and can never end a stage of {self.rounds} rounds, of which probe_rounds "
                f"are {self.probe_rounds}: lower it, or give more rounds"
            )
        return self


MAE_VIEWS = Views(crop=(0.5, 1.0), rotation=0.0, jitter=0.0)
FINETUNE_VIEWS = Views(crop=(0.6, 1.0), rotation=10.0, jitter=0.2)

AnyStage = Annotated[
    SimCLRStage | MICLeStage | MLVICXStage | MAEStage | SSSDStage | Finetune, Field(discriminator="method")
]
TOKEN_METHODS = frozenset({"mae", "sssd"})
"""Methods whose encoder must be able to skip tokens: Vision Transformers only."""

SEPARABLE_METHODS = frozenset({"mae", "sssd", "supervised"})
"""Methods whose loss is a sum over patients: what differential privacy of a patient needs."""


def with_defaults(stage: dict[str, Any], channels: int) -> dict[str, Any]:
    """`stage` with the views that its method and the number of channels call for, under the user's own."""
    if stage.get("kind") == "finetune":
        base, stage = FINETUNE_VIEWS, {"method": "supervised", **stage}
    else:
        base = MAE_VIEWS if str(stage.get("method")) in TOKEN_METHODS else COLOUR if channels == 3 else RADIOGRAPH
    views = stage.get("views", {})
    return {**stage, "views": {**base.model_dump(), **views}} if isinstance(views, dict) else stage
