"""Generates one face for each noise file: NOISE_DIR/00.pt becomes OUT_DIR/00.png, and so on.

    bash hw2_2.sh hw2_data/face/noise out hw2_data/face/UNet.pt              # the course's weights, 256x256
    bash hw2_2.sh hw2_data/face/noise out hw2_data/face/UNet.pt --amp        # faster, not to the pixel
    bash hw2_2.sh p2_ddim/noise64 out p2_ddim/checkpoints/face64.pt --eta 1  # fewer crooked faces than with DDIM's 0

Float32, the default, follows the conventions that gave the course's ground truth (see ddim.py). A UNet of
p2_ddim/train.py is taken as well. Flags come after the three paths.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (UserError, add_amp_argument, amp_dtype, argument_parser, autocast, float_between, in_batches,
                   int_between, nonempty_path, pick_device, require_finite, run)

import torch
from PIL import Image
from tqdm import tqdm

from dataset import some
from files import load_torch, make_output_dir, save_png
from p2_ddim.ddim import T, ddim, step_generators, stretch, timesteps
from p2_ddim.model import load_model
from UNet import STRIDE

# In a batch: as many keep every core of a CPU busy, and more do not make an image cheaper; on a GPU the assignment's
# ten faces are one batch.
PIXELS = dict(cpu=256 * 256, cuda=16 * 256 * 256)


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("noise_dir", type=nonempty_path,
                        help="folder of .pt files, each a tensor (1, 3, H, W) or (3, H, W)")
    parser.add_argument("output_dir", type=nonempty_path,
                        help="folder for the images; made if need be, other files in it stay")
    parser.add_argument("checkpoint", type=nonempty_path, help="UNet.pt or a file of train.py")
    parser.add_argument("--steps", type=int_between(1, T), default=50, help="sampling steps")
    parser.add_argument("--eta", type=float_between(0, 1), default=0.0, help="noise per step: 0 none, 1 as DDPM")
    parser.add_argument("--seed", type=int_between(0), default=0, help="seed of that noise")
    parser.add_argument("--batch_size", type=int_between(1),
                        help="images at a time; when not given, as many as together have the pixels of one of 256x256, "
                        "on a GPU of 16")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add_amp_argument(parser, "off")
    parser.add_argument("--skip_existing", action="store_true",
                        help="go on where an earlier run stopped, with the same noise files")
    return parser.parse_args()


def find_noises(folder):
    """The .pt files of `folder`, sorted by name; says which others it passes over that are not hidden.

    UserError when there are none, or when they are not all noises of one shape.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the one that holds the noise files")
    files = {path for path in folder.iterdir() if not path.name.startswith(".")}
    paths = sorted(path for path in files if path.is_file() and path.suffix == ".pt")
    others = sorted(path.name for path in files.difference(paths))
    if others:
        print(f"passed over in {folder}: {some(others)}", file=sys.stderr)
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
    noise = noise.detach().float()
    if noise.dim() == 3:
        noise = noise[None]
    if noise.dim() != 4 or noise.shape[:2] != (1, 3) or 0 in noise.shape or any(n % STRIDE for n in noise.shape[2:]):
        raise UserError(f"the noise file {path} has the shape {tuple(noise.shape)}; it must be (1, 3, H, W) or "
                        f"(3, H, W) with H and W divisible by {STRIDE}")
    if not noise.isfinite().all():
        raise UserError(f"the noise file {path} holds NaN or infinite values; make it again")
    return noise


def is_whole_png(path):
    """Whether `path` is a PNG file that can be read to its end, and not what a full disk or a crash has left."""
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except Exception:  # Pillow raises OSError, SyntaxError and others on a damaged file
        return False
    return True


def main():
    args = parse_args()
    device = pick_device(args.device)
    dtype = amp_dtype(args.amp, device)
    if args.amp == "auto" and dtype is None:
        print("--amp: this CPU has no bfloat16 units; going on in float32", file=sys.stderr)
    paths, output_dir = find_noises(args.noise_dir), make_output_dir(args.output_dir)
    model, (height, width) = load_model(args.checkpoint, device), load_noise(paths[0]).shape[2:]
    if model.size not in (None, height) or model.size not in (None, width):
        print(f"{args.checkpoint} was trained on images of {model.size}x{model.size}; those of {width}x{height} that "
              f"the noises in {args.noise_dir} give will hardly be faces", file=sys.stderr)
    targets = [output_dir / f"{path.stem}.png" for path in paths]
    # Sampling noise is keyed by a file's place in the folder, so neither batch nor --skip_existing changes an image.
    todo = [i for i, target in enumerate(targets) if not (args.skip_existing and is_whole_png(target))]
    batch_size = args.batch_size or max(1, PIXELS[device.type] // (height * width))

    finished, calls = 0, len(timesteps(args.steps))
    bar = tqdm(total=len(todo) * calls, unit="step", disable=None)

    def generate(batch):
        noise = torch.cat([load_noise(paths[i]) for i in batch]).to(device)
        bar.n = finished * calls  # counted anew when a batch that was too large is tried again
        with autocast(device, dtype):
            for _, x, _ in ddim(model, noise, args.steps, args.eta, step_generators(args.seed, batch)):
                bar.update(len(batch))
        return stretch(require_finite(x, [targets[i] for i in batch]))

    with bar:
        for batch, images in in_batches(generate, todo, batch_size):
            for i, image in zip(batch, images):
                save_png(targets[i], image)
            finished += len(batch)
    there = len(paths) - len(todo)
    print(f"{len(todo)} images in {output_dir}" + (f", {there} were there" if there else ""))


if __name__ == "__main__":
    run(main)
