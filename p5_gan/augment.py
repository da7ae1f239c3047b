"""Differentiable augmentation (Zhao et al. 2020, "DiffAugment") of what the discriminator sees, real and generated.

Both pass through the same random changes, so the generator learns nothing of them, and its gradient goes through them.
Which share of the images is changed follows from how much the discriminator overfits (Karras et al. 2020, "ADA").
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from transforms import uniform


def colour(images):
    """Brightness, saturation and contrast of `images` (B, C, H, W) in [-1, 1], each image's by chance."""
    count, device = len(images), images.device
    images = images + uniform(-0.5, 0.5, count, device)
    for dims, low, high in ((1, 0, 2), ((1, 2, 3), 0.5, 1.5)):
        mean = images.mean(dim=dims, keepdim=True)
        images = (images - mean) * uniform(low, high, count, device) + mean
    return images


def translation(images, ratio=1 / 8):
    """`images` (B, C, H, W) moved by whole pixels, up to `ratio` of the image each way; what moves in is 0."""
    count, channels, height, width = images.shape
    reach = round(height * ratio)
    moves = torch.randint(2 * reach + 1, (2, count, 1, 1, 1), device=images.device)
    rows = moves[0] + torch.arange(height, device=images.device)[:, None]
    columns = moves[1] + torch.arange(width, device=images.device)
    images = F.pad(images, [reach] * 4)
    images = images.gather(2, rows.expand(count, channels, height, images.shape[3]))
    return images.gather(3, columns.expand(count, channels, height, width))


def cutout(images, ratio=1 / 2):
    """`images` (B, C, H, W) with a square of `ratio` of the side set to 0; its centre at least is inside."""
    count, _, height, width = images.shape
    side = round(height * ratio)
    top = torch.randint(height + 1, (count, 1, 1, 1), device=images.device) - side // 2
    left = torch.randint(width + 1, (count, 1, 1, 1), device=images.device) - side // 2
    y = torch.arange(height, device=images.device)[:, None]
    x = torch.arange(width, device=images.device)
    inside = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
    return images.masked_fill(inside, 0)


class DiffAugment(nn.Module):
    """Changes a share of the images it is given, and knows that share; a buffer, so checkpoints hold it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("share", torch.zeros(()))

    def forward(self, images):
        if not self.share:
            return images
        chosen = uniform(0, 1, len(images), images.device) < self.share
        return torch.where(chosen, cutout(translation(colour(images))), images)

    def adapt(self, real_logits, target=0.6, images=100_000, highest=0.8):
        """Moves the share up when the mean sign of the logits of real images (B,) is above `target`, else down.

        It takes `images` real images from 0 to 1. Beyond `highest` generated images would come out augmented.
        """
        mean, count = real_logits.sign().mean(), len(real_logits)
        if dist.is_available() and dist.is_initialized():  # one share for all processes
            dist.all_reduce(mean)
            mean, count = mean / dist.get_world_size(), count * dist.get_world_size()
        self.share.add_(count / images * (mean - target).sign()).clamp_(0, highest)
