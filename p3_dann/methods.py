"""The methods that the tables compare, what each may look at, and the pairs of domains between which they adapt.

A method is a function

    loss, metrics = method(networks, batch, progress, **settings)

networks: a model.Dann in training mode; batch: a batches.Batch of the domains that it `sees`; progress: how much of the
training is done, in [0, 1); settings: keyword arguments that are flags of train.py. loss: the scalar to minimise;
metrics: {name: 0-d tensor}, whose means over some steps make a line of the log.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from p3_dann.model import GradientReversal

# (source, target) of the assignment's two scenarios.
PAIRS = (("mnistm", "svhn"), ("mnistm", "usps"))
METHODS = {}


def sees(labelled, unlabelled=(), flags=()):
    """Enters a method into METHODS by its name, and says of which domains, 'source' or 'target', it gets images with
    labels and images alone, and which of train.py's flags it takes."""
    def enter(method):
        method.labelled, method.unlabelled, method.flags = labelled, tuple(unlabelled), tuple(flags)
        method.domains = (labelled, *unlabelled)
        METHODS[method.__name__] = method
        return method
    return enter


def run_name(method, source, target):
    """'mnistm_svhn_dann', 'svhn_target_only': the domains that a method sees and its name, which name its files."""
    domains = dict(source=source, target=target)
    return "_".join([*(domains[role] for role in METHODS[method].domains), method])


def predicted_domain(recipe):
    """The domain that a network trained by `recipe` predicts best: the last one that its method sees."""
    return recipe[METHODS[recipe["method"]].domains[-1]]


class Objective(nn.Module):
    """A method's loss as a module, so that DistributedDataParallel sees all that it computes."""

    def __init__(self, networks, method, settings):
        super().__init__()
        self.networks, self.method, self.settings = networks, method, settings

    def forward(self, batch, progress):
        return self.method(self.networks, batch, progress, **self.settings)


# --- The methods --------------------------------------------------------------------------------

@sees(labelled="source")
def source_only(networks, batch, progress):
    """The lower bound: learns the source's digits and never sees the target."""
    return supervised(networks, batch)


@sees(labelled="target")
def target_only(networks, batch, progress):
    """The upper bound: learns the target's digits, and never sees the source."""
    return supervised(networks, batch)


@sees(labelled="source", unlabelled=["target"], flags=["lambda_max"])
def dann(networks, batch, progress, lambda_max=1.0):
    """Domain-adversarial training (Ganin et al., JMLR 2016, equation 9 and figure 1).

    The domains pass one after the other, so each is normalised by its own batch statistics (as in AdaBN, Li et al.
    2016): before the adversary has to do anything, each channel's mean and scale agree. The class logits of the target
    are for watching alone.
    """
    (target,), lambda_ = batch.unlabelled, lambda_schedule(progress, lambda_max)
    features, target_features = networks.features(batch.images), networks.features(target)
    class_loss, metrics = classify(networks, features, batch.labels)
    with torch.no_grad():
        confidence = networks.classifier(target_features).float().softmax(dim=1).amax(dim=1)
    both = GradientReversal.apply(torch.cat([features, target_features]), lambda_)
    domain = networks.discriminator(both).squeeze(1).float()  # positive for 'target'
    of_source, of_target = domain[:len(features)], domain[len(features):]
    domain_loss = (F.softplus(of_source).mean() + F.softplus(-of_target).mean()) / 2
    metrics.update(
        domain_loss=domain_loss.detach(),
        domain_accuracy=((of_source < 0).float().mean() + (of_target > 0).float().mean()) / 2,
        confident=(confidence > 0.9).float().mean(), lambda_=class_loss.new_tensor(lambda_))
    return class_loss + domain_loss, metrics


# --- Their parts --------------------------------------------------------------------------------

def lambda_schedule(progress, lambda_max=1.0, gamma=10.0):
    """lambda at `progress` in [0, 1]: from 0, while the discriminator knows nothing yet, up to `lambda_max`.

    lambda_max * (2 / (1 + exp(-gamma * progress)) - 1), Ganin et al. 2016, section 5.2, with its gamma.
    """
    return lambda_max * (2 / (1 + math.exp(-gamma * progress)) - 1)


def supervised(networks, batch):
    return classify(networks, networks.features(batch.images), batch.labels)


def classify(networks, features, labels):
    """(cross-entropy, metrics) of the class logits of `features`."""
    logits = networks.classifier(features)
    loss = F.cross_entropy(logits.float(), labels)
    return loss, dict(loss=loss.detach(), accuracy=(logits.argmax(dim=1) == labels).float().mean())
