"""What masked methods need of a Vision Transformer: positions, and tokens of some patches only."""

import math

import pytest
import torch

from polyclinic.encoders.vit import VisionTransformer, pick, sincos_positions, transformer_block, vit_tiny
from polyclinic.seeding import forked


@pytest.fixture
def encoder() -> VisionTransformer:
    with forked(0):
        return VisionTransformer(size=32, channels=1, patch=8, dim=48, heads=3, depth=2)


@pytest.mark.parametrize(("grid", "dim"), [(3, 8), (4, 48), (7, 64)])
def test_positions_are_sines_and_cosines_of_column_then_row(grid: int, dim: int) -> None:
    positions = sincos_positions(grid, dim)
    quarter = dim // 4
    for row in range(grid):
        for column in range(grid):
            for k in range(quarter):
                frequency = 1 / 10_000 ** (k / quarter)
                expected = [f(p * frequency) for p in (column, row) for f in (math.sin, math.cos)]
                found = positions[row * grid + column, [k, quarter + k, 2 * quarter + k, 3 * quarter + k]]
                torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_positions_need_a_width_divisible_by_four() -> None:
    with pytest.raises(ValueError, match="divisible by 4, not 6"):
        sincos_positions(2, 6)


def test_all_patches_kept_in_order_is_no_mask(encoder: VisionTransformer) -> None:
    images = torch.rand(2, 1, 32, 32)
    kept = torch.arange(16).expand(2, -1)
    assert torch.equal(encoder.tokens(images, kept), encoder.tokens(images))


def test_features_are_the_mean_token(encoder: VisionTransformer) -> None:
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(encoder(images), encoder.tokens(images).mean(dim=1))


def test_tokens_follow_the_order_of_the_kept_patches(encoder: VisionTransformer) -> None:
    images = torch.rand(2, 1, 32, 32)
    kept = torch.tensor([[3, 9, 12], [0, 5, 15]])
    turned = encoder.tokens(images, kept.flip(1)).flip(1)
    torch.testing.assert_close(encoder.tokens(images, kept), turned, atol=1e-5, rtol=1e-4)


def test_hidden_patches_are_not_seen(encoder: VisionTransformer) -> None:
    """Changing the pixels of patches that are left out changes nothing; changing a kept one does."""
    images = torch.rand(1, 1, 32, 32)
    kept = torch.tensor([[0, 1, 2, 3]])  # the top row of patches: pixels of rows 0 to 7
    before = encoder.tokens(images, kept)
    assert before.shape == (1, 4, 48)
    below, above = images.clone(), images.clone()
    below[:, :, 8:] = 0
    above[:, :, :8] = 0
    assert torch.equal(encoder.tokens(below, kept), before)
    assert not torch.allclose(encoder.tokens(above, kept), before, atol=1e-2)


def test_pick_takes_each_samples_own_tokens() -> None:
    tokens = torch.arange(2 * 4 * 3).view(2, 4, 3)
    picked = pick(tokens, torch.tensor([[2, 0], [1, 3]]))
    assert torch.equal(picked, torch.stack([tokens[0, [2, 0]], tokens[1, [1, 3]]]))


def test_the_patch_size_is_the_studys() -> None:
    assert vit_tiny(32, 1, 16).tokens(torch.rand(1, 1, 32, 32)).shape == (1, 4, 192)
    assert vit_tiny(32, 3, 4).tokens(torch.rand(1, 3, 32, 32)).shape == (1, 64, 192)


def test_attention_in_bf16_on_a_cpu_is_that_of_the_fused_kernel() -> None:
    """Which is the slower one there."""
    torch.manual_seed(0)
    layer, x = transformer_block(24, 2).attn, torch.randn(3, 5, 24, requires_grad=True)

    def answers(bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = layer(x).float()
        [gradient] = torch.autograd.grad(y.square().sum(), x)
        return y, gradient

    assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(answers(True), answers(False), strict=True))
    with torch.profiler.profile() as seen:
        answers(True)
    assert not any("flash" in event.key for event in seen.key_averages())
    with torch.profiler.profile() as seen:
        answers(False)
    assert any("flash" in event.key for event in seen.key_averages())
