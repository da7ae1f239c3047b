"""The variational autoencoder of 64x64 faces (Kingma & Welling 2014): a residual encoder and its mirror image.

Both add to what eigenfaces (Turk & Pentland 1991) say, the linear autoencoder of least error, which a principal
component analysis finds in seconds: a training begins where a network alone is after hours on a CPU. Their blocks need
no normalisation, as each begins as its shortcut (Zhang et al. 2019, "Fixup"). Resolution changes by 2x2 patches,
between blocks and at both ends, so nothing is computed at 64x64.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from files import described_by, load_checkpoint, load_weights
from utils import UserError

CHECKPOINT = Path(__file__).parent / "checkpoints/vae.pt"

PIXELS = 3 * 32 * 32  # of eigenfaces


def float32(device):
    """A context without mixed precision: bfloat16 rounds a mean latent by more than its posterior's deviation."""
    return torch.autocast(device.type, enabled=False)


class ResidualBlock(nn.Module):
    """ReLU, conv, ReLU, conv; plus the shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class VAE(nn.Module):
    """q(z | x) and p(x | z) for images of 64x64: what eigenfaces say, and what the networks add to it.

    latents: the length L of z. channels: the networks' width at 32x32, which doubles at 16x16, 8x8 and 4x4.
    """

    def __init__(self, latents, channels):
        super().__init__()
        self.latents = latents
        self.register_buffer("average", torch.full((PIXELS,), 0.5))
        self.register_buffer("basis", torch.zeros(PIXELS, latents))
        self.register_buffer("std", torch.ones(latents))
        widths = [channels, 2 * channels, 4 * channels, 8 * channels]
        encoder = [nn.PixelUnshuffle(2), nn.Conv2d(12, channels, 3, padding=1), nn.ReLU()]
        for narrow, wide in zip(widths, widths[1:]):
            encoder += [nn.Conv2d(narrow, wide, 2, stride=2), ResidualBlock(wide)]
        self.encoder = nn.Sequential(*encoder, nn.ReLU(), nn.Flatten(), nn.Linear(16 * widths[-1], 2 * latents))
        decoder = [nn.Linear(latents, 16 * widths[-1]), nn.Unflatten(1, (widths[-1], 4, 4)), ResidualBlock(widths[-1])]
        for narrow, wide in zip(widths[-2::-1], widths[:0:-1]):
            decoder += [nn.Conv2d(wide, 4 * narrow, 1), nn.PixelShuffle(2), ResidualBlock(narrow)]
        self.decoder = nn.Sequential(*decoder, nn.ReLU(), nn.Conv2d(channels, 12, 3, padding=1), nn.PixelShuffle(2))
        for last in (self.encoder[-1], self.decoder[-2]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @torch.no_grad()
    def set_eigenfaces(self, images):
        """Makes `average`, `basis` and each direction's `std` those of uint8 images (N, 3, 64, 64), N above L;
        UserError when so many of them are the same that they vary in fewer directions.

        These are principal components at 32x32. The model is then nearly probabilistic PCA (Tipping & Bishop 1999):
        the posterior's variance is that of a linear decoder with the error that is left, its mean is not shrunk.
        """
        x = F.avg_pool2d(images.float() / 255, 2).flatten(1)
        self.average.copy_(x.mean(dim=0))
        _, singular, basis = torch.pca_lowrank(x - self.average, self.latents, center=False)
        self.basis.copy_(basis)
        self.std.copy_(singular / len(x) ** 0.5)
        if self.std.min() < 1e-4:  # `encode` divides by it
            raise UserError(f"--latents {self.latents} are too many: too few of the training faces differ; name "
                            "others, or take fewer")
        error = (x - self.average).square().mean() - self.std.square().sum() / PIXELS
        # A pixel at 32x32 stands for four at 64x64.
        self.encoder[-1].bias[self.latents:] = (4 * self.std.square() / error).log()

    def encode(self, x):
        """(mean, log variance) of q(z | x), each (B, L), for images x (B, 3, 64, 64) in [0, 1].

        As in the linear model, the posterior's precision is the prior's, 1, and what the image adds to it, whose log
        the network tells: so no step of a training can make the variance larger than 1.
        """
        mean, log_precision = self.encoder(2 * x - 1).float().chunk(2, dim=1)
        with float32(x.device):
            linear = (F.avg_pool2d(x, 2).flatten(1) - self.average) @ (self.basis / self.std)
        return linear + mean, -F.softplus(log_precision)

    def decode(self, z):
        """The mean of p(x | z), float32 (B, 3, 64, 64) in [0, 1] but for what it oversteps, for z (B, L)."""
        with float32(z.device):
            linear = (self.average + z @ (self.basis * self.std).T).view(-1, 3, 32, 32)
        linear = F.interpolate(linear, scale_factor=2, mode="bilinear", align_corners=False)
        return linear + self.decoder(z).float()

    def forward(self, x, noise):
        """(decoded image, mean, log variance) for images x and standard normal noise (B, L).

        z = mean + exp(log variance / 2) noise: the gradient passes through the sample (Kingma & Welling, section 2.4).
        """
        mean, log_variance = self.encode(x)
        return self.decode(mean + (log_variance / 2).exp() * noise), mean, log_variance


def load_model(path, device="cpu"):
    """(network in evaluation mode, what training found about its latents: see latents.py) of a file of train.py."""
    checkpoint = load_checkpoint(path, "p4_vae", ["config", "latents", "ema"])
    with described_by(path):
        model = VAE(**checkpoint["config"])
    load_weights(model, checkpoint["ema"], path)
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint["latents"]
