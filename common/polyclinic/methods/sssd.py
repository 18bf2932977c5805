"""SSSD: a masked autoencoder whose decoder teaches its encoder.

Tan et al., Self-supervised learning with self-distillation on COVID-19 medical image classification, CMPB 2024.

    loss of an image = MAE's + weight * mean over its visible patches i and their width of
                       ( g(LN(e_i)) - stopgrad(LN(d_i)) )^2

e_i is the encoder's token of patch i, which has looked at visible patches only; d_i the decoder's last token of the
same patch, which has looked at all positions; g a linear map; LN the layer norm without weights. The direction, from
decoder to encoder, is the paper's; its formula is not public, so the form is ours, and so is the mean over the width.
The reconstruction sends no gradient to the last block's tokens of visible patches, so what teaches is a map of what the
blocks before it have learnt; pooled targets did no better where they were tried. With `weight` 0 it is MAE bit for bit
(mae.py). It is a sum over images as well. Encoder, decoder and g are federated while training, the encoder is shipped.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.encoders.vit import VisionTransformer
from polyclinic.methods.base import ViewBatch
from polyclinic.methods.mae import MAE, reconstruction
from polyclinic.stages import SSSDStage


def standard(tokens: Tensor) -> Tensor:
    """(n, k, dim) -> the same, every token with mean 0 and variance 1."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


class SSSD(MAE):
    """The method; see the module's docstring. One term an image: a sum over patients, so separable."""

    def __init__(self, stage: SSSDStage) -> None:
        super().__init__(stage)
        self.weight = stage.weight

    def build(self, encoder: nn.Module) -> nn.Module:
        """MAE's module, and g as its `predictor`: drawn last, so that the rest starts as MAE's."""
        module = super().build(encoder)
        module.predictor = nn.Linear(cast(VisionTransformer, encoder).dim, self.stage.decoder_width)
        return module

    def loss(self, module: nn.Module, views: ViewBatch) -> Tensor:
        """(images,) losses."""
        predicted, visible, known = module(views.views[0], views.extra["order"])
        losses = reconstruction(predicted, views, cast(VisionTransformer, module.get_submodule("encoder")).patch)
        if self.weight == 0:
            return losses
        said: Tensor = module.get_submodule("predictor")(standard(visible))
        return losses + self.weight * (said.float() - standard(known).detach()).square().mean(dim=(1, 2))
