"""Generates scenes that show the objects asked for, with the checkpoint of the chapter.

    bash assignments/nycu2024_lab6/lab6.sh out_dir                        # the lab: 64 scenes, grids, strip, accuracies
    python3 p7_clevr/inference.py out_dir --labels "red sphere" "cyan cube"        # any wish, eight times

Writes into out_dir, for the lab (for --labels alone 0.png ... 7.png and grid.png):
    images/test/0.png ... 31.png, images/new_test/0.png ...    a scene for each list of the conditions, in their order
    grid_test.png, grid_new_test.png                           the same, eight a row
    denoising.png                                              ["red sphere", "cyan cylinder", "cyan cube"] from noise
and prints the evaluator's accuracies, 0.9444 and 0.9643. The noise of a scene depends on --seed and its number alone.
The lab takes 29 seconds on two CPU cores in float32.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, float_between, int_between, nonempty_path, pick_device, run

from typing import NamedTuple

import torch
from torchvision.utils import make_grid

from dataset import some
from files import make_output_dir, save_png
from p1_ddpm.diffusion import SAMPLERS, guided_predictor
from p1_ddpm.inference import Sampling, add_sampling_arguments, sampling_of, visited_timesteps
from p1_ddpm.inference import generate as generate_under
from p7_clevr.evaluator import CHECKPOINTS, Evaluator, load_grader
from p7_clevr.guidance import algorithm_1, algorithm_2, clean_gradient, noisy_gradient
from p7_clevr.model import load_model, scene_schedule
from p7_clevr.scenes import CONDITIONS, check_objects, multi_hot, read_conditions
from transforms import as_input

CHECKPOINT = CHECKPOINTS / "scenes.pt"
SHIPPED = Sampling(steps=30, guidance=2.0, interval=(0, 1000))  # the setting of lab6.sh
STRIP = ["red sphere", "cyan cylinder", "cyan cube"]


class Guide(NamedTuple):
    """A classifier that guides: `scale` is s of Dhariwal & Nichol 2021, 0 for none."""
    network: torch.nn.Module = None
    noisy: bool = False
    scale: float = 0.0


def add_scene_arguments(parser):
    """The flags that say how scenes are sampled; studies.py shares them."""
    add_sampling_arguments(parser)
    parser.set_defaults(checkpoint=CHECKPOINT, batch_size=32, **SHIPPED._asdict())
    parser.add_argument("--evaluator", type=nonempty_path, default=CHECKPOINTS / "evaluator.pth",
                        help="what measures accuracy, such as the course's checkpoint.pth")


def load_guide(path, scale, alphas_cumprod, device):
    """The Guide that the file `path` holds; none is read for scale 0."""
    if not scale:
        return Guide()
    network, config = load_grader(path, device)
    if "schedule" in config and not torch.equal(scene_schedule(**config["schedule"]), alphas_cumprod.cpu()):
        raise UserError(f"the classifier {path} knows other timesteps than the checkpoint; "
                        "train both with one --shift, --schedule and --timesteps")
    return Guide(network, "schedule" in config, scale)


@torch.no_grad()
def sample(model, alphas_cumprod, labels, noise, generators, sampling, guide=Guide()):
    """Yields (t, x_t) after each step from the noise x_T (B, 3, 64, 64) to images in [-1, 1] of multi-hot labels."""
    alphas_cumprod = alphas_cumprod.cpu()  # each of its values is asked for by itself
    timesteps = visited_timesteps(sampling, alphas_cumprod)
    predict = guided_predictor(model, labels, model.null(labels), alphas_cumprod, sampling.guidance, sampling.interval)
    options = dict(eta=sampling.eta) if sampling.sampler == "ddim" else {}
    if guide.scale:
        gradient = (noisy_gradient(guide.network, labels) if guide.noisy
                    else clean_gradient(guide.network, labels, alphas_cumprod))
        if sampling.sampler == "ddpm":
            yield from algorithm_1(predict, gradient, noise, timesteps, alphas_cumprod, generators, guide.scale)
            return
        predict = algorithm_2(predict, gradient, alphas_cumprod, guide.scale)
    yield from SAMPLERS[sampling.sampler](predict, noise, timesteps, alphas_cumprod, generators, **options)


def generate(model, alphas_cumprod, scenes, sampling, seed, device, batch_size=32, guide=Guide(), keep=()):
    """p1_ddpm's generate for the list `scenes` of (number, list of objects), the numbers being the keys."""
    numbers, sets = zip(*scenes)
    return generate_under(model, alphas_cumprod, numbers, multi_hot(sets), sampling, seed, device, batch_size, keep,
                          sample=sample, guide=guide)


def number_scenes(*lists):
    """[(number, list of objects), ...] as `generate` takes them, those of the second list from 1,000 on, and so on."""
    return [(1000 * place + number, names) for place, sets in enumerate(lists) for number, names in enumerate(sets)]


def strip_timesteps(timesteps, states=8):
    """The visited ones of `timesteps` that are nearest to `states` equally far apart, from the first to the last."""
    wanted = [timesteps[0] * i / (states - 1) for i in range(states)]
    return sorted({min(timesteps, key=lambda t: abs(t - place)) for place in wanted}, reverse=True)


def save_grid(path, images, per_row=8):
    save_png(path, make_grid(images, nrow=per_row, padding=2, pad_value=255))


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("output_dir", type=nonempty_path, help="folder for the images; made if need be")
    add_scene_arguments(parser)
    parser.add_argument("--seed", type=int_between(0), default=0, help="seed of the noise")
    parser.add_argument("--scale", type=float_between(0), default=0.0, help="strength of classifier guidance, 0: none")
    parser.add_argument("--guide", type=nonempty_path,
                        help="the classifier that guides, maybe one of noisy images; if not given our evaluator")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--data_dir", type=nonempty_path, default=CONDITIONS, help="holds test.json and new_test.json")
    what.add_argument("--labels", nargs="+", metavar="OBJECT", help="draw these objects instead")
    args = parser.parse_args()
    if args.guide and not args.scale:
        raise UserError(f"--guide {args.guide} has no strength; give one by --scale, such as 1")
    return args


def main():
    args = parse_args()
    if args.labels:
        lists = {"": [check_objects(args.labels, "--labels")] * 8}
    else:
        lists = {name: read_conditions(args.data_dir / f"{name}.json") for name in ("test", "new_test")}
    device, sampling = pick_device(args.device), sampling_of(args)
    model, alphas_cumprod = load_model(args.checkpoint, device, args.weights)
    evaluator = Evaluator(args.evaluator, device)
    guide = load_guide(args.guide or CHECKPOINTS / "evaluator.pth", args.scale, alphas_cumprod, device)
    keep = strip_timesteps(visited_timesteps(sampling, alphas_cumprod))
    output_dir = make_output_dir(args.output_dir)
    folders = {name: make_output_dir(output_dir / "images" / name if name else output_dir) for name in lists}

    scenes = number_scenes(*lists.values(), [] if args.labels else [STRIP])
    batches = list(generate(model, alphas_cumprod, scenes, sampling, args.seed, device, args.batch_size, guide, keep))
    images = torch.cat([images for _, images, _ in batches])
    for name, sets in lists.items():
        generated, images = images[:len(sets)], images[len(sets):]
        for number, image in enumerate(generated):
            save_png(folders[name] / f"{number}.png", image)
        stale = [path.name for path in folders[name].glob("*.png")
                 if path.stem.isdecimal() and int(path.stem) >= len(sets)]
        if stale:
            print(f"other scenes in {folders[name]} stay: {some(sorted(stale))}", file=sys.stderr)
        save_grid(output_dir / (f"grid_{name}.png" if name else "grid.png"), generated)
        print(f"{name or ', '.join(args.labels)}: accuracy {evaluator.eval(as_input(generated), multi_hot(sets)):.4f} "
              f"({len(sets)} images)")
    if not args.labels:
        *_, states = batches[-1]
        save_grid(output_dir / "denoising.png", torch.stack([states[t][-1] for t in keep]), len(keep))
    print(f"the images are in {output_dir}")


if __name__ == "__main__":
    run(main)
