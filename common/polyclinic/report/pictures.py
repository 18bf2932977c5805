"""Two pictures that only a simulation may make, since they come from images: example views and the embedding map."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from polyclinic.evaluation import NotMeasurable
from polyclinic.files import write_atomic

MAX_POINTS = 800
"""Images in the embedding map: t-SNE takes seconds for these, minutes for all."""
SIDE = 96
"""Smallest side at which an image is shown, pixels."""
GAP = 4


def save_views_figure(path: Path, originals: Tensor, views: list[Tensor]) -> None:
    """A PNG with one row an image: the original, then one random view from each tensor of `views`.

    All tensors are (images, channels, size, size) float in [0, 1], with one or three channels.
    """
    cells = torch.stack([originals, *views], dim=1).float().cpu()  # (images, 1 + views, channels, size, size)
    if cells.shape[2] == 1:
        cells = cells.expand(-1, -1, 3, -1, -1)
    factor = -(-SIDE // cells.shape[-1])
    cells = cells.repeat_interleave(factor, dim=3).repeat_interleave(factor, dim=4)
    opaque = torch.ones_like(cells[:, :, :1])
    padded = F.pad(torch.cat([cells, opaque], dim=2), (0, GAP, 0, GAP))  # transparent gaps suit any background
    images, columns, channels, height, width = padded.shape
    sheet = padded.permute(0, 3, 1, 4, 2).reshape(images * height, columns * width, channels)[:-GAP, :-GAP]
    data = io.BytesIO()
    Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().numpy(), "RGBA").save(data, "PNG", optimize=True)
    write_atomic(path, data.getvalue())


def embedding_table(
    features: NDArray[np.floating], sites: NDArray[np.str_], labels: NDArray[np.str_], seed: int
) -> pd.DataFrame:
    """x, y, site, label of at most 800 images: t-SNE of (images, dim) features (van der Maaten and Hinton, JMLR 2008).

    Neighbours in the map were neighbours among the features; distances between groups mean nothing.

    Raises:
        NotMeasurable: features that are not finite.
    """
    if not np.isfinite(features).all():
        raise NotMeasurable("the encoder's features are not finite")
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(features))[:MAX_POINTS])
    places = _project(np.asarray(features[chosen], np.float32), seed % 2**32)
    return pd.DataFrame({"x": places[:, 0], "y": places[:, 1], "site": sites[chosen], "label": labels[chosen]})


def _project(x: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """(images, 2) places; all at the origin where there is nothing to tell apart."""
    from sklearn.manifold import TSNE  # here: slow to import, and only a simulation draws maps

    if len(x) < 4 or x.shape[1] < 2 or np.ptp(x, axis=0).max() == 0:
        return np.zeros((len(x), 2), np.float32)
    perplexity = min(30.0, (len(x) - 1) / 3)
    with threadpool_limits(1):  # other numbers of threads add in another order and give another map
        places: NDArray[np.float32] = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(x)
    return places
