"""Generates digits in the style of MNIST-M with the checkpoint of problem 1, or in the styles of several domains.

    bash hw2_1.sh out_dir                       # 1,000 images, 0_001.png ... 9_100.png
    python3 p1_ddpm/inference.py out_dir --per_class 10 --guidance 2 --seed 1
    python3 p1_ddpm/inference.py out_dir --checkpoint p1_ddpm/output/model.pt --amp off

A checkpoint of `train.py --domains mnistm svhn` writes out_dir/mnistm/0_001.png ... 9_050.png and out_dir/svhn/. The
defaults are hw2_1.sh's; assignments/dlcv2024_hw2/hw2_1.sh shows the flags that suit the one that is here.

Takes 32 seconds on 2 CPU cores in float32. On a CPU the same command makes the same bytes every time on the same
machine. The noise of an image depends on --seed, its class and its number alone; another --batch_size or number of
threads changes the order of float32 sums, which moves a pixel by one grey level now and then. Where the processor has
bfloat16 units it takes 19 in bfloat16, which moves pixels by some grey levels; --amp off does not.
"""

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (UserError, add_amp_argument, amp_dtype, argument_parser, float_between, image_generators, in_batches,
                   int_between, nonempty_path, pick_device, randn, require_finite, run)

import torch
from tqdm import tqdm

from files import load_checkpoint, make_output_dir, save_png
from p1_ddpm.diffusion import SAMPLERS, SPACINGS, guided_predictor
from p1_ddpm.model import load_model
from transforms import to_uint8

CHECKPOINT = ROOT / "p1_ddpm/checkpoints/ddpm.pt"


class Sampling(NamedTuple):
    """How images are sampled; the defaults are the DDIM setting that the studies vary, SHIPPED is hw2_1.sh's."""
    sampler: str = "ddim"
    steps: int = 20
    spacing: str = "log_snr"
    eta: float = 0.0
    guidance: float = 1.5
    interval: tuple = (200, 1000)


SHIPPED = Sampling("dpmpp", 8, "trimmed", guidance=2.5, interval=(400, 900))  # the setting of hw2_1.sh
# The setting that assignments/dlcv2024_hw2/hw2_1.sh names.
SHIPPED_2024 = SHIPPED._replace(steps=7, guidance=3.0, interval=(300, 950))


def add_sampling_arguments(parser):
    """The flags that say how images are sampled; studies.py shares them."""
    parser.add_argument("--checkpoint", type=nonempty_path, default=CHECKPOINT, help="a training's model.pt or last.pt")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema",
                        help="the EMA weights, or those of the last training step, which only last.pt holds")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default=SHIPPED.sampler, help="the sampling method")
    parser.add_argument("--steps", type=int_between(1), default=SHIPPED.steps, help="sampling steps, at most T")
    parser.add_argument("--spacing", choices=sorted(SPACINGS), default=SHIPPED.spacing,
                        help="equal strides in log(signal / noise), in its middle part alone, or in t")
    parser.add_argument("--eta", type=float_between(0, 1), default=SHIPPED.eta,
                        help="noise of the sampler ddim: 0 none, 1 as ddpm")
    parser.add_argument("--guidance", type=float_between(0), default=SHIPPED.guidance,
                        help="strength of classifier-free guidance; 0 is the plain conditional model")
    parser.add_argument("--interval", type=float_between(0), nargs=2, default=SHIPPED.interval, metavar=("LOW", "HIGH"),
                        help="guidance acts while LOW <= 1000 t / T <= HIGH")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--batch_size", type=int_between(1), default=125, help="images at a time")


def sampling_of(args):
    """The Sampling that the flags `args` ask for."""
    return Sampling(args.sampler, args.steps, args.spacing, args.eta, args.guidance, tuple(args.interval))


def visited_timesteps(sampling, alphas_cumprod):
    """The timesteps from T down to 0 that the sampler visits; UserError when the settings do not fit together."""
    total = len(alphas_cumprod) - 1
    if sampling.steps > total:
        raise UserError(f"--steps {sampling.steps} is above the {total} timesteps of the checkpoint")
    if sampling.eta and sampling.sampler != "ddim":
        raise UserError(f"--eta {sampling.eta:g} is for --sampler ddim alone; leave it out with {sampling.sampler}")
    low, high = sampling.interval
    if low > high:
        raise UserError(f"--interval {low:g} {high:g} is empty; the lower timestep comes first")
    return SPACINGS[sampling.spacing](alphas_cumprod, sampling.steps)


@torch.no_grad()
def sample(model, alphas_cumprod, condition, noise, generators, sampling, dtype=None):
    """Yields (t, x_t) after each step from the noise x_T (B, C, H, W) to images in [-1, 1] under their conditions, such
    as labels (B,). dtype: the network's low precision, or None."""
    alphas_cumprod = alphas_cumprod.cpu()  # each of its values is asked for by itself
    timesteps = visited_timesteps(sampling, alphas_cumprod)
    predict = guided_predictor(model, condition, model.null(condition), alphas_cumprod, sampling.guidance,
                               sampling.interval, dtype)
    options = dict(eta=sampling.eta) if sampling.sampler == "ddim" else {}
    yield from SAMPLERS[sampling.sampler](predict, noise, timesteps, alphas_cumprod, generators, **options)


def sample_grid(model, alphas_cumprod, condition, columns):
    """A picture, uint8 (3, H, W), of an image under each condition, from noise that is the same at every call."""
    from torchvision.utils import make_grid  # here, for its import takes as long as torch's and hw2_1.sh needs none
    generators = image_generators(0, range(len(condition)))
    noise = randn(generators, model.image_shape, condition.device)
    sampling = Sampling("dpmpp", min(16, len(alphas_cumprod) - 1), guidance=1.0, interval=(0, 1000))
    *_, (_, images) = sample(model, alphas_cumprod, condition, noise, generators, sampling)
    return make_grid(to_uint8((images + 1) / 2).cpu(), nrow=columns, padding=1)


def generate(model, alphas_cumprod, keys, conditions, sampling, seed, device, batch_size=125, keep=(), sample=sample,
             **options):
    """Yields (keys, images, states) batch by batch under `conditions` (N, ...), with the list `keys` of N integers.

    images: uint8 (B, C, H, W) on the CPU. states: {t: images at timestep t} for those in `keep`, which the sampler has
    to visit. An image's noise is keyed by (seed, its key), so neither its batch nor the other images change it.
    `sample` and its `options`: this chapter's, or one with its arguments. UserError when an image comes out as NaN.
    """
    finished, jobs = 0, list(zip(keys, conditions))
    bar = tqdm(total=len(jobs) * sampling.steps, desc="sampling", unit="image-step", unit_scale=True, disable=None)

    def images_of(batch):
        bar.n = finished * sampling.steps  # counted anew when a batch that was too large is tried again
        keys, conditions = zip(*batch)
        generators = image_generators(seed, keys)
        x = randn(generators, model.image_shape, device)
        states = {len(alphas_cumprod) - 1: x}
        for t, x in sample(model, alphas_cumprod, torch.stack(conditions).to(device), x, generators, sampling,
                           **options):
            if t in keep:
                states[t] = x
            bar.update(len(batch))
        require_finite(x, [f"image {key}" for key in keys])
        return to_uint8((x + 1) / 2).cpu(), {t: to_uint8((states[t] + 1) / 2).cpu() for t in keep}

    with bar:
        for batch, (images, states) in in_batches(images_of, jobs, batch_size):
            finished += len(batch)
            yield [key for key, _ in batch], images, states


def digits(classes, per_class):
    """(keys, labels): 1000 label + number of the images 1 to `per_class` of each class, and their labels, (N,)."""
    keys = [1000 * label + number for label in range(classes) for number in range(1, per_class + 1)]
    return keys, torch.tensor(keys) // 1000


def domains_of(checkpoint):
    """The domains that a checkpoint's classes 0 to 9, 10 to 19, ... are digits of."""
    return load_checkpoint(checkpoint, "p1_ddpm", ["config"])["config"].get("domains", ["mnistm"])


def file_name(label, number, domains=("mnistm",)):
    """Where in the output folder an image goes; of several domains each has a folder of its own."""
    return (f"{label}_{number:03d}.png" if len(domains) == 1 else
            f"{domains[label // 10]}/{label % 10}_{number:03d}.png")


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("output_dir", type=nonempty_path,
                        help="folder for the images; made if need be, other files in it stay")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int_between(0), default=0, help="seed of the noise")
    parser.add_argument("--per_class", type=int_between(1, 999),  # names and keys of noise have three digits
                        help="images of each class, at most 999; else about 1,000 in all")
    add_amp_argument(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    device, sampling = pick_device(args.device), sampling_of(args)
    dtype = amp_dtype(args.amp, device)
    model, alphas_cumprod = load_model(args.checkpoint, device, args.weights)
    per_class, domains = args.per_class or 1000 // model.num_classes, domains_of(args.checkpoint)
    visited_timesteps(sampling, alphas_cumprod)  # a mistake is told before anything is written
    keys, labels = digits(model.num_classes, per_class)
    paths = {key: args.output_dir / file_name(*divmod(key, 1000), domains) for key in keys}
    for folder in sorted({path.parent for path in paths.values()}):
        make_output_dir(folder)
    # All images first: a run that fails or is interrupted on the way leaves the folder as it was.
    batches = list(generate(model, alphas_cumprod, keys, labels, sampling, args.seed, device, args.batch_size,
                            dtype=dtype))
    for batch, images, _ in batches:
        for key, image in zip(batch, images):
            save_png(paths[key], image)
    print(f"{len(keys)} images in {args.output_dir}")


if __name__ == "__main__":
    run(main)
