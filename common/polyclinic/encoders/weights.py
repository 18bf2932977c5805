"""Weights that others have trained, given to an encoder of ours: [encoder] init.

What their network has and ours has not is left out by name: classifiers, class tokens, learnt positions, and, unless
ours normalises batches too, the statistics of batch normalisation, whose scale and shift become those of group
normalisation. A first layer for colour is summed over its colours for grey images: nearly the same answer as to three
equal colours, since grey is normalised with constants of its own (normalise.py). Whatever else does not fit is an
error: half-loaded weights would be trained, measured and believed.
"""

import re

import torch
from torch import Tensor, nn

from polyclinic.errors import StudyError

LEFT_OUT = {
    "polyclinic": r".*\.num_batches_tracked",
    "torchvision": r"fc\..*|.*\.(running_mean|running_var|num_batches_tracked)",
    "timm": r"(fc|head|fc_norm)\..*|cls_token|reg_token|dist_token|pos_embed"
    r"|.*\.(running_mean|running_var|num_batches_tracked)",
}
"""Names, by family, that are left out where an encoder has no place for them; none has one for a count of batches."""
FIRST = ("conv1.weight", "patch_embed.proj.weight")
"""The layers that see colours; BiT sees grey as three equal ones (bit.py)."""
SHOWN = 4
"""Names in an error."""


def adopt(encoder: nn.Module, weights: dict[str, Tensor], family: str) -> None:
    """Copy `weights` into an encoder.

    Context bottlenecks, which only our own encoders have, may be missing and stay as they are.

    Raises:
        StudyError: a tensor has no place, is missing, or has another shape; the error names it.
    """
    state = {name: value for name, value in encoder.state_dict().items() if value.is_floating_point()}
    kept = {n: value for n, value in weights.items() if n in state or not re.fullmatch(LEFT_OUT[family], n)}
    for name in FIRST:
        if name in kept and name in state and kept[name].ndim == 4 and state[name].shape[1] == 1:
            kept[name] = kept[name].float().sum(dim=1, keepdim=True)
    unknown = [name for name in kept if name not in state]
    missing = [name for name in state if name not in kept and not name.startswith("context.")]
    shapes = [
        f"{name} is {tuple(value.shape)} and not {tuple(state[name].shape)}"
        for name, value in kept.items()
        if name in state and value.shape != state[name].shape
    ]
    for problem, names in (("have", unknown), ("lack", missing), ("differ in shape:", shapes)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise StudyError(
                f"the initial weights do not fit the encoder: they {problem} {', '.join(names[:SHOWN])}{more}",
                "set encoder.name, encoder.norm, encoder.patch and images.channels to those of the weights, and "
                "init.family to whose names they have",
            )
    for name, value in kept.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise StudyError(f"the initial weights' {name} is not made of finite numbers", "give another file")
    with torch.no_grad():
        for name, value in kept.items():
            state[name].copy_(value)
