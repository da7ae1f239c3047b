"""Every training behind the tables of problem 3, the tables, and the choice of what is shipped.

    python3 p3_dann/studies.py --jobs 2               # all but AdaMatch on 2023's pairs, 3 seeds: 15 trainings
    python3 p3_dann/studies.py --tables pairs         # the other pairs and AdaMatch
    python3 p3_dann/studies.py --tables choice        # DANN's other settings, between which the rule picks
    python3 p3_dann/studies.py --tables ablation adamatch_ablation       # what each part gives, one seed
    python3 p3_dann/studies.py --tables long          # the other methods with as many steps as AdaMatch
    python3 p3_dann/studies.py --tables pairs --runs 'mnistm_svhn_adamatch_s*'     # some of a table's trainings

A training by AdaMatch takes 43 to 53 minutes on one CPU core with bfloat16, by DANN 4 on two, beside other work 7 to
12. One that is in --output_dir already is not repeated, an interrupted one goes on. Writes --output_dir/results.csv.
With --publish, its rows replace those of the same trainings in p3_dann/checkpoints/results.csv, and networks of seed 0,
each with its record, go to p3_dann/checkpoints, where inference.py looks for them: the seed was fixed before any was
trained. Which setting of a method is shipped for a pair, the rule of choice.py says, which knows no label of the
target.
"""

import fnmatch
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, int_between, nonempty_path, run

import pandas as pd

from dataset import DOMAINS, load_split
from files import make_output_dir, other_rows, read_jsonl, write_atomic
from p3_dann import choice
from p3_dann.methods import ALL_PAIRS, METHODS, PAIRS, run_name
from p3_dann.model import load_model
from p3_dann.prediction import accuracy, adapt_statistics

SEEDS = (0, 1, 2)
STARTED = []  # the processes of trainings


def models():
    """{name in checkpoints/: settings}: each method between each pair, those that see one domain of it once."""
    named = {}
    for source, target in ALL_PAIRS:
        for method in METHODS:
            named.setdefault(run_name(method, source, target), dict(source=source, target=target, method=method))
    return named


MODELS = models()
FIRST = [name for name, settings in MODELS.items() if settings["method"] != "adamatch"
         and (settings["source"], settings["target"]) in PAIRS]  # 2023's assignment
# {method: {ending of the run's name: what differs from train.py's defaults}}: what the rule may pick instead of these.
CHOICE = {"dann": {"lambda_0.1": dict(lambda_max=0.1), "lambda_0.3": dict(lambda_max=0.3)}, "adamatch": {}}
# As many steps and images as adamatch's source has, for the other methods: does the budget make the difference?
LONG = {f"long_{name}": dict(settings, epochs=60, batch_size=64) for name, settings in MODELS.items()
        if name in ("mnistm_svhn_dann", "mnistm_source_only", "svhn_target_only")}
# {name: (what differs from DANN on SVHN, the settings that do it)}
ABLATION = {
    "lambda_0": ("no adversary: lambda = 0", dict(lambda_max=0)),
    "no_geometry": ("no affine maps and no neighbours", dict(without=["geometry"])),
    "no_neighbours": ("no neighbours", dict(without=["neighbours"])),
    "no_intensity": ("no change of polarity, contrast and brightness", dict(without=["intensity"])),
    "no_sharpness": ("no blur and no sharpening", dict(without=["sharpness"])),
}
# {ending of the run's name: (what adamatch does without, the settings that do it)}; on each of these pairs, all with a
# fifth of the steps.
ADAMATCH_ABLATION = {ending: (what, dict(settings, epochs=12)) for ending, (what, settings) in {
    "complete": ("nothing", {}),
    "no_target": ("no target loss: the source alone, in shared statistics", dict(leave_out=["target"])),
    "no_interpolation": ("no second pass, no interpolation of logits", dict(leave_out=["interpolation"])),
    "no_alignment": ("no distribution alignment", dict(leave_out=["alignment"])),
    "absolute": ("an absolute threshold of 0.9", dict(leave_out=["relative"])),
    "no_ramp": ("no ramp: target loss at full weight from the first step on", dict(leave_out=["ramp"])),
    "no_strong": ("no solarize, posterize and cutout", dict(without=["solarize", "posterize", "cutout"])),
}.items()}
ADAMATCH_ABLATION_PAIRS = (("mnistm", "svhn"), ("usps", "mnistm"))


def with_seeds(settings_of):
    """{folder: settings} of three seeds for {experiment: settings}."""
    return {f"{name}_s{seed}": dict(settings, seed=seed) for seed in SEEDS for name, settings in settings_of.items()}


# {table: {folder: settings}}: the trainings that it needs.
TABLES = {
    "main": with_seeds({name: MODELS[name] for name in FIRST}),
    "pairs": with_seeds({name: settings for name, settings in MODELS.items() if name not in FIRST}),
    "choice": with_seeds({f"{name}_{ending}": dict(settings, **changes) for name, settings in MODELS.items()
                          for ending, changes in CHOICE.get(settings["method"], {}).items()}),
    "long": with_seeds(LONG),
    "ablation": {f"ablation_{name}": dict(MODELS["mnistm_svhn_dann"], **settings)
                 for name, (_, settings) in ABLATION.items()},
    "adamatch_ablation": {f"ablation_{name}_{ending}": dict(MODELS[name], **settings)
                          for name in (run_name("adamatch", *pair) for pair in ADAMATCH_ABLATION_PAIRS)
                          for ending, (_, settings) in ADAMATCH_ABLATION.items()},
}


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["main"], help="what to train")
    parser.add_argument("--runs", default="*", help="only the trainings of that name, in which * stands for anything")
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--output_dir", type=nonempty_path, default=ROOT / "p3_dann/output/studies",
                        help="where the trainings go, a folder each")
    parser.add_argument("--jobs", type=int_between(1), default=1,
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
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **threads})
        STARTED.append(process)
        if process.wait():
            raise UserError(f"the training in {folder} failed; its log.txt says why")
    print(f"{folder.name}: {(folder / 'log.txt').read_text().splitlines()[-1]}", flush=True)


def results(output_dir, data_dir):
    """One row for each finished training in `output_dir` and target: accuracy in % on the target's validation digits.

    accuracy: as inference.py predicts, averaged over views; one_view: without that. A network that has seen no target
    answers for each target, and twice: as trained, and with the normalisation statistics of the unlabelled target
    (statistics = target), as dann's networks have them. The rest: see choice.label_free_scores.
    """
    return pd.concat([measured(path.parent, data_dir) for path in sorted(output_dir.glob("*/model.pt"))])


def measured(folder, data_dir):
    """The rows of one training, which are kept in its folder as results.csv."""
    kept = folder / "results.csv"
    if kept.exists() and kept.stat().st_mtime >= (folder / "model.pt").stat().st_mtime:
        return pd.read_csv(kept)
    model, recipe = load_model(folder / "model.pt")
    seconds = sum(row["seconds"] for row in read_jsonl(folder / "metrics.jsonl"))
    method, cases, rows = METHODS[recipe["method"]], [("target", recipe["target"])], []
    adapt = "target" not in method.roles
    if adapt:
        targets = [target for source, target in ALL_PAIRS if source == recipe["source"]]
        cases = list(itertools.product(("source", "target"), targets))
    for statistics, target in cases:
        if adapt and statistics == "target":
            adapt_statistics(model, load_split(data_dir, target, "train", labelled=False)[0])
        images, labels, _ = load_split(data_dir, target, "val")
        rows.append(dict(run=folder.name, method=recipe["method"], source=recipe["source"], target=target,
                         statistics=statistics, seed=recipe["seed"],
                         accuracy=round(accuracy(model, images, labels), 2),
                         one_view=round(accuracy(model, images, labels, average=False), 2),
                         minutes=round(seconds / 60, 1),
                         **choice.label_free_scores(model, recipe, target, data_dir)))
    write_atomic(kept, pd.DataFrame(rows).to_csv(index=False).encode())
    return pd.DataFrame(rows)


def means(table):
    """Mean and standard deviation of the accuracy over the seeds, a row for each experiment, target and statistics."""
    table = table.assign(experiment=table.run.str.replace(r"_s\d+$", "", regex=True))
    columns = dict(mean=("accuracy", "mean"), std=("accuracy", "std"), one_view=("one_view", "mean"),
                   seeds=("seed", "count"))
    return table.groupby(["experiment", "target", "statistics"]).agg(**columns).round(2).reset_index()


def shipped(table):
    """{name in checkpoints/: experiment}: of each of MODELS the setting that the rule picks, or the default one where
    not every candidate has been scored."""
    chosen = {name: name for name in MODELS}
    for name, rows in choice.candidates(table).items():
        if set(rows.experiment) == {name, *(f"{name}_{ending}" for ending in CHOICE[MODELS[name]["method"]])}:
            chosen[name] = choice.pick(rows)
    return chosen


def publish(output_dir, table, checkpoints):
    """Replaces in the folder `checkpoints` the rows of what `output_dir` holds, and the networks that are shipped."""
    results = checkpoints / "results.csv"
    if results.exists():
        old = pd.read_csv(results)
        table = pd.concat([old[~old.run.isin(table.run)], table]).sort_values(["run", "target", "statistics"])
    for name, experiment in shipped(table).items():
        folder = output_dir / f"{experiment}_s0"
        if (folder / "model.pt").exists():
            for ours, theirs in (f"{name}.pt", "model.pt"), (f"{name}.jsonl", "metrics.jsonl"):
                write_atomic(checkpoints / ours, (folder / theirs).read_bytes())
    write_atomic(results, table.to_csv(index=False).encode())
    print(f"wrote {checkpoints}; now run: bash hw2_download.sh --update")


def main():
    args = parse_args()
    make_output_dir(args.output_dir)
    for domain in DOMAINS:  # what is missing is told before anything starts
        load_split(args.data_dir, domain, "val")
    if args.publish:
        other_rows(make_output_dir(ROOT / "p3_dann/checkpoints") / "results.csv", "run")
    trainings = {folder: settings for table in args.tables for folder, settings in TABLES[table].items()
                 if fnmatch.fnmatchcase(folder, args.runs)}
    if not trainings:
        raise UserError(f"no training of {' and '.join(args.tables)} is called {args.runs}; see TABLES")
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(lambda one: train(args.output_dir / one[0], one[1], args.data_dir, args.jobs),
                          trainings.items()))
        except KeyboardInterrupt:  # or SIGTERM; leaving the block waits for the trainings, so they have to end as well
            for process in STARTED:
                process.terminate()
            raise
    table = results(args.output_dir, args.data_dir)
    write_atomic(args.output_dir / "results.csv", table.to_csv(index=False).encode())
    print(table.to_string(index=False), means(table).to_string(index=False), sep="\n\n")
    candidates = choice.candidates(table)
    print("\nHow well each score orders the settings of a method on a pair, mean rank correlation with the accuracy:",
          ", ".join(f"{name} {value:.2f}" for name, value in choice.rank_correlations(candidates).items()))
    print(f"Picked by {choice.RULE}:", ", ".join(choice.pick(rows) for rows in candidates.values()) or "nothing")
    if args.publish:
        publish(args.output_dir, table, ROOT / "p3_dann/checkpoints")


if __name__ == "__main__":
    run(main)
