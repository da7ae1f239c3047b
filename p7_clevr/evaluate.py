"""Judges a folder of generated scenes: do they show what was asked for and nothing else, and are they like real ones?

    python3 p7_clevr/evaluate.py out_dir --data_dir DIR     # out_dir of lab6.sh, DIR with the images of i-CLEVR

- accuracy by the evaluator, which may have guided, and by the judge, which never does;
- objects too many: the share of scenes in which more things stand apart from the empty background than were asked for.
  Things that hide each other count as one, so this finds the surplus and not what is missing;
- fidelity: the Frechet distance (Heusel et al. 2017, equation 6) to the images of held-out scenes in the judge's 128
  features, as a ratio to its floor, that of as many real images with as many objects, averaged over ten draws. With
  fewer than 300 scenes it says little;
- colours: means and standard deviations of red, green and blue over all pixels, beside those of the held-out images.

Of lab6.sh's scenes with seed 0 the accuracies are 0.9444 and 0.9643, by the judge 0.9722 and 0.9643.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import argument_parser, nonempty_path, run

import numpy as np
import torch
from scipy import ndimage

from dataset import read_images
from digit_classifier import frechet_distance
from p7_clevr.evaluator import CHECKPOINTS, Evaluator
from p7_clevr.scenes import CONDITIONS, SIZE, empty_background, multi_hot, read_conditions, read_scenes
from transforms import as_input


def count_objects(images, background):
    """How many things stand apart in uint8 images (N, 3, 64, 64) before the background (3, 64, 64): int64 (N,).

    A thing is a connected component of at least 8 pixels that differ by more than 25 grey levels in some channel: an
    object, or several that hide each other. Shadows differ by less, and the farthest objects have 30 pixels.
    """
    different = ((images - background).abs() > 25).any(dim=1).numpy()
    sizes = [np.bincount(ndimage.label(mask)[0].ravel())[1:] for mask in different]
    return torch.tensor([int((areas >= 8).sum()) for areas in sizes])


def colors(images):
    """(means, standard deviations) of the three channels over all pixels of uint8 images, each a tensor (3,)."""
    pixels = images.permute(1, 0, 2, 3).flatten(1).float()
    return pixels.mean(1), pixels.std(1)


def distance(features, others):
    """The Frechet distance of features (N, D) and (M, D); NaN where one image alone has no covariance."""
    return frechet_distance(features, others) if min(len(features), len(others)) > 1 else float("nan")


class Judge:
    """Measures generated scenes against the images of the generator's part and of held-out scenes."""

    def __init__(self, data_dir, device="cpu", evaluator=CHECKPOINTS / "evaluator.pth",
                 judge=CHECKPOINTS / "judge.pth"):
        self.evaluator, self.judge = Evaluator(evaluator, device), Evaluator(judge, device)
        held_out, _, _ = read_scenes(data_dir, "held_out")
        real, _, self.sets = read_scenes(data_dir, "generator", first=1500)  # 500 scenes are enough
        self.colors, self.background = colors(held_out), empty_background(held_out)
        self.held_out_features, self.real_features = (self.judge.features(as_input(images))
                                                      for images in (held_out, real))

    def floor(self, sets, draws=10):
        """The mean Frechet distance of real images with as many objects as `sets` from the held-out ones."""
        rng = np.random.default_rng(0)
        by_size = {size: np.array([i for i, names in enumerate(self.sets) if len(names) == size]) for size in (1, 2, 3)}
        distances = []
        for _ in range(draws):
            chosen = np.concatenate([rng.permutation(indices)[:sum(len(names) == size for names in sets)]
                                     for size, indices in by_size.items()])
            distances.append(distance(self.real_features[chosen], self.held_out_features))
        return float(np.mean(distances))

    def __call__(self, images, sets):
        """{measure: number} of uint8 images (N, 3, 64, 64) that were asked to show the N `sets`."""
        labels = multi_hot(sets)
        frechet = distance(self.judge.features(as_input(images)), self.held_out_features)
        color_means, color_stds = ((ours - real).abs().max().item() for ours, real in zip(colors(images), self.colors))
        return dict(
            accuracy=self.evaluator.eval(as_input(images), labels), judge=self.judge.eval(as_input(images), labels),
            too_many=(count_objects(images, self.background) > labels.sum(1)).float().mean().item(),
            frechet=frechet, frechet_ratio=frechet / self.floor(sets) if max(map(len, sets)) <= 3 else float("nan"),
            color_mean=color_means, color_std=color_stds)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=nonempty_path, help="what lab6.sh has written, with images/test/0.png")
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "iclevr", help="train.json and the images")
    parser.add_argument("--conditions", type=nonempty_path, default=CONDITIONS,
                        help="holds test.json and new_test.json, as lab6.sh had them by --data_dir")
    parser.add_argument("--evaluator", type=nonempty_path, default=CHECKPOINTS / "evaluator.pth",
                        help="what measures accuracy, such as the course's checkpoint.pth")
    args = parser.parse_args()
    lists = {name: read_conditions(args.conditions / f"{name}.json") for name in ("test", "new_test")}
    images = {name: read_images([args.folder / "images" / name / f"{number}.png" for number in range(len(sets))], SIZE)
              for name, sets in lists.items()}
    judge = Judge(args.data_dir, evaluator=args.evaluator)
    for name, sets in lists.items():
        measures = judge(images[name], sets)
        print(f"{name}: accuracy {measures['accuracy']:.4f}, by the judge {measures['judge']:.4f}; objects too many in "
              f"{100 * measures['too_many']:.0f} % of the scenes")
    both, sets = torch.cat(list(images.values())), sum(lists.values(), [])
    measures = judge(both, sets)
    if len(both) > 1:
        ratio = measures["frechet_ratio"]  # none with sets of four, which no real image shows
        print(f"Frechet distance {measures['frechet']:.2f}"
              + (f", {ratio:.2f} times that of real images" if np.isfinite(ratio) else ""))
    for what, ours, real in zip(("means", "standard deviations"), colors(both), judge.colors):
        print(f"{what} of red, green, blue: {' '.join(f'{x:.1f}' for x in ours)}; of real images: "
              f"{' '.join(f'{x:.1f}' for x in real)}")


if __name__ == "__main__":
    run(main)
