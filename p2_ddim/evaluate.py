"""Compares drawn faces with the ground truth: mean squared error on the 0-255 scale, as the grading does.

    python3 p2_ddim/evaluate.py out hw2_data/face/GT

The grading asks for a mean below 20; the best public solution's images have 0.007 with the course's UNet.pt. The exit
status is 1 when the mean exceeds --baseline or a ground truth has no drawn image.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import UserError, argument_parser, float_between, run  # noqa: E402


def read_images(folder):
    """{name: float64 array (H, W, 3), 0 ... 255} of the PNG files in `folder`.

    Floats, because the difference of two uint8 wraps round: 3 - 5 would be 254.
    """
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}; name one that holds PNG images")
    images = {}
    for path in sorted(p for p in Path(folder).glob("*.png") if not p.name.startswith(".")):
        try:
            images[path.name] = np.asarray(Image.open(path).convert("RGB"), np.float64)
        except Exception:  # Pillow raises OSError, SyntaxError and others on a damaged file
            raise UserError(f"the image {path} is damaged; draw it again")
    if not images:
        raise UserError(f"there are no PNG images in {folder}; name another folder")
    return images


def mean_squared_errors(images, truths):
    """{name: MSE over all pixels and channels} for the names that both dicts of read_images have."""
    errors = {}
    for name in sorted(images.keys() & truths.keys()):
        if images[name].shape != truths[name].shape:
            raise UserError(f"{name} is {images[name].shape[1::-1]} pixels on one side and "
                            f"{truths[name].shape[1::-1]} on the other; compare images of one size")
        errors[name] = ((images[name] - truths[name]) ** 2).mean()
    return errors


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("output_dir", type=Path, help="folder of the drawn images")
    parser.add_argument("truth_dir", type=Path, help="folder of the ground truth")
    parser.add_argument("--baseline", type=float_between(0), default=20.0, help="highest mean MSE that passes")
    args = parser.parse_args()
    images, truths = read_images(args.output_dir), read_images(args.truth_dir)
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
