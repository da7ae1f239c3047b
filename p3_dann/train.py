"""Trains a network of problem 3 by DANN (Ganin et al., JMLR 2016) or one of the methods beside it, see methods.py.

    python3 p3_dann/train.py --target svhn --method dann         # MNIST-M -> SVHN: 80 to 82 %, 4 minutes
    python3 p3_dann/train.py --target svhn --method adamatch     # Berthelot et al., ICLR 2022: 91 to 95 %, 50 minutes
    python3 p3_dann/train.py --target usps --lambda_max 0.1      # MNIST-M -> USPS: 98 to 99 %; --source takes any other
    python3 p3_dann/train.py --target svhn --method source_only  # the lower bound: source labels, no target images
    python3 p3_dann/train.py --target svhn --method target_only  # the upper bound: target labels, no source images
    python3 p3_dann/train.py --target svhn --resume              # goes on where the last run stopped
    python3 p3_dann/train.py --target svhn --dry_run             # two steps, to see that all is in place
    torchrun --nproc_per_node=2 p3_dann/train.py                 # several processes; --batch_size is for all together

All share network and optimiser, so that they can be compared: an epoch is 100 steps, and a step draws --batch_size
images of each domain that the method sees. adamatch takes more and smaller steps than the others, 60 epochs of 64
images, and no dropout. The target's labels are read by target_only alone: with dann and adamatch neither training nor
the choice of the weights (the EMA at the end of a fixed budget) knows them. After the end, validation labels give the
accuracy for the table. Minutes are those on 2 CPU cores with nothing beside it, adamatch's on one, with bfloat16.

Reads hw2_data/digits. Writes into --output_dir:
    last.pt         everything that --resume needs, every --save_every steps
    model.pt        the EMA weights in half precision and the configuration, for inference.py; at the end, last of all
    metrics.jsonl   one line per checkpoint; the last one holds the validation accuracy of every domain

How to read a line: `domain_accuracy` is the discriminator's; 0.5 means that the features hide the domain, 1.0 that it
still tells the domains apart. A domain loss near 0.69 = log 2 says the same; in the first epochs it says only that the
discriminator has not learned yet. `confident` is the share of target images that the classifier is 90 % sure of, the
label-free sign of success; `counted` the share that adamatch takes its own answers for. All are means over augmented
batches, with dropout where there is any.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, autocast, float_between, nonempty_path, run

import torch

import training
from dataset import DOMAINS
from p3_dann.augment import PARTS, STRONG_PARTS
from p3_dann.batches import draw_batch, load_training_images
from p3_dann.methods import ADAMATCH_PARTS, METHODS, Objective, predicted_domain, run_name
from p3_dann.model import Dann
from p3_dann.prediction import adapt_statistics, validation_accuracy

STEPS_PER_EPOCH = 100  # for every method, whatever the sizes of its data sets


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--source", choices=DOMAINS, default="mnistm", help="the domain with labels")
    parser.add_argument("--target", choices=DOMAINS, default="svhn", help="the domain to be predicted")
    parser.add_argument("--method", choices=METHODS, default="dann", help="how to learn, and from what")
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--output_dir", type=nonempty_path, help="where checkpoints go; when not given, a folder in "
                        "p3_dann/output with a name such as mnistm_svhn_dann_s0")
    training.add_arguments(parser, epochs=12, batch_size=128, lr=3e-3, warmup=240, weight_decay=1e-3, ema=0.995,
                           save_every=STEPS_PER_EPOCH, epoch=f"{STEPS_PER_EPOCH} steps")
    parser.add_argument("--lambda_max", type=float_between(0), default=1.0, help="dann's final weight of the adversary")
    parser.add_argument("--threshold", type=float_between(0, 1), default=0.9,
                        help="adamatch counts a target image above this share of the mean confidence on the source")
    parser.add_argument("--without", nargs="+", choices=PARTS, default=[],
                        help="parts of the augmentation to do without, to see what they give")
    parser.add_argument("--leave_out", nargs="+", choices=ADAMATCH_PARTS, default=[],
                        help="parts of adamatch's loss to do without, to see what they give")
    method = METHODS[parser.parse_args([word for word in sys.argv[1:] if word not in ("-h", "--help")]).method]
    parser.set_defaults(**method.defaults)  # now, so that --help shows them
    args = parser.parse_args()
    unused = [flag for flag in ("lambda_max", "threshold", "leave_out")
              if getattr(args, flag) != parser.get_default(flag) and flag not in method.flags]
    if unused:
        raise UserError(f"--method {args.method} has no --{unused[0]}")
    strong = [part for part in args.without if part in STRONG_PARTS and not method.two_views]
    if strong:
        raise UserError(f"--method {args.method} has no strong view, so it is always --without {strong[0]}")
    name = f"{run_name(args.method, args.source, args.target)}_s{args.seed}"
    args.output_dir = args.output_dir or ROOT / "p3_dann/output" / name
    return args


def main():
    args = parse_args()
    method = METHODS[args.method]
    if method.unlabelled and args.source == args.target:
        raise UserError(f"--source and --target are both {args.source}; adaptation needs two domains")
    process, saved = training.start(args, "p3_dann")
    device, count = process.device, args.batch_size // process.count
    if count < 2:
        raise UserError(f"--batch_size {args.batch_size} gives a process one image, batch normalisation needs two")
    images, labels = load_training_images(args.data_dir, method, dict(source=args.source, target=args.target))
    images, labels = {domain: seen.to(device) for domain, seen in images.items()}, labels.to(device)
    total = args.epochs * STEPS_PER_EPOCH

    training.seed_all(args.seed)
    model = Dann(**method.network).to(device, memory_format=torch.channels_last)
    parts = training.make_parts(model, training.make_optimizers(model, args), process, saved)
    objective = Objective(model, method, {flag: getattr(args, flag) for flag in method.flags})
    parallel = training.distribute(objective, process, static_graph=True)  # some methods leave the discriminator out
    metrics, means = saved["metrics"] if saved else [], training.Means()
    seen = ", ".join(f"{len(of_domain)} images of {domain}" for domain, of_domain in images.items())
    training.announce(seen, process, total, model)

    steps = training.steps(args, process, saved, total, *images.values(), labels)
    description = dict(kind="p3_dann", config=model.config, recipe=training.recipe(args), metrics=metrics)
    for step in steps:
        batch = draw_batch(images, labels, count, args.without, method.two_views)
        with autocast(device, process.dtype):
            loss, values = parallel(batch, step / total)
        training.update(parts, loss, training.warmup_cosine(step, total, args.warmup),
                        training.ema_decay(args.ema, step), clip=None)
        means.add(**values)
        if training.due(args, step, total):
            training.log(metrics, means, step, STEPS_PER_EPOCH, args, parts, process)
            if process.rank == 0:
                training.save_training(args.output_dir, parts, step, **description)

    if process.rank == 0 and not args.dry_run:
        if not method.two_views:  # these have recorded the statistics that all domains share
            adapt_statistics(parts.ema, images[predicted_domain(vars(args))])
        metrics[-1]["validation_accuracy"] = validation_accuracy(parts.ema, args.data_dir)
        training.write_jsonl(args.output_dir / "metrics.jsonl", metrics)
        training.save_model(args.output_dir, parts.ema, **description)  # last of all: where it is, the record is whole
        print(f"validation accuracy in %: {metrics[-1]['validation_accuracy']}; wrote {args.output_dir / 'model.pt'}")


if __name__ == "__main__":
    run(main)
