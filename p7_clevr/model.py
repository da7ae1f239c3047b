"""The network of scenes, v(x_t, t, y) for a set y of the 24 objects: p1_ddpm's blocks at any number of resolutions.

The set enters every residual block together with the timestep (adaptive group normalisation of the sum of its objects'
embeddings), and with condition="tokens" each place of the lower resolutions asks besides which of the set's objects it
shows (cross-attention). Both are sums over the set, so that neither knows an order.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from files import described_by, load_checkpoint, load_weights
from p1_ddpm.diffusion import noise_schedule
from p1_ddpm.model import Attention, ResidualBlock, timestep_embedding
from p7_clevr.scenes import OBJECTS, SIZE


def scene_schedule(name="cosine", timesteps=1000, shift=1.0):
    """p1_ddpm's alpha-bar_0 ... alpha-bar_T for images with the contrast of ones `shift` times as strong.

    Objects differ from the floor by a fifth of [-1, 1] and drown in noise early: most timesteps would show nothing. To
    multiply signal / noise by `shift` is to multiply the images by it (Chen 2023, arXiv 2301.10972, section 2.2).
    """
    alphas_cumprod = noise_schedule(name, timesteps)
    return shift**2 * alphas_cumprod / (1 - alphas_cumprod + shift**2 * alphas_cumprod)


class ObjectAttention(nn.Module):
    """Cross-attention of every position of a map to the objects of a set, and to one token that is always there."""

    def __init__(self, channels, heads=4):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key, self.value = (nn.Parameter(torch.randn(heads, channels // heads, len(OBJECTS) + 1)) for _ in range(2))
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x, condition):
        b, c, h, w = x.shape
        heads, width, _ = self.key.shape
        q = self.query(self.norm(x)).reshape(b, heads, width, h * w)
        absent = F.pad(condition, (0, 1), value=1)[:, None, None] == 0
        scores = (q.transpose(-2, -1) @ self.key / math.sqrt(width)).masked_fill(absent, -torch.inf)
        return x + self.out((self.value @ scores.softmax(-1).transpose(-2, -1)).reshape(b, c, h, w))


class Level(nn.Module):
    """A residual block, and after it attention to the map's positions and to the set of objects, where it is wanted."""

    def __init__(self, in_channels, out_channels, embedding, dropout, to_positions=False, to_objects=False):
        super().__init__()
        self.block = ResidualBlock(in_channels, out_channels, embedding, dropout)
        self.positions = Attention(out_channels) if to_positions else None
        self.objects = ObjectAttention(out_channels) if to_objects else None

    def forward(self, x, embedding, condition):
        x = self.block(x, embedding)
        x = self.positions(x) if self.positions else x
        return self.objects(x, condition) if self.objects else x


class SceneUNet(nn.Module):
    """v(x_t, t, y) on maps of patches, each resolution half as fine as the one before; self-attention at the lowest.

    channels: widths from the finest resolution to the lowest, multiples of 8. blocks: residual blocks per resolution
    and way. condition: "multi_hot" or "tokens"; either way y is float (B, 24) of zeros and ones, all zeros for
    "anything". ValueError when patches of side `patch` do not halve so often.
    """

    def __init__(self, channels, blocks=1, dropout=0.0, condition="tokens", patch=2):
        super().__init__()
        side = SIZE // patch
        if SIZE % patch or side % 2 ** (len(channels) - 1):
            raise ValueError(f"images of side {SIZE} in patches of {patch} do not give {len(channels)} resolutions")
        if condition not in ("multi_hot", "tokens"):
            raise ValueError(f"unknown kind of condition {condition!r}")
        self.patch, self.image_shape = patch, (3, SIZE, SIZE)
        self.width, embedding = max(channels[0], 64), 4 * max(channels[0], 64)
        self.time = nn.Sequential(nn.Linear(self.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Linear(len(OBJECTS), embedding, bias=False)
        self.first = nn.Conv2d(3 * patch**2, channels[0], 3, padding=1)
        self.place = nn.Parameter(torch.zeros(1, channels[0], side, side))  # the camera never moves

        def level(i, in_channels):
            return Level(in_channels, channels[i], embedding, dropout, to_positions=i == len(channels) - 1,
                         to_objects=condition == "tokens" and side / 2**i <= 16)

        rest = range(len(channels) - 1)
        self.down = nn.ModuleList([nn.ModuleList([level(i, c) for _ in range(blocks)]) for i, c in enumerate(channels)])
        self.downsample = nn.ModuleList([nn.Conv2d(channels[i], channels[i + 1], 3, stride=2, padding=1) for i in rest])
        self.upsample = nn.ModuleList([nn.Conv2d(channels[i + 1], channels[i], 3, padding=1) for i in rest])
        self.up = nn.ModuleList([nn.ModuleList([level(i, 2 * c) for _ in range(blocks)])
                                 for i, c in enumerate(channels)])
        self.last = nn.Sequential(nn.GroupNorm(8, channels[0]), nn.SiLU(),
                                  nn.Conv2d(channels[0], 3 * patch**2, 3, padding=1))
        nn.init.zeros_(self.last[-1].weight)

    def null(self, condition):
        """The condition of the same shape that leaves everything open (Ho & Salimans 2022)."""
        return torch.zeros_like(condition)

    def forward(self, x, t, condition):
        """v, float32, for noisy images x (B, 3, 64, 64) at timesteps t (B,) in 1 ... T under their sets (B, 24)."""
        embedding = F.silu(self.time(timestep_embedding(t, self.width)) + self.label(condition))
        h = self.first(F.pixel_unshuffle(x, self.patch)) + self.place
        skips = []
        for i, levels in enumerate(self.down):
            h = self.downsample[i - 1](h) if i else h
            for level in levels:
                h = level(h, embedding, condition)
                skips.append(h)
        for i in reversed(range(len(self.up))):
            for level in self.up[i]:
                h = level(torch.cat([h, skips.pop()], dim=1), embedding, condition)
            if i:  # in float32: before PyTorch 2.1 a GPU cannot do it in bfloat16
                h = F.interpolate(h.float(), scale_factor=2.0, mode="nearest").to(h.dtype)
                h = self.upsample[i - 1](h)
        return F.pixel_shuffle(self.last(h), self.patch).float()


def load_model(path, device="cpu", weights="ema"):
    """(network in evaluation mode, alphas_cumprod) of a checkpoint of train.py; UserError when it does not hold them.

    weights: 'ema', the moving average, or 'model', those of the last training step, which only a last.pt holds.
    """
    checkpoint = load_checkpoint(path, "p7_clevr", ["config", weights])
    with described_by(path):
        model = SceneUNet(**checkpoint["config"]["network"])
        alphas_cumprod = scene_schedule(**checkpoint["config"]["schedule"])
    load_weights(model, checkpoint[weights], path)
    # The layout in which convolutions are fastest on a CPU.
    return model.to(device, memory_format=torch.channels_last).eval(), alphas_cumprod
