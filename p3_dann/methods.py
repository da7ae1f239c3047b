"""The methods that the tables compare, what each may look at, and the pairs of domains between which they adapt.

A method is a function

    loss, metrics = method(networks, batch, progress, **settings)

networks: a model.Dann in training mode; batch: a batches.Batch of the domains that it `sees`; progress: how much of the
training is done, in [0, 1); settings: keyword arguments that are flags of train.py. loss: the scalar to minimise;
metrics: {name: 0-d tensor}, whose means over some steps make a line of the log.
"""

import contextlib
import itertools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dataset import DOMAINS
from p3_dann.model import GradientReversal

# (source, target) of the scenarios of 2023's assignment and 2020's, and of all that there is to adapt.
PAIRS = (("mnistm", "svhn"), ("mnistm", "usps"))
PAIRS_2020 = (("usps", "mnistm"), ("mnistm", "svhn"), ("svhn", "usps"))
ALL_PAIRS = tuple(dict.fromkeys([*PAIRS, *PAIRS_2020, *itertools.permutations(DOMAINS, 2)]))
METHODS = {}
ADAMATCH_PARTS = ("target", "interpolation", "alignment", "relative", "ramp")


def sees(labelled, unlabelled=(), two_views=False, flags=(), network={}, defaults={}):
    """Enters a method into METHODS by its name, and says what it needs.

    labelled, unlabelled: of which domains, 'source' or 'target', it gets images with labels and images alone.
    two_views: whether of each image it gets a weak and a strong view, which then share their normalisation statistics
    with each other and with all domains. flags: which of train.py's it takes as settings; network: arguments of
    model.Dann; defaults: other defaults of train.py's flags.
    """
    def enter(method):
        method.labelled, method.unlabelled, method.two_views = labelled, tuple(unlabelled), two_views
        method.flags, method.network, method.defaults = tuple(flags), network, defaults
        method.roles = (labelled, *unlabelled)
        METHODS[method.__name__] = method
        return method
    return enter


def run_name(method, source, target):
    """'mnistm_svhn_dann', 'svhn_target_only': the domains that a method sees and its name, which name its files."""
    domains = dict(source=source, target=target)
    return "_".join([*(domains[role] for role in METHODS[method].roles), method])


def predicted_domain(recipe):
    """The domain that a network trained by `recipe` predicts best: the last one that its method sees."""
    return recipe[METHODS[recipe["method"]].roles[-1]]


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
    are for watching alone. The domain loss is the mean over all images; equation 9 adds the two domains' means, so a
    lambda of 1 here is 1/2 there.
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


@sees(labelled="source", unlabelled=["target"], two_views=True, flags=["threshold", "leave_out"],
      network=dict(dropout=0.0, alignment=True), defaults=dict(epochs=60, batch_size=64))
def adamatch(networks, batch, progress, threshold=0.9, leave_out=()):
    """AdaMatch (Berthelot et al., ICLR 2022, section 3): what the network is sure to see in a weak view of a target
    image, it learns to see in the strong view.

    One pass normalises all views of both domains together, another the source alone. The teacher is the network itself:
    its answers to weak views pass no gradient on. A pseudo-label is the likeliest class, as in FixMatch (Sohn et al.
    2020); the paper's loss keeps the aligned probabilities. leave_out: names from ADAMATCH_PARTS, to see what they
    give.
    """
    (target,), (strong, target_strong) = batch.unlabelled, batch.strong
    source, count = torch.cat([batch.images, strong]), len(target)
    together = networks(torch.cat([source, target, target_strong])).float()
    logits = together[:len(source)]
    if "interpolation" not in leave_out:
        with without_recording(networks):
            logits = interpolate(logits, networks(source).float())
    target_logits, strong_logits = together[len(source):].split(count)
    class_loss = 2 * F.cross_entropy(logits, batch.labels.repeat(2))  # the paper adds the means of both views
    with torch.no_grad():
        answers, target_answers = logits[:len(strong)].softmax(dim=1), target_logits.softmax(dim=1)
        follow(networks.source_classes, answers)
        follow(networks.target_classes, target_answers)
        aligned = target_answers
        if "alignment" not in leave_out:
            aligned = align(target_answers, networks.source_classes, networks.target_classes)
        confidence, pseudo_labels = aligned.max(dim=1)
        level = threshold if "relative" in leave_out else relative_threshold(answers, threshold)
        counted = (confidence >= level).float()
    target_loss = (counted * F.cross_entropy(strong_logits, pseudo_labels, reduction="none")).mean()
    weight = 0.0 if "target" in leave_out else 1.0 if "ramp" in leave_out else half_cosine_ramp(progress)
    metrics = dict(loss=class_loss.detach() / 2, accuracy=(answers.argmax(dim=1) == batch.labels).float().mean(),
                   target_loss=target_loss.detach(), counted=counted.mean(),
                   confident=(target_answers.amax(dim=1) > 0.9).float().mean(), weight=class_loss.new_tensor(weight))
    return class_loss + weight * target_loss, metrics


# --- The parts of adamatch ----------------------------------------------------------------------

@contextlib.contextmanager
def without_recording(networks):
    """Within, batch normalisation still takes the batch's statistics, but does not add them to the running ones."""
    norms = [module for module in networks.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def interpolate(first, second):
    """Logits at random places between two of the same images, (N, C): each of them has its own place (section 3.2)."""
    return torch.lerp(second, first, torch.rand_like(first))


@torch.no_grad()
def follow(running, probabilities, decay=0.99):
    """Moves the running class distribution (C,) towards the mean of `probabilities` (N, C) of all processes.

    decay: as slow as ReMixMatch's mean over 128 batches (Berthelot et al. 2020, section 3.1).
    """
    mean = probabilities.mean(dim=0)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    running.lerp_(mean, 1 - decay)


def align(probabilities, source_classes, target_classes):
    """Target probabilities (N, C) as they would be if its classes were as frequent as the source's (section 3.3)."""
    aligned = probabilities * (source_classes / target_classes)
    return aligned / aligned.sum(dim=1, keepdim=True)


def relative_threshold(source_probabilities, threshold=0.9):
    """How sure counts as sure: `threshold` times the mean confidence on the source's weak views (section 3.4)."""
    return threshold * source_probabilities.amax(dim=1).mean()


def half_cosine_ramp(progress):
    """The target loss's weight: from 0 to 1 along half a cosine over the first half of training (section 3.5)."""
    return 0.5 - 0.5 * math.cos(min(math.pi, 2 * math.pi * progress))


# --- The parts of the others --------------------------------------------------------------------

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
