"""Trains the conditional DDPM of problem 1 on MNIST-M (Algorithm 1 of Ho et al. 2020 with label dropping).

    python3 p1_ddpm/train.py                               # all settings of the committed checkpoint, see below
    python3 p1_ddpm/train.py --resume                      # goes on where the last run stopped
    python3 p1_ddpm/train.py --resume --epochs 120         # prolongs a finished training
    python3 p1_ddpm/train.py --dry_run                     # two steps, to see that all is in place
    torchrun --nproc_per_node=4 p1_ddpm/train.py           # several GPUs; --batch_size is for all together

Reads hw2_data/digits/mnistm. Writes into --output_dir:
    last.pt         everything that --resume needs, after every epoch
    model.pt        the averaged weights in half precision and the configuration, for inference.py --checkpoint
    metrics.jsonl   one line per epoch: loss, loss per quarter of the noise steps, learning rate, images/s
    samples_*.png   ten digits of each class from fixed noise, rows are digits

p1_ddpm/checkpoints/ddpm.pt is the model.pt of these settings: 50 epochs, 98 minutes on 2 CPU cores with bfloat16 and
nothing beside it (about 330 images/s), the loss ends at 0.115. metrics.jsonl beside it is the record.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset import load_split  # noqa: E402
from p1_ddpm.diffusion import ddpm_loss, dpmpp, guided_predictor, log_snr_levels, noise_schedule  # noqa: E402
from p1_ddpm.model import UNet  # noqa: E402
from utils import (EMA, UserError, amp_dtype, argument_parser, autocast, check_recipe, float_between, grad_scaler,  # noqa: E402
                   image_generators, init_distributed, int_at_least, load_checkpoint, make_output_dir, randn, restore, run,
                   save_checkpoint, save_png, seed_all, sum_over_processes, to_uint8, warmup_cosine, write_atomic)


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "p1_ddpm/output", help="where checkpoints go")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --output_dir")
    parser.add_argument("--dry_run", action="store_true", help="train two steps on a few images, write nothing")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of weights, order, noise and steps")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    parser.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto",
                        help="mixed precision; auto takes what the device does fast")
    model = parser.add_argument_group("model")
    model.add_argument("--channels", type=int_at_least(8), nargs=2, default=[96, 192],
                       help="widths at 14x14 and 7x7, multiples of 8")
    model.add_argument("--blocks", type=int_at_least(1), default=1, help="residual blocks per resolution and way")
    model.add_argument("--dropout", type=float_between(0, 1), default=0.0, help="dropout in the residual blocks")
    model.add_argument("--schedule", choices=["linear", "cosine"], default="cosine", help="noise schedule")
    model.add_argument("--noise_steps", type=int_at_least(2), default=1000, help="T, the number of noise steps")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", type=int_at_least(1), default=50, help="passes over the training images")
    optimisation.add_argument("--batch_size", type=int_at_least(1), default=64, help="images per step")
    optimisation.add_argument("--lr", type=float_between(0), default=8e-4, help="highest learning rate")
    optimisation.add_argument("--warmup", type=int_at_least(1), default=500, help="steps of linear warm-up")
    optimisation.add_argument("--weight_decay", type=float_between(0), default=0.01, help="AdamW's weight decay")
    optimisation.add_argument("--ema", type=float_between(0, 1), default=0.999, help="decay of the weight average")
    optimisation.add_argument("--label_drop", type=float_between(0, 1), default=0.1,
                              help="share of labels dropped for classifier-free guidance")
    optimisation.add_argument("--sample_every", type=int_at_least(1), default=5, help="epochs between sample grids")
    return parser.parse_args()


def save_samples(path, model, alphas_cumprod, device):
    """A 10x10 PNG grid, row d the digit d, from noise that is the same at every call."""
    labels = torch.arange(10, device=device).repeat_interleave(10)
    predict = guided_predictor(model, labels, model.null_label, alphas_cumprod, guidance=1.0)
    generators = image_generators(0, range(100))
    noise = randn(generators, (3, 28, 28), device)
    levels = log_snr_levels(alphas_cumprod.cpu(), min(16, len(alphas_cumprod) - 1))
    with torch.no_grad():
        *_, (_, images) = dpmpp(predict, noise, levels, alphas_cumprod, generators)
    save_png(path, make_grid(to_uint8((images + 1) / 2).cpu(), nrow=10, padding=1))


def main():
    args = parse_args()
    device, rank, world_size = init_distributed(args.device)
    dtype = amp_dtype(args.amp, device)
    if args.batch_size % world_size:
        raise UserError(f"--batch_size {args.batch_size} is not a multiple of the {world_size} processes")
    if any(width % 8 for width in args.channels):
        raise UserError(f"--channels {args.channels} must be multiples of 8, the groups of the normalisation")
    output_dir = args.output_dir if args.dry_run else make_output_dir(args.output_dir)
    config = dict(channels=args.channels, blocks=args.blocks, dropout=args.dropout)
    last = output_dir / "last.pt"
    recipe = {name: getattr(args, name) for name in
              ("channels", "blocks", "dropout", "schedule", "noise_steps", "epochs", "batch_size", "lr", "warmup",
               "weight_decay", "ema", "label_drop", "seed")}
    state = load_checkpoint(last, "p1_ddpm", ["recipe", "metrics", "model", "optimizer"]) if args.resume else None
    if state and len(state["metrics"]) == state["recipe"]["epochs"] < args.epochs:
        state["recipe"]["epochs"] = args.epochs  # a finished training may be prolonged; the learning rate rises again
    if state:
        check_recipe(last, state["recipe"], recipe)
    if last.exists() and not (args.resume or args.dry_run):
        raise UserError(f"{output_dir} holds a training already; add --resume or name another --output_dir")
    alphas_cumprod = noise_schedule(args.schedule, args.noise_steps).to(device)
    if alphas_cumprod[-1] > 0.01:
        raise UserError(f"with --schedule {args.schedule} the last of {args.noise_steps} steps still shows the image "
                        f"(alpha-bar {alphas_cumprod[-1]:.2f}), but sampling starts from noise; take more --noise_steps")

    images, labels, _ = load_split(args.data_dir, "mnistm", "train")
    if args.dry_run:
        args.batch_size = min(args.batch_size, 8 * world_size)
        images, labels = images[:2 * args.batch_size], labels[:2 * args.batch_size]
    images, labels = images.to(device), labels.to(device)
    steps_per_epoch = len(images) // args.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"--batch_size {args.batch_size} is larger than the {len(images)} training images")

    seed_all(args.seed)
    model = UNet(**config).to(device)
    ema = EMA(model, args.ema)
    averaged = UNet(**config).to(device).eval()
    parallel = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scaler = grad_scaler(dtype)
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    metrics = []
    if state:
        restore(parts, state)
        metrics = state["metrics"]
    epochs = len(metrics) + 1 if args.dry_run else args.epochs
    if rank == 0:
        print(f"{len(images)} images, {sum(p.numel() for p in model.parameters()):,} parameters, {device}, "
              f"{dtype or torch.float32}, {world_size} process(es), epochs {len(metrics) + 1} to {epochs}")

    for epoch in range(len(metrics), epochs):
        order = torch.from_numpy(np.random.default_rng([args.seed, epoch]).permutation(len(images)))
        quarters = torch.zeros(4, 2, device=device)  # for each quarter of the noise steps: sum of losses, images
        start = time.time()
        for i in tqdm(range(steps_per_epoch), f"epoch {epoch + 1}/{epochs}", disable=rank != 0 or None):
            step = epoch * steps_per_epoch + i
            seed_all(args.seed, step, rank)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warmup_cosine(step, args.epochs * steps_per_epoch, args.warmup)
            batch = order[i * args.batch_size:(i + 1) * args.batch_size][rank::world_size].to(device)
            x0 = images[batch].float() / 127.5 - 1
            with autocast(device, dtype):
                t, loss = ddpm_loss(parallel, x0, labels[batch], alphas_cumprod, model.null_label, args.label_drop)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss.mean()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            ema.update(model)
            quarters.index_add_(0, (t - 1) * 4 // args.noise_steps,
                                torch.stack([loss.detach(), torch.ones_like(loss)], dim=1))
        loss_sum, loss_count = sum_over_processes(quarters).T
        if not loss_sum.isfinite().all():  # every process sees it, so none waits for another
            raise UserError(f"the loss is not finite in epoch {epoch + 1}; lower --lr")
        if rank != 0:
            continue

        seconds = time.time() - start
        metrics.append(dict(epoch=epoch + 1, loss=round((loss_sum.sum() / loss_count.sum()).item(), 5),
                            loss_quarters=[round(q, 5) for q in (loss_sum / loss_count.clamp(min=1)).tolist()],
                            lr=optimizer.param_groups[0]["lr"], seconds=round(seconds, 1),
                            images_per_second=round(steps_per_epoch * args.batch_size / seconds)))
        print("epoch {epoch}: loss {loss:.4f}, by quarter of t {loss_quarters}, lr {lr:.2e}, "
              "{images_per_second} images/s".format(**metrics[-1]), flush=True)
        if args.dry_run:
            continue
        description = dict(kind="p1_ddpm", model_config=config, schedule=[args.schedule, args.noise_steps], recipe=recipe,
                           metrics=metrics)
        half = {name: value.half() for name, value in ema.shadow.items()}
        save_checkpoint(output_dir / "model.pt", **{**description, "metrics": metrics[-1:]}, ema=half)
        write_atomic(output_dir / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics).encode())
        if (epoch + 1) % args.sample_every == 0 or epoch + 1 == args.epochs:
            averaged.load_state_dict(ema.shadow)
            save_samples(output_dir / f"samples_{epoch + 1:03d}.png", averaged, alphas_cumprod, device)
        # Last of all: what an interrupt may cut off above, --resume makes again.
        save_checkpoint(last, **description, **{k: v.state_dict() for k, v in parts.items()})


if __name__ == "__main__":
    run(main)
