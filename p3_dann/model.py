"""The network of domain-adversarial training (DANN: Ganin et al., JMLR 2016) and how it predicts.

            +--> classifier ----------------> which digit?     learns to tell the digits apart
    features
            +--> gradient reversal --> discriminator --> source or target?

The discriminator learns to tell the domains apart. Its gradient reaches the features with its sign
reversed, so they learn to make the domains look the same.
"""

import math

import torch
from torch import nn

from p3_dann.augment import standardize, views
from utils import UserError, in_batches, load_checkpoint


class GradientReversal(torch.autograd.Function):
    """R(x) = x going forward, dR/dx = -lambda I going backward (Ganin et al. 2016, section 4.2)."""

    @staticmethod
    def forward(ctx, x, lambda_):
        ctx.lambda_ = lambda_
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.lambda_ * gradient, None


def lambda_schedule(progress, lambda_max=1.0, gamma=10.0):
    """lambda at `progress` in [0, 1]: from 0, while the discriminator knows nothing yet, up to `lambda_max`.

    lambda_max * (2 / (1 + exp(-gamma * progress)) - 1), Ganin et al. 2016, section 5.2, with its gamma.
    """
    return lambda_max * (2 / (1 + math.exp(-gamma * progress)) - 1)


def convolution(in_channels, out_channels):
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
                         nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Dann(nn.Module):
    """Feature extractor, label classifier and domain discriminator for 28x28 digits; one for every scenario.

    widths: channels at 28x28, 14x14 and 7x7. num_features: size of the feature vector.
    Inputs are what `standardize` returns.
    """

    def __init__(self, widths=(32, 64, 128), num_features=256, num_classes=10, dropout=0.5):
        super().__init__()
        self.config = dict(widths=list(widths), num_features=num_features, num_classes=num_classes, dropout=dropout)
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

    def forward(self, source, target=None, lambda_=0.0):
        """Class logits (N, 10) of `source`; with `target`, (class logits of source, of target, domain logits of
        source, of target).

        Domain logits are (N,), positive for 'target'. The target's class logits carry no gradient: they are for
        watching only. The domains pass one after the other, so each is normalised by its own batch statistics (as
        in AdaBN, Li et al. 2016): before the adversary has to do anything, each channel's mean and scale agree.
        """
        features = self.features(source)
        logits = self.classifier(features)
        if target is None:
            return logits
        target_features = self.features(target)
        with torch.no_grad():
            target_logits = self.classifier(target_features)
        both = GradientReversal.apply(torch.cat([features, target_features]), lambda_)
        domain = self.discriminator(both).squeeze(1)
        return logits, target_logits, domain[:len(source)], domain[len(source):]


@torch.no_grad()
def adapt_statistics(model, images, batch_size=512):
    """Sets the normalisation statistics of `model` to those of the unlabelled `images`, uint8 (N, 3, 28, 28).

    Training normalises each domain by its own batches. At prediction time these statistics stand in for the batch's, so
    that a prediction depends on one image only. It also fits the statistics to the averaged weights.
    """
    device = next(model.parameters()).device
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
    model.train()
    batches = math.ceil(len(images) / batch_size)
    for first in range(batches):  # strided: every batch has all classes even when the images are sorted by class
        model.features(standardize(images[first::batches].to(device)))
    for norm in norms:
        norm.momentum = 0.1
    model.eval()


@torch.no_grad()
def outputs(model, images, function, batch_size=100):
    """What `function` returns for batches of uint8 `images` (N, 3, 28, 28) on the model's device, on the CPU as float32.

    Puts the model into evaluation mode itself: in training mode an answer would depend on its batch.
    """
    model.eval()
    device = next(model.parameters()).device
    parts = in_batches(lambda batch: function(batch.to(device)).float().cpu(), images, batch_size)
    return torch.cat([part for _, part in parts])


def predict(model, images, batch_size=100, average=True):
    """Class probabilities (N, 10) of uint8 `images` (N, 3, 28, 28): their mean over `views`, or of one plain view."""
    def probabilities(batch):
        looks = list(views(batch)) if average else [standardize(batch)]
        return sum(model(look).softmax(dim=1) for look in looks) / len(looks)
    return outputs(model, images, probabilities, batch_size)


def load_model(path, device="cpu"):
    """(network in evaluation mode, its recipe: a dict with 'source', 'target', 'mode', ...) of a model.pt of train.py.

    UserError when the file is missing, damaged or something else.
    """
    checkpoint = load_checkpoint(path, "p3_dann", ["config", "recipe", "ema"])
    try:
        model = Dann(**checkpoint["config"])
        model.load_state_dict(checkpoint["ema"])
    except (TypeError, RuntimeError):
        raise UserError(f"{path} does not hold this network's averaged weights alone; name a model.pt of train.py")
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint["recipe"]
