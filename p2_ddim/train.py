"""Trains UNet.py on face images (Algorithm 1 of Ho et al. 2020), for those who have no UNet.pt.

    python3 p2_ddim/train.py --data_dir first9000.zip squashed.zip:6-58         # face64.pt, see below
    python3 p2_ddim/train.py --data_dir img_align_celeba.zip --epochs 1         # or a folder of numbered images
    python3 p2_ddim/train.py --data_dir img_align_celeba.zip --epochs 1 --resume    # goes on where that run stopped
    python3 p2_ddim/train.py --data_dir img_align_celeba.zip --dry_run          # two steps, to see that all is in place
    torchrun --nproc_per_node=4 p2_ddim/train.py --data_dir img_align_celeba.zip   # --batch_size is for all together

Writes into --output_dir:
    last.pt         everything that --resume needs, every --save_every steps
    model.pt        the EMA weights in half precision and what they belong to, for inference.py
    metrics.jsonl   one line per checkpoint: loss, loss per quarter of the timesteps, learning rate, images/s
    samples_*.png   sixteen faces from noise that is always the same

What --data_dir takes: faces.py; the faces 8001 to 9000 are kept for validation. p2_ddim/checkpoints/face64.pt is the
model.pt of the first command, on the 36,459 faces that p4_vae and p5_gan have seen, too:
121 minutes on 2 CPU cores with bfloat16, the loss ends at 0.020. metrics.jsonl beside it is the record.
p2_ddim/noise64 holds the first ten of the sixteen noises.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, autocast, image_generators, int_between, nonempty_path, randn, run

import torch
from torchvision.utils import make_grid

import training
from faces import add_arguments, training_faces
from p2_ddim.ddim import T, ddpm_loss, noise_schedule, sample, stretch
from transforms import as_input, random_mirror
from UNet import STRIDE, UNet


def parse_args():
    parser = argument_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--output_dir", type=nonempty_path, default=ROOT / "p2_ddim/output", help="where to write")
    parser.add_argument("--size", type=int_between(STRIDE), default=64,
                        help=f"side of the images, a multiple of {STRIDE}")
    parser.add_argument("--channel", type=int_between(4), default=32, help="width of the UNet; the course's has 128")
    training.add_arguments(parser, epochs=5, batch_size=32, lr=8e-4, warmup=500, weight_decay=0.01, ema=0.9995,
                           save_every=300)
    parser.set_defaults(optimizer="muon")
    args = parser.parse_args()
    if args.size % STRIDE:
        raise UserError(f"--size {args.size} is not a multiple of {STRIDE}; take {args.size // STRIDE * STRIDE}")
    return args


def draw_batch(images):
    """(x0, t) for uint8 images (B, 3, H, W): float32 in [-1, 1], each mirrored or not, and timesteps, int64 (B,)."""
    count, device = len(images), images.device
    x0 = random_mirror(as_input(images))
    # Uniform t, but one in each B-th of the range: a less noisy gradient (Kingma et al. 2021, appendix I.1).
    t = (torch.rand(1, device=device) + torch.arange(count, device=device) / count) % 1
    return x0, (t * T).long().clamp(max=T - 1)


def main():
    args = parse_args()
    training.seed_all(args.seed)
    try:
        model = UNet(channel=args.channel)
    except ValueError as error:
        raise UserError(f"--channel {args.channel} does not fit: {error}")
    process, saved = training.start(args, "p2_ddim")
    images = training_faces(args.data_dir, args.size).images.to(process.device)
    per_epoch = training.steps_per_epoch(len(images), args.batch_size)
    total = args.epochs * per_epoch

    model.to(process.device)
    parts = training.make_parts(model, training.make_optimizers(model, args), process, saved)
    parallel = training.distribute(model, process)
    alphas_cumprod = noise_schedule().to(process.device)
    grid_noise = randn(image_generators(0, range(16)), (3, args.size, args.size), process.device)
    metrics, means = saved["metrics"] if saved else [], training.Means()
    training.announce(f"{len(images)} images", process, total, model)

    for step in training.steps(args, process, saved, total, images):
        x0, t = draw_batch(images[training.batch_indices(step, len(images), args, process)])
        with autocast(process.device, process.dtype):
            loss = ddpm_loss(parallel, x0, t, torch.randn_like(x0), alphas_cumprod)
        training.update(parts, loss.mean(), training.warmup_cosine(step, total, args.warmup),
                        training.ema_decay(args.ema, step))
        means.add(loss=loss)
        means.add_quarters("loss_quarters", loss, t + 1, T)  # t counts from 0 here
        if not training.due(args, step, total):
            continue
        training.log(metrics, means, step, per_epoch, args, parts, process)
        if process.rank == 0:
            config = dict(channel=args.channel, size=args.size)
            description = dict(kind="p2_ddim", config=config, recipe=training.recipe(args), metrics=metrics)
            faces = [stretch(sample(parts.ema, noise)) for noise in grid_noise.split(args.batch_size)]
            training.save(args.output_dir, parts, step, description, make_grid(torch.cat(faces), nrow=4))


if __name__ == "__main__":
    run(main)
