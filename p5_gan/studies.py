"""The study of problem 2: what the recipe gives beside the public one, and what each of its parts gives.

    python3 p5_gan/studies.py --data_dir first9000.zip squashed.zip:6-58 --recipes ours public  # H200: 4 and 9 minutes
    python3 p5_gan/studies.py --data_dir first9000.zip squashed.zip:6-58                         # all recipes

Trains each recipe into a folder of --output_dir, unless that is done (an interrupted training goes on), judges 1,000
samples as face_grader.py does, which needs its packages, and writes a row each into --output, with the seconds and the
images that the training took; rows of other recipes stay there. Prints the table as Markdown. Recipes compare when they
took as long: narrow with public, the others with ours.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, int_between, nonempty_path, run

import pandas as pd

from face_grader import Judge, require_judges
from faces import add_arguments
from files import check_output_file, load_checkpoint, other_rows, read_jsonl, write_atomic
from p5_gan.inference import generate
from p5_gan.model import load_model

RECIPES = {  # flags of train.py
    "ours": [],
    "narrow": ["--channels", "48", "--batch_size", "128", "--lr", "3e-4", "--epochs", "87"],
    # DCGAN with spectral norm as public solutions have it.
    "public": ["--loss", "cross_entropy", "--no_augment", "--ema", "0", "--batch_size", "128", "--lr", "2e-4",
               "--epochs", "94"],
    "no_augment": ["--no_augment"],
    "no_ema": ["--ema", "0"],
    "cross_entropy": ["--loss", "cross_entropy"],
}
MEASURES = {"face_rate": 3, "kid": 5, "frechet": 4, "diversity": 3, "nearest": 1}  # decimals


def parse_args():
    parser = argument_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="what to train")
    parser.add_argument("--count", type=int_between(2), default=1000, help="samples to judge")
    parser.add_argument("--output_dir", type=nonempty_path, default=ROOT / "p5_gan/output/studies",
                        help="where the trainings go, a folder each")
    parser.add_argument("--output", type=nonempty_path, default=ROOT / "p5_gan/checkpoints/results.csv",
                        help="the file of results")
    return parser.parse_args()


def train(folder, recipe, args):
    """Runs train.py with a recipe into `folder`, from where an earlier run stopped; UserError when it fails."""
    command = [sys.executable, ROOT / "p5_gan/train.py", "--data_dir", *args.data_dir, "--output_dir", folder,
               *RECIPES[recipe], *["--resume"] * (folder / "last.pt").exists()]
    if subprocess.run(list(map(str, command))).returncode:
        raise UserError(f"the training of the recipe {recipe} has failed, see above")


def measure(folder, recipe, judge, count):
    """The row of results.csv of the generator in `folder`."""
    saved = load_checkpoint(folder / "model.pt", "p5_gan", ["metrics", "recipe"])
    record = read_jsonl(folder / "metrics.jsonl")
    measures, _ = judge(generate(load_model(folder / "model.pt"), range(count), 0))
    return dict(recipe=recipe, count=count, seconds=round(sum(row["seconds"] for row in record)),
                images=saved["metrics"][-1]["step"] * saved["recipe"]["batch_size"],
                **{name: round(measures[name], decimals) for name, decimals in MEASURES.items()})


def main():
    args = parse_args()
    check_output_file(args.output)
    other_rows(args.output, "recipe")  # a foreign file is told before hours of training
    require_judges()  # before hours of training
    for recipe in args.recipes:
        train(args.output_dir / recipe, recipe, args)
    judge = Judge(args.data_dir)
    rows = [measure(args.output_dir / recipe, recipe, judge, args.count) for recipe in args.recipes]
    rows = pd.concat([other_rows(args.output, "recipe", args.recipes), pd.DataFrame(rows)])
    write_atomic(args.output, rows.to_csv(index=False).encode())
    lines = [list(rows.columns), ["---"] * rows.shape[1], *rows.astype(str).values.tolist()]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))


if __name__ == "__main__":
    run(main)
