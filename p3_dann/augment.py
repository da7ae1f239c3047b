"""What is done to digit images before the network sees them, for a whole batch at once on its device.

In training they are changed at random in ways that leave the digit what it is; a prediction averages over a few fixed
views. Between MNIST-M, SVHN and USPS the digits differ in place, size, slant, stroke, sharpness, contrast and polarity,
and street numbers have neighbours. Whatever the changes below can turn into each other is no longer a difference
between the domains, and only the rest is left for the method to align. None of them needs to know a label.

`grey`, `standardize`, `views`, `weakly` and `augment` take colour images as they were read, uint8 (N, 3, 28, 28); the
random changes take grey ones, float (N, 1, 28, 28).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from transforms import random_affine, uniform

# What the ablation can leave out.
STRONG_PARTS = ("solarize", "posterize", "cutout")
PARTS = ("backgrounds", "geometry", "neighbours", "sharpness", "intensity", *STRONG_PARTS)


class Augmentation(NamedTuple):
    """What depends on the domain."""
    zoom: tuple  # range of the magnification
    strong_zoom: tuple  # that of the strong view
    neighbours: int = 0  # the columns that a digit takes in a row of others, in which it is shown; 0: alone
    margin: int = 0  # pixels that are added around it, black
    backgrounds: bool = False  # whether it is painted on made-up ones, half of the time


# A digit of MNIST-M takes 20 of 28 pixels, one of USPS all of them, and both are alone: they learn what street numbers
# look like, with neighbours, and come in each other's sizes. SVHN's fill the frame and have neighbours already. USPS'
# are white on black and SVHN's on the plain paint of a house: they learn what else there is.
AUGMENTATIONS = {
    "mnistm": Augmentation(zoom=(0.9, 1.5), strong_zoom=(0.9, 1.5), neighbours=20),
    "svhn": Augmentation(zoom=(0.9, 1.15), strong_zoom=(0.7, 1.15), backgrounds=True),
    "usps": Augmentation(zoom=(0.65, 1.15), strong_zoom=(0.65, 1.15), neighbours=28, margin=6, backgrounds=True)}


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


def backgrounds(count, side, device):
    """Made-up backgrounds, float (count, 3, side, side) in (0, 255): colour noise of all sizes, sharpened at random.

    What comes out lies between soft gradients and plateaus with edges, as patches of photographs do.
    """
    field = 0
    for size, share in (2, 1.0), (4, 0.7), (8, 0.4), (side, 0.2):
        noise = torch.randn(count, 1, size, size, device=device) + torch.randn(count, 3, size, size, device=device) / 2
        noise = F.interpolate(noise, size=(side, side), mode="bilinear", align_corners=False)
        field = field + uniform(0, share, count, device) * noise
    return 255 * torch.sigmoid(uniform(0.5, 5, count, device) * field + uniform(-3, 3, count, device))


def on_backgrounds(images):
    """Images, uint8 (N, 3, S, S), on backgrounds from dark ones to bright ones: float (N, 1, S, S).

    Blended as MNIST-M is (Ganin et al. 2016, section 5.2.4): the absolute difference of the colours.
    """
    count, device = len(images), images.device
    painted = backgrounds(count, images.shape[-1], device) * uniform(0, 0.8, count, device)
    return grey((painted - images.float()).abs())


def row_of_digits(images, columns):
    """(N, 1, H, 3 * columns): the middle `columns` of each image between those of two others of the batch.

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


def for_a_share(images, changed, share):
    """`changed` instead of `images` (N, ...) for a random `share` of them."""
    return torch.where(uniform(0, 1, len(images), images.device) < share, changed, images)


def solarize(images):
    """Inverts what is brighter than a random level of each image's own range."""
    lowest, highest = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    level = torch.lerp(lowest, highest, uniform(0.2, 1, len(images), images.device))
    return torch.where(images > level, lowest + highest - images, images)


def posterize(images):
    """Leaves 2 to 6 levels of each image's own range."""
    lowest, highest = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    step = (highest - lowest + 1e-3) / torch.randint(1, 6, (len(images), 1, 1, 1), device=images.device)
    return lowest + ((images - lowest) / step).round() * step


def cutout(images, largest=14):
    """Sets a square of each image to 0, its centre anywhere, its side up to `largest` (DeVries and Taylor 2017)."""
    count, device = len(images), images.device
    half = uniform(0, largest / 2, count, device)
    rows, columns = ((torch.arange(28, device=device) - uniform(0, 27, count, device)).abs() for _ in range(2))
    return images * ((rows.transpose(2, 3) > half) | (columns > half))


def views(images):
    """Three standardized views of uint8 `images` (N, 3, 28, 28): three magnifications, one of them inverted."""
    for zoom, polarity in ((0.9, 1), (1.0, -1), (1.1, 1)):
        yield polarity * standardize(random_affine(grey(images), zoom=(zoom, zoom)))


def weakly(images):
    """uint8 (N, 3, 28, 28) to standardized float (N, 1, 28, 28), of either polarity, moved and magnified a little."""
    images = standardize(random_affine(grey(images), zoom=(0.9, 1.1), shift=0.15))
    return for_a_share(images, -images, 0.5)


def augment(images, domain, without=(), strong=False):
    """uint8 (N, 3, 28, 28) to standardized float (N, 1, 28, 28), changed at random in the ways that suit their domain.

    without: names from PARTS, the ways that are left out. strong: adds what RandAugment (Cubuk et al. 2020) has beyond
    that, for methods that only have to recognise an image whose digit they believe to know.
    """
    kind = AUGMENTATIONS[domain]
    if "geometry" not in without:
        images = F.pad(images, [kind.margin] * 4)
    plain = grey(images)
    painted = kind.backgrounds and "backgrounds" not in without
    images = for_a_share(plain, on_backgrounds(images), 0.5) if painted else plain
    if "geometry" not in without:
        if kind.neighbours and "neighbours" not in without:
            images = row_of_digits(images, kind.neighbours)
        images = random_affine(images, kind.strong_zoom if strong else kind.zoom, stretch=0.25, degrees=15.0, shear=0.2,
                               shift=0.24, size=(28, 28))
    if "sharpness" not in without:
        images = random_sharpness(images)
    if strong and "solarize" not in without:
        images = for_a_share(images, solarize(images), 0.25)
    if strong and "posterize" not in without:
        images = for_a_share(images, posterize(images), 0.25)
    images = standardize(images)
    if "intensity" not in without:
        images = random_intensity(images)
    return cutout(images) if strong and "cutout" not in without else images
