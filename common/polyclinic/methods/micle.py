"""MICLe, multi-instance contrastive learning: two images of one patient agree, those of different patients do not.

Azizi et al., Big self-supervised models advance medical image classification, ICCV 2021.

    loss of a patient = NT-Xent of a view of one image and a view of another (nt_xent.py), over a batch of patients

Where a patient has one image, both views are of that one, as in SimCLR, whose module, views and loss these are; so with
no patient of two images the two differ only in that an epoch is over patients. The authors train it after SimCLR on
the same images: a study then has two stages.
"""

import torch

from polyclinic.augment import make_views
from polyclinic.methods.base import Batch, ViewBatch
from polyclinic.methods.simclr import SimCLR


class MICLe(SimCLR):
    """The method; see the module's docstring. One term a patient, that all the others move: not separable."""

    pairs = True

    def views(self, batch: Batch, generator: torch.Generator) -> ViewBatch:
        """A view of every image: those of each patient's first, and those of the second."""
        views = make_views(batch.images, self.settings, generator)
        return ViewBatch((views[::2], views[1::2]), batch.patients[::2], {})
