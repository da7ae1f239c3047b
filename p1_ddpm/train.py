"""Trains the conditional DDPM of problem 1 on digits (Algorithm 1 of Ho et al. 2020 with label dropping).

    python3 p1_ddpm/train.py                               # all settings of the committed checkpoint, see below
    python3 p1_ddpm/train.py --resume                      # goes on where the last run stopped
    python3 p1_ddpm/train.py --resume --epochs 120         # prolongs a finished training
    python3 p1_ddpm/train.py --domains mnistm svhn         # one network of 20 classes, ten for each domain
    python3 p1_ddpm/train.py --dry_run                     # two steps, to see that all is in place
    torchrun --nproc_per_node=4 p1_ddpm/train.py           # several GPUs; --batch_size is for all together

Reads hw2_data/digits. Writes into --output_dir:
    last.pt         everything that --resume needs, every --save_every steps (600 are an epoch of 38,400 digits)
    model.pt        the EMA weights in half precision and the configuration, for inference.py --checkpoint
    metrics.jsonl   one line per checkpoint: loss, loss per quarter of the timesteps, the EMA's on validation digits
    samples_*.png   ten digits of each class from fixed noise, rows are classes

p1_ddpm/checkpoints/ddpm.pt is the model.pt of these settings: 50 epochs, 98 minutes on 2 CPU cores with bfloat16 and
nothing beside it (about 330 images/s), the loss ends at 0.115. metrics.jsonl beside it is the record, without losses on
validation digits.
mnistm_svhn.pt has two domains; README.md shows its command. It took 319 seconds on a GPU that other trainings shared
(2 CPU cores: 106 images/s, by that two hours and a third), the loss ends at 0.091; mnistm_svhn.jsonl is the record.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, autocast, float_between, int_between, nonempty_path, run

import torch

import training
from dataset import DOMAINS, balanced, load_domains
from p1_ddpm.diffusion import ddpm_loss, noise_schedule, require_noise, validation_loss
from p1_ddpm.inference import sample_grid
from p1_ddpm.model import UNet
from transforms import as_input


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--output_dir", type=nonempty_path, default=ROOT / "p1_ddpm/output",
                        help="where checkpoints go")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=["mnistm"],
                        help="whose digits; smaller ones are repeated, as often as the largest has room for")
    training.add_arguments(parser, epochs=50, batch_size=64, lr=8e-4, warmup=500, weight_decay=0.01, ema=0.999,
                           save_every=600)
    parser.add_argument("--sample_every", type=int_between(1), default=5, help="checkpoints between sample grids")
    parser.add_argument("--label_drop", type=float_between(0, 1), default=0.1,
                        help="share of labels dropped for classifier-free guidance")
    parser.add_argument("--logit_normal", type=float_between(0, 1), default=0.0,
                        help="share of timesteps drawn around the middle of the schedule")
    model = parser.add_argument_group("model")
    model.add_argument("--channels", type=int_between(8), nargs=2, default=[96, 192],
                       help="widths at 14x14 and 7x7, multiples of 8")
    model.add_argument("--blocks", type=int_between(1), default=1, help="residual blocks per resolution and way")
    model.add_argument("--dropout", type=float_between(0, 1), default=0.0, help="dropout in the residual blocks")
    model.add_argument("--schedule", choices=["linear", "cosine"], default="cosine", help="noise schedule")
    model.add_argument("--timesteps", type=int_between(2), default=1000, help="T, the length of the noise schedule")
    return parser.parse_args()


def main():
    args = parse_args()
    network = dict(channels=args.channels, blocks=args.blocks, dropout=args.dropout, num_classes=10 * len(args.domains),
                   patch=2, image_channels=3, image_size=28)
    config = dict(network=network, schedule=dict(name=args.schedule, timesteps=args.timesteps), domains=args.domains)
    alphas_cumprod = noise_schedule(**config["schedule"])
    require_noise(alphas_cumprod, args.schedule)
    if any(width % 8 for width in args.channels):
        raise UserError(f"--channels {args.channels} must be multiples of 8, the groups of the normalisation")
    if len(set(args.domains)) < len(args.domains):
        raise UserError(f"--domains {' '.join(args.domains)} names a domain twice")
    process, saved = training.start(args, "p1_ddpm")
    device = process.device
    digits, validation = (load_domains(args.data_dir, args.domains, split) for split in ("train", "val"))
    images, labels, alphas_cumprod = (values.to(device) for values in (*balanced(digits), alphas_cumprod))
    per_epoch = training.steps_per_epoch(len(images), args.batch_size)
    total = args.epochs * per_epoch

    training.seed_all(args.seed)
    model = UNet(**network).to(device)
    parts = training.make_parts(model, training.make_optimizers(model, args), process, saved)
    parallel = training.distribute(model, process)
    shown = torch.arange(model.num_classes, device=device).repeat_interleave(10)  # ten samples a class
    metrics, means = saved["metrics"] if saved else [], training.Means()
    training.announce(f"{len(images)} images", process, total, model)

    for step in training.steps(args, process, saved, total, images, labels):
        batch = training.batch_indices(step, len(images), args, process)
        x0, y = as_input(images[batch]), labels[batch]
        with autocast(device, process.dtype):
            t, loss = ddpm_loss(parallel, x0, y, model.null(y), alphas_cumprod, args.label_drop,
                                args.logit_normal)
        training.update(parts, loss.mean(), training.warmup_cosine(step, total, args.warmup),
                        training.ema_decay(args.ema, step))
        means.add(loss=loss)
        means.add_quarters("loss_quarters", loss, t, args.timesteps)
        if not training.due(args, step, total):
            continue
        with autocast(device, process.dtype):
            for domain, (x0, y) in zip(args.domains, validation):
                means.add(**{f"val_loss_{domain}": validation_loss(parts.ema, x0[:1000], y[:1000], alphas_cumprod)})
        training.log(metrics, means, step, per_epoch, args, parts, process)
        if process.rank == 0:
            description = dict(kind="p1_ddpm", config=config, recipe=training.recipe(args), metrics=metrics)
            wanted = len(metrics) % args.sample_every == 0 or step + 1 == total
            samples = sample_grid(parts.ema, alphas_cumprod, shown, 10) if wanted else None
            training.save(args.output_dir, parts, step, description, samples)


if __name__ == "__main__":
    run(main)
