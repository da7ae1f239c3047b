"""What a method may see: its domains' images in memory, and the batches that are drawn from them."""

from typing import NamedTuple

import torch

from dataset import load_split
from p3_dann.augment import augment, weakly
from utils import UserError


class Batch(NamedTuple):
    """Images are float (B, 1, 28, 28), augmented as their domain is and standardized; the weak views, where there are
    two."""
    images: torch.Tensor  # of the domain that comes with labels
    labels: torch.Tensor  # theirs, int64 (B,)
    unlabelled: list  # images of each domain that comes without
    strong: list = ()  # strong views of the images of all domains, the labelled first, for the methods of two views


def load_training_images(data_dir, method, domains):
    """({domain: uint8 images} that `method` sees, the labelled ones first; their labels); domains: {role: domain}.

    The only place where training reads the data set, and so the proof that dann cannot know the target's labels, and
    source_only not even its images.
    """
    labelled, labels, _ = load_split(data_dir, domains[method.labelled], "train")
    images = {domains[method.labelled]: labelled}
    for role in method.unlabelled:
        images[domains[role]] = load_split(data_dir, domains[role], "train", labelled=False)[0]
    for domain, seen in images.items():
        if len(seen) < 2:
            raise UserError(f"{data_dir} holds a single training image of {domain}, and batch normalisation needs two; "
                            "name a --data_dir with more")
    return images, labels


def balanced_draw(labels, count):
    """Indices of `count` of the labels, int64 (N,), with replacement: every class is as likely as another."""
    labels = labels.cpu()
    return torch.multinomial(1 / labels.bincount()[labels], count, replacement=True)


def draw_batch(images, labels, count, without=(), two_views=False):
    """A Batch of `count` images of each domain, drawn with replacement from what load_training_images returns.

    The labelled ones come from all classes alike: how often a digit occurs in house numbers or postcodes, ones most of
    all, is a habit of its domain, which neither the classifier nor adamatch's alignment has to learn.
    without: names from augment.PARTS, the parts of the augmentation to leave out. two_views: see methods.sees.
    """
    chosen, views, strong = [], [], []
    for domain, seen in images.items():
        indices = torch.randint(len(seen), (count,)) if chosen else balanced_draw(labels, count)
        chosen.append(indices.to(labels.device))
        drawn = seen[chosen[-1]]
        if two_views:
            views.append(weakly(drawn))
            strong.append(augment(drawn, domain, without, strong=True))
        else:
            views.append(augment(drawn, domain, without))
    views, strong = ([view.contiguous(memory_format=torch.channels_last) for view in some] for some in (views, strong))
    return Batch(views[0], labels[chosen[0]], views[1:], strong)
