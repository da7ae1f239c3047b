"""Every training behind the tables of problem 3, and the tables.

    python3 p3_dann/experiments.py --jobs 2               # 15 trainings, then the table: mean and deviation of 3 seeds
    python3 p3_dann/experiments.py --tables lambda        # DANN with a weak adversary, 3 seeds
    python3 p3_dann/experiments.py --tables ablation      # what each part of DANN gives: MNIST-M -> SVHN, one seed

The first takes 45 minutes on 2 CPU cores. A training that is in --output_dir already is not repeated, an interrupted
one goes on. Writes --output_dir/results.csv. With --publish, its rows replace those of the same trainings in
p3_dann/checkpoints/results.csv, and the networks of seed 0, each with its record, go to p3_dann/checkpoints, where
inference.py looks for them: the seed was fixed before any was trained.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset import load_split  # noqa: E402
from p3_dann.model import adapt_statistics, load_model, predict  # noqa: E402
from utils import UserError, argument_parser, int_at_least, make_output_dir, run, write_atomic  # noqa: E402

# name in checkpoints/: flags of train.py. The network of mode source has seen no target, so it serves both scenarios.
MODELS = {
    "mnistm_svhn_dann": "--target svhn --mode dann",
    "mnistm_usps_dann": "--target usps --mode dann",
    "mnistm_source": "--mode source",
    "svhn_target": "--target svhn --mode target",
    "usps_target": "--target usps --mode target",
}
# name: what differs from DANN on SVHN, and the flags that do it.
ABLATION = {
    "lambda_0": ("no adversary: lambda = 0", "--lambda_max 0"),
    "lambda_0.3": ("lambda = 0.3", "--lambda_max 0.3"),
    "no_geometry": ("no affine maps and no neighbours", "--without geometry"),
    "no_neighbours": ("no neighbours", "--without neighbours"),
    "no_intensity": ("no change of polarity, contrast and brightness", "--without intensity"),
    "no_sharpness": ("no blur and no sharpening", "--without sharpness"),
}
SEEDS = (0, 1, 2)


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--tables", nargs="+", choices=["main", "lambda", "ablation"], default=["main"], help="what to train")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "p3_dann/output/experiments",
                        help="where the trainings go, a folder each")
    parser.add_argument("--jobs", type=int_at_least(1), default=1,
                        help="trainings at a time; they share the cores, and 2 on 2 cores are a little faster than 1")
    parser.add_argument("--publish", action="store_true", help="replace what p3_dann/checkpoints holds")
    return parser.parse_args()


def trainings(tables):
    """{folder: flags of train.py} of all trainings that the `tables` need."""
    runs = {}
    if "main" in tables:
        runs |= {f"{name}_s{seed}": f"{flags} --seed {seed}" for seed in SEEDS for name, flags in MODELS.items()}
    if "lambda" in tables:
        runs |= {f"lambda_0.1_{target}_s{seed}": f"--target {target} --mode dann --lambda_max 0.1 --seed {seed}"
                 for seed in SEEDS for target in ("svhn", "usps")}
    if "ablation" in tables:
        runs |= {f"ablation_{name}": f"{MODELS['mnistm_svhn_dann']} {flags}" for name, (_, flags) in ABLATION.items()}
    return runs


def train(folder, flags, data_dir, jobs):
    """Runs train.py into `folder` unless it is done; its output goes to folder/log.txt."""
    if (folder / "model.pt").exists():
        return
    make_output_dir(folder)
    command = [sys.executable, str(ROOT / "p3_dann/train.py"), "--data_dir", str(data_dir), "--output_dir",
               str(folder), *flags.split(), *(["--resume"] if (folder / "last.pt").exists() else [])]
    threads = dict(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // jobs))) if jobs > 1 else {}
    with open(folder / "log.txt", "a") as log:
        if subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **threads}).returncode:
            raise UserError(f"the training in {folder} failed; its log.txt says why")
    print(f"{folder.name}: {(folder / 'log.txt').read_text().splitlines()[-1]}", flush=True)


def results(output_dir, data_dir):
    """One row for each finished training in `output_dir` and target: accuracy in % on the target's validation digits.

    accuracy: as inference.py predicts, averaged over views; one_view: without that. Networks of mode source appear
    twice: as trained, and with the normalisation statistics of the unlabelled target (statistics = target), as networks
    of mode dann have them.
    """
    rows = []
    for folder in sorted(path.parent for path in output_dir.glob("*/model.pt")):
        *epochs, last = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        of_source = last["mode"] == "source"
        for target in ("svhn", "usps") if of_source else (last["target"],):
            images, labels, _ = load_split(data_dir, target, "val")
            for statistics in ("source", "target") if of_source else ("target",):
                model, _ = load_model(folder / "model.pt")
                if of_source and statistics == "target":
                    adapt_statistics(model, load_split(data_dir, target, "train", labelled=False)[0])
                accuracy, one_view = (100 * (predict(model, images, average=average).argmax(dim=1) == labels)
                                      .float().mean().item() for average in (True, False))
                rows.append(dict(run=folder.name, mode=last["mode"], source=last["source"], target=target,
                                 statistics=statistics, seed=last["seed"], accuracy=round(accuracy, 2),
                                 one_view=round(one_view, 2),
                                 minutes=round(sum(epoch["seconds"] for epoch in epochs) / 60, 1)))
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
    load_split(args.data_dir, "mnistm", "val")  # a missing data set is reported before anything starts
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: train(args.output_dir / run[0], run[1], args.data_dir, args.jobs),
                      trainings(args.tables).items()))
    table = results(args.output_dir, args.data_dir)
    write_atomic(args.output_dir / "results.csv", table.to_csv(index=False).encode())
    print(table.to_string(index=False), means(table).to_string(index=False), sep="\n\n")
    if args.publish:
        publish(args.output_dir, table, ROOT / "p3_dann/checkpoints")


if __name__ == "__main__":
    run(main)
