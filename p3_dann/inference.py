"""Predicts the digit of every image in a folder and writes a CSV file, as the grading of problem 3 asks.

    bash hw2_3.sh TEST_DIR PRED_CSV                                     # 20,000 images: half a minute on 2 CPU cores
    bash hw2_3.sh TEST_DIR PRED_CSV --method adamatch                   # by AdaMatch
    python3 p3_dann/inference.py TEST_DIR usps PRED_CSV                 # when neither path nor images tell
    python3 p3_dann/inference.py TEST_DIR PRED_CSV --checkpoint MODEL   # with a model.pt of your own

Which network answers depends on the method, the assignment and the domain of the images. Of the pairs of domains the
assignment has one for each target: 2023's adapts MNIST-M to SVHN and to USPS, and 2020's (hw3_p3.sh by DANN, hw3_p4.sh
by AdaMatch) USPS to MNIST-M, MNIST-M to SVHN and SVHN to USPS. The domain is what TARGET or --target says, or else the
last component of TEST_DIR's path that names one (svhn, usps or mnistm, in any case), or else what the images show: grey
ones are USPS, coloured ones SVHN. Coloured images are never USPS, whatever the path says; where the path names another
domain and the images are grey, a warning says so.

A prediction averages over three views of the image. Every image file gets one answer; one that cannot be read gets
the commonest answer of the others and a warning.
"""

import csv
import io
import math
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, int_between, nonempty_path, pick_device, run

import torch

from dataset import DOMAINS, IMAGE_SUFFIXES, list_images, read_images
from files import check_output_file, write_atomic
from p3_dann.methods import PAIRS, PAIRS_2020, predicted_domain, run_name
from p3_dann.model import load_model
from p3_dann.prediction import predict

ASSIGNMENTS = {"2023": PAIRS, "2020": PAIRS_2020}
SHIPPED_METHODS = ("dann", "adamatch")
# {(assignment, method, domain): the name of the network that answers}; 2023's for mnistm has learned it with labels.
NETWORKS = {(assignment, method, target): run_name(method, source, target) for assignment, pairs in ASSIGNMENTS.items()
            for method in SHIPPED_METHODS for source, target in pairs}
NETWORKS |= {("2023", method, "mnistm"): run_name("source_only", *PAIRS[0]) for method in SHIPPED_METHODS}
CHECKPOINTS = ROOT / "p3_dann/checkpoints"


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("test_dir", type=nonempty_path, help="folder of images")
    parser.add_argument("domain", nargs="?", choices=DOMAINS, metavar="target", help="what the images are, as --target")
    parser.add_argument("pred_csv", type=nonempty_path, help="the CSV file to write: image_name,label")
    parser.add_argument("--target", choices=["auto", *DOMAINS], default="auto", help="what the images are")
    parser.add_argument("--method", choices=SHIPPED_METHODS, default="dann", help="how the network has learned")
    parser.add_argument("--assignment", choices=ASSIGNMENTS, default="2023", help="whose pairs of domains")
    parser.add_argument("--checkpoint", type=nonempty_path, help="a model.pt of train.py, whatever the target")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--batch_size", type=int_between(1), default=100, help="images at once; changes no answer")
    args = parser.parse_args()
    if args.domain and args.target not in ("auto", args.domain):
        raise UserError(f"the target is given twice, as {args.domain} and as --target {args.target}; name one")
    if str(args.pred_csv) in DOMAINS:
        raise UserError(f"the CSV file to write would be called {args.pred_csv}, a domain; name the file after it")
    if args.pred_csv.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"the CSV file to write, {args.pred_csv}, is named as an image is; name another")
    args.target = args.domain or args.target
    return args


def find_checkpoint(assignment, method, target):
    """The shipped network's file; UserError where there is none."""
    name = NETWORKS[assignment, method, target]
    if not (CHECKPOINTS / f"{name}.pt").exists():
        raise UserError(f"there is no {CHECKPOINTS / name}.pt; 'bash hw2_download.sh' tells where it comes from, or "
                        "name a model.pt of p3_dann/train.py with --checkpoint")
    return CHECKPOINTS / f"{name}.pt"


def target_from_path(path):
    """The domain that the last telling component of the absolute `path`, without "..", names, or None.

    A component names a domain as a word of its own: .../SVHN/test and .../usps-test do, .../mysvhns does not. One that
    names several, such as svhn-from-mnistm, tells nothing.
    """
    parts = [set(re.split("[^a-z0-9]+", part.lower())).intersection(DOMAINS)
             for part in Path(os.path.abspath(path)).parts]
    named = next(filter(None, reversed(parts)), ())
    return min(named) if len(named) == 1 else None


def target_from_images(images):
    """'usps' when the typical image of uint8 (N, 3, H, W) is grey, else 'svhn'; looks at 200 of them at most.

    Grey: the channels differ by at most 2 levels on average (a JPEG of a grey image need not have equal channels).
    That is 0 for a USPS image, and below 2 for no SVHN image that was looked at; the median forgives exceptions.
    """
    images = images[::math.ceil(len(images) / 200)].float()
    spread = (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))
    return "usps" if spread.median() <= 2 else "svhn"


def find_target(path, images):
    """(the domain of the `images` in the folder `path`, why); says on stderr where these two disagree."""
    named, looks = target_from_path(path), target_from_images(images)
    if named is None:
        return looks, "by its colours, as the path names no single domain"
    if named == "usps" and looks != "usps":
        print(f"warning: the path {path} names usps, but the images are coloured, as USPS never is: they are taken to "
              f"be {looks}; if that is wrong, say --target", file=sys.stderr)
        return looks, "by its colours, against the path"
    if named != "usps" and looks == "usps":
        print(f"warning: the path {path} names {named}, but the images are grey, as USPS is: if they are, say "
              "--target usps", file=sys.stderr)
    return named, "named by the path"


def read(paths):
    """(uint8 images (N, 3, 28, 28), bool (N,): which could be read); the others are black, and said on stderr.

    UserError when none can be read.
    """
    readable = torch.ones(len(paths), dtype=torch.bool)

    def report(index, error):
        readable[index] = False
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
    check_output_file(args.pred_csv)
    if args.checkpoint:
        load_model(args.checkpoint)  # a mistake is told before the images are read
    elif args.target != "auto":
        find_checkpoint(args.assignment, args.method, args.target)
    images, readable = read([args.test_dir / name for name in names])
    if args.checkpoint:
        checkpoint, what = args.checkpoint, "as asked"
    else:
        auto = args.target == "auto"
        target, reason = find_target(args.test_dir, images[readable]) if auto else (args.target, "as asked")
        checkpoint, what = find_checkpoint(args.assignment, args.method, target), f"taken to be {target} ({reason})"
    model, recipe = load_model(checkpoint, device)
    print(f"{len(names)} images, {what}; network {checkpoint}, made for {predicted_domain(recipe)}")

    labels = predict(model, images, args.batch_size).argmax(dim=1)
    labels[~readable] = labels[readable].bincount(minlength=10).argmax()
    write_predictions(args.pred_csv, names, labels.tolist())
    print(f"wrote {args.pred_csv}")


if __name__ == "__main__":
    run(main)
