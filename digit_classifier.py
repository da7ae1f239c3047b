"""The grader of problem 1: how many images of a folder show the digit that their name begins with?

    python3 digit_classifier.py --folder out_dir                  # acc = 0.999 (correct/total = 999/1000)
    python3 digit_classifier.py --train hw2_data --checkpoint mine.pth          # as Classifier.pth, of MNIST-M
    python3 digit_classifier.py --train hw2_data --domain svhn --checkpoint mine.pth   # as Classifier_svhn.pth
    python3 digit_classifier.py --train hw2_data --panel 8 --checkpoint mine.pth       # as Classifier_panel.pth

Same network, command line, weight file and output line as the course's script of 2023, so the course's
Classifier.pth can be dropped in (or named with --checkpoint). A folder that holds the folders mnistm and svhn is graded
as in 2024: a line for each, each by its own classifier or both by --checkpoint, and a line with their mean.

Classifier.pth recognises 97.6 % of MNIST-M's validation digits, Classifier_svhn.pth, of a network four times as wide,
92.6 % of SVHN's, which they never train on. Both are trained with much augmentation, in four and two minutes on 2 CPU
cores. The panel's networks, a second opinion, are trained as a course would, plainly and not for long; they recognise
93.1 to 94.7 %, and take four minutes.
"""

import copy
import io
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, int_between, nonempty_path, pick_device, run

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dataset import DOMAIN_NAMES, list_images, load_split, read_images, some
from files import check_output_file, find_weights, load_torch, load_weights, write_atomic
from training import average, ema_decay, seed_all
from transforms import as_input, random_affine, uniform

CHECKPOINTS = {"mnistm": ROOT / "Classifier.pth", "svhn": ROOT / "Classifier_svhn.pth"}
PANEL = ROOT / "Classifier_panel.pth"
WIDTHS = {"mnistm": 1, "svhn": 4}  # the course's network alone would recognise 89 % of SVHN


class Classifier(nn.Module):
    """The course's network: two convolutions, three linear layers, 44,674 parameters.

    Or one `width` times as wide, with dropout between the convolutions and the linear layers.
    """

    def __init__(self, width=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6 * width, 5)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6 * width, 16 * width, 5)
        self.fc1 = nn.Linear(16 * width * 4 * 4, 128 * width)
        self.fc2 = nn.Linear(128 * width, 64)
        self.fc3 = nn.Linear(64, 10)
        self.dropout = nn.Dropout(0.3 if width > 1 else 0)

    def features(self, x):
        """The 64 penultimate activations of images x (B, 3, 28, 28) in [-1, 1]."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        return F.relu(self.fc2(F.relu(self.fc1(self.dropout(x.flatten(1))))))

    def forward(self, x):
        """Logits (B, 10)."""
        return self.fc3(self.features(x))


def load_classifier(path=CHECKPOINTS["mnistm"], device="cpu"):
    """The classifier in evaluation mode; its weights are under 'state_dict' in the file, or in any other wrapping."""
    content = load_torch(path, "classifier checkpoint")
    if isinstance(content, dict) and "panel" in content:
        raise UserError(f"{path} holds a panel; p1_ddpm/evaluate.py --panel_checkpoint grades by all of it, name one "
                        "classifier here")
    return _classifier(content, path, device)


def load_panel(path=PANEL, device="cpu"):
    """The graders of a panel, a list of classifiers in evaluation mode."""
    content = load_torch(path, "panel of classifiers")
    graders = content.get("panel") if isinstance(content, dict) else None
    if not isinstance(graders, list) or not graders:
        raise UserError(f"{path} does not hold a panel; run 'python3 digit_classifier.py --train DATA_DIR --panel 8'")
    return [_classifier(weights, path, device) for weights in graders]


def _classifier(content, path, device):
    """The network whose weights are somewhere in `content`, which was read from `path`; their shapes tell its width."""
    weights = find_weights(content, Classifier().state_dict(), path)
    filters = weights.get("conv1.weight", torch.empty(0))
    model = Classifier(max(1, sum(filters.shape[:1]) // 6))
    load_weights(model, weights, path)
    return model.to(device).eval()


@torch.no_grad()
def classify(model, images, device="cpu", batch_size=1000):
    """(features (N, 64), predicted digits (N,)) on the CPU for uint8 images (N, 3, 28, 28)."""
    features = torch.cat([model.features(as_input(batch.to(device))) for batch in images.split(batch_size)])
    return features.cpu(), model.fc3(features).argmax(1).cpu()


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D) (Heusel et al. 2017, eq. 6)."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # C_a C_b is similar to a positive semi-definite matrix; its trace of roots is the sum of roots of eigenvalues.
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def expected_names(per_class=100):
    """The names that problem 1 asks for: 0_001.png ... 9_100.png, or ... 9_050.png."""
    return {f"{digit}_{number:03d}.png" for digit in range(10) for number in range(1, per_class + 1)}


def domain_folders(folder, domain=None):
    """{domain: its folder}: of 2024, where `folder` holds mnistm and svhn, or one, where all of it is of `domain`, as a
    rule MNIST-M."""
    folders = {name: Path(folder) / name for name in CHECKPOINTS}
    there = [path for path in folders.values() if path.is_dir()]
    if there and any(path.is_file() and path.name[0].isdecimal() for path in Path(folder).iterdir()):
        raise UserError(f"{folder} holds digits and {there[0]} as well; grade them apart, each in a folder of its own")
    if there and domain:
        raise UserError(f"{folder} holds {there[0].name}; leave --domain out, or name that folder")
    others = [name for name in DOMAIN_NAMES if name not in folders and (Path(folder) / name).is_dir()]
    if not there:
        return {domain or "mnistm": Path(folder)}
    if others and len(there) < len(folders):
        raise UserError(f"{folder} is not of 2024's domains, {' and '.join(folders)}; grade {there[0]} by itself, with "
                        f"--domain {there[0].name}")
    for name in others:
        print(f"not graded: {Path(folder) / name}, for which there is no grader", file=sys.stderr)
    return folders


def read_generated(folder, per_class=100):
    """(images, labels) of the images in `folder` whose names begin with a digit: uint8 (N, 3, 28, 28) and (N,).

    Warns on stderr of whatever differs from a folder of exactly the expected_names.
    """
    names = list_images(folder)
    foreign = {name for name in names if not name[0].isdecimal()}
    graded = [name for name in names if name not in foreign]
    if not graded:
        raise UserError(f"no image in {folder} has a name that begins with its digit, such as 7_001.png")
    images, expected = read_images([Path(folder) / name for name in graded]), expected_names(per_class)
    odd = {name for name in graded if image_size(Path(folder) / name) != (28, 28)}
    for found, what in ((foreign, "not graded, their names do not begin with a digit"),
                        (set(graded) - expected, f"graded, but not among {min(expected)} ... {max(expected)}"),
                        (odd, "resized, they are not 28x28"), (expected - set(names), "missing")):
        if found:
            print(f"warning: {len(found)} file(s) {what}: {some(sorted(found))}", file=sys.stderr)
    return images, torch.tensor([int(name[0]) for name in graded])


def image_size(path):
    with Image.open(path) as image:
        return image.size


# --- Training -----------------------------------------------------------------------------------

def augment(x):
    """Random affine map, order of the colour channels, contrast, polarity and brightness for x in [-1, 1].

    |photograph - digit| makes a digit either darker or lighter than its background and of any colour, so none of these
    changes what MNIST-M could show.
    """
    count, device = len(x), x.device
    x = random_affine(x, zoom=(0.9, 1.15), stretch=0.2, degrees=15, shear=0.2, shift=0.15)
    channels = torch.rand(count, 3, device=device).argsort(dim=1)
    x = x.gather(1, channels[:, :, None, None].expand_as(x))
    polarity = torch.randint(2, (count, 1, 1, 1), device=device) * 2 - 1
    x = x * polarity * uniform(0.7, 1.3, count, device) + uniform(-0.2, 0.2, count, device)
    return x.clamp(-1, 1)


def fit(model, optimizer, splits, epochs, seed, change=lambda x: x, scheduler=None, decay=0.0):
    """Trains `model` on the first of the two `splits` (images, labels), which are on its device, changed by `change`.

    Prints the accuracy on the second after each epoch. Returns the EMA of the weights, those of the last step where its
    `decay` is 0. UserError when the loss is not finite.
    """
    (images, labels), (validation_images, validation_labels) = splits
    ema, per_epoch = copy.deepcopy(model).eval(), len(images) // batch_size_for(images)
    for epoch in range(epochs):
        start, order = time.time(), torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(images)))
        for step, batch in enumerate(order.split(batch_size_for(images))[:per_epoch], start=epoch * per_epoch):
            batch = batch.to(images.device)
            loss = F.cross_entropy(model(change(as_input(images[batch]))), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            average(ema, model, ema_decay(decay, step))
        predicted = classify(ema, validation_images, images.device)[1]
        accuracy = (predicted == validation_labels.cpu()).float().mean().item()
        print(f"epoch {epoch + 1}/{epochs}: loss of the last step {loss.item():.3f}, validation accuracy "
              f"{100 * accuracy:.2f} %, {time.time() - start:.0f} s", flush=True)
        if not math.isfinite(loss.item()):
            raise UserError("the loss is not finite; take another --seed")
    return ema.state_dict()


def batch_size_for(images):
    return min(128, len(images))


def train_judge(splits, width, epochs, seed, lr=3e-3):
    """The weights of a classifier trained as well as it can be: with augmentation, a schedule and the EMA."""
    images, _ = splits[0]
    seed_all(seed)
    model = Classifier(width).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    total_steps = epochs * (len(images) // batch_size_for(images))
    rise = 0.3 if total_steps == 10 else 0.1  # a rise of a single step would be a division by zero
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total_steps, pct_start=rise)
    return fit(model, optimizer, splits, epochs, seed, augment, scheduler, decay=0.999)


def train_plainly(splits, epochs, seed):
    """The weights of a classifier trained as a course would: Adam on the images as they are."""
    seed_all(seed)
    model = Classifier().to(splits[0][0].device)
    return fit(model, torch.optim.Adam(model.parameters(), lr=1e-3), splits, epochs, seed)


def train(args, device):
    """What --train asks for: one judge, or a panel of graders in half precision."""
    domain = args.domain or "mnistm"
    checkpoint = args.checkpoint or (PANEL if args.panel else CHECKPOINTS[domain])
    if checkpoint.exists() and not args.checkpoint:
        raise UserError(f"{checkpoint} is there already; name another file, or this one to replace it, by --checkpoint")
    check_output_file(checkpoint)
    splits = [[values.to(device) for values in load_split(args.train, domain, split)[:2]]
              for split in ("train", "val")]
    epochs = args.epochs or (4 if args.panel else 60)
    if args.panel:
        weights = [train_plainly(splits, epochs, args.seed + i) for i in range(args.panel)]
        content = {"panel": [{name: value.half() for name, value in grader.items()} for grader in weights]}
    else:
        content = {"state_dict": train_judge(splits, WIDTHS[domain], epochs, args.seed)}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(checkpoint, buffer.getvalue())


# --- Grading ------------------------------------------------------------------------------------

def course_line(correct, total):
    """What the course's script of 2023 prints."""
    return f"acc = {correct / total} (correct/total = {correct}/{total})"


def grade(args, device):
    """Prints the grade of --folder: 2023's line, or for the folders of two domains the three lines of 2024."""
    folders, accuracies = domain_folders(args.folder, args.domain), []
    models = {domain: load_classifier(args.checkpoint or CHECKPOINTS[domain], device) for domain in folders}
    generated = {domain: read_generated(folder, 100 // len(folders)) for domain, folder in folders.items()}
    for domain, (images, labels) in generated.items():
        correct, total = (classify(models[domain], images, device)[1] == labels).sum().item(), len(labels)
        accuracies.append(correct / total)
        print(course_line(correct, total) if len(folders) == 1 else
              f"{DOMAIN_NAMES[domain]} acc = {correct / total:.4f} (correct/total = {correct}/{total})")
    if len(folders) > 1:
        print(f"acc = {np.mean(accuracies):.4f}")


def main():
    parser = argument_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--folder", type=nonempty_path, help="folder of images to grade")
    what.add_argument("--train", type=nonempty_path, metavar="DATA_DIR",
                      help="train on the data set in this folder (hw2_data)")
    parser.add_argument("--checkpoint", type=nonempty_path,
                        help="the weights to use, for both domains, or to write; else the repository's own")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--domain", choices=CHECKPOINTS, help="whose digits these are; if not given, mnistm's")
    group = parser.add_argument_group("with --train")
    group.add_argument("--panel", type=int_between(1), metavar="N", help="train N graders of MNIST-M, plainly")
    group.add_argument("--epochs", type=int_between(1),
                       help="passes over the training images; else 60, for a panel 4")
    group.add_argument("--seed", type=int_between(0), default=0,
                       help="seed of weights, order and augmentation; a panel takes N from here on")
    args = parser.parse_args()
    if args.panel and args.domain == "svhn":
        raise UserError("--panel is one of MNIST-M's graders; leave --domain out")
    if args.folder and (args.panel or args.epochs or args.seed):
        raise UserError("--panel, --epochs and --seed are for --train; leave them out with --folder")
    (train if args.train else grade)(args, pick_device(args.device))


if __name__ == "__main__":
    run(main)
