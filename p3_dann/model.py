"""The networks of domain-adversarial training (DANN: Ganin et al., JMLR 2016); methods.py says how they learn.

            +--> classifier ----------------> which digit?     learns to tell the digits apart
    features
            +--> gradient reversal --> discriminator --> source or target?

The discriminator learns to tell the domains apart. Its gradient reaches the features with its sign
reversed, so they learn to make the domains look the same.
"""

import torch
from torch import nn

from files import described_by, load_checkpoint, load_weights
from utils import UserError


class GradientReversal(torch.autograd.Function):
    """R(x) = x going forward, dR/dx = -lambda I going backward (Ganin et al. 2016, section 4.2)."""

    @staticmethod
    def forward(ctx, x, lambda_):
        ctx.lambda_ = lambda_
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.lambda_ * gradient, None


def convolution(in_channels, out_channels):
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
                         nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Dann(nn.Module):
    """Feature extractor, label classifier and domain discriminator for 28x28 digits; one for every scenario.

    widths: channels at 28x28, 14x14 and 7x7. num_features: size of the feature vector.
    features: float (N, 1, 28, 28), what `augment.standardize` returns, to (N, num_features); classifier: features to
    logits (N, num_classes); discriminator: features to logits (N, 1), positive for 'target'. alignment: whether to
    keep the running class distributions (num_classes,) that adamatch aligns.
    """

    def __init__(self, widths=(32, 64, 128), num_features=256, num_classes=10, dropout=0.5, alignment=False):
        super().__init__()
        self.config = dict(widths=list(widths), num_features=num_features, num_classes=num_classes, dropout=dropout,
                           alignment=alignment)
        stages, channels = [], 1
        for width in widths:
            stages += [convolution(channels, width), convolution(width, width), nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(
            *stages, nn.Flatten(),
            # Not an average over places: in a row of digits it matters which one is in the middle.
            nn.Linear(9 * channels, num_features, bias=False), nn.BatchNorm1d(num_features), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(num_features, num_classes))
        self.discriminator = nn.Sequential(nn.Linear(num_features, 128), nn.ReLU(inplace=True),
                                           nn.Linear(128, 128), nn.ReLU(inplace=True), nn.Linear(128, 1))
        if alignment:
            for name in ("source_classes", "target_classes"):
                self.register_buffer(name, torch.full((num_classes,), 1 / num_classes))

    def forward(self, images):
        """Class logits (N, num_classes)."""
        return self.classifier(self.features(images))


def load_model(path, device="cpu"):
    """(network in evaluation mode, its recipe: a dict with 'source', 'target', 'method', ...) of train.py's model.pt.

    UserError when the file is missing, damaged or something else.
    """
    checkpoint = load_checkpoint(path, "p3_dann", ["config", "recipe", "ema"])
    if "optimizer" in checkpoint:
        raise UserError(f"{path} is for --resume and lacks the normalisation statistics of the domain that is "
                        "predicted; name the model.pt beside it")
    with described_by(path):
        model = Dann(**checkpoint["config"])
    load_weights(model, checkpoint["ema"], path)
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint["recipe"]
