"""Draws one face for each noise file: NOISE_DIR/00.pt becomes OUT_DIR/00.png, and so on.

    bash hw2_2.sh hw2_data/face/noise out hw2_data/face/UNet.pt              # the course's weights, 256x256
    bash hw2_2.sh hw2_data/face/noise out hw2_data/face/UNet.pt --amp        # faster, not to the pixel

Float32, the default, follows the conventions that gave the course's ground truth (see ddim.py). A UNet of
p2_ddim/train.py is taken as well. Flags come after the three paths.
"""

import sys
from argparse import BooleanOptionalAction
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2_ddim.ddim import T, sample, stretch, timesteps  # noqa: E402
from UNet import STRIDE, UNet, channel_of  # noqa: E402
from utils import (UserError, amp_dtype, argument_parser, autocast, float_between, image_generators,  # noqa: E402
                   in_batches, int_at_least, load_torch, make_output_dir, pick_device, run, save_png)


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("noise_dir", type=Path, help="folder of .pt files, each a tensor (1, 3, H, W) or (3, H, W)")
    parser.add_argument("output_dir", type=Path, help="folder for the images; made if need be, other files in it stay")
    parser.add_argument("checkpoint", type=Path, help="UNet.pt or a file of train.py")
    parser.add_argument("--steps", type=int_at_least(1), default=50, help=f"sampling steps, at most {T}")
    parser.add_argument("--eta", type=float_between(0, 1), default=0.0, help="noise per step: 0 none, 1 as DDPM")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of that noise")
    parser.add_argument("--batch_size", type=int_at_least(1), default=1,
                        help="images drawn at a time; more is faster on a GPU only")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--amp", nargs="?", const="auto", default="off", choices=["auto", "off", "bf16", "fp16"],
                        help="mixed precision; --amp alone takes what the device does fast")
    parser.add_argument("--channels_last", action=BooleanOptionalAction,
                        help="memory layout of weights and images; when not given: on a CPU, where it is faster")
    parser.add_argument("--skip_existing", action="store_true",
                        help="go on where an earlier run stopped, with the same noise files")
    return parser.parse_args()


def load_unet(path):
    """The UNet whose weights `path` holds, in evaluation mode on the CPU; its width follows from the weights.

    Takes a bare state dict such as the course's UNet.pt, or one under the key ema, state_dict or model, with or
    without DistributedDataParallel's "module." before the names. UserError for anything else.
    """
    content = load_torch(path, "checkpoint")
    for key in ("ema", "shadow", "state_dict", "model"):  # an EMA's weights are inside, as its shadow
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} and not the weights of a UNet; name UNet.pt")
    weights = {name.removeprefix("module."): value for name, value in content.items()
               if isinstance(name, str) and torch.is_tensor(value)}
    with torch.device("meta"):  # shapes alone: a foreign file's could fill the memory
        try:
            model = UNet(channel=channel_of(weights))
        except (KeyError, IndexError, ValueError):
            model = UNet()  # the course's, to say how the weights differ from it
    found, expected = ({name: tuple(value.shape) for name, value in state.items()}
                       for state in (weights, model.state_dict()))
    wrong = [f"{name} is {found.get(name, 'missing')} and should be {expected.get(name, 'absent')}"
             for name in expected | found if found.get(name) != expected.get(name)]
    if wrong:
        raise UserError(f"the weights in {path} are not those of UNet.py: {'; '.join(wrong[:3])}"
                        f"{f'; and {len(wrong) - 3} more' * (len(wrong) > 3)}")
    model.to_empty(device="cpu").load_state_dict(weights)
    return model.eval()


def place(model, device, channels_last=None):
    """The model on `device`, in the memory layout that is faster there unless `channels_last` says which."""
    channels_last = device.type == "cpu" if channels_last is None else channels_last
    return model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def find_noises(folder):
    """The .pt files of `folder`, sorted by name; says which other files it passes over.

    UserError when there are none, or when they are not all noises of one shape.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the one that holds the noise files")
    paths = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix == ".pt" and not p.name.startswith("."))
    others = sorted(p.name for p in folder.iterdir() if p not in paths)
    if others:
        print(f"passed over in {folder}: {', '.join(others)}", file=sys.stderr)
    if not paths:
        raise UserError(f"there are no noise files (.pt) in {folder}; name another folder")
    shapes = {tuple(load_noise(path).shape) for path in paths}
    if len(shapes) > 1:
        raise UserError(f"the noises in {folder} have several shapes, {shapes}; give each a folder of its own")
    return paths


def load_noise(path):
    """One noise as float32 (1, 3, H, W) on the CPU, wherever and in whatever precision it was saved."""
    noise = load_torch(path, "noise file")
    if not torch.is_tensor(noise) or not noise.is_floating_point():
        raise UserError(f"the noise file {path} does not hold a tensor of floats; "
                        "save a bare tensor of the shape (1, 3, H, W) in it")
    noise = noise.float()
    if noise.dim() == 3:
        noise = noise[None]
    if noise.dim() != 4 or noise.shape[:2] != (1, 3) or noise.shape[2] % STRIDE or noise.shape[3] % STRIDE:
        raise UserError(f"the noise file {path} has the shape {tuple(noise.shape)}; it must be (1, 3, H, W) or "
                        f"(3, H, W) with H and W divisible by {STRIDE}")
    if not noise.isfinite().all():
        raise UserError(f"the noise file {path} holds NaN or infinite values; make it again")
    return noise


def main():
    args = parse_args()
    if args.steps > T:
        raise UserError(f"--steps {args.steps} is above {T}, the number of noise levels")
    device = pick_device(args.device)
    dtype = amp_dtype(args.amp, device)
    if args.amp == "auto" and dtype is None:
        print("--amp: this CPU has no bfloat16 units; going on in float32", file=sys.stderr)
    paths = find_noises(args.noise_dir)
    output_dir = make_output_dir(args.output_dir)
    # Sampling noise is keyed by a file's place in the folder, so neither batch nor --skip_existing changes an image.
    todo = [(i, path) for i, path in enumerate(paths)
            if not (args.skip_existing and (output_dir / f"{path.stem}.png").exists())]

    model = place(load_unet(args.checkpoint), device, args.channels_last)

    def draw(batch):
        noise = torch.cat([load_noise(path) for _, path in batch]).to(device)
        generators = image_generators(args.seed, [i for i, _ in batch])
        bar.n = drawn * calls  # counted anew when a batch that was too large is tried again
        with autocast(device, dtype):
            images = sample(model, noise, args.steps, args.eta, generators, lambda *_: bar.update(len(batch)))
        finite = images.isfinite().all(dim=3).all(dim=2).all(dim=1).tolist()
        if not all(finite):
            raise UserError(f"sampling {batch[finite.index(False)][1]} ends in NaN; the weights hold NaN, or --amp exceeds "
                            "its range")
        return stretch(images)

    drawn, calls = 0, len(timesteps(args.steps))
    with tqdm(total=len(todo) * calls, unit="step", disable=None) as bar:
        for batch, images in in_batches(draw, todo, args.batch_size):
            for (_, path), image in zip(batch, images):
                save_png(output_dir / f"{path.stem}.png", image)
            drawn += len(batch)
    print(f"{len(todo)} images in {output_dir}" + (f", {len(paths) - len(todo)} were there" * (len(paths) > len(todo))))


if __name__ == "__main__":
    run(main)
