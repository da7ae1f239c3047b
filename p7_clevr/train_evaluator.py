"""Trains the graders of scenes on the share of the stand-in's scenes that the generator never sees.

    python3 p7_clevr/train_evaluator.py --data_dir DIR       # the evaluator; then the judge, and that of noisy images
    python3 p7_clevr/train_evaluator.py --network encoder --optimizer adamw --epochs 130 --paste 0.3 --seed 1
    python3 p7_clevr/train_evaluator.py --network encoder --optimizer adamw --epochs 130 --paste 0.3 --noisy

--resume, --dry_run and torchrun as in train.py. Writes last.pt, metrics.jsonl and model.pt into --output_dir; model.pt
is what p7_clevr/checkpoints holds as evaluator.pth, judge.pth and noisy.pth. Prints the accuracy of `Evaluator.eval` on
held-out scenes, for --noisy at a signal-to-noise ratio of 1: 0.992, 0.973 and 0.463. On an H200 in bfloat16 the first
takes eight minutes, the others two. Each wants an --output_dir of its own.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, autocast, float_between, nonempty_path, run

import torch
import torch.nn.functional as F

import training
from p1_ddpm.diffusion import diffuse
from p7_clevr.evaluator import NETWORKS, top_k_hits
from p7_clevr.model import scene_schedule
from p7_clevr.scenes import empty_background, read_scenes
from p7_clevr.train import add_schedule_arguments, schedule_of
from transforms import as_input, random_affine, uniform


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "iclevr", help="train.json and the images")
    parser.add_argument("--output_dir", type=nonempty_path, default=ROOT / "p7_clevr/output/evaluator",
                        help="where checkpoints go")
    training.add_arguments(parser, epochs=200, batch_size=64, lr=1e-3, warmup=100, weight_decay=0.05, ema=0.998,
                           save_every=1400)
    parser.set_defaults(optimizer="muon")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet18", help="which grader")
    parser.add_argument("--noisy", action="store_true", help="train on noisy images, to guide")
    parser.add_argument("--paste", type=float_between(0, 1), default=0.4,
                        help="share of images that get the objects of another one as well")
    add_schedule_arguments(parser.add_argument_group("noise of --noisy, as the generator has it"))
    args = parser.parse_args()
    for flag in "schedule", "timesteps", "shift":
        if not args.noisy and getattr(args, flag) != parser.get_default(flag):
            raise UserError(f"--{flag} is about the noise of --noisy; leave it out, or add that")
    return args


def augment(x, labels, background, paste):
    """Other images of the same objects: x (B, 3, 64, 64) in [-1, 1] and multi-hot labels (B, 24) -> the same.

    Some get the objects of another one as well, that is what differs from the `background` (3, 64, 64), so that more
    than three occur. Mirrored, moved, stretched, brighter or darker, grainier: nothing that changes a shape or the name
    of a colour.
    """
    # Moved sideways, for the first object of every scene stands in the centre.
    shift = int(torch.randint(9, 17, ()) * (2 * torch.randint(0, 2, ()) - 1))
    other, pasted = x.roll(1, 0), uniform(0, 1, len(x), x.device) < paste
    mask = (other - background).abs().amax(1, keepdim=True) > 0.08
    x = torch.where(mask.roll(shift, 3) & pasted, other.roll(shift, 3), x)
    labels = torch.where(pasted.flatten(1), labels.maximum(labels.roll(1, 0)), labels)
    x = torch.where(uniform(0, 1, len(x), x.device) < 0.5, x, x.flip(3))
    x = random_affine(x, zoom=(0.87, 1.15), stretch=0.1, shift=0.12)
    x = (x + 1) * uniform(0.9, 1.1, len(x), x.device) - 1
    return x + uniform(0, 0.04, len(x), x.device) * torch.randn_like(x), labels


@torch.no_grad()
def accuracy(model, images, labels, noisy_at=None):
    """The share of labels among the k likeliest of each image: uint8 images; noisy_at: (t, alphas_cumprod) or None."""
    hits = 0
    stream = torch.Generator().manual_seed(0)
    for batch, label in zip(images.split(256), labels.split(256)):
        x, t = as_input(batch), None
        if noisy_at:
            t = torch.full((len(x),), noisy_at[0], device=x.device)
            x = diffuse(x, t, torch.randn(x.shape, generator=stream).to(x.device), noisy_at[1])
        hits += top_k_hits(model.logits(x, t), label).sum().item()
    return hits / labels.sum().item()


def main():
    args = parse_args()
    schedule = schedule_of(args)
    process, saved = training.start(args, "p7_clevr_evaluator")
    device = process.device
    images, labels, held_out_images, held_out_labels = (
        tensor.to(device) for part in ("grader", "held_out") for tensor in read_scenes(args.data_dir, part)[:2])
    alphas_cumprod = scene_schedule(**schedule).to(device)
    background = as_input(empty_background(images))
    equal = (alphas_cumprod - 0.5).abs().argmin().item()  # where signal and noise have the same variance
    per_epoch = training.steps_per_epoch(len(images), args.batch_size)
    total = args.epochs * per_epoch
    config = dict(network=args.network, **(dict(schedule=schedule) if args.noisy else {}))

    training.seed_all(args.seed)
    model = NETWORKS[args.network]().to(device)
    parts = training.make_parts(model, training.make_optimizers(model, args), process, saved)
    metrics, means = saved["metrics"] if saved else [], training.Means()
    parallel = training.distribute(model, process)
    training.announce(f"{len(images)} images, {len(held_out_images)} held out", process, total, model)

    for step in training.steps(args, process, saved, total, images, labels):
        batch = training.batch_indices(step, len(images), args, process)
        x, y = augment(as_input(images[batch]), labels[batch], background, args.paste)
        t = torch.zeros(len(x), dtype=torch.int64, device=device)
        if args.noisy:
            t = torch.randint(0, len(alphas_cumprod), (len(x),), device=device)
            x = diffuse(x, t, torch.randn_like(x), alphas_cumprod)
        with autocast(device, process.dtype):
            probabilities = parallel(x, t)
        loss = F.binary_cross_entropy(probabilities.float(), y, reduction="none").sum(1)
        training.update(parts, loss.mean(), training.warmup_cosine(step, total, args.warmup),
                        training.ema_decay(args.ema, step))
        means.add(loss=loss)
        if training.due(args, step, total):
            means.add(accuracy=torch.tensor(accuracy(parts.ema, held_out_images, held_out_labels,
                                                     (equal, alphas_cumprod) if args.noisy else None),
                                             device=device))
            training.log(metrics, means, step, per_epoch, args, parts, process)
            if process.rank == 0:
                description = dict(kind="p7_clevr_evaluator", config=config, recipe=training.recipe(args),
                                   metrics=metrics)
                training.save_model(args.output_dir, parts.ema, **description)
                training.save_training(args.output_dir, parts, step, **description)


if __name__ == "__main__":
    run(main)
