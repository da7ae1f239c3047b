"""Whole batches of images where they are: as input and back, and random changes, each image its own.

The random numbers are PyTorch's, of the device's default generator.
"""

import math

import torch
import torch.nn.functional as F


def as_input(images):
    """Pixels of uint8 images, 0..255, as the networks take them: float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Float images in [0, 1] to uint8 0..255, rounded to nearest as torchvision's save_image does."""
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def uniform(low, high, count, device):
    """(count, 1, 1, 1) uniform random numbers in [low, high), one for each image of a batch."""
    return torch.empty(count, 1, 1, 1, device=device).uniform_(low, high)


def random_mirror(images):
    """`images` (N, C, H, W), each mirrored left to right or not, with equal chances."""
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(3), images)


def random_affine(images, zoom=(1.0, 1.0), stretch=0.0, degrees=0.0, shear=0.0, shift=0.0, size=None):
    """Views of the middle of `images`, float (N, C, H, W), under random affine maps; float (N, C, *size).

    zoom: range of the magnification (log-uniform); stretch: greatest log ratio of width to height, so that an axis is
    magnified by zoom * exp(+-stretch / 2); degrees: greatest rotation; shear: greatest slant; shift: greatest
    translation, in half views. size: (height, width) of the views, the images' own when not given; pixels stay as
    large as they are. What lies outside is mirrored.
    """
    count, device = len(images), images.device
    height, width = size or images.shape[2:]
    scale = uniform(math.log(zoom[0]), math.log(zoom[1]), count, device).flatten().exp()
    ratio = uniform(-stretch / 2, stretch / 2, count, device).flatten().exp()
    angle = uniform(-math.radians(degrees), math.radians(degrees), count, device).flatten()
    slant = uniform(-shear, shear, count, device).flatten()
    translation = torch.empty(count, 2, device=device).uniform_(-shift, shift)
    cos, sin = angle.cos(), angle.sin()
    # Where in the input each output pixel comes from; x in units of half the view's width, y of half its height.
    rows = [cos / (scale * ratio), (slant - sin) / (scale * ratio) * (height / width), translation[:, 0],
            sin / (scale / ratio) * (width / height), cos / (scale / ratio), translation[:, 1]]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (count, images.shape[1], height, width), align_corners=False)
    grid *= grid.new_tensor([width / images.shape[3], height / images.shape[2]])  # from the view's to the input's units
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
