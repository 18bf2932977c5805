"""From a study to the module that a stage trains, and between modules and the tensors that travel."""

import copy
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from polyclinic.encoders import build_encoder
from polyclinic.encoders.weights import adopt
from polyclinic.methods import make_method
from polyclinic.methods.base import Method
from polyclinic.seeding import forked, seed_for
from polyclinic.study import Encoder, Images, Study
from polyclinic.wire import Malformed, Tensors


def build_stage(study: Study, stage: int) -> tuple[Method, nn.Module]:
    """The method of a stage and its module, initialised from the study's seed: alike wherever it is built."""
    method = make_method(study.stages[stage], len(study.evaluation.classes))
    encoder = _untrained(study)
    with forked(seed_for(study.seed, "heads", stage=stage)):
        return method, method.build(encoder)


def _untrained(study: Study) -> nn.Module:
    """The encoder as it is initialised; the caller's own."""
    return copy.deepcopy(_initialised(study.encoder, study.images, seed_for(study.seed, "encoder")))


@lru_cache(maxsize=1)
def _initialised(settings: Encoder, images: Images, seed: int) -> nn.Module:
    """Kept, since a simulation asks for it at every site and round, and drawing weights takes longer than a copy."""
    with forked(seed):
        return build_encoder(settings, images)


def initial_tensors(
    study: Study, stage: int, previous: Tensors | None, weights: dict[str, Tensor] | None = None
) -> Tensors:
    """The global tensors that a stage starts from: fresh heads on the encoder that the stage before left.

    The first stage starts from `weights`, those of `[encoder] init`, or where that is random from an untrained encoder.

    Raises:
        StudyError: the weights do not fit the encoder.
    """
    method, module = build_stage(study, stage)
    if weights is not None and study.encoder.init != "random":
        adopt(module.get_submodule("encoder"), weights, study.encoder.init.family)
    if previous is not None:
        encoder = {k.removeprefix("encoder."): v for k, v in previous.items() if k.startswith("encoder.")}
        load_tensors(module.get_submodule("encoder"), encoder)
    return shared_tensors(method, module)


def shared_tensors(method: Method, module: nn.Module) -> Tensors:
    """Copies of the tensors that leave a site, in a fixed order."""
    state = module.state_dict()
    return {name: state[name].detach().cpu().numpy().astype(np.float32) for name in sorted(method.shared(module))}


def load_tensors(module: nn.Module, tensors: Tensors) -> None:
    """Copy tensors into a module by name.

    Raises:
        Malformed: the module has no tensor of a name, or one of another shape.
    """
    state = module.state_dict()
    with torch.no_grad():
        for name, value in tensors.items():
            if name not in state or tuple(state[name].shape) != value.shape:
                raise Malformed(f"the module has no tensor {name[:80]!r} of shape {value.shape}")
            state[name].copy_(torch.tensor(value))


def encoder_of(study: Study, tensors: Tensors | None) -> nn.Module:
    """The encoder in global tensors (None: as it is initialised), in evaluation mode."""
    encoder = _untrained(study)
    if tensors is not None:
        load_tensors(encoder, {k.removeprefix("encoder."): v for k, v in tensors.items() if k.startswith("encoder.")})
    return encoder.eval()
