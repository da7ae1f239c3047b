"""How a trained network predicts, and the normalisation statistics with which it does."""

import math
import sys

import torch
from torch import nn

from dataset import DOMAINS, load_split
from p3_dann.augment import standardize, views
from utils import UserError, in_batches, require_finite


@torch.no_grad()
def adapt_statistics(model, images, batch_size=512):
    """Sets the normalisation statistics of `model` to those of the unlabelled `images`, uint8 (N, 3, 28, 28), N > 1.

    Training normalises each domain by its own batches. At prediction time these statistics stand in for the batch's, so
    that a prediction depends on one image only. It also fits the statistics to the EMA weights.
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
    """What `function` returns for batches of uint8 `images` (N, 3, 28, 28) on the model's device: float32 on the CPU.

    Puts the model into evaluation mode itself: in training mode an answer would depend on its batch. UserError when a
    result is not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    parts = in_batches(lambda batch: function(batch.to(device)).float().cpu(), images, batch_size)
    return require_finite(torch.cat([part for _, part in parts]), [f"the result for image {i + 1}"
                                                                   for i in range(len(images))])


def predict(model, images, batch_size=100, average=True):
    """Class probabilities (N, 10) of uint8 `images` (N, 3, 28, 28): their mean over `views`, or of one plain view."""
    def probabilities(batch):
        looks = list(views(batch)) if average else [standardize(batch)]
        return sum(model(look).softmax(dim=1) for look in looks) / len(looks)
    return outputs(model, images, probabilities, batch_size)


def accuracy(model, images, labels, average=True):
    """The share of uint8 `images` (N, 3, 28, 28) that are predicted to show their labels (N,), in %."""
    return 100 * (predict(model, images, average=average).argmax(dim=1) == labels).float().mean().item()


def validation_accuracy(model, data_dir):
    """{domain: accuracy in %} on the validation digits of every domain that has labels in `data_dir`."""
    percent = {}
    for domain in DOMAINS:
        try:
            images, labels, _ = load_split(data_dir, domain, "val")
        except UserError as error:
            print(f"no validation accuracy for {domain}: {error}", file=sys.stderr)
        else:
            percent[domain] = round(accuracy(model, images, labels), 2)
    return percent
