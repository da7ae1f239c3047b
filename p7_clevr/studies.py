"""How guidance, sampler, steps and classifier guidance trade accuracy, fidelity and time: the report's tables.

    python3 p7_clevr/studies.py --data_dir DIR                                # all tables but ablation
    python3 p7_clevr/studies.py --data_dir DIR --tables ablation --checkpoint multi_hot/model.pt

Generates the scenes of each setting, judges them as evaluate.py does, and adds a line to --output; --output
p7_clevr/checkpoints/results.csv changes the record of README and report. Settings of the same checkpoint and graders
that are in that file already are not measured again, so an interrupted study goes on; a row does not name its
--data_dir, so other data need an --output of their own. Prints the tables as Markdown: mean and standard deviation
where settings differ in the seed alone. Tables that serve to choose use sets of their own and seed 11; what is
reported, "seeds", "judged" and "fidelity", took part in no choice. An hour.
"""

import itertools
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import argument_parser, nonempty_path, pick_device, run

import pandas as pd
import torch

from files import check_output_file, digest_of, load_checkpoint, lock, other_rows, write_atomic
from p1_ddpm.inference import sampling_of, visited_timesteps
from p1_ddpm.studies import as_text, markdown, sampling_in
from p7_clevr.evaluate import Judge
from p7_clevr.evaluator import CHECKPOINTS
from p7_clevr.inference import SHIPPED, add_scene_arguments, generate, load_guide, number_scenes
from p7_clevr.model import load_model
from p7_clevr.scenes import held_out_sets, official_sets, random_sets


def each(sets, seeds, *changes):
    """Each of the `changes` to the flags with each of the seeds, for one of the kinds of sets."""
    return [dict(sets=sets, seed=seed, **change) for change in changes for seed in seeds]


# Each table varies some flags of inference.py and leaves the others at what the command line says.
TABLES = {
    "guidance": each("choice", (11,), *[dict(guidance=g) for g in (0.0, 1.0, 2.0, 3.0, 4.0)]),
    "steps": each("choice", (11,), *[dict(sampler=s, steps=n) for s, n in (
        ("ddim", 10), ("ddim", 20), ("ddim", 30), ("ddim", 40), ("dpmpp", 20), ("dpmpp", 30), ("ddpm", 30))]),
    "classifier": each("choice", (11,), {}, *[dict(guide=guide, scale=scale) for guide, scale in (
        ("evaluator", 0.3), ("noisy", 1.0))]),
    "ablation": each("choice", (11,), *[dict(guidance=g) for g in (0.0, 2.0)]),
    "seeds": [row for sets in ("test", "new_test", "held_out", "four", "five") for row in each(sets, range(5), {})],
    "judged": [row for sets in ("test", "new_test") for row in each(sets, (0,), dict(scale=0.3))],
    "fidelity": each("real", (0,), {}),
}
DEFAULTS = dict(SHIPPED._asdict(), scale=0.0, guide="evaluator", sets="test", seed=0, weights="ema")
FLAGS = list(DEFAULTS)
MEASURES = {"accuracy": 4, "judge": 4, "too_many": 3, "frechet": 3, "frechet_ratio": 2, "color_mean": 2, "color_std": 2,
            "seconds": 1}  # decimals


def sets_of(kind, judge=None):
    """The lists of objects that a table's `sets` stands for; "real" are those of 150 real images of the `judge`."""
    official = official_sets()
    known = [*itertools.chain(*official.values()), *held_out_sets()]
    kinds = {**official, "choice": random_sets(160, [2, 3], seed=1, without=known), "held_out": held_out_sets(),
             "four": random_sets(32, [4], seed=2), "five": random_sets(32, [5], seed=3)}
    return judge.sets[:150] if kind == "real" else kinds[kind]


def graders(evaluator, folder=CHECKPOINTS):
    """The digests, each once, of all that judges or guides: of the file `evaluator`, and of the three in `folder`."""
    files = [evaluator, *(folder / f"{name}.pth" for name in ("evaluator", "judge", "noisy"))]
    return " ".join(dict.fromkeys(map(digest_of, files)))


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=[t for t in TABLES if t != "ablation"],
                        help="which tables to make; ablation compares checkpoints, one a run")
    parser.add_argument("--output", type=nonempty_path, default=ROOT / "p7_clevr/output/results.csv",
                        help="the file of results")
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "iclevr", help="train.json and the images")
    add_scene_arguments(parser)
    return parser.parse_args()


def measure(model, alphas_cumprod, judge, setting, device, batch_size):
    """The MEASURES of a setting, a dict with the keys FLAGS."""
    sets = sets_of(setting["sets"], judge)
    sampling = sampling_in(setting)
    guide = load_guide(CHECKPOINTS / f"{setting['guide']}.pth", setting["scale"], alphas_cumprod, device)
    start = time.time()
    # As lab6.sh numbers them, whose second list new_test is.
    scenes = number_scenes([], sets) if setting["sets"] == "new_test" else number_scenes(sets)
    batches = generate(model, alphas_cumprod, scenes, sampling, setting["seed"], device, batch_size, guide)
    images = torch.cat([images for _, images, _ in batches])
    measures = dict(seconds=time.time() - start, **judge(images, sets))
    return {name: round(measures[name], decimals) for name, decimals in MEASURES.items()}


def main():
    args = parse_args()
    device = pick_device(args.device)
    check_output_file(args.output)
    lock(args.output.parent)  # two runs at once would overwrite each other's rows
    other_rows(args.output, "channels")  # a foreign file is told before the networks are read
    rows = other_rows(args.output, "graders", dtype=str).to_dict("records")
    model, alphas_cumprod = load_model(args.checkpoint, device, args.weights)
    checkpoint = load_checkpoint(args.checkpoint, "p7_clevr", ["metrics", "config"])
    network, schedule = checkpoint["config"]["network"], checkpoint["config"]["schedule"]
    about = dict(checkpoint=digest_of(args.checkpoint), graders=graders(args.evaluator),
                 channels=" ".join(map(str, network["channels"])), condition=network["condition"],
                 schedule=f"{schedule['name']}, shift {schedule['shift']:g}",
                 epochs=f"{checkpoint['metrics'][-1]['epoch']:g}")
    flags = dict(DEFAULTS, **sampling_of(args)._asdict(), weights=args.weights)
    tables = {name: [{**flags, **changes} for changes in TABLES[name]] for name in args.tables}
    for setting in itertools.chain(*tables.values()):  # what does not fit together is told now
        setting["steps"] = min(setting["steps"], len(alphas_cumprod) - 1)
        visited_timesteps(sampling_in(setting), alphas_cumprod)
        load_guide(CHECKPOINTS / f"{setting['guide']}.pth", setting["scale"], alphas_cumprod, device)
    judge = Judge(args.data_dir, device, args.evaluator)
    for name in tables:
        for setting in tables[name]:
            row = dict(about, **as_text(setting, FLAGS))
            same = [old for old in rows if all(str(old.get(key)) == value for key, value in row.items())]
            if any(old.get("table") == name for old in same):
                continue
            measures = ({key: same[0][key] for key in MEASURES} if same else  # another table has it
                        measure(model, alphas_cumprod, judge, setting, device, args.batch_size))
            rows.append(dict(table=name, **row, **measures))
            print(rows[-1], flush=True)
            write_atomic(args.output, pd.DataFrame(rows).to_csv(index=False).encode())
        made = pd.DataFrame(rows).query("table == @name")
        told = ["checkpoint", "graders", "condition", *FLAGS]
        table = markdown(made.astype(dict.fromkeys(MEASURES, float)), told, MEASURES)
        print(f"\n{name}\n\n{table}\n", flush=True)


if __name__ == "__main__":
    run(main)
