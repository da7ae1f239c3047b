"""Trains one of the three experiments of problem 3: source only, DANN (Ganin et al., JMLR 2016), or target only.

    python3 p3_dann/train.py --target svhn --mode dann        # MNIST-M -> SVHN: 80 to 82 % in 4 minutes on 2 CPU cores
    python3 p3_dann/train.py --target usps --mode dann        # MNIST-M -> USPS: 98 %
    python3 p3_dann/train.py --target svhn --mode source      # the lower bound: source labels, no target images
    python3 p3_dann/train.py --target svhn --mode target      # the upper bound: target labels, no source images
    python3 p3_dann/train.py --target svhn --resume           # goes on where the last run stopped
    python3 p3_dann/train.py --target svhn --dry_run          # two steps, to see that all is in place
    torchrun --nproc_per_node=2 p3_dann/train.py              # several processes; --batch_size is for all together

All three share network, optimiser and number of steps, so that they can be compared. Source images are augmented
more widely than the target's own, which need no magnification and no neighbours (augment.py). In mode dann the target's
labels are never read: neither training nor the choice of the weights (the average at the end of a fixed budget) knows
them. After the end, validation labels give the accuracy for the table.

Reads hw2_data/digits. Writes into --output_dir:
    last.pt         everything that --resume needs, after every epoch
    model.pt        the averaged weights in half precision and the configuration, for inference.py --checkpoint
    metrics.jsonl   one line per epoch, and the validation accuracy of every domain at the end

How to read an epoch's line: `domain` is the discriminator's accuracy; 0.5 means that the features hide the domain,
1.0 that it still tells the domains apart. A domain loss near 0.69 = log 2 says the same; in the first epochs it says
only that the discriminator has not learned yet. `confident` is the share of target images that the classifier is 90 %
sure of, the label-free sign of success. All are means over an epoch's augmented batches, with dropout.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset import DOMAINS, load_split  # noqa: E402
from p3_dann.augment import PARTS, augment_source, augment_target  # noqa: E402
from p3_dann.model import Dann, adapt_statistics, lambda_schedule, predict  # noqa: E402
from utils import (EMA, UserError, amp_dtype, argument_parser, autocast, check_recipe, float_between, grad_scaler,  # noqa: E402
                   init_distributed, int_at_least, load_checkpoint, make_output_dir, restore, run, save_checkpoint,
                   seed_all, sum_over_processes, warmup_cosine, write_atomic)

STEPS_PER_EPOCH = 100  # the same in all modes, whatever the sizes of their data sets


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--source", choices=DOMAINS, default="mnistm", help="the domain with labels")
    parser.add_argument("--target", choices=DOMAINS, default="svhn", help="the domain to be predicted")
    parser.add_argument("--mode", choices=["source", "dann", "target"], default="dann",
                        help="train on source labels only, on these and unlabelled target images, or on target labels")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--output_dir", type=Path, help="where checkpoints go; "
                        "p3_dann/output/SOURCE_TARGET_MODE_sSEED when not given")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --output_dir")
    parser.add_argument("--dry_run", action="store_true",
                        help="train two steps on small batches, into a folder of its own, and stop")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of weights, order and augmentation")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    parser.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto",
                        help="mixed precision; auto takes what the device does fast")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", type=int_at_least(1), default=12,
                              help=f"training time; one epoch is {STEPS_PER_EPOCH} steps in every mode")
    optimisation.add_argument("--batch_size", type=int_at_least(2), default=128, help="images per step and domain")
    optimisation.add_argument("--lr", type=float_between(0), default=3e-3, help="highest learning rate")
    optimisation.add_argument("--weight_decay", type=float_between(0), default=1e-3, help="AdamW's weight decay")
    optimisation.add_argument("--lambda_max", type=float_between(0), default=1.0, help="final weight of the adversary")
    optimisation.add_argument("--ema", type=float_between(0, 1), default=0.995, help="decay of the weight average")
    optimisation.add_argument("--without", nargs="+", choices=PARTS, default=[],
                              help="parts of the augmentation to leave out, to see what they give")
    args = parser.parse_args()
    args.output_dir = args.output_dir or ROOT / f"p3_dann/output/{args.source}_{args.target}_{args.mode}_s{args.seed}"
    return args


def load_training_images(data_dir, source, target, mode):
    """(images, labels) of the domain with labels and the target's images, which are None outside mode dann.

    The only place where training reads the data set, and so the proof that mode dann cannot know the target's labels
    and mode source not even its images.
    """
    images, labels, _ = load_split(data_dir, target if mode == "target" else source, "train")
    target_images = load_split(data_dir, target, "train", labelled=False)[0] if mode == "dann" else None
    return images, labels, target_images


def losses(model, images, labels, target_images, lambda_):
    """The loss to minimise, and what an epoch's line reports: means over the batch as a dict of 0-d tensors."""
    if target_images is None:
        logits = model(images)
        class_loss = F.cross_entropy(logits.float(), labels)
        return class_loss, dict(loss=class_loss.detach(), source=hits(logits, labels))
    logits, target_logits, source_domain, target_domain = model(images, target_images, lambda_)
    class_loss = F.cross_entropy(logits.float(), labels)
    domain_loss = (F.softplus(source_domain.float()).mean() + F.softplus(-target_domain.float()).mean()) / 2
    return class_loss + domain_loss, dict(
        loss=class_loss.detach(), source=hits(logits, labels), domain_loss=domain_loss.detach(),
        domain=((source_domain < 0).float().mean() + (target_domain > 0).float().mean()) / 2,
        confident=(target_logits.float().softmax(dim=1).amax(dim=1) > 0.9).float().mean())


def hits(logits, labels):
    return (logits.argmax(dim=1) == labels).float().mean()


def validation_accuracy(model, data_dir):
    """{domain: accuracy in %} on the validation digits of every domain that has labels in `data_dir`."""
    accuracy = {}
    for domain in DOMAINS:
        try:
            images, labels, _ = load_split(data_dir, domain, "val")
        except UserError as error:
            print(f"no validation accuracy for {domain}: {error}", file=sys.stderr)
            continue
        accuracy[domain] = round(100 * hits(predict(model, images), labels).item(), 2)
    return accuracy


def main():
    args = parse_args()
    device, rank, world_size = init_distributed(args.device)
    dtype = amp_dtype(args.amp, device)
    if args.batch_size % world_size:
        raise UserError(f"--batch_size {args.batch_size} is not a multiple of the {world_size} processes")
    if args.mode == "dann" and args.source == args.target:
        raise UserError(f"--source and --target are both {args.source}; adaptation needs two domains")
    if args.dry_run:
        args.epochs, args.batch_size = 1, min(args.batch_size, 8 * world_size)
    output_dir = make_output_dir(args.output_dir / "dry_run" if args.dry_run else args.output_dir)
    recipe = {name: getattr(args, name) for name in ("source", "target", "mode", "seed", "epochs", "batch_size", "lr",
                                                     "weight_decay", "lambda_max", "ema", "without")}
    last = output_dir / "last.pt"
    state = load_checkpoint(last, "p3_dann", ["recipe", "metrics", "model", "optimizer"]) if args.resume else None
    if state:
        check_recipe(last, state["recipe"], recipe)
    if last.exists() and not (args.resume or args.dry_run):
        raise UserError(f"{output_dir} holds a training already; add --resume or name another --output_dir")

    images, labels, target_images = load_training_images(args.data_dir, args.source, args.target, args.mode)
    # Predictions will be about the domain whose images were seen last: the target's, but in mode source.
    statistics_images = images if target_images is None else target_images
    images, labels = images.to(device), labels.to(device)
    target_images = None if target_images is None else target_images.to(device)
    augment = augment_target if args.mode == "target" else augment_source

    seed_all(args.seed)
    model = Dann().to(device, memory_format=torch.channels_last)
    ema = EMA(model, args.ema)
    parallel = model
    if world_size > 1:
        parallel = DistributedDataParallel(model, find_unused_parameters=target_images is None)
    steps_per_epoch = 2 if args.dry_run else STEPS_PER_EPOCH
    total = args.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scaler = grad_scaler(dtype)
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    metrics = []
    if state:
        restore(parts, state)
        metrics = state["metrics"]
    if rank == 0:
        print(f"{len(images)} labelled images, {0 if target_images is None else len(target_images)} unlabelled, "
              f"{sum(p.numel() for p in model.parameters()):,} parameters, {device}, {dtype or torch.float32}, "
              f"{world_size} process(es), epochs {len(metrics) + 1} to {args.epochs}")

    local_batch = args.batch_size // world_size
    for epoch in range(len(metrics), args.epochs):
        sums, start = {}, time.time()
        for i in tqdm(range(steps_per_epoch), f"epoch {epoch + 1}/{args.epochs}", disable=rank != 0 or None):
            step = epoch * steps_per_epoch + i
            seed_all(args.seed, step, rank)
            lambda_ = lambda_schedule(step / total, args.lambda_max)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warmup_cosine(step, total, max(1, total // 5))
            batch = torch.randint(len(images), (local_batch,)).to(device)
            source_batch = augment(images[batch], args.without).contiguous(memory_format=torch.channels_last)
            target_batch = None
            if target_images is not None:
                other = torch.randint(len(target_images), (local_batch,)).to(device)
                target_batch = augment_target(target_images[other], args.without).contiguous(
                    memory_format=torch.channels_last)
            model.train()
            with autocast(device, dtype):
                loss, report = losses(parallel, source_batch, labels[batch], target_batch, lambda_)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            ema.update(model)
            for name, value in report.items():
                sums[name] = sums.get(name, 0) + value
        means = {name: round(sum_over_processes(value).item() / (world_size * steps_per_epoch), 4)
                 for name, value in sums.items()}
        if rank != 0:
            continue

        metrics.append(dict(epoch=epoch + 1, **(dict(lambda_=round(lambda_, 4)) if args.mode == "dann" else {}), **means,
                            seconds=round(time.time() - start, 1)))
        print(", ".join(f"{name} {value}" for name, value in metrics[-1].items()), flush=True)
        content = dict(kind="p3_dann", config=model.config, recipe=recipe, metrics=metrics)
        save_checkpoint(last, **content, **{k: v.state_dict() for k, v in parts.items()})
        write_jsonl(output_dir / "metrics.jsonl", metrics)

    if rank == 0:
        model.load_state_dict(ema.shadow)
        adapt_statistics(model, statistics_images)
        accuracy = {} if args.dry_run else validation_accuracy(model, args.data_dir)
        write_jsonl(output_dir / "metrics.jsonl", [*metrics, dict(recipe, validation_accuracy=accuracy)])
        half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        # Last of all: where model.pt is, the record is whole.
        save_checkpoint(output_dir / "model.pt", kind="p3_dann", config=model.config, recipe=recipe, ema=half)
        print(f"validation accuracy in %: {accuracy}; wrote {output_dir / 'model.pt'}")


def write_jsonl(path, rows):
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


if __name__ == "__main__":
    run(main)
