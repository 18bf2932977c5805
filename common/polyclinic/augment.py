"""Random views of a batch of images, on whatever device holds it.

What runs, in this order; each step is left out where the settings turn it off, and draws anew for every image:

1. geometry: random resized crop, flip, rotation and elastic deformation, composed into one sampling grid, so that
   each pixel is interpolated once;
2. histogram equalisation, with probability `equalise`;
3. colour: brightness and contrast, and for colour images saturation, hue and loss of colour, composed into one
   affine map of the channels;
4. Gaussian blur, with probability `blur` (colour images only);
5. Gaussian noise.

Values are clamped to [0, 1] after steps 3, 4 and 5. All draws come from the one generator given, so a seed repeats
the views exactly; a CPU and a GPU draw different numbers from the same seed.

References: Chen et al., SimCLR, ICML 2020, appendix A; Azizi et al., Big self-supervised models advance medical image
classification, ICCV 2021 (no blur for radiographs); Azizi et al., REMEDIS, Nat Biomed Eng 2023 (equalisation, elastic).
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from polyclinic.stages import Views

ASPECT = math.log(4 / 3)
"""A crop is at most this much wider than high, or higher than wide; logarithm of the ratio (SimCLR's)."""
KNOTS = 7
"""Control points along a side, one beyond each border: elastic bends of about a quarter of the image."""
JITTERED = 0.8
"""Probability of colour jitter (SimCLR's)."""
BLUR_SIGMA = (0.1, 2.0)
"""Standard deviation of the blur, in pixels of a view of 224 (SimCLR's); scaled with the side."""
BINS = 256
"""Grey levels that equalisation tells apart."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)."""
# The two colour-difference axes of YIQ (NTSC 1953): a turn of this plane changes the hue and keeps the luma.
CHROMA = ((0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def make_views(images: Tensor, settings: Views, generator: torch.Generator) -> Tensor:
    """One random view of each image.

    Args:
        images: (n, channels, s, s) float32 in [0, 1], one or three channels.
        settings: what may change, and by how much.
        generator: on the images' device; every draw is made from it.

    Returns:
        (n, channels, s, s) float32 in [0, 1].
    """
    images = warp(images, settings, generator)
    if settings.equalise > 0:
        images = equalise_some(images, settings.equalise, generator)
    images = recolour(images, settings, generator)
    if settings.blur > 0 and images.shape[1] == 3:
        images = blur_some(images, settings.blur, generator)
    if settings.noise > 0:
        images = add_noise(images, settings.noise, generator)
    return images


def uniform(shape: int | tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Uniform draws in [low, high) on the generator's device."""
    shape = (shape,) if isinstance(shape, int) else shape
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def chance(n: int, probability: float, generator: torch.Generator) -> Tensor:
    """(n,) booleans, each true with `probability`."""
    return torch.rand(n, generator=generator, device=generator.device) < probability


def warp(images: Tensor, settings: Views, generator: torch.Generator) -> Tensor:
    """Crop, flip, rotate and bend, in one interpolation. What falls outside the image is black."""
    if settings.crop == (1.0, 1.0) and not settings.flip and settings.rotation == 0 and settings.elastic == 0:
        return images
    grid = sampling_grid(len(images), images.shape[-1], settings, generator)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def sampling_grid(n: int, side: int, settings: Views, generator: torch.Generator) -> Tensor:
    """(n, side, side, 2): where in its image, in [-1, 1] along x and y, each pixel of a view lies.

    Splines carry the positions of a few knots to all pixels. They reproduce affine maps exactly, so that affine map and
    bend are one product, several times quicker than a grid for each.
    """
    knot = (torch.arange(KNOTS, device=generator.device) - 1) / (KNOTS - 3) * 2 - 1
    v, u = torch.meshgrid(knot, knot, indexing="ij")
    plane = torch.stack([u, v, torch.ones_like(u)]).flatten(1)  # (3, KNOTS * KNOTS)
    knots = (affine(n, settings, generator) @ plane).view(n, 2, KNOTS, KNOTS)
    if settings.elastic > 0:  # a displacement of 2 is one side
        knots = knots + uniform(knots.shape, -2 * settings.elastic, 2 * settings.elastic, generator)
    basis = spline(side).to(knots.device)
    return (basis @ (knots @ basis.T)).permute(0, 2, 3, 1)  # (n, 2, side, side) -> (n, side, side, 2)


def affine(n: int, settings: Views, generator: torch.Generator) -> Tensor:
    """(n, 2, 3): random crop, flip and rotation, from coordinates of a view to those of its image."""
    area = uniform(n, *settings.crop, generator)
    # Ratios for which neither side is longer than the image's.
    log_ratio = uniform(n, -1, 1, generator) * torch.clamp(-area.log(), min=0.0, max=ASPECT)
    width, height = (area * log_ratio.exp()).sqrt(), (area / log_ratio.exp()).sqrt()
    x = uniform(n, -1, 1, generator) * (1 - width)
    y = uniform(n, -1, 1, generator) * (1 - height)
    if settings.flip:
        width = torch.where(chance(n, 0.5, generator), -width, width)
    angle = uniform(n, -1, 1, generator) * math.radians(settings.rotation)
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([cos * width, -sin * height, x], 1), torch.stack([sin * width, cos * height, y], 1)]
    return torch.stack(rows, 1)


@lru_cache(maxsize=8)
def spline(side: int) -> Tensor:
    """(side, KNOTS) uniform cubic B-splines at the pixel centres: smooth, not negative, each row sums to one."""
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side * (KNOTS - 3) + 1  # knots 0 .. KNOTS - 1
    distance = (centres.unsqueeze(1) - torch.arange(KNOTS, dtype=torch.float64)).abs()  # (side, KNOTS)
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far).float()


def equalise_some(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Equalise the histogram of each image with `probability`, channels apart."""
    chosen = chance(len(images), probability, generator).nonzero().squeeze(1)
    return images.index_copy(0, chosen, equalise(images[chosen]))


def equalise(images: Tensor) -> Tensor:
    """(n, channels, s, s) in [0, 1] -> the same, each channel's grey levels spread evenly.

    Level v becomes (C(v) - C(lowest)) / (pixels - C(lowest)), C the cumulative histogram; a constant channel stays.
    """
    planes = images.flatten(0, 1).flatten(1)  # (n * channels, pixels)
    levels = (planes * (BINS - 1)).round().long()
    counts = planes.new_zeros(len(planes), BINS).scatter_add_(1, levels, torch.ones_like(planes))
    cumulative = counts.cumsum(1)
    lowest = cumulative.gather(1, levels.amin(1, keepdim=True))  # (n * channels, 1)
    spread = planes.shape[1] - lowest
    table = (cumulative - lowest) / spread.clamp(min=1)
    return torch.where(spread > 0, table.gather(1, levels), planes).view_as(images)


def recolour(images: Tensor, settings: Views, generator: torch.Generator) -> Tensor:
    """Jitter brightness and contrast by factors in 1 +- `jitter`, and colour images as `colour_matrix` says.

    Contrast scales about the image's own mean brightness, as in SimCLR.
    """
    n, channels = images.shape[:2]
    coloured = channels == 3 and (settings.jitter > 0 or settings.hue > 0 or settings.grey > 0)
    if settings.jitter == 0 and not coloured:
        return images
    struck = chance(n, JITTERED, generator).to(images.dtype)  # (n,) 1 or 0
    strength = settings.jitter * struck
    brightness = 1 + uniform(n, -1, 1, generator) * strength
    contrast = 1 + uniform(n, -1, 1, generator) * strength
    scale, shift = (brightness * contrast).view(n, 1, 1, 1), brightness * (1 - contrast)
    if not coloured:
        mean = images.mean(dim=(1, 2, 3)) * shift
        return torch.addcmul(mean.view(n, 1, 1, 1), images, scale).clamp_(0, 1)
    luma = torch.tensor(LUMA, device=images.device)
    mean = images.mean(dim=(2, 3)) @ luma * shift
    matrix = colour_matrix(struck, settings, generator) * scale.view(n, 1, 1)
    turned = torch.baddbmm(mean.view(n, 1, 1), matrix, images.flatten(2))  # (n, 3, 3) x (n, 3, pixels)
    return turned.view_as(images).clamp_(0, 1)


def colour_matrix(struck: Tensor, settings: Views, generator: torch.Generator) -> Tensor:
    """(n, 3, 3): scale the colour differences by 1 +- `jitter`, turn them by up to `hue` of the circle, or drop them.

    `struck` (n,) is 1 where an image is jittered at all, else 0; colours are dropped independently of it.

    The brightness of every pixel stays. (torchvision turns the hue in HSV, which does not keep it.)
    """
    n, device = len(struck), struck.device
    to_yiq = torch.tensor((LUMA, *CHROMA), device=device)
    saturation = 1 + uniform(n, -1, 1, generator) * struck * settings.jitter
    saturation = torch.where(chance(n, settings.grey, generator), 0.0, saturation)
    angle = uniform(n, -1, 1, generator) * struck * (2 * math.pi * settings.hue)
    cos, sin = saturation * angle.cos(), saturation * angle.sin()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    rows = [torch.stack(r, 1) for r in ((one, zero, zero), (zero, cos, -sin), (zero, sin, cos))]
    matrix: Tensor = torch.linalg.inv(to_yiq) @ torch.stack(rows, 1) @ to_yiq
    return matrix


def blur_some(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur of each image with `probability`, as a product with a band matrix along each axis."""
    n, _, side, _ = images.shape
    sigma = uniform(n, *BLUR_SIGMA, generator) * (side / 224)
    sigma = torch.where(chance(n, probability, generator), sigma, 1e-3)  # so narrow that nothing changes
    pixel = torch.arange(side, device=images.device, dtype=images.dtype)
    offsets = (pixel.unsqueeze(0) - pixel.unsqueeze(1)) ** 2  # (side, side)
    kernel = torch.exp(-offsets / (2 * sigma.view(n, 1, 1) ** 2))
    kernel = (kernel / kernel.sum(2, keepdim=True)).unsqueeze(1)  # (n, 1, side, side); rows sum to one at borders too
    return (kernel @ images @ kernel.transpose(2, 3)).clamp_(0, 1)  # rounding alone can leave the bounds


def add_noise(images: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise whose standard deviation is drawn for each image in [0, largest)."""
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    deviation = uniform(len(images), 0, largest, generator).view(-1, 1, 1, 1)
    return torch.addcmul(images, noise, deviation).clamp_(0, 1)
