"""Trains the variational autoencoder of problem 1 on faces.

    python3 p4_vae/train.py --data_dir first9000.zip squashed.zip:6-58 --attributes list_attr_celeba.txt
    python3 p4_vae/train.py --data_dir ... --attributes ... --resume  # goes on where the last run stopped
    python3 p4_vae/train.py --data_dir ... --beta 1e-5                # the course's weight of the KL divergence
    python3 p4_vae/train.py --data_dir face/train --attributes face/train.csv       # the course's set
    torchrun --nproc_per_node=4 p4_vae/train.py --data_dir ...        # several GPUs; --batch_size is for all together

The first took 44 minutes on one CPU core; its mean squared error on validation faces is 0.0053 (evaluate.py). What
--data_dir takes: faces.py. The faces 8001 to 9000 are kept for validation. Writes into --output_dir:
    last.pt         everything that --resume needs, every --save_every steps
    model.pt        the EMA weights in half precision, in the end with what latents.py makes of them, for inference.py
    metrics.jsonl   one line per checkpoint: MSE, KL, decoder's variance sigma2 (elbo.py), learning rate, images/s
    samples_*.png   sixteen validation faces, their reconstructions and sixteen samples of N(0, I), in rows of eight
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (UserError, argument_parser, autocast, float_between, image_generators, int_between, nonempty_path,
                   randn, run)

import argparse

import torch
from torchvision.utils import make_grid

import training
from faces import add_arguments, read_attributes, read_faces, split_faces
from p4_vae.elbo import D, automatic_beta, kl_divergence, squared_errors
from p4_vae.latents import attribute_directions, encode_all, fit_mixture
from p4_vae.model import PIXELS, VAE
from transforms import random_mirror, to_uint8

# A mean over pixels has small gradients, of norm 0.001 to 0.002; one of norm 1 would steer Muon, which moves by the
# same amount along small gradients and large ones, for dozens of steps.
CLIP = 0.01


def beta(text):
    """An argparse type: 'auto' or a weight of the KL divergence."""
    try:
        return text if text == "auto" else float_between(0)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor a number")


def parse_args():
    parser = argument_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--attributes", type=nonempty_path, help="list_attr_celeba.txt or the course's train.csv")
    parser.add_argument("--output_dir", type=nonempty_path, default=ROOT / "p4_vae/output", help="where to write")
    training.add_arguments(parser, epochs=2, batch_size=32, lr=1e-3, warmup=100, weight_decay=0.01, ema=0.995,
                           save_every=100)
    parser.set_defaults(optimizer="muon")
    parser.add_argument("--beta", type=beta, default="auto", help="weight of the KL divergence; auto: see elbo.py")
    parser.add_argument("--latents", type=int_between(1), default=192, help="length of the latent vector")
    parser.add_argument("--channels", type=int_between(1), default=16, help="width at 32x32")
    return parser.parse_args()


@torch.no_grad()
def sample_grid(model, faces, device):
    """A picture, uint8 (3, H, W): up to sixteen uint8 `faces`, their reconstructions, and samples of fixed noise."""
    x = faces[:16].to(device).float() / 255
    z = randn(image_generators(0, range(16)), (model.latents,), device)
    images = torch.cat([x, model.decode(model.encode(x)[0]), model.decode(z)])
    return make_grid(to_uint8(images).cpu(), nrow=8, padding=1)


def describe(model, faces, attributes, seed):
    """What a checkpoint holds about the latents of the training `faces`; see latents.py."""
    means, log_variances = encode_all(model, faces.images)
    training.seed_all(seed)
    known = {} if attributes is None else dict(attributes=attribute_directions(means, faces.numbers, attributes))
    return dict(mixture=fit_mixture(means + (log_variances / 2).exp() * torch.randn(means.shape), seed=seed), **known)


def main():
    args = parse_args()
    attributes = read_attributes(args.attributes) if args.attributes else None
    process, saved = training.start(args, "p4_vae")
    if saved and "attributes" in saved.get("latents", {}) and attributes is None:
        raise UserError(f"{args.output_dir / 'last.pt'} was trained with --attributes; name them again")
    device, (faces, held_out) = process.device, split_faces(read_faces(args.data_dir))
    if args.latents >= min(len(faces.images) - 1, PIXELS):  # they are principal components, and leave an error
        raise UserError(f"--latents {args.latents} are too many for {len(faces.images)} training faces (8001 to 9000 "
                        f"are kept for validation) of {PIXELS} values; name more, or take fewer")
    if attributes is not None and not set(faces.numbers.tolist()).intersection(attributes.index):
        raise UserError(f"{args.attributes} knows none of the training faces; name the file that belongs to them")
    images = faces.images.to(device)
    per_epoch = training.steps_per_epoch(len(images), args.batch_size)
    total = args.epochs * per_epoch

    training.seed_all(args.seed)
    config = dict(latents=args.latents, channels=args.channels)
    model = VAE(**config).to(device, memory_format=torch.channels_last)
    model.set_eigenfaces(images[torch.randperm(len(images), device=device)[:10_000]])
    parts = training.make_parts(model, training.make_optimizers(model, args), process, saved)
    parallel = training.distribute(model, process)
    metrics, means = saved["metrics"] if saved else [], training.Means()
    training.announce(f"{len(images)} faces", process, total, model)

    for step in training.steps(args, process, saved, total, images):
        x = random_mirror(images[training.batch_indices(step, len(images), args, process)].float() / 255)
        with autocast(device, process.dtype):
            decoded, mean, log_variance = parallel(x, torch.randn(len(x), args.latents, device=device))
        mse, kl = squared_errors(decoded, x), kl_divergence(mean, log_variance)
        weight = automatic_beta(mse) if args.beta == "auto" else torch.tensor(args.beta, device=device)
        training.update(parts, (mse + weight * kl).mean(), training.warmup_cosine(step, total, args.warmup),
                        training.ema_decay(args.ema, step), CLIP)
        means.add(mse=mse, kl=kl, sigma2=weight * D / 2)
        if not training.due(args, step, total):
            continue
        training.log(metrics, means, step, per_epoch, args, parts, process)
        if process.rank == 0:
            latents = {} if attributes is None else dict(attributes={})  # so that --resume knows of them
            if step + 1 == total:
                latents = describe(parts.ema, faces, attributes, args.seed)
            description = dict(kind="p4_vae", config=config, recipe=training.recipe(args), metrics=metrics)
            samples = sample_grid(parts.ema, held_out.images if len(held_out.images) else faces.images, device)
            training.save(args.output_dir, parts, step, dict(description, latents=latents), samples)


if __name__ == "__main__":
    run(main)
