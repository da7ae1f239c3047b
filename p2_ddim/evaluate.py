"""Compares generated faces with the ground truth: mean squared error on the 0-255 scale, as the grading does.

    python3 p2_ddim/evaluate.py out hw2_data/face/GT

The grading asks for a mean below 20; the best public solution's images have 0.007 with the course's UNet.pt. The exit
status is 1 when the mean exceeds --baseline or a ground truth has no generated image.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, float_between, nonempty_path, run

import numpy as np

from dataset import list_images, read_rgb


def read_folder(folder):
    """{name: float64 array (H, W, 3), 0 ... 255} of the images in `folder`.

    Floats, because the difference of two uint8 wraps round: 3 - 5 would be 254.
    """
    return {name: np.asarray(read_rgb(Path(folder) / name), np.float64) for name in list_images(folder)}


def mean_squared_errors(images, truths):
    """{name: MSE over all pixels and channels} for the names that both dicts of read_folder have."""
    errors = {}
    for name in sorted(images.keys() & truths.keys()):
        if images[name].shape != truths[name].shape:
            raise UserError(f"{name} is {images[name].shape[1::-1]} pixels on one side and "
                            f"{truths[name].shape[1::-1]} on the other; compare images of one size")
        errors[name] = ((images[name] - truths[name]) ** 2).mean()
    return errors


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("output_dir", type=nonempty_path, help="folder of the generated images")
    parser.add_argument("truth_dir", type=nonempty_path, help="folder of the ground truth")
    parser.add_argument("--baseline", type=float_between(0), default=20.0, help="highest mean MSE that passes")
    args = parser.parse_args()
    images, truths = read_folder(args.output_dir), read_folder(args.truth_dir)
    errors = mean_squared_errors(images, truths)
    for name, error in errors.items():
        print(f"{name}  {error:.4f}")
    for folder, here, there in ((args.output_dir, images, truths), (args.truth_dir, truths, images)):
        missing = sorted(there.keys() - here.keys())
        if missing:
            print(f"missing in {folder}: {', '.join(missing)}")
    mean = np.mean(list(errors.values())) if errors else float("inf")
    print(f"mean MSE = {mean:.4f} ({len(errors)} images, baseline {args.baseline:g})")
    sys.exit(0 if mean <= args.baseline and truths.keys() <= images.keys() else 1)


if __name__ == "__main__":
    run(main)
