"""What every train.py does before, at and after a step, as functions. The loop stays in the script:

    process, saved = start(args, "p1_ddpm")
    parts = make_parts(model, make_optimizers(model, args), process, saved)
    for step in steps(args, process, saved, total, images):
        loss = ...                                     # the batch and the method: what the chapter is about
        update(parts, loss.mean(), warmup_cosine(step, total, args.warmup), ema_decay(args.ema, step))
        means.add(loss=loss)
        if due(args, step, total):
            log(metrics, means, step, per_epoch, args, parts, process)
            save(args.output_dir, parts, step, ...)    # by the process of rank 0

Whatever a step does is a function of (seed, step, rank), so on a CPU --resume goes on bit for bit with nothing but the
weights, the optimiser's state and the number of the step.
"""

import copy
import functools
import hashlib
import inspect
import math
import os
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from files import load_checkpoint, lock, make_output_dir, save_checkpoint, save_png, write_jsonl
from utils import UserError, add_amp_argument, amp_dtype, float_between, int_between, pick_device

# Flags that say where and how a training runs; what comes out depends on the content of data_dir, not on its name.
NOT_RECIPE = ("data_dir", "attributes", "output_dir", "resume", "dry_run", "device", "amp", "save_every",
              "sample_every", "gradient_checkpointing")


class Process(NamedTuple):
    """This process's part of the training: alone it has rank 0 of 1; `dtype` is its low precision, or None."""
    device: torch.device
    dtype: torch.dtype
    rank: int
    count: int


class Parts(NamedTuple):
    """What an update changes: the network, the moving average of its weights, the optimisers, the loss scaler."""
    model: nn.Module
    ema: nn.Module
    optimizers: list
    scaler: object


# --- Before the first step ----------------------------------------------------------------------

def add_arguments(parser, epochs, batch_size, lr, warmup, weight_decay, ema, save_every, epoch="a pass over all"):
    """The flags of every train.py, with this chapter's defaults; epoch: what that is here."""
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --output_dir")
    parser.add_argument("--dry_run", action="store_true", help="train two steps on small batches, write nothing")
    parser.add_argument("--seed", type=int_between(0), default=0, help="seed of all random numbers")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    add_amp_argument(parser)
    parser.add_argument("--save_every", type=int_between(1), default=save_every, help="steps between checkpoints")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int_between(1), default=epochs, help=f"how long to train; an epoch is {epoch}")
    group.add_argument("--batch_size", type=int_between(1), default=batch_size, help="images per step, all processes")
    group.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw",
                       help="muon: the inner convolutions by Muon, all else by AdamW")
    group.add_argument("--lr", type=float_between(0), default=lr, help="AdamW's highest learning rate")
    group.add_argument("--muon_lr", type=float_between(0), default=0.02, help="Muon's highest learning rate")
    group.add_argument("--warmup", type=int_between(1), default=warmup, help="steps of linear warm-up")
    group.add_argument("--weight_decay", type=float_between(0), default=weight_decay, help="decoupled weight decay")
    group.add_argument("--ema", type=float_between(0, 1), default=ema, help="decay of the weights' moving average")


def start(args, kind, *written):
    """(this Process, the checkpoint to go on from or None) for the parsed flags `args` of the chapter `kind`.

    written: names of what its trainings write beside last.pt, model.pt and metrics.jsonl.

    Joins torchrun's processes, if there are any, and makes --output_dir. UserError when the flags do not fit together,
    or do not fit the training that is there.
    """
    process = _join(args)
    if args.batch_size % process.count:
        raise UserError(f"--batch_size {args.batch_size} is not a multiple of the {process.count} processes")
    if args.dry_run:
        args.batch_size = min(args.batch_size, 8 * process.count)
    last = args.output_dir / "last.pt"
    there = any((args.output_dir / name).exists()
                for name in ("last.pt", "model.pt", "metrics.jsonl", *written))
    if args.resume and not last.exists():
        way = f"move {args.output_dir} away and start" if there else "start"
        raise UserError(f"there is no training to go on with, {last}; {way} without --resume")
    if not args.dry_run:
        make_output_dir(args.output_dir)
        if process.rank == 0:
            lock(args.output_dir)
    if not args.resume:
        if there and not args.dry_run:
            way = "add --resume" if last.exists() else "move it away"
            raise UserError(f"{args.output_dir} holds a training already; {way} or name another --output_dir")
        return process, None
    try:
        saved = load_checkpoint(last, kind, ["recipe", "metrics", "ema", "step", "model", "optimizer", "scaler"])
    except UserError as error:
        raise UserError(f"{error}; or move {args.output_dir} away and start without --resume")
    finished = saved["metrics"] and saved["metrics"][-1]["epoch"] >= saved["recipe"]["epochs"]
    if finished and args.epochs > saved["recipe"]["epochs"]:
        saved["recipe"]["epochs"] = args.epochs  # a finished training may be prolonged; the learning rate rises again
    wanted = recipe(args)
    if args.dry_run:
        wanted["batch_size"] = saved["recipe"]["batch_size"]
    new = [f"--{name}" for name in wanted if name not in saved["recipe"]]
    if new:
        raise UserError(f"{last} is of an earlier version of this script, which had no {', '.join(new)}; go on with "
                        f"that version, or move {args.output_dir} away and start without --resume")
    other = {name: value for name, value in saved["recipe"].items()
             if name not in (*NOT_RECIPE, "data") and value != wanted.get(name)}
    if other:
        flags = ", ".join(_as_flag(*item) for item in other.items())
        raise UserError(f"{last} was trained {flags}; resume it with the same flags")
    return process, saved


def _as_flag(name, value):
    if value is False or value is None or value == []:
        return f"without --{name}"
    words = [] if value is True else value if isinstance(value, list) else [value]
    return " ".join(["with", f"--{name}", *map(str, words)])


def _join(args):
    """The Process that torchrun has started, or the only one."""
    device = pick_device(args.device)
    rank, count = 0, 1
    # Not by RANK or WORLD_SIZE, which a cluster may have set for a purpose of its own.
    if dist.is_available() and dist.is_torchelastic_launched():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            if device.index >= torch.cuda.device_count():
                raise UserError(f"torchrun starts more processes than the {torch.cuda.device_count()} GPUs here; "
                                "lower --nproc_per_node")
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        rank, count = dist.get_rank(), dist.get_world_size()
    return Process(device, amp_dtype(args.amp, device), rank, count)


def recipe(args):
    """The flags that make a training what it is, as a dict of plain types for its checkpoint."""
    return {name: str(value) if isinstance(value, os.PathLike) else value
            for name, value in vars(args).items() if name not in NOT_RECIPE}


def steps_per_epoch(count, batch_size):
    """Whole batches in `count` images; UserError when there is none."""
    if count < batch_size:
        raise UserError(f"--batch_size {batch_size} is larger than the {count} training images")
    return count // batch_size


def make_parts(model, optimizers, process, saved=None):
    """The Parts of a new training of `model`, or of the one that the checkpoint `saved` describes."""
    scaler_type = torch.amp.GradScaler if hasattr(torch.amp, "GradScaler") else torch.cuda.amp.GradScaler  # PyTorch 2.3
    # Loss scaling for float16, whose small gradients would vanish; for other precisions it passes all through.
    scaler = scaler_type(enabled=process.dtype == torch.float16)
    parts = Parts(model, copy.deepcopy(model).eval().requires_grad_(False), optimizers, scaler)
    if saved:
        model.load_state_dict(saved["model"])
        parts.ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizer"]):
            optimizer.load_state_dict(state)
        if saved["scaler"]:  # empty where the training did not need one so far
            scaler.load_state_dict(saved["scaler"])
    return parts


def distribute(model, process, **arguments):
    """`model` as one of the processes calls it: with several, their gradients are averaged."""
    if process.count == 1:
        return model
    # Buffers stay each process's own: sending them round could end as utils.run tells.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # as older PyTorch has it
    return DistributedDataParallel(model, **{name: False}, **arguments)


def announce(data, process, total, *models):
    """Prints what begins: `data`, such as "38400 images", the parameters of each model, where, and how many steps."""
    if process.rank == 0:
        parameters = " and ".join(f"{sum(p.numel() for p in model.parameters()):,}" for model in models)
        print(f"{data}, {parameters} parameters, {process.device}, {process.dtype or torch.float32}, "
              f"{process.count} process(es), {total} steps", flush=True)


# --- At a step ----------------------------------------------------------------------------------

def seed_all(*keys):
    """Seeds PyTorch's generators on every device from the integers `keys`, at least 0, less zeros at their end."""
    torch.manual_seed(int(np.random.SeedSequence(keys).generate_state(1)[0]))


def steps(args, process, saved, total, *data):
    """Iterates over the steps left of `total`, each with random numbers of (seed, step, rank); two in a dry run.

    data: the tensors (N, ...) of training images and labels, whose digest becomes part of the recipe. UserError when
    the training to go on with has seen others.
    """
    args.data, first = _digest(data), saved["step"] if saved else 0
    if saved and not args.dry_run and saved["recipe"].get("data", args.data) != args.data:
        raise UserError(f"{args.output_dir / 'last.pt'} was trained on other data than --data_dir holds; resume it "
                        "with the same data")
    return _seeded(args, process, first, first + 2 if args.dry_run else total, total)


def _seeded(args, process, first, stop, total):
    for step in tqdm(range(first, stop), "training", total=stop, initial=first, unit="step",
                     disable=process.rank != 0 or None):
        seed_all(args.seed, step, process.rank)
        yield step
    if args.dry_run and process.rank == 0:
        print(f"dry run: two steps of {args.batch_size} images went well on {process.device}; nothing was written")


def _digest(tensors):
    """Eight hexadecimal digits that depend on the shapes and on some 64 examples of each of the `tensors` (N, ...)."""
    content = hashlib.sha256()
    for tensor in tensors:
        some = tensor[::max(1, len(tensor) // 64)].cpu().contiguous()
        content.update(f"{tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return content.hexdigest()[:8]


@functools.lru_cache(maxsize=1)
def _order(count, seed, epoch):
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))


def batch_indices(step, count, args, process):
    """Which of `count` images this process takes at `step`, int64 (B,) on its device: every epoch is a permutation."""
    epoch, i = divmod(step, steps_per_epoch(count, args.batch_size))
    batch = _order(count, args.seed, epoch)[i * args.batch_size:(i + 1) * args.batch_size]
    return batch[process.rank::process.count].to(process.device)


def warmup_cosine(step, total, warmup):
    """The learning rate's factor at a step: linear warm-up, then, if there are steps left, half a cosine down to 0.

    A function of the step, so there is no scheduler whose state would have to be saved.
    """
    progress = max(0, step - warmup) / max(1, total - warmup)
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay(highest, step):
    """The average's decay at a step: (1 + step) / (10 + step) at first, to forget the initial weights soon."""
    return min(highest, (1 + step) / (10 + step))


def update(parts, loss, lr_factor, decay, clip=1.0):
    """One step down the gradient of the scalar `loss`, and one of the moving average.

    lr_factor: of each optimiser's highest learning rate; decay: the average's; clip: the gradient's highest norm, or
    None.
    """
    for optimizer in parts.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_factor * group["highest_lr"]
        optimizer.zero_grad(set_to_none=True)
    parts.scaler.scale(loss).backward()
    for optimizer in parts.optimizers:
        parts.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parts.model.parameters(), clip or math.inf)
    # The scaler asks each optimiser's gradients alone, but clipping has carried one's overflow of float16 into all.
    if not parts.scaler.is_enabled() or norm.isfinite():
        for optimizer in parts.optimizers:
            parts.scaler.step(optimizer)
    parts.scaler.update()
    average(parts.ema, parts.model, decay)


@torch.no_grad()
def average(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, for floating-point parameters and buffers; others are copied."""
    for mean, value in zip(ema.state_dict().values(), model.state_dict().values()):
        if value.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


# --- Optimisers ---------------------------------------------------------------------------------

def make_optimizers(model, args):
    """[AdamW], or [Muon for the weights of all convolutions but the first and the last, AdamW for the rest]."""
    convolutions = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    inner = convolutions[1:-1] if args.optimizer == "muon" else []
    ids = {id(weight) for weight in inner}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    optimizers = [torch.optim.AdamW(rest, lr=args.lr, weight_decay=args.weight_decay)]
    if inner:
        optimizers.insert(0, Muon(inner, lr=args.muon_lr, weight_decay=args.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["highest_lr"] = group["lr"]
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose update, seen as a matrix (outputs, rest), is made orthogonal.

    Every direction of the matrix then moves by the same amount: lr * sqrt(max(1, rows / columns)) in the spectral norm.
    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon
    """

    def __init__(self, parameters, lr=0.02, weight_decay=0.01, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight not in self.state:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
                momentum = self.state[weight]["momentum"]
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                nesterov = weight.grad.lerp(momentum, group["momentum"])
                matrix = nesterov.reshape(len(weight), -1)
                rows, columns = matrix.shape
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(group["lr"] * max(1, rows / columns) ** 0.5 * orthogonalise(matrix).reshape(weight.shape))


def orthogonalise(matrix, iterations=5):
    """A matrix with the singular vectors of `matrix` and singular values between about 0.7 and 1.2.

    Newton-Schulz iteration with the quintic of Jordan et al. 2024; in bfloat16, which it forgives, where that is fast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    low = torch.bfloat16 if amp_dtype("auto", matrix.device) == torch.bfloat16 else torch.float32
    x = (matrix / (matrix.norm() + 1e-7)).to(low)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(iterations):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return (wide if wide.shape == x.shape else wide.T).to(matrix.dtype)


# --- What is logged and saved -------------------------------------------------------------------

class Means:
    """Means of named values since they were last popped, over all processes."""

    def __init__(self):
        self.sums, self.since = {}, time.time()

    def add(self, **values):
        """values: tensors (B,), one number an image, or 0-d."""
        for name, value in values.items():
            value = value.detach().float()
            self._add(name, torch.stack([value.sum(), torch.full_like(value.sum(), value.numel())]))

    def add_quarters(self, name, values, t, timesteps):
        """values (B,) apart by the quarter of 1 ... `timesteps` in which t (B,) lies: four means."""
        rows = torch.stack([values.detach().float(), torch.ones_like(values, dtype=torch.float32)], dim=1)
        self._add(name, torch.zeros(4, 2, device=values.device).index_add_(0, (t - 1) * 4 // timesteps, rows))

    def _add(self, name, sums):
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def pop(self):
        """({name: mean, or a list of them}, seconds since the last time); every process has to call this."""
        means = {}
        for name, sums in self.sums.items():
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(sums)
            total, count = sums.unbind(-1)
            mean = (total / count.clamp(min=1)).tolist()
            means[name] = [round(x, 5) for x in mean] if isinstance(mean, list) else round(mean, 5)
        seconds = time.time() - self.since
        self.sums, self.since = {}, time.time()
        return means, seconds


def due(args, step, total):
    """Whether `step` ends with a line in the log and a checkpoint."""
    return not args.dry_run and ((step + 1) % args.save_every == 0 or step + 1 == total)


def log(metrics, means, step, per_epoch, args, parts, process):
    """Appends the row of `step` to the list `metrics` and prints it; every process has to call this.

    UserError when a mean is not finite, or an averaged weight in the half precision of model.pt: the training ends, and
    its last checkpoint stays as it is.
    """
    values, seconds = means.pop()
    # Every process sees either, so none waits for another.
    if not np.isfinite(np.hstack(list(values.values()))).all():
        raise UserError(f"the loss is not finite before step {step + 1}; train anew with a lower --lr")
    if not all(weight.half().isfinite().all() for weight in parts.ema.parameters()):
        raise UserError(f"the weights are not finite at step {step + 1}; train anew with a lower --lr")
    done = step + 1 - (metrics[-1]["step"] if metrics else 0)
    metrics.append(dict(step=step + 1, epoch=round((step + 1) / per_epoch, 3), **values,
                        lr=parts.optimizers[-1].param_groups[0]["lr"], seconds=round(seconds, 1),
                        images_per_second=round(done * args.batch_size / seconds, 1)))
    if process.rank == 0:
        tqdm.write(", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                             for name, value in metrics[-1].items()))


def save(output_dir, parts, step, description, samples=None, **rest):
    """Writes a checkpoint: model.pt, samples_*.png, metrics.jsonl and, last of all, last.pt.

    --resume goes on from last.pt, and so makes again what an interrupt has cut off before. description: kind, config,
    recipe, metrics and what else both checkpoints hold; samples: a picture, uint8 (3, H, W), or None; rest: what only
    last.pt holds.
    """
    save_model(output_dir, parts.ema, **description)
    if samples is not None:
        save_png(output_dir / f"samples_{step + 1:06d}.png", samples)
    save_training(output_dir, parts, step, **description, **rest)


def save_model(output_dir, model, **description):
    """Writes model.pt for inference: `model`'s parameters in half precision (its buffers as they are) on the CPU, which
    every machine has, no more metrics than the last; description: kind, config, recipe, metrics."""
    parameters = dict(model.named_parameters())
    weights = {name: (value.half() if name in parameters else value).cpu()
               for name, value in model.state_dict().items()}
    description["metrics"] = description["metrics"][-1:]
    save_checkpoint(output_dir / "model.pt", **description, ema=weights)


def save_training(output_dir, parts, step, **description):
    """Writes metrics.jsonl and last.pt, all that --resume needs."""
    write_jsonl(output_dir / "metrics.jsonl", description["metrics"])
    save_checkpoint(output_dir / "last.pt", **description, step=step + 1, ema=parts.ema.state_dict(),
                    model=parts.model.state_dict(), optimizer=[o.state_dict() for o in parts.optimizers],
                    scaler=parts.scaler.state_dict())
