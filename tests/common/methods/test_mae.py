"""The masked autoencoder: its targets and loss against loops, its mask, its gradients sample by sample."""

import copy

import pytest
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from polyclinic import study
from polyclinic.encoders import build_encoder
from polyclinic.encoders.vit import VisionTransformer
from polyclinic.errors import StudyError
from polyclinic.methods import make_method
from polyclinic.methods.base import Batch, ViewBatch
from polyclinic.methods.mae import MAE, Decoder, MaskedAutoencoder, normalised, patchify
from polyclinic.seeding import forked
from polyclinic.stages import MAE_VIEWS, MAEStage


def autoencoder(channels: int = 1, mask: float = 0.75, size: int = 32) -> tuple[MAE, nn.Module]:
    stage = MAEStage(method="mae", rounds=1, mask=mask, decoder_depth=1, decoder_width=32, views=MAE_VIEWS)
    with forked(0):
        method = MAE(stage)
        return method, method.build(VisionTransformer(size, channels, patch=8, dim=48, heads=3, depth=2))


def drawn(method: MAE, n: int = 3, channels: int = 1, seed: int = 0) -> ViewBatch:
    images = torch.rand(n, channels, 32, 32, generator=torch.Generator().manual_seed(seed))
    return method.views(Batch(images, torch.arange(n)), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("channels", "grid", "patch"), [(1, 2, 4), (3, 2, 3), (1, 4, 2)])
def test_patches_are_cut_in_rows(channels: int, grid: int, patch: int) -> None:
    images = torch.rand(2, channels, grid * patch, grid * patch)
    patches = patchify(images, patch)
    assert patches.shape == (2, grid * grid, channels * patch * patch)
    for row in range(grid):
        for column in range(grid):
            rows, columns = slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch)
            assert torch.equal(patches[:, row * grid + column], images[:, :, rows, columns].flatten(1))


def loop(images: Tensor, predicted: Tensor, order: Tensor, kept: int, patch: int) -> list[float]:
    """The definition, one patch and one pixel at a time."""
    grid, losses = images.shape[-1] // patch, []
    for n in range(len(images)):
        errors = []
        for k, index in enumerate(order[n, kept:].tolist()):
            row, column = divmod(index, grid)
            cut = images[n, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            pixels = cut.flatten().tolist()
            mean = sum(pixels) / len(pixels)
            variance = sum((p - mean) ** 2 for p in pixels) / (len(pixels) - 1)
            target = [(p - mean) / (variance + 1e-6) ** 0.5 for p in pixels]
            errors += [(a - b) ** 2 for a, b in zip(predicted[n, k].tolist(), target, strict=True)]
        losses.append(sum(errors) / len(errors))
    return losses


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mask", [0.3, 0.75])
def test_the_loss_equals_a_loop_over_masked_patches(channels: int, mask: float) -> None:
    method, module = autoencoder(channels, mask)
    module.double()
    views = drawn(method, channels=channels)
    views = ViewBatch((views.views[0].double(),), views.patients, views.extra)
    order, kept = views.extra["order"], round(16 * (1 - mask))
    predicted = module(views.views[0], order)[0]
    assert predicted.shape == (3, 16 - kept, channels * 64)
    expected = torch.tensor(loop(views.views[0], predicted, order, kept, 8), dtype=torch.float64)
    torch.testing.assert_close(method.loss(module, views), expected, atol=1e-10, rtol=1e-10)


def test_a_flat_patch_is_a_target_of_zeros() -> None:
    torch.testing.assert_close(normalised(torch.full((1, 2, 9), 0.7)), torch.zeros(1, 2, 9), atol=1e-3, rtol=0)


def test_masks_are_orders_of_all_patches_drawn_for_each_image() -> None:
    method, _ = autoencoder()
    order = drawn(method, n=200).extra["order"]
    assert torch.equal(order.sort(dim=1).values, torch.arange(16).expand(200, -1))
    assert len({tuple(row.tolist()) for row in order}) == 200
    seen_first = torch.bincount(order[:, :4].flatten(), minlength=16)
    assert seen_first.min() > 25 and seen_first.max() < 80  # 50 on average


def test_a_seed_repeats_view_and_mask() -> None:
    method, _ = autoencoder()
    first, again, other = drawn(method, seed=1), drawn(method, seed=1), drawn(method, seed=2)
    assert torch.equal(first.views[0], again.views[0])
    assert torch.equal(first.extra["order"], again.extra["order"])
    assert not torch.equal(first.extra["order"], other.extra["order"])


def test_masked_pixels_reach_the_loss_only_as_targets() -> None:
    method, module = autoencoder()
    views = drawn(method)
    images, order = views.views[0], views.extra["order"]
    hidden = torch.ones(3, 16).scatter(1, order[:, :4], 0.0).view(3, 1, 4, 4)
    black = images * (1 - hidden.repeat_interleave(8, 2).repeat_interleave(8, 3))
    assert not torch.equal(images, black)
    assert torch.equal(module(images, order)[0], module(black, order)[0])


def test_the_decoder_puts_tokens_back_in_their_places() -> None:
    """A prediction belongs to its patch: reordering visible or masked patches reorders nothing else."""
    method, module = autoencoder()
    views = drawn(method, n=1)
    order = views.extra["order"]
    turned = torch.cat([order[:, :4].flip(1), order[:, 4:].flip(1)], dim=1)
    images = views.views[0]
    torch.testing.assert_close(module(images, turned)[0].flip(1), module(images, order)[0], atol=1e-5, rtol=1e-4)


def test_all_losses_have_exact_gradients() -> None:
    method, module = autoencoder()
    module.double()
    views = drawn(method, n=2)
    order = views.extra["order"]

    def losses(images: Tensor) -> Tensor:
        return method.loss(module, ViewBatch((images,), views.patients, {"order": order}))

    images = views.views[0].double().requires_grad_()
    assert torch.autograd.gradcheck(losses, (images,), fast_mode=True)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Opacus takes an embedding's indices for mixed precision
@pytest.mark.parametrize("functorch", [False, True], ids=["hooks", "functorch"])
def test_opacus_takes_per_sample_gradients(functorch: bool) -> None:
    """The loss is separable: Opacus's gradient of each image equals that of the image alone."""
    method, module = autoencoder()
    assert method.separable and ModuleValidator.validate(module) == []
    views = drawn(method)
    images, order = views.views[0], views.extra["order"]
    wrapped = GradSampleModule(copy.deepcopy(module), loss_reduction="sum", force_functorch=functorch)
    method.loss(wrapped, views).sum().backward()
    for i in range(3):
        module.zero_grad()
        alone = ViewBatch((images[i : i + 1],), views.patients[i : i + 1], {"order": order[i : i + 1]})
        method.loss(module, alone).sum().backward()
        for (name, one), many in zip(module.named_parameters(), wrapped.parameters(), strict=True):
            assert one.grad is not None, name
            torch.testing.assert_close(many.grad_sample[i], one.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_takes_per_sample_norms_without_the_gradients() -> None:
    """Ghost clipping: the norm of each image's gradient equals that of the image alone."""
    method, module = autoencoder()
    views = drawn(method)
    wrapped = GradSampleModuleFastGradientClipping(copy.deepcopy(module), loss_reduction="sum", max_grad_norm=1.0)
    method.loss(wrapped, views).sum().backward()
    for i, norm in enumerate(wrapped.get_norm_sample()):
        module.zero_grad()
        order = views.extra["order"][i : i + 1]
        alone = ViewBatch((views.views[0][i : i + 1],), views.patients[i : i + 1], {"order": order})
        method.loss(module, alone).sum().backward()
        expected = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm()
        torch.testing.assert_close(norm, expected, atol=0, rtol=1e-4)


def test_encoder_and_decoder_are_shared_and_positions_are_not() -> None:
    method, module = autoencoder()
    shared = method.shared(module)
    assert set(shared) == {name for name, _ in module.named_parameters()}
    assert {name.split(".")[0] for name in shared} == {"encoder", "decoder"}
    assert "decoder.mask_token.weight" in shared


@pytest.mark.parametrize(("mask", "kept"), [(0.75, 4), (0.3, 11), (0.999, 1), (0.001, 15)])
def test_at_least_one_patch_is_seen_and_one_is_not(mask: float, kept: int) -> None:
    _, module = autoencoder(mask=mask)
    assert isinstance(module, MaskedAutoencoder) and module.kept == kept


def test_an_encoder_that_cannot_skip_tokens_is_refused() -> None:
    images = study.Images(size=32)
    method = make_method(MAEStage(method="mae", rounds=1))
    with pytest.raises(StudyError, match="skip tokens"):
        method.build(build_encoder(study.Encoder(), images))


def test_an_image_of_one_patch_is_refused() -> None:
    method = MAE(MAEStage(method="mae", rounds=1))
    with pytest.raises(StudyError, match="two patches"):
        method.build(VisionTransformer(16, 1, patch=16, dim=48, heads=3, depth=1))


def test_the_decoder_is_light() -> None:
    with forked(0):
        encoder = build_encoder(study.Encoder(name="vit_tiny"), study.Images())
    assert isinstance(encoder, VisionTransformer)
    decoder = Decoder(encoder, MAEStage(method="mae", rounds=1).decoder_width, 2)
    assert sum(p.numel() for p in decoder.parameters()) < 0.1 * sum(p.numel() for p in encoder.parameters())
