"""Every training behind the tables of problem 3, and the tables.

    python3 p3_dann/studies.py --jobs 2               # 15 trainings, then the table: means of 3 seeds
    python3 p3_dann/studies.py --tables lambda        # DANN with a weak adversary, 3 seeds
    python3 p3_dann/studies.py --tables ablation      # what each part of DANN gives: MNIST-M -> SVHN, one seed

The first takes 45 minutes on 2 CPU cores. A training that is in --output_dir already is not repeated, an interrupted
one goes on. Writes --output_dir/results.csv. With --publish, its rows replace those of the same trainings in
p3_dann/checkpoints/results.csv, and the networks of seed 0, each with its record, go to p3_dann/checkpoints, where
inference.py looks for them: the seed was fixed before any was trained.
"""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, int_at_least, nonempty_path, run

import pandas as pd

from dataset import load_split
from files import make_output_dir, write_atomic
from p3_dann.methods import METHODS, PAIRS, run_name
from p3_dann.model import load_model
from p3_dann.prediction import accuracy, adapt_statistics

SEEDS = (0, 1, 2)


def models():
    """{name in checkpoints/: settings}: each method between each pair, those that see one domain of it once."""
    named = {}
    for source, target in PAIRS:
        for method in METHODS:
            named.setdefault(run_name(method, source, target), dict(source=source, target=target, method=method))
    return named


MODELS = models()
# {name: (what differs from DANN on SVHN, the settings that do it)}
ABLATION = {
    "lambda_0": ("no adversary: lambda = 0", dict(lambda_max=0)),
    "lambda_0.3": ("lambda = 0.3", dict(lambda_max=0.3)),
    "no_geometry": ("no affine maps and no neighbours", dict(without=["geometry"])),
    "no_neighbours": ("no neighbours", dict(without=["neighbours"])),
    "no_intensity": ("no change of polarity, contrast and brightness", dict(without=["intensity"])),
    "no_sharpness": ("no blur and no sharpening", dict(without=["sharpness"])),
}
# {table: {folder: settings}}: the trainings that it needs.
TABLES = {
    "main": {f"{name}_s{seed}": dict(settings, seed=seed) for seed in SEEDS for name, settings in MODELS.items()},
    "lambda": {f"lambda_0.1_{target}_s{seed}": dict(MODELS[run_name("dann", source, target)], lambda_max=0.1, seed=seed)
               for seed in SEEDS for source, target in PAIRS},
    "ablation": {f"ablation_{name}": dict(MODELS[run_name("dann", "mnistm", "svhn")], **settings)
                 for name, (_, settings) in ABLATION.items()},
}


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["main"], help="what to train")
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--output_dir", type=nonempty_path, default=ROOT / "p3_dann/output/studies",
                        help="where the trainings go, a folder each")
    parser.add_argument("--jobs", type=int_at_least(1), default=1,
                        help="trainings at a time; they share the cores, and 2 on 2 cores are a little faster than 1")
    parser.add_argument("--publish", action="store_true", help="replace what p3_dann/checkpoints holds")
    return parser.parse_args()


def flags(settings):
    """{name: value or list of values} as a list of command line arguments."""
    return [text for name, value in settings.items()
            for text in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))]


def train(folder, settings, data_dir, jobs):
    """Runs train.py into `folder` unless it is done; its output goes to folder/log.txt."""
    if (folder / "model.pt").exists():
        return
    make_output_dir(folder)
    command = [sys.executable, str(ROOT / "p3_dann/train.py"), *flags(settings), "--data_dir", str(data_dir),
               "--output_dir", str(folder), *(["--resume"] if (folder / "last.pt").exists() else [])]
    threads = dict(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // jobs))) if jobs > 1 else {}
    with open(folder / "log.txt", "a") as log:
        if subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **threads}).returncode:
            raise UserError(f"the training in {folder} failed; its log.txt says why")
    print(f"{folder.name}: {(folder / 'log.txt').read_text().splitlines()[-1]}", flush=True)


def results(output_dir, data_dir):
    """One row for each finished training in `output_dir` and target: accuracy in % on the target's validation digits.

    accuracy: as inference.py predicts, averaged over views; one_view: without that. A network that has seen no target
    answers for each target, and twice: as trained, and with the normalisation statistics of the unlabelled target
    (statistics = target), as dann's networks have them.
    """
    rows = []
    for folder in sorted(path.parent for path in output_dir.glob("*/model.pt")):
        model, recipe = load_model(folder / "model.pt")
        seconds = sum(json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines())
        method, cases = METHODS[recipe["method"]], [("target", recipe["target"])]
        adapt = "target" not in method.domains
        if adapt:
            targets = [target for source, target in PAIRS if source == recipe["source"]]
            cases = list(itertools.product(("source", "target"), targets))
        for statistics, target in cases:
            if adapt and statistics == "target":
                adapt_statistics(model, load_split(data_dir, target, "train", labelled=False)[0])
            images, labels, _ = load_split(data_dir, target, "val")
            rows.append(dict(run=folder.name, method=recipe["method"], source=recipe["source"], target=target,
                             statistics=statistics, seed=recipe["seed"],
                             accuracy=round(accuracy(model, images, labels), 2),
                             one_view=round(accuracy(model, images, labels, average=False), 2),
                             minutes=round(seconds / 60, 1)))
    return pd.DataFrame(rows)


def means(table):
    """Mean and standard deviation of the accuracy over the seeds, a row for each experiment, target and statistics."""
    table = table.assign(experiment=table.run.str.replace(r"_s\d+$", "", regex=True))
    columns = dict(mean=("accuracy", "mean"), std=("accuracy", "std"), one_view=("one_view", "mean"),
                   seeds=("seed", "count"))
    return table.groupby(["experiment", "target", "statistics"]).agg(**columns).round(2).reset_index()


def publish(output_dir, table, checkpoints):
    """Replaces in the folder `checkpoints` the rows and networks of what `output_dir` holds."""
    results, files = checkpoints / "results.csv", {}
    for name in MODELS:
        folder = output_dir / f"{name}_s0"
        if (folder / "model.pt").exists():
            files |= {f"{name}.pt": folder / "model.pt", f"{name}.jsonl": folder / "metrics.jsonl"}
    for name, path in files.items():
        write_atomic(checkpoints / name, path.read_bytes())
    if results.exists():
        old = pd.read_csv(results)
        table = pd.concat([old[~old.run.isin(table.run)], table]).sort_values(["run", "target", "statistics"])
    write_atomic(results, table.to_csv(index=False).encode())
    print(f"wrote {checkpoints}; now run: bash hw2_download.sh --update")


def main():
    args = parse_args()
    make_output_dir(args.output_dir)
    load_split(args.data_dir, PAIRS[0][0], "val")  # a missing data set is reported before anything starts
    trainings = {folder: settings for table in args.tables for folder, settings in TABLES[table].items()}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda one: train(args.output_dir / one[0], one[1], args.data_dir, args.jobs), trainings.items()))
    table = results(args.output_dir, args.data_dir)
    write_atomic(args.output_dir / "results.csv", table.to_csv(index=False).encode())
    print(table.to_string(index=False), means(table).to_string(index=False), sep="\n\n")
    if args.publish:
        publish(args.output_dir, table, ROOT / "p3_dann/checkpoints")


if __name__ == "__main__":
    run(main)
