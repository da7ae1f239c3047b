"""Trains UNet.py on face images (Algorithm 1 of Ho et al. 2020), for those who have no UNet.pt.

    python3 p2_ddim/train.py --data_dir img_align_celeba.zip                 # a folder of images will do as well
    python3 p2_ddim/train.py --data_dir img_align_celeba.zip --resume        # goes on where the last run stopped
    python3 p2_ddim/train.py --data_dir img_align_celeba.zip --dry_run       # two steps, to see that all is in place
    torchrun --nproc_per_node=4 p2_ddim/train.py --data_dir img_align_celeba.zip   # --batch_size is for all together

Writes into --output_dir:
    last.pt         everything that --resume needs, every --save_every steps
    model.pt        the averaged weights in half precision and the configuration, for inference.py
    metrics.jsonl   one line per checkpoint: loss, loss per quarter of the noise levels, learning rate, images/s
    samples_*.png   sixteen faces from noise that is always the same

p2_ddim/checkpoints/face64.pt is the model.pt of these settings on the first 9,000 aligned faces of CelebA: 24 epochs,
about an hour on 2 CPU cores with nothing beside it (60 images/s), the loss ends at 0.023. metrics.jsonl beside it is
the record. p2_ddim/noise64 holds the first ten of the sixteen noises.
"""

import io
import json
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from p2_ddim.ddim import T, alphas_cumprod, sample, stretch  # noqa: E402
from UNet import STRIDE, UNet  # noqa: E402
from utils import (EMA, UserError, amp_dtype, argument_parser, autocast, check_recipe, float_between, grad_scaler,  # noqa: E402
                   image_generators, init_distributed, int_at_least, load_checkpoint, make_output_dir, randn, restore, run,
                   save_checkpoint, save_png, seed_all, sum_over_processes, warmup_cosine, write_atomic)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def load_images(path, size):
    """All images of a folder (searched through) or of a zip, in the order of their names.

    Returns uint8 (N, 3, size, size): the largest centred square, resized. Decoded once; 100,000 images of
    64x64 take 1.2 GB. UserError when there are none or one is damaged.
    """
    path = Path(path)
    if path.is_dir():
        names, read = [p for p in path.rglob("*") if p.is_file()], Path.read_bytes
    elif zipfile.is_zipfile(path):
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"the zip file {path} is damaged ({error}); fetch it again")
        names, read = archive.namelist(), archive.read
    else:
        raise UserError(f"{path} is neither a folder nor a zip file; name one that holds face images")
    names = sorted(n for n in names if Path(n).suffix.lower() in SUFFIXES and not Path(n).name.startswith("."))
    if not names:
        raise UserError(f"there are no images ({', '.join(SUFFIXES)}) in {path}; name another folder or zip file")
    images = np.empty((len(names), 3, size, size), np.uint8)
    for i, name in enumerate(tqdm(names, desc="reading images", disable=None)):
        try:
            image = Image.open(io.BytesIO(read(name))).convert("RGB")
        except Exception:  # zip, zlib and each of Pillow's decoders have their own ways to fail
            raise UserError(f"the image {name} of {path} is damaged; remove it or fetch it again")
        images[i] = np.moveaxis(np.asarray(ImageOps.fit(image, (size, size), Image.LANCZOS)), 2, 0)
    return torch.from_numpy(images)


def batch_at(images, step, batch_size, seed):
    """The images (batch_size, 3, H, W), uint8, of a step: every epoch is a permutation drawn from (seed, epoch).

    A function of its arguments alone, so a resumed run sees what an uninterrupted one sees.
    """
    epoch, step_of_epoch = divmod(step, len(images) // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(len(images))
    return images[order[step_of_epoch * batch_size:][:batch_size]]


def loss_per_image(model, x0, t, noise, alpha_bar):
    """Algorithm 1: mean squared error (B,) of the predicted noise. alpha_bar is float64 (T,), t is int64 (B,)."""
    ab = alpha_bar[t][:, None, None, None]
    x_t = ab.sqrt().float() * x0 + (1 - ab).sqrt().float() * noise
    return (model(x_t, t).float() - noise).square().mean(dim=(1, 2, 3))


def save_slim(path, ema, config):
    """Averaged weights in half precision with the configuration; the time frequencies stay exact."""
    weights = {name: value if name.endswith("inv_freq") else value.half() for name, value in ema.items()}
    save_checkpoint(path, kind="p2_ddim", config=config, ema=weights)


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder or zip file of face images")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "p2_ddim/output", help="where checkpoints go")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --output_dir")
    parser.add_argument("--dry_run", action="store_true", help="train two steps, write nothing")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of weights, order, noise and steps")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    parser.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto",
                        help="mixed precision; auto takes what the device does fast")
    parser.add_argument("--size", type=int_at_least(STRIDE), default=64, help=f"side of the images, a multiple of {STRIDE}")
    parser.add_argument("--channel", type=int_at_least(4), default=32, help="width of the UNet; the course's has 128")
    parser.add_argument("--epochs", type=int_at_least(1), default=24, help="passes over the images")
    parser.add_argument("--batch_size", type=int_at_least(1), default=32, help="images per step")
    parser.add_argument("--lr", type=float_between(0), default=4e-4, help="highest learning rate")
    parser.add_argument("--warmup", type=int_at_least(1), default=500, help="steps of linear warm-up")
    parser.add_argument("--ema", type=float_between(0, 1), default=0.9995, help="decay of the weight average")
    parser.add_argument("--save_every", type=int_at_least(1), default=300, help="steps between checkpoints")
    return parser.parse_args()


def main():
    args = parse_args()
    device, rank, world_size = init_distributed(args.device)
    dtype = amp_dtype(args.amp, device)
    if args.batch_size % world_size:
        raise UserError(f"--batch_size {args.batch_size} is not a multiple of the {world_size} processes")
    if args.size % STRIDE:
        raise UserError(f"--size {args.size} is not a multiple of {STRIDE}; take {args.size // STRIDE * STRIDE}")
    try:
        seed_all(args.seed)
        model = UNet(channel=args.channel).to(device)
    except ValueError as error:
        raise UserError(f"--channel {args.channel} does not fit: {error}")
    last = args.output_dir / "last.pt"
    config = {key: getattr(args, key) for key in
              ("channel", "size", "epochs", "batch_size", "lr", "warmup", "ema", "seed")}
    state = load_checkpoint(last, "p2_ddim", ["config", "step", "metrics", "model", "optimizer"]) if args.resume else None
    if state:
        check_recipe(last, state["config"], config)
    if not (args.resume or args.dry_run) and last.exists():
        raise UserError(f"{args.output_dir} holds a training already; add --resume or name another --output_dir")
    if not args.dry_run:
        make_output_dir(args.output_dir)
    images = load_images(args.data_dir, args.size)
    steps_per_epoch = len(images) // args.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"--batch_size {args.batch_size} is larger than the {len(images)} images of {args.data_dir}")

    total = args.epochs * steps_per_epoch
    ema = EMA(model, args.ema)
    averaged = UNet(channel=args.channel).to(device).eval()
    # The one buffer is constant. Sending it round could end as sum_over_processes in utils.py tells.
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model
    alpha_bar = alphas_cumprod().to(device)
    grid_noise = randn(image_generators(args.seed, range(16)), (3, args.size, args.size), device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    scaler = grad_scaler(dtype)
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    step, metrics = 0, []
    if state:
        restore(parts, state)
        step, metrics = state["step"], state["metrics"]
    if rank == 0:
        print(f"{len(images)} images, {sum(p.numel() for p in model.parameters()):,} parameters, {device}, "
              f"{dtype or torch.float32}, {world_size} process(es), steps {step + 1} to {total}", flush=True)

    stop = step + 2 if args.dry_run else total
    quarters = torch.zeros(4, 2, device=device)  # for each quarter of the noise levels: sum of losses, images
    bar, start = tqdm(total=stop, initial=step, disable=rank != 0 or None), time.time()
    while step < stop:
        seed_all(args.seed, step, rank)
        x0 = batch_at(images, step, args.batch_size, args.seed)[rank::world_size].to(device).float() / 127.5 - 1
        mirrored = torch.rand(len(x0), 1, 1, 1, device=device) < 0.5
        x0 = torch.where(mirrored, x0.flip(3), x0)
        # Uniform t, but one in each B-th of the range: a less noisy gradient (Kingma et al. 2021, appendix I.1).
        t = (torch.rand(1, device=device) + torch.arange(len(x0), device=device) / len(x0)) % 1
        t = (t * T).long().clamp(max=T - 1)
        with autocast(device, dtype):
            loss = loss_per_image(parallel, x0, t, torch.randn_like(x0), alpha_bar)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmup_cosine(step, total, args.warmup)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss.mean()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        ema.update(model)
        quarters.index_add_(0, t * 4 // T, torch.stack([loss.detach(), torch.ones_like(loss)], dim=1))
        step += 1
        bar.update()
        if args.dry_run or (step % args.save_every and step < total):
            continue

        loss_sum, count = sum_over_processes(quarters).T
        if not loss_sum.isfinite().all():  # every process sees it, so none waits for another
            raise UserError(f"the loss is not a number at step {step}; train anew with a lower --lr")
        if rank != 0:
            quarters.zero_()
            continue
        metrics.append(dict(step=step, loss=round((loss_sum.sum() / count.sum()).item(), 5),
                            loss_quarters=[round(q, 5) for q in (loss_sum / count.clamp(min=1)).tolist()],
                            lr=optimizer.param_groups[0]["lr"],
                            images_per_second=round(count.sum().item() / (time.time() - start), 1)))
        bar.write("step {step}: loss {loss:.4f}, by quarter of t {loss_quarters}, lr {lr:.2e}, "
                  "{images_per_second} images/s".format(**metrics[-1]))
        save_slim(args.output_dir / "model.pt", ema.shadow, config)
        write_atomic(args.output_dir / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics).encode())
        averaged.load_state_dict(ema.shadow)
        faces = [stretch(sample(averaged, noise)) for noise in grid_noise.split(max(1, args.batch_size // world_size))]
        save_png(args.output_dir / f"samples_{step:06d}.png", make_grid(torch.cat(faces), nrow=4))
        # Last of all: what an interrupt may cut off above, --resume makes again.
        save_checkpoint(last, kind="p2_ddim", config=config, step=step, metrics=metrics,
                        **{name: part.state_dict() for name, part in parts.items()})
        quarters.zero_()
        start = time.time()
    if args.dry_run and rank == 0:
        print(f"dry run: two steps went well, loss {loss.mean().item():.3f}; nothing was written")


if __name__ == "__main__":
    run(main)
