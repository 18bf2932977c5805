"""What of the encoder is a site's own from round to round, under the rules `fedbn` and `fedema`.

Either stands in the site's state (`SiteState.own_before`) under the names of the module's tensors, as training has left
them; what is sent is their difference from the global ones, as ever. So a round is a function of the global tensors
that come and of what the newest round before it has left here: asked for again, it gives the same bits.

Under privacy.mode "patient" that takes nothing from the promise: what is kept is what noised steps have made of earlier
results of noised steps, and to start from it costs no more than to start from the global tensors.
"""

import torch
from torch import Tensor, nn

from polyclinic.rules import Aggregation, FedBNRule, FedEMARule

SCALE = "scale"
"""The name under which fedema's lambda_k stands beside the tensors, float64."""
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)


def normalisation(module: nn.Module) -> list[str]:
    """Names of the tensors in the encoder's normalisation layers: scale, shift and, of batches, running statistics."""
    return [
        f"encoder.{layer}.{name}"
        for layer, part in module.get_submodule("encoder").named_modules()
        if isinstance(part, _NORMS)
        for name, value in part.state_dict().items()
        if value.is_floating_point()
    ]


def lay_over(module: nn.Module, own: dict[str, Tensor]) -> None:
    """Put the site's own tensors in the place of the global ones."""
    state = module.state_dict()
    for name, value in own.items():
        state[name].copy_(value)


def blend(module: nn.Module, own: dict[str, Tensor], tau: float) -> dict[str, Tensor]:
    """Have the encoder start from m w_k + (1 - m) w_g, as in fedema: `own` is w_k, `module` holds w_g.

    Returns:
        lambda_k as {SCALE: ...}. Nothing before the first w_k, nor while that is no other than w_g.
    """
    state = {name: module.state_dict()[name] for name in own if name != SCALE}
    weights = [name for name, _ in module.named_parameters() if name in state]
    squares = [(state[name].cpu().double() - own[name].double()).square().sum() for name in weights]
    divergence = torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)
    if divergence == 0:
        return {SCALE: own[SCALE]} if SCALE in own else {}
    scale = own.get(SCALE, tau / divergence)
    share = min(float(scale * divergence), 1.0)
    for name, value in state.items():
        value.lerp_(own[name].to(value.device), share)
    return {SCALE: scale}


def to_keep(rule: Aggregation, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a trained module that are the site's own under a rule, on the CPU; none under most."""
    state, names = module.state_dict(), list[str]()
    if isinstance(rule, FedBNRule):
        names = normalisation(module)
    elif isinstance(rule, FedEMARule):
        names = [name for name in state if name.startswith("encoder.") and state[name].is_floating_point()]
    return {name: state[name].cpu().contiguous() for name in names}
