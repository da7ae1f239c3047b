"""Judges a folder of generated digits: are they right, faithful to real ones, varied, and not copies?

    python3 p1_ddpm/evaluate.py out_dir [--data_dir hw2_data]     # or 2024's out_dir, which holds mnistm and svhn

- accuracy per digit by digit_classifier.py's network of the domain, and the line that the course's script prints;
- accuracy by each of a panel of graders of MNIST-M, trained as a course would: their mean, and the least of them;
- fidelity: the Frechet distance between generated and real validation digits (Heusel et al. 2017, equation 6), as in
  FID but in that network's 64 penultimate features. Even real digits do not reach 0 in a finite sample, so it is told
  as a ratio to its floor: the same distance for as many real training digits, with as many of each class, averaged
  over ten draws of them;
- diversity: the mean pairwise distance of the images of a class, divided by that of real validation digits;
- the distance of each image to its nearest neighbour among the training images, beside the same for real
  validation digits: a model that copies its training images would be far closer to them. Copies are images whose
  nearest training image is less than a third as far as the second nearest (Yoon et al. 2023).

Distances between images are root mean squares over pixels in [0, 255]. Takes about half a minute on 2 CPU cores.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, nonempty_path, run

import numpy as np
import torch

from dataset import DOMAIN_NAMES, load_split
from digit_classifier import (CHECKPOINTS, PANEL, classify, course_line, domain_folders, frechet_distance,
                              load_classifier, load_panel, read_generated)


def rms_distances(a, b):
    """Root mean square pixel differences, (len(a), len(b)), between two sets of images, rows of `as_rows`."""
    return torch.cdist(a, b) / a.shape[1] ** 0.5


def as_rows(images):
    """uint8 images (N, C, H, W) as a float tensor (N, C H W)."""
    return images.flatten(1).float()


def diversity(images):
    """Mean distance over all pairs of different uint8 images."""
    rows = as_rows(images)
    return (rms_distances(rows, rows).sum() / (len(rows) * (len(rows) - 1))).item()


def same_class_draw(labels, wanted, rng):
    """Indices into `labels` of a random subset with as many of each digit as `wanted` has, or all there are."""
    return np.concatenate([rng.permutation(np.flatnonzero(labels.numpy() == digit))[:int((wanted == digit).sum())]
                           for digit in wanted.unique().tolist()])


class Judge:
    """The real digits of a domain and its classifiers, loaded once; call it with generated images and their labels.

    `panel` are MNIST-M's graders; elsewhere the classifier is a panel of one.
    """

    def __init__(self, data_dir, domain="mnistm", classifier=None, panel=PANEL):
        if not classifier and domain not in CHECKPOINTS:
            raise UserError(f"there is no grader of {DOMAIN_NAMES[domain]}, only of {' and '.join(CHECKPOINTS)}")
        self.classifier = load_classifier(classifier or CHECKPOINTS[domain])
        self.panel = load_panel(panel) if domain == "mnistm" else [self.classifier]
        self.train_images, self.train_labels, _ = load_split(data_dir, domain, "train")
        self.val_images, self.val_labels, _ = load_split(data_dir, domain, "val")
        if min(len(self.train_images), len(self.val_images)) < 2:
            raise UserError(f"{data_dir} holds a single training or validation digit of {domain}; name one with more")
        self.val_features, _ = classify(self.classifier, self.val_images)
        self.train_features, _ = classify(self.classifier, self.train_images)

    def floor(self, labels, draws=10):
        """Frechet distance of real training digits with the classes of `labels`: (mean, standard deviation)."""
        rng = np.random.default_rng(0)
        distances = [frechet_distance(self.train_features[same_class_draw(self.train_labels, labels, rng)],
                                      self.val_features) for _ in range(draws)]
        return float(np.mean(distances)), float(np.std(distances))

    def __call__(self, images, labels, neighbours=True):
        """A dict of measures for uint8 images (N, 3, 28, 28) that should show the digits `labels` (N,)."""
        features, predicted = classify(self.classifier, images)
        right = (predicted == labels).float()
        digits = labels.unique().tolist()
        floor, floor_std = self.floor(labels)
        measures = dict(
            images=len(images), correct=int(right.sum()), accuracy=right.mean().item(),
            panel=[(classify(grader, images)[1] == labels).float().mean().item() for grader in self.panel],
            accuracy_per_digit={d: right[labels == d].mean().item() for d in digits},
            frechet=frechet_distance(features, self.val_features), frechet_floor=floor, frechet_floor_std=floor_std,
            diversity={d: diversity(images[labels == d]) / diversity(self.val_images[self.val_labels == d])
                       for d in digits if (labels == d).sum() > 1})
        if neighbours:
            rng = np.random.default_rng(0)
            real = self.val_images[same_class_draw(self.val_labels, labels, rng)]
            for name, judged in (("generated", images), ("real", real)):
                nearest, second = self.nearest(judged).unbind(1)
                measures[f"nearest_{name}"] = nearest
                measures[f"copies_{name}"] = (nearest < second / 3).float().mean().item()
        return measures

    def nearest(self, images):
        """Distances of each image to its nearest and its second nearest training image, (N, 2)."""
        train_rows = as_rows(self.train_images)
        return torch.cat([rms_distances(batch, train_rows).topk(2, largest=False).values
                          for batch in as_rows(images).split(250)])


def summary(measures):
    """The measures in one line: accuracies in %, the Frechet distance and its ratio to the floor, mean diversity."""
    return dict(accuracy=100 * measures["accuracy"], worst_digit=100 * min(measures["accuracy_per_digit"].values()),
                panel=100 * float(np.mean(measures["panel"])), panel_least=100 * min(measures["panel"]),
                frechet=measures["frechet"], frechet_ratio=measures["frechet"] / measures["frechet_floor"],
                diversity=float(np.mean(list(measures["diversity"].values()))))


def report(measures):
    """The measures as text for people."""
    total = summary(measures)
    per_digit = " ".join(f"{d}: {100 * a:.4g}" for d, a in measures["accuracy_per_digit"].items())
    lines = [course_line(measures["correct"], measures["images"]),
             f"images            {measures['images']}",
             f"accuracy          {total['accuracy']:.4g} %   per digit {per_digit}",
             f"panel             {total['panel']:.4g} %   the least of {len(measures['panel'])} graders "
             f"{total['panel_least']:.4g} %",
             f"Frechet distance  {total['frechet']:.3f}   real digits {measures['frechet_floor']:.3f} +- "
             f"{measures['frechet_floor_std']:.3f}   ratio {total['frechet_ratio']:.2f}",
             f"diversity         {total['diversity']:.3f} of real digits'   per digit "
             + " ".join(f"{d}: {r:.2f}" for d, r in measures["diversity"].items())]
    generated, real = measures["nearest_generated"], measures["nearest_real"]
    lines.append(f"nearest training image, root mean square in grey levels: median {generated.median():.1f}, "
                 f"smallest {generated.min():.1f}; real validation digits: median {real.median():.1f}, "
                 f"smallest {real.min():.1f}")
    lines.append(f"copies            {100 * measures['copies_generated']:.3g} %   real validation digits "
                 f"{100 * measures['copies_real']:.3g} %")
    return "\n".join(lines)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=nonempty_path, help="images whose names begin with their digit")
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--checkpoint", type=nonempty_path,
                        help="the classifier's weights; else those of each domain that digit_classifier.py takes")
    parser.add_argument("--panel_checkpoint", type=nonempty_path, default=PANEL, help="the weights of MNIST-M's panel")
    parser.add_argument("--domain", choices=CHECKPOINTS, help="whose digits these are; if not given, mnistm's")
    args = parser.parse_args()
    folders = domain_folders(args.folder, args.domain)
    generated = {domain: read_generated(folder, 100 // len(folders)) for domain, folder in folders.items()}
    for domain, (_, labels) in generated.items():
        if labels.bincount().max() < 2:
            raise UserError(f"{folders[domain]} must hold several images of a digit, named such as 7_001.png and "
                            "7_002.png")
    judges = {domain: Judge(args.data_dir, domain, args.checkpoint, args.panel_checkpoint) for domain in generated}
    for domain, (images, labels) in generated.items():
        title = f"{DOMAIN_NAMES[domain]}\n" if len(folders) > 1 else ""
        print(title + report(judges[domain](images, labels)))


if __name__ == "__main__":
    run(main)
