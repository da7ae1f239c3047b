"""Trains the conditional DDPM of scenes (Algorithm 1 of Ho et al. 2020 with label dropping) on i-CLEVR.

    python3 p7_clevr/train.py --data_dir DIR                   # all settings of the committed checkpoint
    python3 p7_clevr/train.py --data_dir DIR --resume          # goes on where the last run stopped
    python3 p7_clevr/train.py --data_dir DIR --dry_run         # two steps, to see that all is in place
    torchrun --nproc_per_node=4 p7_clevr/train.py --data_dir DIR

DIR is a folder with train.json and the images, in folders or a zip file. Writes into --output_dir:
    last.pt         everything that --resume needs, every --save_every steps
    model.pt        the EMA weights in half precision and the configuration, for inference.py --checkpoint
    metrics.jsonl   one line per checkpoint: loss (of v, weighted, and of eps), that of v per quarter of the timesteps
    samples_*.png   a scene for each list of test.json from fixed noise

4,896 steps of 256 images: six minutes on an H200 in bfloat16, 27 hours on one CPU core with AVX2, which manages 13
images a second. The loss ends at 0.0143.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, autocast, float_between, int_between, nonempty_path, run

import training
from p1_ddpm.diffusion import ddpm_loss, require_noise
from p1_ddpm.inference import sample_grid
from p7_clevr.model import SceneUNet, scene_schedule
from p7_clevr.scenes import multi_hot, official_sets, read_scenes
from transforms import as_input


def add_schedule_arguments(parser):
    """The flags of the noise schedule; train_evaluator.py shares them."""
    parser.add_argument("--schedule", choices=["linear", "cosine"], default="cosine", help="noise schedule")
    parser.add_argument("--timesteps", type=int_between(2), default=1000, help="T, the length of the noise schedule")
    parser.add_argument("--shift", type=float_between(0.1, 10), default=3.0,
                        help="factor of signal / noise at every timestep, as if images had that much more contrast")


def schedule_of(args):
    """The arguments of scene_schedule that the flags `args` ask for; UserError where it does not end in noise."""
    schedule = dict(name=args.schedule, timesteps=args.timesteps, shift=args.shift)
    require_noise(scene_schedule(**schedule), args.schedule)
    return schedule


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "iclevr", help="train.json and the images")
    parser.add_argument("--output_dir", type=nonempty_path, default=ROOT / "p7_clevr/output/scenes",
                        help="where checkpoints go")
    training.add_arguments(parser, epochs=96, batch_size=256, lr=8e-4, warmup=300, weight_decay=0.01, ema=0.999,
                           save_every=204)
    parser.set_defaults(optimizer="muon")
    parser.add_argument("--all_scenes", action="store_true",
                        help="train on those scenes and sets as well that are kept for the graders and for measuring")
    parser.add_argument("--sample_every", type=int_between(1), default=5, help="checkpoints between sample grids")
    parser.add_argument("--label_drop", type=float_between(0, 1), default=0.1,
                        help="share of sets dropped for classifier-free guidance")
    model = parser.add_argument_group("model")
    model.add_argument("--channels", type=int_between(8), nargs="+", default=[48, 96, 192],
                       help="widths from the finest resolution to the lowest, multiples of 8")
    model.add_argument("--blocks", type=int_between(1), default=1, help="residual blocks per resolution and way")
    model.add_argument("--dropout", type=float_between(0, 1), default=0.0, help="dropout in the residual blocks")
    model.add_argument("--condition", choices=["multi_hot", "tokens"], default="tokens", help="how the set enters")
    model.add_argument("--patch", type=int_between(1), default=2, help="side of the patches that the network sees")
    add_schedule_arguments(model)
    return parser.parse_args()


def main():
    args = parse_args()
    config = dict(network=dict(channels=args.channels, blocks=args.blocks, dropout=args.dropout,
                               condition=args.condition, patch=args.patch),
                  schedule=schedule_of(args))
    alphas_cumprod = scene_schedule(**config["schedule"])
    training.seed_all(args.seed)
    try:
        model = SceneUNet(**config["network"])
    except ValueError as error:
        raise UserError(f"--channels {args.channels} and --patch {args.patch} do not fit together: {error}")
    process, saved = training.start(args, "p7_clevr")
    device = process.device
    images, conditions, _ = read_scenes(args.data_dir, None if args.all_scenes else "generator")
    images, conditions, alphas_cumprod = images.to(device), conditions.to(device), alphas_cumprod.to(device)
    per_epoch = training.steps_per_epoch(len(images), args.batch_size)
    total = args.epochs * per_epoch

    parts = training.make_parts(model.to(device), training.make_optimizers(model, args), process, saved)
    parallel = training.distribute(model, process)
    shown = multi_hot(official_sets()["test"]).to(device)  # what is sampled
    metrics, means = saved["metrics"] if saved else [], training.Means()
    training.announce(f"{len(images)} images", process, total, model)

    for step in training.steps(args, process, saved, total, images, conditions):
        batch = training.batch_indices(step, len(images), args, process)
        x0, condition = as_input(images[batch]), conditions[batch]
        with autocast(device, process.dtype):
            t, loss = ddpm_loss(parallel, x0, condition, model.null(condition), alphas_cumprod, args.label_drop)
        means.add(loss_eps=loss * alphas_cumprod[t])
        # The error of v, were the images `shift` times as strong beside the noise.
        loss = loss * (args.shift**2 + (1 - args.shift**2) * alphas_cumprod[t]).float()
        training.update(parts, loss.mean(), training.warmup_cosine(step, total, args.warmup),
                        training.ema_decay(args.ema, step))
        means.add(loss=loss)
        means.add_quarters("loss_quarters", loss, t, args.timesteps)
        if training.due(args, step, total):
            training.log(metrics, means, step, per_epoch, args, parts, process)
            if process.rank == 0:
                description = dict(kind="p7_clevr", config=config, recipe=training.recipe(args), metrics=metrics)
                wanted = len(metrics) % args.sample_every == 0 or step + 1 == total
                samples = sample_grid(parts.ema, alphas_cumprod, shown, 8) if wanted else None
                training.save(args.output_dir, parts, step, description, samples)


if __name__ == "__main__":
    run(main)
