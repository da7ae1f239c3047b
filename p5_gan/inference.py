"""Generates faces with the checkpoint of problem 2.

    bash assignments/dlcv2020_hw3/hw3_p2.sh OUT.png              # 32 faces in one picture, PNG or JPEG
    python3 p5_gan/inference.py OUT_DIR --count 1000             # 0000.png ... 0999.png

A face depends on --seed and its number alone: 0031.png is the last one of the grid.
"""

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (argument_parser, image_generators, in_batches, int_between, nonempty_path, pick_device,
                   randn, require_finite, run)

import torch

from faces import add_output_arguments, check_outputs, save_faces
from files import make_output_dir
from p5_gan.model import CHECKPOINT, load_model
from transforms import to_uint8


@torch.no_grad()
def generate(model, numbers, seed, batch_size=250):
    """uint8 (N, 3, 64, 64) on the CPU: the faces of the list `numbers`, whose latents are keyed by (seed, number).

    UserError when a face comes out as NaN.
    """
    device = next(model.parameters()).device

    def images_of(batch):
        images = model(randn(image_generators(seed, batch), (model.latents,), device))
        return to_uint8((require_finite(images, [f"face {number}" for number in batch]) + 1) / 2).cpu()

    return torch.cat([images for _, images in in_batches(images_of, numbers, batch_size)])


def parse_args():
    parser = argument_parser(__doc__)
    add_output_arguments(parser)
    parser.add_argument("--count", type=int_between(1), default=32, help="faces")
    parser.add_argument("--checkpoint", type=nonempty_path, default=CHECKPOINT, help="a training's model.pt or last.pt")
    parser.add_argument("--seed", type=int_between(0), default=0, help="seed of the latents")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--batch_size", type=int_between(1), default=250, help="faces at a time")
    return parser.parse_args()


def main():
    args = parse_args()
    check_outputs(args, math.ceil(args.count / 8))
    model = load_model(args.checkpoint, pick_device(args.device))
    if args.output_dir:
        make_output_dir(args.output_dir)
    images = generate(model, range(args.count), args.seed, args.batch_size)
    save_faces(images, args.output_dir, args.grid)


if __name__ == "__main__":
    run(main)
