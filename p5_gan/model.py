"""Generator and discriminator of 64x64 faces: those of DCGAN (Radford et al. 2016), the latter with spectral norm.

Spectral normalisation (Miyato et al. 2018) divides every weight of the discriminator by its largest singular value; it
needs no batch normalisation beside it.
"""

from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from files import described_by, load_checkpoint, load_weights
from p5_gan.augment import DiffAugment

CHECKPOINT = Path(__file__).parent / "checkpoints/gan.pt"


class Generator(nn.Module):
    """Images from latents: transposed convolutions, batch normalisation, ReLU; tanh at the end.

    latents: the length L of z. channels: width at 32x32, which doubles at 16x16, 8x8 and 4x4. modulated: whether scale
    and shift after each normalisation are linear in z (Chen et al. 2019, "On self modulation for generative adversarial
    networks", eq. 2), else they are the same for every image, as in DCGAN.
    """

    def __init__(self, latents, channels, modulated=True):
        super().__init__()
        self.latents = latents
        widths = [8 * channels, 4 * channels, 2 * channels, channels]
        self.first = nn.Sequential(nn.Linear(latents, 16 * widths[0], bias=False), nn.Unflatten(1, (widths[0], 4, 4)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, affine=not modulated) for width in widths)
        self.modulations = nn.ModuleList(nn.Linear(latents, 2 * width) for width in widths if modulated)
        self.layers = nn.ModuleList(nn.ConvTranspose2d(*pair, 4, 2, 1, bias=False) for pair in zip(widths, widths[1:]))
        self.layers.append(nn.ConvTranspose2d(channels, 3, 4, 2, 1))
        for modulation in self.modulations:  # a weak one at first
            nn.init.normal_(modulation.weight, std=0.02)
            nn.init.zeros_(modulation.bias)

    def forward(self, z):
        """float32 (B, 3, 64, 64) in [-1, 1] for standard normal z (B, L)."""
        x = self.first(z)
        for norm, modulation, layer in zip_longest(self.norms, self.modulations, self.layers):
            x = norm(x)
            if modulation:
                scale, shift = modulation(z)[:, :, None, None].chunk(2, dim=1)
                x = x * (1 + scale) + shift
            x = layer(F.relu(x))
        return torch.tanh(x).float()


class Discriminator(nn.Module):
    """How real images look: strided convolutions, leaky ReLU. While it is trained, it augments what it sees.

    channels: width at 32x32, which doubles at 16x16, 8x8 and 4x4.
    """

    def __init__(self, channels):
        super().__init__()
        self.augment = DiffAugment()
        widths = [3, channels, 2 * channels, 4 * channels, 8 * channels]
        self.layers = nn.ModuleList(spectral_norm(nn.Conv2d(*pair, 4, 2, 1)) for pair in zip(widths, widths[1:]))
        self.last = spectral_norm(nn.Conv2d(widths[-1], 1, 4))

    def forward(self, images):
        """Logits, float32 (B,): positive for real, for images (B, 3, 64, 64) in [-1, 1]."""
        x = self.augment(images) if self.training else images
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return self.last(x).flatten().float()


def load_model(path, device="cpu"):
    """The generator in evaluation mode of a file of train.py; UserError when it does not hold one."""
    checkpoint = load_checkpoint(path, "p5_gan", ["config", "ema"])
    with described_by(path):
        model = Generator(**checkpoint["config"])
    load_weights(model, checkpoint["ema"], path)
    return model.to(device, memory_format=torch.channels_last).eval()
