"""Generates faces with the checkpoint of problem 1, and shows what the autoencoder makes of given ones.

    bash assignments/dlcv2020_hw3/hw3_p1.sh OUT.png                     # 32 faces in one picture, PNG or JPEG
    python3 p4_vae/inference.py OUT_DIR --count 1000                    # 0000.png ... 0999.png
    python3 p4_vae/inference.py OUT_DIR --count 1000 --prior fitted     # from the prior fitted to the latents
    python3 p4_vae/inference.py --grid OUT.png --reconstruct FACES      # ten of them above reconstructions, MSEs
    python3 p4_vae/inference.py --grid OUT.png --reconstruct FACES --attribute Smiling Eyeglasses   # more rows
    python3 p4_vae/inference.py --grid OUT.png --walk FACES             # eight steps from the first face to the second

A face depends on --seed and its number alone: 0031.png is the last one of the grid. FACES: as --data_dir in faces.py.
"""

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (UserError, argument_parser, float_between, image_generators, in_batches, int_between, nonempty_path,
                   pick_device, require_finite, run)

import torch

from faces import add_output_arguments, check_outputs, face_source, faces_to_test, save_faces
from files import make_output_dir
from p4_vae.elbo import squared_errors
from p4_vae.latents import sample_prior
from p4_vae.model import CHECKPOINT, load_model
from transforms import to_uint8


@torch.no_grad()
def generate(model, numbers, seed, mixture=None, batch_size=250):
    """uint8 (N, 3, 64, 64) on the CPU: the faces of the list `numbers`, whose latents are keyed by (seed, number).

    mixture: the prior that was fitted (latents.py), or None for N(0, I). UserError when a face comes out as NaN.
    """
    device = next(model.parameters()).device

    def images_of(batch):
        z = sample_prior(model.latents, image_generators(seed, batch), mixture)
        images = model.decode(z.to(device))
        return to_uint8(require_finite(images, [f"face {number}" for number in batch])).cpu()

    return torch.cat([images for _, images in in_batches(images_of, numbers, batch_size)])


@torch.no_grad()
def reconstruct(model, images, directions=(), batch_size=250):
    """(reconstructions, MSEs) of uint8 `images` (N, 3, 64, 64).

    uint8 (1 + len(directions), N, 3, 64, 64): the image of the mean latent, and those of the mean latent moved by each
    direction (L,); float (N,): the errors of the first, in [0, 1]. UserError when one comes out as NaN.
    """
    device = next(model.parameters()).device

    def rows_of(batch):
        x = batch.to(device).float() / 255
        mean, _ = model.encode(x)
        decoded = [require_finite(model.decode(mean + shift.to(device)), ["a reconstruction"] * len(x))
                   for shift in (torch.zeros(model.latents), *directions)]
        return to_uint8(torch.stack(decoded)).cpu(), squared_errors(decoded[0].clamp(0, 1), x).cpu()

    rows, errors = zip(*(result for _, result in in_batches(rows_of, images, batch_size)))
    return torch.cat(rows, dim=1), torch.cat(errors)


@torch.no_grad()
def walk(model, pair, steps=8):
    """uint8 (steps, 3, 64, 64): on the straight line between the mean latents of two images, uint8 (2, 3, 64, 64)."""
    (start, stop), _ = model.encode(pair.to(next(model.parameters()).device).float() / 255)
    images = model.decode(torch.stack([start.lerp(stop, i / (steps - 1)) for i in range(steps)]))
    return to_uint8(require_finite(images, ["a face of the walk"] * steps)).cpu()


# What each of the three pictures can be told.
USES = {"sampling": {"count", "prior", "seed"}, "--walk": set(),
        "--reconstruct": {"count", "seed", "attribute", "strength"}}


def parse_args():
    parser = argument_parser(__doc__)
    add_output_arguments(parser)
    parser.add_argument("--count", type=int_between(1), help="faces; 32, or 10 with --reconstruct, when not given")
    parser.add_argument("--prior", choices=["normal", "fitted"], default="normal", help="what latents are sampled from")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--reconstruct", type=face_source, metavar="FACES", help="show some of these and their likes")
    what.add_argument("--walk", type=face_source, metavar="FACES", help="go from the first of these to the second")
    parser.add_argument("--attribute", nargs="+", default=[], help="with --reconstruct: attributes to add, in rows")
    parser.add_argument("--strength", type=float_between(-10, 10), default=1.5, help="how much of an attribute to add")
    parser.add_argument("--checkpoint", type=nonempty_path, default=CHECKPOINT, help="a training's model.pt or last.pt")
    parser.add_argument("--seed", type=int_between(0), default=0,
                        help="seed of the latents, or of which faces are reconstructed")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--batch_size", type=int_between(1), default=250, help="faces at a time")
    args = parser.parse_args()
    what = "--walk" if args.walk else "--reconstruct" if args.reconstruct else "sampling"
    for flag in sorted(set().union(*USES.values()) - USES[what]):
        if getattr(args, flag) != parser.get_default(flag):
            others = " and ".join(other for other in USES if flag in USES[other])
            raise UserError(f"--{flag} means nothing to {what}, it is for {others}; leave it out")
    if args.strength != parser.get_default("strength") and not args.attribute:
        raise UserError("--strength means nothing without --attribute; name one, or leave it out")
    args.count = 2 if args.walk else args.count or (10 if args.reconstruct else 32)
    return args


def pictures(args, model, latents):
    """(uint8 images (N, 3, 64, 64), columns of their grid): what the flags ask for; prints what belongs to them."""
    known = latents.get("attributes", {})
    unknown = [name for name in args.attribute if name not in known]
    if unknown:
        raise UserError(f"the checkpoint {args.checkpoint} knows no attribute {unknown[0]}; it knows "
                        f"{', '.join(known) or 'none'}")
    if args.walk or args.reconstruct:
        faces = faces_to_test([args.walk or args.reconstruct])
        if len(faces.images) < args.count:
            raise UserError(f"{(args.walk or args.reconstruct).path} holds {len(faces.images)} faces, and {args.count} "
                            f"are needed; name others{'' if args.walk else ', or lower --count'}")
        if args.walk:
            return walk(model, faces.images[:2]), 8
        faces = faces.draw(args.count, args.seed)
        rows, errors = reconstruct(model, faces.images, [args.strength * known[name] for name in args.attribute],
                                   args.batch_size)
        for number, error in zip(faces.numbers.tolist(), errors.tolist()):
            print(f"face {number:06d}: mse = {error:.4f}")
        return torch.cat([faces.images, *rows]), args.count
    if args.prior == "fitted" and "mixture" not in latents:
        raise UserError(f"the checkpoint {args.checkpoint} has no fitted prior, which is made when a training ends; "
                        "let it end, or use --prior normal")
    mixture = latents["mixture"] if args.prior == "fitted" else None
    return generate(model, range(args.count), args.seed, mixture, args.batch_size), 8


def main():
    args = parse_args()
    check_outputs(args, args.count if args.reconstruct else math.ceil(args.count / 8))
    model, latents = load_model(args.checkpoint, pick_device(args.device))
    if args.output_dir:
        make_output_dir(args.output_dir)
    images, columns = pictures(args, model, latents)
    save_faces(images, args.output_dir, args.grid, columns)


if __name__ == "__main__":
    run(main)
