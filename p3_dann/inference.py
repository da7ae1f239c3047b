"""Predicts the digit of every image in a folder and writes a CSV file, as the grading of problem 3 asks.

    bash hw2_3.sh TEST_DIR PRED_CSV                                     # 20,000 images: 14 s on 2 CPU cores
    python3 p3_dann/inference.py TEST_DIR PRED_CSV --target usps        # when neither path nor images tell
    python3 p3_dann/inference.py TEST_DIR PRED_CSV --checkpoint MODEL   # with a model.pt of your own

Which network answers depends on the domain of the images: the last component of TEST_DIR's path that names one
(svhn, usps or mnistm, in any case), or else the images: grey ones are USPS, coloured ones SVHN.

A prediction averages over three views of the image. Every image file gets one answer; one that cannot be read gets
the commonest answer of the others and a warning.
"""

import csv
import io
import math
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset import DOMAINS, list_images, read_images  # noqa: E402
from p3_dann.model import load_model, predict  # noqa: E402
from utils import (UserError, argument_parser, int_at_least, make_output_dir, pick_device, run,  # noqa: E402
                   write_atomic)

CHECKPOINTS = {domain: Path(__file__).parent / "checkpoints" / name for domain, name in dict(
    svhn="mnistm_svhn_dann.pt", usps="mnistm_usps_dann.pt", mnistm="mnistm_source.pt").items()}


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("test_dir", type=Path, help="folder of images")
    parser.add_argument("pred_csv", type=Path, help="the CSV file to write: image_name,label")
    parser.add_argument("--target", choices=["auto", *DOMAINS], default="auto", help="what the images are")
    parser.add_argument("--checkpoint", type=Path, help="a model.pt of train.py, whatever the target")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--batch_size", type=int_at_least(1), default=100, help="images at once; changes no answer")
    return parser.parse_args()


def target_from_path(path):
    """The domain that the last telling component of the absolute `path` names, or None.

    A component names a domain as a word of its own: .../SVHN/test and .../usps-test do, .../mysvhns does not.
    """
    words = [word for part in Path(path).absolute().parts for word in re.split("[^a-z0-9]+", part.lower())]
    named = [word for word in words if word in DOMAINS]
    return named[-1] if named else None


def target_from_images(images):
    """'usps' when the typical image of uint8 (N, 3, H, W) is grey, else (or when there is none) 'svhn'.

    Grey: the channels differ by at most 2 levels on average (a JPEG of a grey image need not have equal channels).
    That is 0 for a USPS image, and below 2 for no SVHN image that was looked at; the median forgives exceptions.
    """
    spread = (images.amax(dim=1).float() - images.amin(dim=1).float()).mean(dim=(1, 2))
    return "usps" if len(images) and spread.median() <= 2 else "svhn"


def read(paths, warn=False):
    """(uint8 images (N, 3, 28, 28), bool (N,): which could be read); the others are black."""
    readable = torch.ones(len(paths), dtype=torch.bool)

    def report(index, error):
        readable[index] = False
        if warn:
            print(f"warning: {error}; until then its answer is the commonest one", file=sys.stderr)

    return read_images(paths, on_error=report), readable


def write_predictions(path, names, labels):
    """Writes the CSV file with the header image_name,label; names with a comma or a quote are quoted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image_name", "label"])
    writer.writerows(zip(names, labels))
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


def main():
    args = parse_args()
    device = pick_device(args.device)
    names = list_images(args.test_dir)
    if args.pred_csv.is_dir():
        raise UserError(f"the output path {args.pred_csv} is a folder; name a CSV file")
    make_output_dir(args.pred_csv.parent)

    if args.checkpoint:
        checkpoint, reason = args.checkpoint, "its network was asked for"
    else:
        target, reason = args.target, "as asked"
        if target == "auto":
            target, reason = target_from_path(args.test_dir), "named by the path"
        if target is None:
            sample = [args.test_dir / name for name in names[::math.ceil(len(names) / 200)]]
            images, readable = read(sample)
            target, reason = target_from_images(images[readable]), "by its colours, as the path names no domain"
        checkpoint = CHECKPOINTS[target]
    model, recipe = load_model(checkpoint, device)
    domain = recipe["source" if recipe["mode"] == "source" else "target"]
    print(f"{len(names)} images, taken to be {domain} ({reason}); network {checkpoint}")

    images, readable = read([args.test_dir / name for name in names], warn=True)
    labels = predict(model, images, args.batch_size).argmax(dim=1)
    labels[~readable] = labels[readable].bincount(minlength=10).argmax()
    write_predictions(args.pred_csv, names, labels.tolist())
    print(f"wrote {args.pred_csv}")


if __name__ == "__main__":
    run(main)
