"""Draws digits in the style of MNIST-M with the checkpoint of problem 1.

    bash hw2_1.sh out_dir                       # 1,000 images, 0_001.png ... 9_100.png
    python3 p1_ddpm/inference.py out_dir --per_class 10 --guidance 2 --seed 1

Takes 45 seconds on 2 CPU cores. On a CPU the same command draws the same bytes every time on the same machine. The
noise of an image depends on --seed, its digit and its number alone; another --batch_size or number of threads
changes the order of float32 sums, which moves a pixel by one grey level now and then.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from p1_ddpm.diffusion import (SAMPLERS, guided_predictor, log_snr_levels, noise_schedule,  # noqa: E402
                               uniform_levels)
from p1_ddpm.model import UNet  # noqa: E402
from utils import (UserError, argument_parser, float_between, image_generators, in_batches, int_at_least,  # noqa: E402
                   load_checkpoint, make_output_dir, pick_device, randn, run, save_png, to_uint8)

CHECKPOINT = ROOT / "p1_ddpm/checkpoints/ddpm.pt"


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("output_dir", type=Path, help="folder for the images; made if need be, other files in it stay")
    add_sampling_arguments(parser)
    parser.add_argument("--per_class", type=int_at_least(1), default=100, help="images of each digit, at most 999")
    parser.add_argument("--trajectory", type=int_at_least(0), nargs="+", default=[], metavar="T",
                        help="also keep each digit's first image at these noise steps, in output_dir/trajectory")
    return parser.parse_args()


def add_sampling_arguments(parser):
    """The flags that say how images are drawn; study.py and the report share them."""
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="a model.pt of train.py, or its last.pt")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema",
                        help="the averaged weights, or those of the last training step, which only last.pt holds")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="ddim", help="the sampling method")
    parser.add_argument("--steps", type=int_at_least(1), default=20, help="sampling steps, at most T")
    parser.add_argument("--spacing", choices=["log_snr", "uniform"], default="log_snr",
                        help="equal strides in log(signal / noise), or in t")
    parser.add_argument("--eta", type=float_between(0, 1), default=0.0, help="noise of the sampler ddim: 0 none, 1 as ddpm")
    parser.add_argument("--guidance", type=float_between(0), default=1.5,
                        help="strength of classifier-free guidance; 0 is the plain conditional model")
    parser.add_argument("--interval", type=float_between(0), nargs=2, default=[200, 1000], metavar=("LOW", "HIGH"),
                        help="guidance acts while LOW <= 1000 t / T <= HIGH")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of the noise")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--batch_size", type=int_at_least(1), default=250, help="images drawn at a time")


def load_model(path, device, weights="ema"):
    """(model, alphas_cumprod) of a checkpoint, in evaluation mode; weights: 'ema', the average, or 'model'."""
    checkpoint = load_checkpoint(path, "p1_ddpm", ["model_config", "schedule", weights])
    try:
        model, state = UNet(**checkpoint["model_config"]), checkpoint[weights]
        model.load_state_dict(state.get("shadow", state))  # in last.pt the average comes with its count of updates
        # The layout in which convolutions are fastest on a CPU.
        return model.to(device, memory_format=torch.channels_last).eval(), noise_schedule(*checkpoint["schedule"])
    except (AttributeError, RuntimeError, TypeError, ValueError):
        raise UserError(f"the weights in {path} do not fit the network and schedule that it describes; fetch it again")


def check_steps(args, alphas_cumprod, keep=()):
    """The steps that the sampler visits; UserError when the flags do not fit it or each other, or a step to `keep`
    is not among them."""
    total = len(alphas_cumprod) - 1
    if args.steps > total:
        raise UserError(f"--steps {args.steps} is above the {total} noise steps of the checkpoint")
    if args.eta and args.sampler != "ddim":
        raise UserError(f"--eta {args.eta:g} is for --sampler ddim alone; leave it out with {args.sampler}")
    if args.interval[0] > args.interval[1]:
        raise UserError(f"--interval {args.interval[0]:g} {args.interval[1]:g} is empty; the lower step comes first")
    levels = uniform_levels(total, args.steps) if args.spacing == "uniform" else log_snr_levels(alphas_cumprod, args.steps)
    unvisited = sorted(set(keep) - set(levels))
    if unvisited:
        raise UserError(f"--trajectory {unvisited[0]}: with --steps {args.steps} the sampler visits only "
                        f"{', '.join(map(str, levels))}")
    return levels


@torch.no_grad()
def generate(model, alphas_cumprod, numbers, args, device, keep=()):
    """Yields (numbers, images, states) batch by batch for the list `numbers` of (digit, number) pairs.

    images: uint8 (B, 3, 28, 28) on the CPU. states: {t: images at step t} for the steps in `keep`. An image's
    noise is keyed by (seed, 1000 digit + number), so neither its batch nor --per_class changes it.
    """
    levels = check_steps(args, alphas_cumprod, keep)

    def draw(batch):
        labels = torch.tensor([digit for digit, _ in batch], device=device)
        generators = image_generators(args.seed, [1000 * digit + number for digit, number in batch])
        predict = guided_predictor(model, labels, model.null_label, alphas_cumprod, args.guidance, args.interval)
        x = randn(generators, (3, 28, 28), device)
        states = {levels[0]: x}
        for t, x in SAMPLERS[args.sampler](predict, x, levels, alphas_cumprod, generators, args.eta):
            if t in keep:
                states[t] = x
            bar.update(len(batch))
        return to_uint8((x + 1) / 2).cpu(), {t: to_uint8((states[t] + 1) / 2).cpu() for t in keep}

    with tqdm(total=len(numbers) * args.steps, desc="sampling", unit="image-step", unit_scale=True,
              disable=None) as bar:
        for batch, (images, states) in in_batches(draw, numbers, args.batch_size):
            yield batch, images, states


def main():
    args = parse_args()
    if args.per_class > 999:
        raise UserError(f"--per_class {args.per_class} is above 999, the most that three-digit names can hold")
    device = pick_device(args.device)
    model, alphas_cumprod = load_model(args.checkpoint, device, args.weights)
    check_steps(args, alphas_cumprod, args.trajectory)  # a mistake is told before anything is written
    output_dir = make_output_dir(args.output_dir)
    if args.trajectory:
        make_output_dir(output_dir / "trajectory")
    numbers = [(digit, number) for digit in range(10) for number in range(1, args.per_class + 1)]
    for left in output_dir.glob(".unfinished-*"):  # by a run that was killed
        shutil.rmtree(left)
    # Inside the output folder, so that moving a file is a rename: the folder may be a file system of its own.
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".unfinished-") as temporary:
        temporary = Path(temporary)
        (temporary / "trajectory").mkdir()
        for batch, images, states in generate(model, alphas_cumprod, numbers, args, device, args.trajectory):
            for k, (digit, number) in enumerate(batch):
                save_png(temporary / f"{digit}_{number:03d}.png", images[k])
                for t in states if number == 1 else ():
                    save_png(temporary / f"trajectory/{digit}_t{t:04d}.png", states[t][k])
        for path in sorted(temporary.rglob("*.png")):
            os.replace(path, output_dir / path.relative_to(temporary))
    print(f"{len(numbers)} images in {output_dir}")


if __name__ == "__main__":
    run(main)
