"""What is done to digit images before the network sees them, for a whole batch at once on its device.

In training they are changed at random in ways that leave the digit what it is; a prediction averages over a few
fixed views. Between MNIST-M, SVHN and USPS the digits differ in place, size, slant, stroke, sharpness, contrast and polarity, and
street numbers have neighbours. Whatever the changes below can turn into each other is no longer a difference between
the domains, and only the rest is left for the adversary to align. None of them needs to know the target's labels.

`grey`, `standardize`, `views` and `augment` take colour images as they were read, uint8 (N, 3, 28, 28); the random
changes take grey ones, float (N, 1, 28, 28).
"""

import math

import torch
import torch.nn.functional as F

# What the ablation can leave out.
PARTS = ("geometry", "neighbours", "sharpness", "intensity")


def grey(images):
    """(N, C, 28, 28), uint8 or float 0..255, to float32 (N, 1, 28, 28): the mean of the channels."""
    return images.float().mean(dim=1, keepdim=True)


def standardize(images):
    """Takes each image's own brightness, contrast and colour away.

    images: (N, C, 28, 28), uint8 or float 0..255. Returns float32 (N, 1, 28, 28): grey, with mean 0 and deviation 1
    (less where an image is nearly flat). What a number is painted with says nothing about its digits, but much about
    its domain. Instance normalisation of the input as in Shu et al. 2018 (VADA).
    """
    centred = grey(images)
    centred = centred - centred.mean(dim=(2, 3), keepdim=True)
    return centred / (centred.square().mean(dim=(2, 3), keepdim=True).sqrt() + 2.5)


def uniform(low, high, count, device):
    """(count, 1, 1, 1) uniform random numbers, one for each image."""
    return torch.empty(count, 1, 1, 1, device=device).uniform_(low, high)


def row_of_digits(images, columns=20):
    """(N, 1, 28, 3 * columns): the middle `columns` of each image between those of two others of the batch.

    A street number's crop shows parts of its neighbours; in this row an affine view does, too.
    """
    first = (images.shape[-1] - columns) // 2
    middle = images[..., first:first + columns]
    left, right = (middle[torch.randperm(len(images), device=images.device)] for _ in range(2))
    return torch.cat([left, middle, right], dim=3)


def random_affine(images, zoom=(0.9, 1.5), stretch=0.25, degrees=15.0, shear=0.2, shift=0.24):
    """28x28 views of the middle of `images` (N, 1, 28, W), W >= 28, under random affine maps.

    zoom: range of the magnification (log-uniform); stretch: greatest log ratio of width to height; degrees: greatest
    rotation; shear: greatest slant; shift: greatest translation, in half images. What lies outside is mirrored.
    """
    count, device = len(images), images.device
    scale = uniform(math.log(zoom[0]), math.log(zoom[1]), count, device).flatten().exp()
    ratio = uniform(-stretch / 2, stretch / 2, count, device).flatten().exp()
    angle = uniform(-math.radians(degrees), math.radians(degrees), count, device).flatten()
    slant = uniform(-shear, shear, count, device).flatten()
    translation = torch.empty(count, 2, device=device).uniform_(-shift, shift)
    cos, sin = angle.cos(), angle.sin()
    # Where in the input each output pixel comes from, in units of 14 pixels.
    rows = [cos / (scale * ratio), (slant - sin) / (scale * ratio), translation[:, 0],
            sin / (scale / ratio), cos / (scale / ratio), translation[:, 1]]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), (count, 1, 28, 28), align_corners=False)
    grid[..., 0] *= 28 / images.shape[-1]
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def random_sharpness(images, sharpen=0.5, blur=1.0):
    """Moves each image towards its blurred self, up to all the way, or away from it."""
    smooth = images
    for _ in range(2):
        smooth = F.avg_pool2d(F.pad(smooth, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    return images + uniform(-sharpen, blur, len(images), images.device) * (smooth - images)


def random_intensity(images, scale=(0.25, 1.5), offset=0.5, noise=0.1):
    """Polarity, contrast, brightness and noise of standardized images (French et al. 2018, section 4.3)."""
    count, device = len(images), images.device
    sign = torch.randint(0, 2, (count, 1, 1, 1), device=device) * 2 - 1
    images = images * sign * uniform(*scale, count, device) + uniform(-offset, offset, count, device)
    return images + torch.randn_like(images) * uniform(0, noise, count, device)


def views(images):
    """Three standardized views of uint8 `images` (N, 3, 28, 28): three magnifications, one of them inverted."""
    for zoom, polarity in ((0.9, 1), (1.0, -1), (1.1, 1)):
        still = random_affine(grey(images), zoom=(zoom, zoom), stretch=0, degrees=0, shear=0, shift=0)
        yield polarity * standardize(still)


def augment(images, zoom, row, without=()):
    """uint8 (N, 3, 28, 28) to standardized float (N, 1, 28, 28), changed at random in every way but those in `without`.

    row: show parts of other images of the batch as neighbours; without: names from PARTS, for the ablation.
    """
    images = grey(images)
    if "geometry" not in without:
        images = random_affine(row_of_digits(images) if row and "neighbours" not in without else images, zoom)
    if "sharpness" not in without:
        images = random_sharpness(images)
    images = standardize(images)
    return images if "intensity" in without else random_intensity(images)


def augment_source(images, without=()):
    """Views of images of single digits: also much larger, and with neighbours."""
    return augment(images, (0.9, 1.5), True, without)


def augment_target(images, without=()):
    """Views of the target's images, which show their digits as large and with such neighbours as they are."""
    return augment(images, (0.9, 1.15), False, without)
