"""The noise predictor eps_theta(x_t, t) of problem 2: it takes the course's weights, UNet.pt, and it can be trained.

It is the CelebA-HQ 256x256 network of Ho et al. 2020 (arXiv 2006.11239, appendix B) as the PyTorch version of Kim
Seonghyeon (github.com/rosinality/denoising-diffusion-pytorch) has it, written anew: six resolutions with two residual
blocks each, self-attention at the fifth resolution and in the middle. That version pads on both sides where it halves
the image and divides the frequencies' exponent by the full width. The names of the weights (down1 ... down18, mid1,
mid2, up1 ... up23) are those of the course's file.

    model = UNet(channel=channel_of(weights))
    model.load_state_dict(weights)
    eps = model(x, t)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

MULTIPLIERS = (1, 1, 2, 2, 4, 4)  # width of each resolution, in units of `channel`
BLOCKS = 2                        # residual blocks per resolution on the way down, one more on the way up
ATTENTION_LEVEL = 4               # self-attention where the image is 16 times smaller
STRIDE = 2 ** (len(MULTIPLIERS) - 1)


def channel_of(state_dict):
    """The `channel` of the UNet that the weights `state_dict` belong to; KeyError for a foreign network."""
    return state_dict["down1.weight"].shape[0]


def groups(channel):
    """Number of groups of every GroupNorm: 32 for the full network, fewer for a narrow one.

    Four channels at least share a group: with one channel a group, norm2 would subtract the time
    vector, which is constant over space, and the block would not know the time.
    """
    return min(32, channel // 4)


def conv(in_channel, out_channel, kernel_size=3, stride=1, gain=1.0):
    layer = nn.Conv2d(in_channel, out_channel, kernel_size, stride, padding=kernel_size // 2)
    return initialise(layer, gain)


def initialise(layer, gain=1.0):
    """Uniform variance scaling with fan_avg, which is Xavier's rule, and no bias.

    Ho et al. start the last layer of every residual branch at practically zero (gain 1e-5, scale 1e-10).
    """
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class TimeEmbedding(nn.Module):
    """Timesteps (B,) to (B, dim): sines, then cosines, of angles from t down to t / 10000 (not quite reached)."""

    def __init__(self, dim):
        super().__init__()
        # On the CPU even where the rest is made on the meta device: arithmetic there loads sympy, for two seconds.
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") * (-math.log(10000) / dim)
        self.register_buffer("inv_freq", exponents.exp())

    def forward(self, time):
        angles = time.to(self.inv_freq.dtype)[:, None] * self.inv_freq
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time between them, around a shortcut."""

    def __init__(self, in_channel, out_channel, time_dim, norm_groups, use_affine_time, dropout):
        super().__init__()
        self.use_affine_time = use_affine_time
        self.norm1 = nn.GroupNorm(norm_groups, in_channel)
        self.conv1 = conv(in_channel, out_channel)
        self.time = nn.Sequential(nn.SiLU(), initialise(nn.Linear(time_dim, out_channel * (1 + use_affine_time))))
        self.norm2 = nn.GroupNorm(norm_groups, out_channel, affine=not use_affine_time)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channel, out_channel, gain=1e-5)
        self.skip = conv(in_channel, out_channel, 1) if in_channel != out_channel else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time(time)[:, :, None, None]
        if self.use_affine_time:
            gamma, beta = time.chunk(2, dim=1)
            h = (1 + gamma) * self.norm2(h) + beta
        else:
            h = self.norm2(h + time)
        return self.conv2(self.dropout(F.silu(h))) + self.skip(x)


class SelfAttention(nn.Module):
    """Every position looks at every position; plain matrix products, for a 256x256 image has only 256 there."""

    def __init__(self, channel, heads, norm_groups):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(norm_groups, channel)
        self.qkv = conv(channel, 3 * channel, 1)
        self.out = conv(channel, channel, 1, gain=1e-5)

    def forward(self, x):
        batch, channel, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, self.heads, 3 * channel // self.heads, height * width)
        query, key, value = qkv.chunk(3, dim=2)  # each (B, heads, channel / heads, positions)
        # The full width scales the scores, whatever the number of heads: the course's network does so.
        weight = (query.transpose(2, 3) @ key / math.sqrt(channel)).softmax(dim=-1)
        return x + self.out((value @ weight.transpose(2, 3)).reshape(x.shape))


class Layer(nn.Module):
    """A residual block, then self-attention where `heads` is not 0."""

    def __init__(self, in_channel, out_channel, time_dim, norm_groups, heads, use_affine_time, dropout):
        super().__init__()
        self.resblocks = ResBlock(in_channel, out_channel, time_dim, norm_groups, use_affine_time, dropout)
        self.attention = SelfAttention(out_channel, heads, norm_groups) if heads else nn.Identity()

    def forward(self, x, time):
        return self.attention(self.resblocks(x, time))


class Upsample(nn.Module):
    """Twice as high and wide, every pixel a square of four."""

    def forward(self, x):
        # At least in float32: before PyTorch 2.1 a GPU cannot do it in bfloat16.
        return F.interpolate(x.to(torch.promote_types(x.dtype, torch.float32)), scale_factor=2).to(x.dtype)


class UNet(nn.Module):
    """model(x, time): the noise in x, of x's shape.

    x: (B, in_channel, H, W) with values about [-1, 1] plus noise, H and W divisible by 32. time: (B,) raw
    timesteps t = 0 ... 999, integer or float, not divided by T. `channel` (a multiple of 4) scales every width;
    the course's network has 128. The other arguments are the course's too, for who builds on them; no script sets them.
    Raises ValueError for other widths and shapes.
    """

    def __init__(self, in_channel=3, channel=128, attn_heads=1, use_affine_time=False, dropout=0):
        super().__init__()
        if channel < 4 or channel % 4 or channel % groups(channel) or attn_heads < 1 or 4 * channel % attn_heads:
            raise ValueError(f"channel must be a multiple of 4 (of 32 above 128) and attn_heads divide 4 * channel; "
                             f"got channel={channel}, attn_heads={attn_heads}")
        self.in_channel = in_channel
        time_dim = 4 * channel

        def layer(in_width, out_width, attention):
            return Layer(in_width, out_width, time_dim, groups(channel), attn_heads if attention else 0,
                         use_affine_time, dropout)

        self.time = nn.Sequential(TimeEmbedding(channel), initialise(nn.Linear(channel, time_dim)), nn.SiLU(),
                                  initialise(nn.Linear(time_dim, time_dim)))
        widths = [channel * multiplier for multiplier in MULTIPLIERS]
        last_level = len(widths) - 1

        down, width = [conv(in_channel, channel)], channel
        pushed = [width]  # widths of the stack of shortcuts, which every layer on the way down pushes to
        for level, out_width in enumerate(widths):
            for _ in range(BLOCKS):
                down.append(layer(width, out_width, level == ATTENTION_LEVEL))
                width = out_width
                pushed.append(width)
            if level < last_level:
                down.append(nn.Sequential(conv(width, width, stride=2)))
                pushed.append(width)

        mid = [layer(width, width, attention=True), layer(width, width, attention=False)]

        up = []
        for level, out_width in reversed(list(enumerate(widths))):
            for _ in range(BLOCKS + 1):
                up.append(layer(width + pushed.pop(), out_width, level == ATTENTION_LEVEL))
                width = out_width
            if level > 0:
                up.append(nn.Sequential(Upsample(), conv(width, width)))

        self.names = {}
        for part, layers in (("down", down), ("mid", mid), ("up", up)):
            self.names[part] = [f"{part}{n}" for n in range(1, len(layers) + 1)]
            for name, module in zip(self.names[part], layers):
                self.add_module(name, module)
        self.out = nn.Sequential(nn.GroupNorm(groups(channel), channel), nn.SiLU(),
                                 conv(channel, in_channel, gain=1e-5))

    def forward(self, x, time):
        if x.dim() != 4 or x.shape[1] != self.in_channel or 0 in x.shape or x.shape[2] % STRIDE or x.shape[3] % STRIDE:
            raise ValueError(f"x must have the shape (B, {self.in_channel}, H, W) with H and W divisible by {STRIDE}; "
                             f"got {tuple(x.shape)}")
        if time.shape != x.shape[:1]:
            raise ValueError(f"time must hold one timestep for each of the {len(x)} images; "
                             f"got the shape {tuple(time.shape)}")
        time = self.time(time)
        stack = []
        for name in self.names["down"]:
            module = self.get_submodule(name)
            x = module(x, time) if isinstance(module, Layer) else module(x)
            stack.append(x)
        for name in self.names["mid"]:
            x = self.get_submodule(name)(x, time)
        for name in self.names["up"]:
            module = self.get_submodule(name)
            x = module(torch.cat([x, stack.pop()], dim=1), time) if isinstance(module, Layer) else module(x)
        return self.out(x)
