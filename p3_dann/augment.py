"""What is done to digit images before the network sees them, for a whole batch at once on its device.

In training they are changed at random in ways that leave the digit what it is; a prediction averages over a few fixed
views. Between MNIST-M, SVHN and USPS the digits differ in place, size, slant, stroke, sharpness, contrast and polarity,
and street numbers have neighbours. Whatever the changes below can turn into each other is no longer a difference
between the domains, and only the rest is left for the adversary to align. None of them needs to know a label.

`grey`, `standardize`, `views` and `augment` take colour images as they were read, uint8 (N, 3, 28, 28); the random
changes take grey ones, float (N, 1, 28, 28).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from transforms import random_affine, uniform

# What the ablation can leave out.
PARTS = ("geometry", "neighbours", "sharpness", "intensity")


class Augmentation(NamedTuple):
    """What depends on the domain: the range of the magnification, and whether a digit is shown in a row of others."""
    zoom: tuple
    neighbours: bool


# A digit of MNIST-M is alone, and learns what street numbers look like: larger, and with neighbours. SVHN's have both
# already, and USPS', which are never the source here, need neither.
AUGMENTATIONS = {"mnistm": Augmentation(zoom=(0.9, 1.5), neighbours=True),
                 "svhn": Augmentation(zoom=(0.9, 1.15), neighbours=False),
                 "usps": Augmentation(zoom=(0.9, 1.15), neighbours=False)}


def grey(images):
    """(N, C, 28, 28), uint8 or float 0..255, to float32 (N, 1, 28, 28): the mean of the channels."""
    return images.float().mean(dim=1, keepdim=True)


def standardize(images):
    """Takes each image's own brightness, contrast and colour away.

    images: (N, C, 28, 28), uint8 or float 0..255. Returns float32 (N, 1, 28, 28): grey, with mean 0 and standard
    deviation 1 (less where an image is nearly flat). What a number is painted with says nothing about its digits, but
    much about its domain. Instance normalisation of the input as in Shu et al. 2018 (VADA).
    """
    centred = grey(images)
    centred = centred - centred.mean(dim=(2, 3), keepdim=True)
    return centred / (centred.square().mean(dim=(2, 3), keepdim=True).sqrt() + 2.5)


def row_of_digits(images, columns=20):
    """(N, 1, 28, 3 * columns): the middle `columns` of each image between those of two others of the batch.

    A street number's crop shows parts of its neighbours; in this row an affine view does, too.
    """
    first = (images.shape[-1] - columns) // 2
    middle = images[..., first:first + columns]
    left, right = (middle[torch.randperm(len(images), device=images.device)] for _ in range(2))
    return torch.cat([left, middle, right], dim=3)


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
        yield polarity * standardize(random_affine(grey(images), zoom=(zoom, zoom)))


def augment(images, domain, without=()):
    """uint8 (N, 3, 28, 28) to standardized float (N, 1, 28, 28), changed at random in the ways that suit their domain.

    without: names from PARTS, the ways that are left out.
    """
    images, kind = grey(images), AUGMENTATIONS[domain]
    if "geometry" not in without:
        row = row_of_digits(images) if kind.neighbours and "neighbours" not in without else images
        images = random_affine(row, kind.zoom, stretch=0.25, degrees=15.0, shear=0.2, shift=0.24, size=(28, 28))
    if "sharpness" not in without:
        images = random_sharpness(images)
    images = standardize(images)
    return images if "intensity" in without else random_intensity(images)
