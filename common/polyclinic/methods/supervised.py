"""Supervised training of a classifier, encoder and all: fine-tuning after pretraining, or the baseline without it.

    single label:  loss of an image = w_c * -log softmax(W f(x))_c,    c its class
    multi-label:   loss of an image = mean over classes k of w_k,y * -log sigmoid(+-(W f(x))_k),    + where it is of k

f is the encoder and W a linear layer that starts near zero, so that the first answer is nearly none. (At zero, no
gradient would reach the encoder in the first step, and the second round's updates would look too large.) With balanced
classes w_c = n / (classes * n_c) over the n labelled images that the site trains on, which makes their mean 1; a class
that the site has no image of has no weight and is learnt from the others. Images without a label teach nothing.

In the first `probe_rounds` the encoder is frozen, as a few labels and a head that knows nothing would spoil it (Azizi
et al., REMEDIS, Nat Biomed Eng 2023); then each layer learns `layer_decay` times as fast as the next (Clark et al.,
ELECTRA, ICLR 2020, as used by He et al., Masked autoencoders are scalable vision learners, CVPR 2022).
"""

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from polyclinic.augment import make_views
from polyclinic.encoders.vit import VisionTransformer
from polyclinic.methods.base import Batch, ViewBatch
from polyclinic.stages import FINETUNE_VIEWS, Finetune


class Classifier(nn.Module):
    """An encoder with a linear head."""

    def __init__(self, encoder: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(dim, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, s, s) -> (n, classes) logits."""
        logits: Tensor = self.head(self.encoder(images))
        return logits


class Supervised:
    """The method; see the module's docstring. One term an image: a sum over patients, so separable."""

    separable = True
    pairs = False

    def __init__(self, stage: Finetune, classes: int) -> None:
        self.stage, self.classes = stage, classes
        self.settings = stage.views or FINETUNE_VIEWS
        self.weights = torch.ones(2, classes)
        """Of a class's images, [1], and (multi-label) of those that are not of it, [0]."""

    def balance(self, targets: Tensor) -> None:
        """Weigh classes by the (images, classes) targets of a site, where the stage asks for that."""
        if self.stage.class_weights == "none":
            return
        known = targets[~targets.isnan().any(dim=1)]
        sides = 2 if self.stage.multi_label else self.classes
        counts = torch.stack([len(known) - known.sum(dim=0), known.sum(dim=0)])  # (2, classes)
        self.weights = torch.where(counts > 0, len(known) / (sides * counts.clamp(min=1)), 0.0)

    def build(self, encoder: nn.Module) -> nn.Module:
        """The encoder with a head that knows nothing."""
        if isinstance(encoder, VisionTransformer) and self.stage.drop_path:
            for block in encoder.blocks:
                block.drop_path1 = DropPath(self.stage.drop_path)
                block.drop_path2 = DropPath(self.stage.drop_path)
        return Classifier(encoder, int(encoder.dim), self.classes)  # type: ignore[arg-type]

    def views(self, batch: Batch, generator: torch.Generator) -> ViewBatch:
        """One view of every labelled image, and `targets`: (images, classes)."""
        labelled = ~batch.targets.isnan().any(dim=1)
        view = make_views(batch.images[labelled], self.settings, generator)
        return ViewBatch((view,), batch.patients[labelled], {"targets": batch.targets[labelled]})

    def loss(self, module: nn.Module, views: ViewBatch) -> Tensor:
        """(images,) losses."""
        targets = views.extra["targets"]
        return self.losses(module(views.views[0]).float(), targets) if len(targets) else targets.new_zeros(0)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(images, classes) logits and targets, none of them NaN -> (images,) losses."""
        weights = self.weights.to(logits)
        if self.stage.multi_label:
            weighted = torch.where(targets > 0, weights[1], weights[0])
            return F.binary_cross_entropy_with_logits(logits, targets, weighted, reduction="none").mean(dim=1)
        return (targets * weights[1] * -logits.log_softmax(dim=1)).sum(dim=1)

    def shared(self, module: nn.Module) -> list[str]:
        """Encoder and head."""
        return [name for name, tensor in module.state_dict().items() if tensor.is_floating_point()]
