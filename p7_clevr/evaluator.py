"""The course's evaluator of generated scenes, and networks of our own in its place.

    Evaluator().eval(images, labels)    # images (B, 3, 64, 64) in [-1, 1], multi-hot labels (B, 24) -> accuracy

A grader is one of two networks that see which of the 24 objects an image shows:
    resnet18    the course's: ResNet-18 with Linear(512, 24) and a sigmoid
    encoder     a small one, which may know how noisy its image is

Ours are checkpoints of train_evaluator.py; the course's checkpoint.pth, with the weights under the key `model`, can be
named wherever they are.
    checkpoints/evaluator.pth   resnet18: what the accuracies are measured with, and what guides
    checkpoints/judge.pth       encoder: takes no part in guidance and tells what guidance gains
    checkpoints/noisy.pth       encoder: trained on noisy images, guides in the evaluator's place
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from files import load_torch, load_weights
from p1_ddpm.model import ResidualBlock, timestep_embedding
from p7_clevr.scenes import OBJECTS

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


class ResNet18(ResNet):
    """The course's network: probabilities (B, 24) of images x (B, 3, 64, 64) in [-1, 1]."""

    def __init__(self):
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Sequential(nn.Linear(512, len(OBJECTS)), nn.Sigmoid())

    def features(self, x, t=None):
        """The 512 values before the last layer; the network knows nothing of t."""
        return nn.Sequential(*list(self.children())[:-1])(x).flatten(1)

    def logits(self, x, t=None):
        """What the sigmoid makes probabilities of, (B, 24)."""
        return self.fc[0](self.features(x))

    def forward(self, x, t=None):
        return self.logits(x).float().sigmoid()  # in bfloat16 it would be 1 from a logit of 6.3 on, without a gradient


class Encoder(nn.Module):
    """p1_ddpm's residual blocks on patches of 2x2 at three resolutions, then the mean over all positions.

    Knows the timestep of noisy images (Dhariwal & Nichol 2021, section 4.1); clean ones have 0.
    """

    def __init__(self, channels=(32, 64, 128), embedding=128):
        super().__init__()
        self.width = channels[0]
        self.time = nn.Sequential(nn.Linear(self.width, embedding), nn.SiLU())
        self.first = nn.Conv2d(12, self.width, 3, padding=1)
        self.blocks = nn.ModuleList([ResidualBlock(width, width, embedding, 0.0) for width in channels])
        self.downsamples = nn.ModuleList([nn.Conv2d(high, low, 3, stride=2, padding=1)
                                          for high, low in zip(channels, channels[1:])])
        self.last = nn.Sequential(nn.GroupNorm(8, channels[-1]), nn.SiLU())
        self.fc = nn.Linear(channels[-1], len(OBJECTS))

    def features(self, x, t=None):
        """The last block's channels, averaged over the positions: (B, 128)."""
        t = torch.zeros(len(x), device=x.device) if t is None else t
        embedding = self.time(timestep_embedding(t, self.width))
        h = self.first(F.pixel_unshuffle(x, 2))
        for i, block in enumerate(self.blocks):
            h = block(self.downsamples[i - 1](h) if i else h, embedding)
        return self.last(h).mean(dim=(2, 3))

    def logits(self, x, t=None):
        """Unnormalised log-odds (B, 24) that x (B, 3, 64, 64), at timesteps t (B,) or clean, shows each object."""
        return self.fc(self.features(x, t))

    def forward(self, x, t=None):
        return self.logits(x, t).float().sigmoid()


NETWORKS = {"resnet18": ResNet18, "encoder": Encoder}


def load_grader(path, device="cpu"):
    """(network in evaluation mode, its config) of a file of train_evaluator.py, or the course's checkpoint.pth.

    config: a dict, with the noise schedule when the network was trained on noisy images. UserError when the file does
    not hold such weights.
    """
    content = load_torch(path, "evaluator")
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or config.get("network") not in [*NETWORKS]:  # a generator's is a dict
        config = {"network": "resnet18"}
    model = NETWORKS[config["network"]]()
    load_weights(model, content, path)
    return model.to(device).eval().requires_grad_(False), config


def top_k_hits(scores, labels):
    """How many of each image's labels are among its k highest scores, k the number of its labels: int64 (B,).

    scores and multi-hot labels: (B, 24).
    """
    # The rank of every score in its row, from 0 for the highest; on equal ones the lower number comes first.
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ((ranks < labels.sum(1, keepdim=True)) & (labels > 0)).sum(1)


class Evaluator:
    """What the course's class evaluation_model is: made from a file, asked by `eval`."""

    def __init__(self, checkpoint=CHECKPOINTS / "evaluator.pth", device="cpu"):
        self.device = torch.device(device)
        self.network, self.config = load_grader(checkpoint, self.device)
        if "schedule" in self.config:
            raise UserError(f"{checkpoint} was trained on noisy images and cannot grade clean ones; name another one")

    @torch.no_grad()
    def scores(self, images, batch_size=256):
        """Log-odds (N, 24) on the CPU for images (N, 3, 64, 64) in [-1, 1]."""
        return torch.cat([self.network.logits(batch.to(self.device)).cpu() for batch in images.split(batch_size)])

    @torch.no_grad()
    def features(self, images, batch_size=256):
        """The network's features (N, D) on the CPU for images (N, 3, 64, 64) in [-1, 1]."""
        return torch.cat([self.network.features(batch.to(self.device)).cpu() for batch in images.split(batch_size)])

    def eval(self, images, labels):
        """The share of all labels that are hit, see top_k_hits: an image of three objects counts three times."""
        labels = torch.as_tensor(labels).float().cpu()
        return top_k_hits(self.scores(images), labels).sum().item() / labels.sum().item()
