"""The conditional network of problem 1, v(x_t, t, y): a compact UNet (Ho et al. 2020, appendix B).

It works on patches: with 2x2 patches a 28x28 RGB image becomes a 14x14 map with 12 channels and back (space to depth),
which costs a quarter of a UNet at full resolution and shows no seams. Time and condition enter every residual block
through adaptive group normalisation (Dhariwal & Nichol 2021, section 3.1).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from files import described_by, load_checkpoint, load_weights
from p1_ddpm.diffusion import noise_schedule


def timestep_embedding(t, width):
    """Sinusoidal embedding (Vaswani et al. 2017, section 3.5) of t, shape (B,), as (B, width) float32."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm scaled and shifted by the embedding, SiLU, dropout, conv; plus the shortcut."""

    def __init__(self, in_channels, out_channels, embedding, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = nn.Linear(embedding, 2 * out_channels)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # every block starts as its shortcut

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.conv2(self.dropout(F.silu(h))) + self.shortcut(x)


class Attention(nn.Module):
    """Self-attention over all positions of a feature map, with a shortcut."""

    def __init__(self, channels, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).unbind(1)
        # Plain products: at 49 positions they are faster than the fused kernel, forwards and backwards.
        weights = torch.softmax(q.transpose(-2, -1) @ k / math.sqrt(c // self.heads), dim=-1)
        return x + self.out((v @ weights.transpose(-2, -1)).reshape(b, c, h, w))


class UNet(nn.Module):
    """v(x_t, t, y) on maps of patches at two resolutions, the lower one half as fine and with attention.

    channels: widths of the two resolutions, multiples of 8. blocks: residual blocks per resolution and way.
    y: one of num_classes labels, int64 (B,), or num_classes itself for "no label".
    image_size: side of the images, a multiple of 2 patch. ValueError when one of these does not fit.
    """

    def __init__(self, channels, blocks=1, dropout=0.0, num_classes=10, patch=2, image_channels=3, image_size=28):
        super().__init__()
        high, low = channels
        if image_size % (2 * patch):
            raise ValueError(f"images of side {image_size} do not halve into patches of {patch} at two resolutions")
        self.num_classes, self.patch = num_classes, patch
        self.image_shape = (image_channels, image_size, image_size)
        self.width, embedding = high, 4 * high
        self.time = nn.Sequential(nn.Linear(high, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(num_classes + 1, embedding)

        def residual(in_channels, out_channels):
            return ResidualBlock(in_channels, out_channels, embedding, dropout)

        depth = image_channels * patch**2
        self.first = nn.Conv2d(depth, high, 3, padding=1)
        self.down_high = nn.ModuleList([residual(high, high) for _ in range(blocks)])
        self.downsample = nn.Conv2d(high, low, 3, stride=2, padding=1)
        self.down_low = nn.ModuleList([residual(low, low) for _ in range(blocks)])
        self.middle = nn.ModuleList([residual(low, low), Attention(low), residual(low, low)])
        self.up_low = nn.ModuleList([residual(2 * low, low) for _ in range(blocks)])
        self.upsample = nn.Conv2d(low, high, 3, padding=1)
        self.up_high = nn.ModuleList([residual(2 * high, high) for _ in range(blocks)])
        self.last = nn.Sequential(nn.GroupNorm(8, high), nn.SiLU(), nn.Conv2d(high, depth, 3, padding=1))
        nn.init.zeros_(self.last[-1].weight)

    def null(self, y):
        """As many labels "no label" (classifier-free guidance, Ho & Salimans 2022)."""
        return torch.full_like(y, self.num_classes)

    def forward(self, x, t, y):
        """v, float32, for noisy images x (B, C, H, W) at timesteps t (B,) in 1 ... T under their labels."""
        embedding = F.silu(self.time(timestep_embedding(t, self.width)) + self.label(y))
        h = self.first(F.pixel_unshuffle(x, self.patch))
        skips = []
        for block in self.down_high:
            h = block(h, embedding)
            skips.append(h)
        h = self.downsample(h)
        for block in self.down_low:
            h = block(h, embedding)
            skips.append(h)
        before, attention, after = self.middle
        h = after(attention(before(h, embedding)), embedding)
        for block in self.up_low:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        # In float32: before PyTorch 2.1 a GPU cannot do it in bfloat16.
        h = self.upsample(F.interpolate(h.float(), scale_factor=2.0, mode="nearest").to(h.dtype))
        for block in self.up_high:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.last(h), self.patch).float()


def load_model(path, device="cpu", weights="ema"):
    """(network in evaluation mode, alphas_cumprod) of a checkpoint of train.py; UserError when it does not hold them.

    weights: 'ema', or 'model', those of the last training step, which only a last.pt holds.
    """
    checkpoint = load_checkpoint(path, "p1_ddpm", ["config", weights])
    with described_by(path):
        network = dict(checkpoint["config"]["network"])
        network.pop("condition", None)  # some checkpoints name it; it is always "class"
        model = UNet(**network)
        alphas_cumprod = noise_schedule(**checkpoint["config"]["schedule"])
    load_weights(model, checkpoint[weights], path)
    # The layout in which convolutions are fastest on a CPU.
    return model.to(device, memory_format=torch.channels_last).eval(), alphas_cumprod
