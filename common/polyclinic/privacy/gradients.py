"""Gradients of single patients, clipped and summed in one pass backwards: what DP-SGD asks of a model.

Hooks see what enters each layer and the gradient of what leaves it, and Opacus knows what that makes the gradients of
single samples. To a linear layer with inputs a_t and gradients g_t at places t (a convolution is one, of patches)
patient i adds the product G_i = sum over t of g_t a_t'. Of products and factors the smaller are kept until coefficients
are known. From factors,

    |G_i|^2 = sum over s, t of (g_s' g_t) (a_s' a_t)

and the weighted sum over patients is one product of matrices (book-keeping: Bu et al., Differentially private
optimization on large foundation models at small cost, ICML 2023; the choice by layer: Bu et al., Scalable and efficient
training of large convolutional neural networks with differential privacy, NeurIPS 2022).

Whoever sends the weights may choose them such that factors are 1e-38 and 1e38, of which single precision cannot take
the square, or such that all but the last digits of a sum cancel. So norms and sums are in double precision, where
products of four single-precision numbers neither under- nor overflow, from factors that are kept as they came out.

Opacus's own ghost clipping goes backwards a second time for the sum. With weights on which single precision loses most
digits, and a coordinator could send such, the second pass disagrees with the norms of the first: in a search over
weights made up to a thousand times larger, one patient alone came to 1.4 times the clip.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from polyclinic.errors import PolyclinicError, StudyError

SMALLER = 1.0
"""Factors are kept where they are smaller than this many times the products."""
ROUNDING = 1e-10
"""By which the square of a norm from factors is taken for larger, as a fraction of what it were if no terms cancelled.

Double precision loses less, and clipped terms before they cancel are then 1e5 clips long at most: too little for the
rounding of their sum to matter.
"""


@dataclass(frozen=True)
class Products:
    """Of one parameter, the gradients themselves.

    Attributes:
        samples: (n, ...).
    """

    samples: Tensor

    def norms(self) -> Tensor:
        """(n,) float64."""
        return torch.stack([torch.linalg.vector_norm(sample.double()) for sample in self.samples])

    def sum(self, coefficients: Tensor) -> Tensor:
        """The gradients, weighted by (n,) coefficients; in float64, and without those of coefficient 0."""
        total = torch.zeros_like(self.samples[0], dtype=torch.float64)
        for coefficient, sample in zip(coefficients.tolist(), self.samples, strict=True):
            if coefficient:
                total.add_(sample, alpha=coefficient)
        return total


@dataclass(frozen=True)
class Factors:
    """Of a matrix, what its gradients are products of.

    Attributes:
        gradients: (n, places, out).
        inputs: (n, places, in).
    """

    gradients: Tensor
    inputs: Tensor

    def norms(self) -> Tensor:
        """(n,) float64, not below the true ones by rounding."""
        gradients, inputs = self.gradients.double(), self.inputs.double()
        g, a = gradients @ gradients.mT, inputs @ inputs.mT  # (n, places, places) both
        squares = (g * a).sum(dim=(1, 2)).clamp(min=0)
        uncancelled = (g.diagonal(dim1=1, dim2=2) * a.diagonal(dim1=1, dim2=2)).sqrt().sum(dim=1).square()
        norms: Tensor = (squares + ROUNDING * uncancelled).sqrt()
        return norms

    def sum(self, coefficients: Tensor) -> Tensor:
        """(out, in) the products, weighted by (n,) coefficients; in float64, and without those of coefficient 0."""
        rows = coefficients.nonzero().squeeze(1)
        weighted = self.gradients[rows].double() * coefficients[rows].view(-1, 1, 1)
        inputs = self.inputs[rows].double()
        total: Tensor = weighted.flatten(0, 1).T @ inputs.flatten(0, 1)  # (out, n * places) x (n * places, in)
        return total


Part = Products | Factors


def matrix(gradients: Tensor, inputs: Tensor) -> Part:
    """What to keep of (n, places, out) gradients and (n, places, in) inputs."""
    places, out, into = *gradients.shape[1:], inputs.shape[2]
    if places * (out + into) < SMALLER * out * into:
        return Factors(gradients, inputs)
    return Products(gradients.mT @ inputs)


def parts_of(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> Iterator[tuple[Tensor, Part]]:
    """Of each parameter of a layer its part, given what entered, and (n, ...) gradients of what left."""
    if type(layer) is nn.Linear:
        inputs, gradients = (x.reshape(len(x), -1, x.shape[-1]) for x in (activations[0], backprops))
    elif type(layer) is nn.Conv2d and layer.groups == 1 and not isinstance(layer.padding, str):
        patches = F.unfold(activations[0], layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        inputs, gradients = patches.mT, backprops.flatten(2).mT  # (n, places, in * kernel), (n, places, out)
    else:
        sampler = GradSampleHooks.GRAD_SAMPLERS.get(type(layer), ft_compute_per_sample_gradient)
        yield from ((p, Products(samples)) for p, samples in sampler(layer, activations, backprops).items())
        return
    yield layer.weight, matrix(gradients, inputs)
    if layer.bias is not None:
        yield layer.bias, Products(gradients.sum(dim=1))


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The layers with trainable parameters of their own. What is in one that Opacus takes as a whole is left out."""
    own = any(p.requires_grad for p in module.parameters(recurse=False))
    if own:
        yield module
    if not own or type(module) in GradSampleHooks.GRAD_SAMPLERS:
        for child in module.children():
            yield from layers_of(child)


class Gradients:
    """Per-patient gradients of a module. Call `norms`, then `sums`; in the end `close`.

    Attributes:
        parameters: the trainable ones; frozen ones have no part in norms and sums.
    """

    def __init__(self, module: nn.Module) -> None:
        """Hang hooks on the module's layers.

        Raises:
            StudyError: Opacus cannot tell patients apart in one of them.
        """
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self._module, self._layers = module, list(layers_of(module))
        self._inputs = self.parameters  # until a pass has shown that the hooks see how each is used
        self._parts: dict[Tensor, Part] = {}
        self._handles: list[RemovableHandle] = []
        try:
            GradSampleHooks.validate(module, strict=True)
            for layer in self._layers:
                if type(layer) not in GradSampleHooks.GRAD_SAMPLERS:
                    prepare_layer(layer)
        except NotImplementedError as error:
            self.close()
            raise StudyError(
                f"gradients of single patients cannot be had: {error}", "use one of the encoders of encoder.name"
            ) from error
        self._handles += [layer.register_forward_hook(self._watch) for layer in self._layers]

    def _watch(self, layer: nn.Module, entered: tuple[Tensor, ...], left: Tensor) -> None:
        """Called when a layer has computed: keep its parts when the gradient of what left it is known."""
        if left.requires_grad:
            activations = [tensor.detach() for tensor in entered]
            left.register_hook(lambda gradient: self._keep(layer, activations, gradient))  # type: ignore[no-untyped-call]

    def _keep(self, layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> None:
        for parameter, part in parts_of(layer, activations, backprops):
            if parameter in self._parts:
                raise PolyclinicError(
                    f"a {type(layer).__name__} is used twice in a pass, and its gradients would be clipped apart",
                    "use a layer of its own in each place, or leave privacy.mode 'patient'",
                )
            if parameter.requires_grad:
                self._parts[parameter] = part

    def norms(self, losses: Tensor) -> Tensor:
        """(n,) float64 norms of the gradients of (n,) losses, over all parameters together.

        The gradients of the whole batch are wasted here, so only a small one of each layer is asked for.

        Raises:
            PolyclinicError: the hooks have not seen how a parameter is used, or a layer's rows are not patients.
        """
        self._parts.clear()
        gradients = torch.autograd.grad(losses.sum(), self._inputs, allow_unused=True)
        used = [p for p, gradient in zip(self._inputs, gradients, strict=True) if gradient is not None]
        if unseen := {id(p) for p in used if p not in self._parts}:
            names = [name for name, p in self._module.named_parameters() if id(p) in unseen]
            raise PolyclinicError(
                f"no gradients of single patients are known of {', '.join(names)}",
                "use parameters through torch's own layers only, or leave privacy.mode 'patient'",
            )
        layers = ([p for p in layer.parameters(recurse=False) if p in self._parts] for layer in self._module.modules())
        self._inputs = [min(own, key=Tensor.numel) for own in layers if own]
        norms = [part.norms() for part in self._parts.values()]
        if any(len(one) != len(losses) for one in norms):
            raise PolyclinicError(
                f"{len(losses)} losses came of {max(map(len, norms))} rows in a layer: its rows are not patients",
                "train with mae, sssd or supervised",
            )
        together: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return together

    def sums(self, coefficients: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(number, float64 sum) of each parameter that the losses depend on: its gradients, weighted.

        Whoever has a coefficient of 0 has no part in the sums, not even a gradient that is not finite.

        Args:
            coefficients: (n,) float64.
        """
        for number, parameter in enumerate(self.parameters):
            if part := self._parts.pop(parameter, None):
                yield number, part.sum(coefficients).view_as(parameter)

    def close(self) -> None:
        """Leave no trace on the module."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.__dict__.pop("ft_compute_sample_grad", None)  # what `prepare_layer` sets
        self._parts.clear()
