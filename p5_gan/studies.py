"""The study of problem 2: what the recipe gives beside others, and what its parts give in a tenth of its length.

    python3 p5_gan/studies.py --data_dir first9000.zip squashed.zip:6-58 --recipes ours      # 100 minutes on two cores
    python3 p5_gan/studies.py --data_dir first9000.zip squashed.zip:6-58        # all recipes, 17 hours by their rates

Trains each recipe into a folder of --output_dir, unless that is done (an interrupted training goes on), judges 1,000
samples as face_grader.py does, which needs its packages, and writes a row each into --output_dir/results.csv, with the
seconds, steps and images that the training took, where rows of other recipes stay; --output
p5_gan/checkpoints/results.csv changes the record of README and report. Prints the table as Markdown.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import argument_parser, run

from face_grader import Judge, add_study_arguments, study
from files import digest_of, load_checkpoint, read_jsonl
from p5_gan.inference import generate
from p5_gan.model import load_model

SHORT = ["--epochs", "5"]
# DCGAN with spectral norm as public solutions have it.
PUBLIC = ["--no_modulation", "--no_augment", "--ema", "0", "--channels", "64", "--batch_size", "128"]
RECIPES = {  # flags of train.py
    "ours": [],
    "public": [*PUBLIC, "--epochs", "94"],
    "public_as_long": [*PUBLIC, "--epochs", "19"],  # as ours takes, on two cores
    "hinge": ["--no_modulation", "--loss", "hinge", "--channels", "48", "--batch_size", "128", "--lr", "3e-4",
              "--epochs", "87"],
    "short": SHORT,
    "short_no_modulation": [*SHORT, "--no_modulation"],
    "short_hinge": [*SHORT, "--loss", "hinge"],
}
MEASURES = {"face_rate": 3, "kid": 5, "frechet": 4, "diversity": 3, "nearest": 1}  # decimals


def parse_args():
    parser = argument_parser(__doc__)
    add_study_arguments(parser, ROOT / "p5_gan")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="what to train")
    return parser.parse_args()


def measure(folder, recipe, judge, count):
    """The row of results.csv of the generator in `folder`."""
    saved = load_checkpoint(folder / "model.pt", "p5_gan", ["metrics", "recipe"])
    steps, record = saved["metrics"][-1]["step"], read_jsonl(folder / "metrics.jsonl")
    measures, _ = judge(generate(load_model(folder / "model.pt"), range(count), 0))
    return dict(recipe=recipe, checkpoint=digest_of(folder / "model.pt"), count=count,
                seconds=round(sum(row["seconds"] for row in record)),
                steps=steps, images=steps * saved["recipe"]["batch_size"],
                **{name: round(measures[name], decimals) for name, decimals in MEASURES.items()})


def main():
    args = parse_args()
    judge = Judge(args.data_dir)  # what is missing is told before hours of training
    study(args, ROOT / "p5_gan/train.py", "recipe", {recipe: RECIPES[recipe] for recipe in args.recipes},
          lambda recipe, folder: [measure(folder, recipe, judge, args.count)])


if __name__ == "__main__":
    run(main)
