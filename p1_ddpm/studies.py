"""How guidance, sampler and number of steps trade accuracy, fidelity, diversity and time: the report's tables.

    python3 p1_ddpm/studies.py                       # all tables of the committed checkpoint
    python3 p1_ddpm/studies.py --tables guidance     # one of them
    python3 p1_ddpm/studies.py --tables ema --checkpoint p1_ddpm/output/last.pt   # of a training: does the EMA pay?
    python3 p1_ddpm/studies.py --tables domains --checkpoint p1_ddpm/checkpoints/mnistm_svhn.pt   # of two domains
    python3 p1_ddpm/studies.py --tables trainings --checkpoint p1_ddpm/output/model.pt   # is a training a better one?

Generates up to 1,000 digits with each setting, judges them as evaluate.py does, and adds a line to --output, of several
domains a line each; --output p1_ddpm/checkpoints/results.csv changes the record of README and report. Settings of the
same checkpoint, graders and precision that are in that file already are not measured again, so an interrupted study
goes on; of one precision those by other graders or without some measure give way. Prints the tables as Markdown:
mean and standard deviation where settings differ in the seed alone. On 2 CPU cores with AVX-512 the table reference
takes 40 minutes in float32, the others together 40 in bfloat16.
"""

import itertools
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (UserError, add_amp_argument, amp_dtype, argument_parser, int_between, nonempty_path, pick_device,
                   run)

import pandas as pd
import torch

from digit_classifier import CHECKPOINTS, PANEL
from files import check_output_file, digest_of, load_checkpoint, lock, markdown_table, other_rows, write_atomic
from p1_ddpm.diffusion import SPACINGS
from p1_ddpm.evaluate import Judge, summary
from p1_ddpm.inference import (SHIPPED, Sampling, add_sampling_arguments, digits, domains_of, generate, sampling_of,
                               visited_timesteps)
from p1_ddpm.model import load_model


def candidates(seeds, spacing, *choices):
    """Each (sampler, steps, guidance, low, high) of `choices` with each of the seeds."""
    return [dict(sampler=sampler, steps=steps, spacing=spacing, guidance=guidance, interval=(low, high), seed=seed)
            for sampler, steps, guidance, low, high in choices for seed in seeds]


# What the tables from ddim on vary: 20 steps of DDIM, whose strides are short enough to tell what a change does.
DDIM = Sampling()._asdict()

# Each table varies some flags of inference.py and leaves the others at what the command line says; those made of DDIM
# leave it seed, weights and number of images alone.
TABLES = {
    "shipped": [{}],  # hw2_1.sh
    "candidates": [
        *candidates((11, 12, 13), "trimmed", *[("dpmpp", steps, guidance, 400, 900) for steps, guidance in (
            (7, 2.0), (7, 2.5), (8, 2.0), (8, 2.5), (8, 3.0), (9, 2.0), (9, 2.5))]),
        *candidates((11, 12, 13), "log_snr", ("dpmpp", 12, 2.5, 400, 900), ("ddim", 20, 1.5, 200, 1000))],
    "seeds": [dict(seed=s) for s in range(30, 35)],  # which took part in no choice
    "ddim": [dict(DDIM, seed=s) for s in range(5, 10)],
    "guidance": [dict(DDIM, guidance=g) for g in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)],
    "interval": [dict(DDIM, interval=limits) for limits in ((0, 1000), (200, 1000), (400, 1000), (200, 950))],
    "steps": [dict(DDIM, sampler=s, steps=n) for s in ("dpmpp", "ddim", "ddpm") for n in (8, 12, 20, 32)],
    "spacing": [dict(DDIM, spacing=s, steps=n) for s in SPACINGS for n in (8, 20)],
    "reference": [dict(DDIM, sampler="ddpm", steps=1000)],  # all steps, where there are fewer
    "domains": [dict(row, per_class=25) for row in (  # two domains, one network
        *candidates((11, 12, 13), "trimmed", *[("dpmpp", 6, guidance, 200, 1000) for guidance in (1.5, 2.0, 2.5)],
                    ("dpmpp", 7, 2.0, 300, 950), ("dpmpp", 7, 3.0, 300, 950), ("dpmpp", 8, 2.5, 400, 900),
                    ("dpmpp", 8, 4.0, 400, 900), ("ddim", 8, 2.5, 400, 900)),
        *candidates((11, 12, 13), "log_snr", ("dpmpp", 12, 1.5, 400, 900), ("ddim", 12, 2.0, 200, 1000)))],
    "ema": [dict(DDIM, weights=w) for w in ("ema", "model")],
    "trainings": [*[dict(DDIM, sampler=sampler, guidance=0.0, seed=s, per_class=50) for sampler in ("ddim", "ddpm")
                    for s in (11, 12)], *[dict(seed=s) for s in (11, 12, 13)]],
}
OF_OTHERS = ("domains", "ema", "trainings")  # the tables that are not about the committed checkpoint alone
DEFAULTS = dict(SHIPPED._asdict(), seed=0, weights="ema", per_class=100)
FLAGS = ["sampler", "steps", "spacing", "guidance", "interval", "seed", "weights", "eta", "per_class"]
GROUPED_BY = ["domain", *FLAGS]  # what tells the settings in a table apart
MEASURES = {"accuracy": 2, "worst_digit": 2, "panel": 2, "panel_least": 2, "frechet": 3, "frechet_ratio": 2,
            "diversity": 3, "seconds": 1}  # decimals


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES,
                        default=[name for name in TABLES if name not in OF_OTHERS],
                        help="which tables to make; domains needs a network of several, ema a last.pt")
    parser.add_argument("--output", type=nonempty_path, default=ROOT / "p1_ddpm/output/results.csv",
                        help="the file of results")
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--per_class", type=int_between(2, 999), default=DEFAULTS["per_class"],
                        help="images of each digit")
    parser.add_argument("--seed", type=int_between(0), default=DEFAULTS["seed"], help="seed of the noise")
    add_sampling_arguments(parser)
    add_amp_argument(parser)
    return parser.parse_args()


def settings(table, timesteps, flags=DEFAULTS):
    """The rows of a table, dicts with the keys FLAGS: its changes to `flags`, for a schedule of so many timesteps."""
    rows = [{**flags, **changes} for changes in TABLES[table]]
    return [dict(row, steps=min(row["steps"], timesteps)) for row in rows]


def sampling_in(setting):
    """The Sampling in the dict `setting`, which has other keys as well."""
    return Sampling(**{flag: setting[flag] for flag in Sampling._fields})


def as_text(setting, flags=FLAGS):
    """{flag: its value in the dict `setting` as results.csv spells it}."""
    return {flag: "{:g} to {:g}".format(*setting[flag]) if flag == "interval" else str(setting[flag]) for flag in flags}


def measure(model, alphas_cumprod, judges, setting, device, batch_size, dtype=None):
    """{domain: MEASURES} of a setting, a dict with the keys FLAGS, for the domains of `judges` in the model's order.

    The seconds are those of all domains together.
    """
    keys, labels = digits(model.num_classes, setting["per_class"])
    sampling = sampling_in(setting)
    start = time.time()
    batches = generate(model, alphas_cumprod, keys, labels, sampling, setting["seed"], device, batch_size, dtype=dtype)
    images = torch.cat([images for _, images, _ in batches])
    seconds = time.time() - start
    measured = {}
    for i, (domain, judge) in enumerate(judges.items()):
        own = labels // 10 == i
        measures = dict(summary(judge(images[own], labels[own] % 10, neighbours=False)), seconds=seconds)
        measured[domain] = {name: round(measures[name], decimals) for name, decimals in MEASURES.items()}
    return measured


def means(rows, flags=GROUPED_BY, measures=MEASURES):
    """Rows that differ in nothing but the seed made one: mean and `_std` of each measure, and the number of `seeds`."""
    groups = rows.groupby([flag for flag in flags if flag != "seed"], sort=False)[list(measures)]
    return groups.mean().join(groups.std().add_suffix("_std")).join(groups.size().rename("seeds")).reset_index()


def markdown(rows, flags=GROUPED_BY, measures=MEASURES):
    """The means of some rows of results as a Markdown table of the flags that vary and the measures.

    flags, measures: names of columns, the latter with their decimals.
    """
    table = means(rows, flags, measures)
    shown = table[[flag for flag in flags if flag in table and table[flag].nunique() > 1]].astype(str)
    for name, decimals in measures.items():
        shown[name] = [f"{mean:.{decimals}f}" + (f" ± {std:.{decimals}f}" if seeds > 1 else "")
                       for mean, std, seeds in zip(table[name], table[f"{name}_std"], table.seeds)]
    return markdown_table(shown.columns, shown.values.tolist())


def main():
    args = parse_args()
    device = pick_device(args.device)
    dtype = amp_dtype(args.amp, device)
    _, alphas_cumprod = load_model(args.checkpoint)
    epochs = load_checkpoint(args.checkpoint, "p1_ddpm", ["metrics"])["metrics"][-1]["epoch"]
    about = dict(checkpoint=digest_of(args.checkpoint), epochs=f"{epochs:g}",
                 precision=str(dtype or torch.float32).removeprefix("torch."),
                 graders=" ".join(digest_of(path) for path in (*CHECKPOINTS.values(), PANEL)))
    flags = dict(sampling_of(args)._asdict(), seed=args.seed, weights=args.weights, per_class=args.per_class)
    domains = domains_of(args.checkpoint)
    tables = {name: settings(name, len(alphas_cumprod) - 1, flags) for name in args.tables}
    wanted = list(itertools.chain(*tables.values()))
    if "domains" in tables and len(domains) < 2:
        raise UserError(f"--tables domains needs a network of several, and {args.checkpoint} is of {domains[0]} alone")
    for setting in wanted:  # what does not fit together is told now
        visited_timesteps(sampling_in(setting), alphas_cumprod)
    for weights in sorted({setting["weights"] for setting in wanted}):
        load_model(args.checkpoint, weights=weights)
    check_output_file(args.output)
    lock(args.output.parent)  # two runs at once would overwrite each other's rows
    rows = other_rows(args.output, "table", dtype=str).to_dict("records")
    judges = {domain: Judge(args.data_dir, domain) for domain in domains}
    for name in tables:
        for setting in tables[name]:
            row = dict(about, **as_text(setting))
            same = [old for old in rows if all(str(old.get(key)) == value for key, value in row.items())
                    and not any(pd.isna(old[measure]) for measure in MEASURES)]
            if any(old["table"] == name for old in same):
                continue
            measured = {old["domain"]: {key: old[key] for key in MEASURES} for old in same}  # another table may have it
            if not measured:
                model, alphas_cumprod = load_model(args.checkpoint, device, setting["weights"])
                measured = measure(model, alphas_cumprod, judges, setting, device, args.batch_size, dtype)
            place = dict(table=name, checkpoint=about["checkpoint"], precision=about["precision"], **as_text(setting))
            rows = [old for old in rows if any(old.get(key) != value for key, value in place.items())]
            for domain, measures in measured.items():
                rows.append(dict(table=name, domain=domain, **row, **measures))
                print(rows[-1], flush=True)
            write_atomic(args.output, pd.DataFrame(rows).to_csv(index=False).encode())
        made = pd.DataFrame(rows).query("table == @name and checkpoint == @about['checkpoint'] "
                                        "and precision == @about['precision']")
        print(f"\n{name}\n\n{markdown(made.astype(dict.fromkeys(MEASURES, float)))}\n", flush=True)


if __name__ == "__main__":
    run(main)
