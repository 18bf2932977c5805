"""Views: what each step does, that it does it to each image apart, and that a seed repeats it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as vision

from polyclinic.augment import KNOTS, LUMA, affine, blur_some, equalise, make_views, sampling_grid, spline
from polyclinic.stages import COLOUR, MAE_VIEWS, RADIOGRAPH, Views

IDENTITY = Views(crop=(1.0, 1.0), flip=False, rotation=0.0, jitter=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def changed(**settings: object) -> Views:
    return Views.model_validate({**IDENTITY.model_dump(), **settings})


def pictures(n: int, channels: int = 1, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth random images in [0, 1]."""
    coarse = torch.rand(n, channels, 6, 6, generator=generator(seed))
    return F.interpolate(coarse, side, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_identity_settings_give_back_the_image(channels: int) -> None:
    images = pictures(4, channels)
    assert torch.equal(make_views(images, IDENTITY, generator()), images)


@pytest.mark.parametrize("side", [16, 33, 96])
def test_the_grid_of_identity_settings_samples_every_pixel_centre(side: int) -> None:
    images = torch.rand(2, 1, side, side, generator=generator())
    grid = sampling_grid(2, side, IDENTITY, generator())
    torch.testing.assert_close(F.grid_sample(images, grid, align_corners=False), images, atol=3e-5, rtol=0)


def test_splines_carry_an_affine_map_exactly() -> None:
    settings = changed(crop=(0.3, 1.0), flip=True, rotation=45.0)
    grid = sampling_grid(8, 40, settings, generator(3))
    plain = F.affine_grid(affine(8, settings, generator(3)), [8, 1, 40, 40], align_corners=False)
    torch.testing.assert_close(grid, plain, atol=2e-6, rtol=0)


def test_splines_are_a_smooth_partition_of_one() -> None:
    basis = spline(64).double()
    assert basis.shape == (64, KNOTS)
    assert basis.min() >= 0
    torch.testing.assert_close(basis.sum(1), torch.ones(64, dtype=torch.float64), atol=1e-6, rtol=0)
    steps = basis.diff(dim=0)
    assert steps.abs().max() < 0.06
    assert steps.diff(dim=0).abs().max() < 0.01


@pytest.mark.parametrize(("settings", "channels"), [(RADIOGRAPH, 1), (COLOUR, 3), (RADIOGRAPH, 3), (MAE_VIEWS, 1)])
def test_views_stay_within_bounds_and_keep_their_form(settings: Views, channels: int) -> None:
    images = pictures(16, channels)
    views = make_views(images, settings, generator())
    assert views.shape == images.shape
    assert views.dtype == torch.float32
    assert views.min() >= 0 and views.max() <= 1
    assert torch.isfinite(views).all()


@pytest.mark.parametrize("settings", [RADIOGRAPH, COLOUR])
def test_a_seed_repeats_the_views_and_leaves_the_images(settings: Views) -> None:
    images = pictures(6, 3)
    before = images.clone()
    first, again, other = (make_views(images, settings, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("settings", "channels"),
    [
        (changed(crop=(0.3, 0.9)), 1),
        (changed(rotation=30.0), 1),
        (changed(elastic=0.1), 1),
        (changed(jitter=0.5), 1),
        (changed(jitter=0.5), 3),
        (changed(hue=0.3), 3),
        (changed(noise=0.1), 1),
        (changed(blur=1.0), 3),
    ],
)
def test_every_image_gets_its_own_draw(settings: Views, channels: int) -> None:
    """Eight copies of one image, eight different views (but for jitter's probability of doing nothing)."""
    image = pictures(1, channels, side=96).expand(8, -1, -1, -1)
    views = make_views(image, settings, generator())
    distinct = {view.numpy().tobytes() for view in views}
    assert len(distinct) >= (5 if settings.jitter or settings.hue else 8)


def test_the_crop_has_the_asked_area_and_lies_inside() -> None:
    theta = affine(5_000, changed(crop=(0.2, 0.6)), generator())
    width, height, x, y = theta[:, 0, 0], theta[:, 1, 1], theta[:, 0, 2], theta[:, 1, 2]
    area, ratio = width * height, width / height
    assert area.min() >= 0.2 and area.max() <= 0.6
    assert math.isclose(area.mean(), 0.4, abs_tol=0.01)  # uniform
    assert ratio.min() >= 3 / 4 - 1e-5 and ratio.max() <= 4 / 3 + 1e-5
    assert ratio.log().mean().abs() < 0.01
    assert (width + x.abs()).max() <= 1 + 1e-6 and (height + y.abs()).max() <= 1 + 1e-6
    assert theta[:, 0, 1].abs().max() == 0


def test_half_of_the_images_are_mirrored() -> None:
    ramp = torch.linspace(0, 1, 32).expand(2_000, 1, 32, 32)
    views = make_views(ramp, changed(flip=True), generator())
    mirrored = views[:, 0, 16, 0] > views[:, 0, 16, -1]
    assert 0.45 < mirrored.float().mean() < 0.55
    torch.testing.assert_close(views[mirrored], ramp[mirrored].flip(3), atol=3e-5, rtol=0)


def test_rotation_turns_about_the_centre_by_up_to_the_given_angle() -> None:
    theta = affine(5_000, changed(rotation=30.0), generator())
    angles = torch.rad2deg(torch.atan2(theta[:, 1, 0], theta[:, 0, 0]))
    assert angles.abs().max() <= 30 + 1e-4
    assert math.isclose(angles.std(), 60 / math.sqrt(12), rel_tol=0.03)  # uniform
    assert theta[:, :, 2].abs().max() < 1e-6
    torch.testing.assert_close(torch.linalg.det(theta[:, :, :2]), torch.ones(5_000), atol=1e-5, rtol=0)


def test_elastic_displacement_keeps_its_bound_and_is_smooth() -> None:
    still = sampling_grid(50, 64, IDENTITY, generator())
    bent = sampling_grid(50, 64, changed(elastic=0.05), generator(1)) - still
    assert bent.abs().max() <= 2 * 0.05  # [-1, 1] is one side
    assert bent.abs().max() > 0.05
    assert bent.diff(dim=1).abs().max() < 0.02  # per pixel: nothing folds over itself (a pixel is 2 / 64 = 0.031)


def test_grey_jitter_is_brightness_then_contrast_about_the_mean() -> None:
    """Without clamping it is affine in the image, and its two numbers follow from two factors in their bounds."""
    image = pictures(1) * 0.2 + 0.2
    views = make_views(image.expand(3_000, -1, -1, -1), changed(jitter=0.5), generator())
    spread = views.std(dim=(1, 2, 3)) / image.std()  # brightness * contrast
    brightness = views.mean(dim=(1, 2, 3)) / image.mean()  # contrast keeps the mean
    contrast = spread / brightness
    untouched = (brightness - 1).abs() < 1e-5
    assert 0.17 < untouched.float().mean() < 0.23
    for factor in (brightness, contrast):
        assert factor.min() >= 0.5 - 1e-4 and factor.max() <= 1.5 + 1e-4
        assert math.isclose(factor[~untouched].std(), 1 / math.sqrt(12), rel_tol=0.05)  # uniform
    assert torch.corrcoef(torch.stack([brightness, contrast]))[0, 1].abs() < 0.05


def test_colour_jitter_keeps_greys_grey() -> None:
    grey = pictures(8).expand(-1, 3, -1, -1)
    views = make_views(grey, changed(jitter=0.8, hue=0.5), generator())
    torch.testing.assert_close(views, views[:, :1].expand_as(views), atol=1e-3, rtol=0)


def test_hue_turns_colours_and_keeps_their_luma() -> None:
    colours = (torch.rand(500, 3, 1, 1, generator=generator()) * 0.1 + 0.45).expand(-1, -1, 16, 16)
    views = make_views(colours, changed(hue=0.5), generator())
    luma = torch.tensor(LUMA).view(3, 1, 1)
    torch.testing.assert_close((views * luma).sum(1), (colours * luma).sum(1), atol=1e-4, rtol=0)
    moved = (views - colours).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert 0.7 < moved.float().mean() < 0.9


def test_saturation_is_torchvisions() -> None:
    """A saturation factor of zero is torchvision's own: the greyscale image in three channels."""
    image = pictures(1, 3)
    grey = make_views(image, changed(grey=1.0), generator())
    torch.testing.assert_close(grey, vision.adjust_saturation(image, 0.0), atol=1e-3, rtol=0)


def test_colour_is_dropped_as_often_as_asked() -> None:
    views = make_views(pictures(1, 3, 16).expand(2_000, -1, -1, -1), changed(grey=0.2), generator())
    colourless = (views - views[:, :1]).abs().amax(dim=(1, 2, 3)) < 1e-3
    assert 0.17 < colourless.float().mean() < 0.23


def test_equalisation_is_pillows_within_its_rounding() -> None:
    levels = (pictures(1, 1, 64)[0, 0] * 120 + 60).byte()
    expected = torch.from_numpy(np.array(ImageOps.equalize(Image.fromarray(levels.numpy())))).float() / 255
    ours = equalise(levels.float().div(255)[None, None])[0, 0]
    assert (ours - expected).abs().max() < 0.03  # Pillow floors steps of pixels / 255


def test_equalised_levels_are_spread_evenly() -> None:
    flat = equalise(torch.rand(3, 1, 96, 96, generator=generator()) ** 1.5)
    quantiles = torch.quantile(flat.flatten(1), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), dim=1)
    expected = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).unsqueeze(1).expand(-1, 3)
    torch.testing.assert_close(quantiles, expected, atol=0.03, rtol=0)


def test_equalisation_leaves_a_constant_image_and_keeps_the_order_of_levels() -> None:
    constant = torch.full((1, 1, 16, 16), 0.3)
    assert torch.equal(equalise(constant), constant)
    image = pictures(1, 1, 48)
    order = (image.flatten() * 255).round().argsort(stable=True)
    assert (equalise(image).flatten()[order].diff() >= 0).all()


def test_equalisation_strikes_as_often_as_asked_and_no_others() -> None:
    images = pictures(1, 1, 16).expand(2_000, -1, -1, -1) * 0.5
    views = make_views(images, changed(equalise=0.3), generator())
    struck = (views != images).flatten(1).any(1)
    assert 0.27 < struck.float().mean() < 0.33
    torch.testing.assert_close(views[struck][0], equalise(images[:1])[0])


def test_blur_keeps_flat_images_lowers_contrast_and_strikes_as_often_as_asked() -> None:
    flat = torch.full((4, 3, 32, 32), 0.7)
    torch.testing.assert_close(blur_some(flat, 1.0, generator()), flat)
    noisy = torch.rand(1, 3, 224, 224, generator=generator()).expand(40, -1, -1, -1)
    blurred = blur_some(noisy, 0.5, generator())
    changed_ones = (blurred - noisy).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert 10 <= changed_ones.sum() <= 30
    assert (blurred[changed_ones].std(dim=(1, 2, 3)) < noisy[0].std()).all()


def test_blur_is_torchvisions_away_from_the_border() -> None:
    images = torch.rand(1, 3, 224, 224, generator=generator())
    blurred = blur_some(images, 1.0, generator(4))
    sigma = float(torch.rand(1, generator=generator(4)) * (2.0 - 0.1) + 0.1)
    expected = vision.gaussian_blur(images, [31, 31], [sigma, sigma])
    torch.testing.assert_close(blurred[..., 20:-20, 20:-20], expected[..., 20:-20, 20:-20], atol=1e-4, rtol=0)


def test_noise_has_a_deviation_of_its_own_for_each_image() -> None:
    images = torch.full((500, 1, 48, 48), 0.5)
    noise = make_views(images, changed(noise=0.1), generator()) - images
    deviation = noise.std(dim=(1, 2, 3))
    assert deviation.max() < 0.105
    assert math.isclose(deviation.mean(), 0.05, rel_tol=0.1)  # uniform in [0, 0.1)
    assert noise.mean().abs() < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("settings", "channels"), [(RADIOGRAPH, 1), (COLOUR, 3)])
def test_views_on_a_gpu(settings: Views, channels: int) -> None:
    images = pictures(16, channels).cuda()
    first, again = (make_views(images, settings, torch.Generator("cuda").manual_seed(1)) for _ in range(2))
    assert first.is_cuda and torch.equal(first, again)
    assert first.min() >= 0 and first.max() <= 1
