"""The studies of problem 1: how the weight of the KL divergence trades reconstructions for samples, and the figures.

    python3 p4_vae/studies.py --data_dir first9000.zip squashed.zip:6-58 --attributes list_attr_celeba.txt
    python3 p4_vae/studies.py --data_dir ... --attributes ... --betas auto --figures p4_vae/output/figures

Trains with each of --betas into a folder of --output_dir, unless that is done (an interrupted training goes on), judges
1,000 samples of N(0, I) and of the fitted prior as face_grader.py does, which needs its packages, and writes a row each
into --output_dir/results.csv, where rows of other betas stay; --output p4_vae/checkpoints/results.csv changes the
record of README and report. Prints the table as Markdown. A training takes 44 minutes on one core. --figures: the
learning curve and the t-SNE embedding of the validation faces' mean latents, of the last of --betas.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import argument_parser, int_between, nonempty_path, run

import numpy as np

import plots
from face_grader import Judge, add_study_arguments, study
from faces import attributes_of, read_attributes
from files import digest_of, load_checkpoint, make_output_dir
from p4_vae.evaluate import evaluate
from p4_vae.inference import generate
from p4_vae.latents import encode_all
from p4_vae.model import load_model
from p4_vae.train import beta as beta_type

MEASURES = {"mse": 4, "kl": 1, "face_rate": 3, "kid": 5, "frechet": 4, "diversity": 3}  # decimals
SHOWN = ["Male", "Smiling"]  # the attributes that colour the embedding


def beta_text(text):
    """An argparse type: what train.py takes as --beta, as it was spelt, which names the folder and the row."""
    beta_type(text)
    return text


def parse_args():
    parser = argument_parser(__doc__)
    add_study_arguments(parser, ROOT / "p4_vae")
    parser.add_argument("--attributes", type=nonempty_path, help="list_attr_celeba.txt or the course's train.csv")
    parser.add_argument("--betas", type=beta_text, nargs="+", default=["1e-4", "1e-5", "1e-7", "auto"],
                        help="what train.py is given")
    parser.add_argument("--epochs", type=int_between(1), help="of each training; train.py's own when not given")
    parser.add_argument("--no_identity", action="store_true", help="leave out Frechet distance and diversity")
    parser.add_argument("--figures", type=nonempty_path, help="a folder for figures; none are made when not given")
    return parser.parse_args()


def measure(folder, beta, judge, count):
    """The rows of results.csv of the network in `folder`: one for N(0, I), one for the fitted prior."""
    model, latents = load_model(folder / "model.pt")
    mse, kl = evaluate(model, judge.validation.images)
    rows = []
    for prior, mixture in (("normal", None), ("fitted", latents["mixture"])):
        measures, _ = judge(generate(model, range(count), 0, mixture))
        values = dict(measures, mse=mse, kl=kl)
        rows.append(dict(beta=beta, prior=prior, checkpoint=digest_of(folder / "model.pt"), count=count,
                         **{name: round(values[name], decimals) for name, decimals in MEASURES.items()
                            if name in values}))
    return rows


def draw_curves(path, metrics):
    """Writes the learning curve: MSE and KL of the training's batches over epochs; metrics: rows of metrics.jsonl."""
    figure, axes = plots.plt.subplots(1, 2, figsize=(plots.TEXT_WIDTH, 2))
    for panel, name, title, colour in zip(axes, ("mse", "kl"), ("mean squared error", "KL divergence, nats"),
                                          (plots.BLUE, plots.ORANGE)):
        panel.plot([row["epoch"] for row in metrics], [row[name] for row in metrics], color=colour)
        panel.set(title=title, xlabel="epoch")
    plots.save(path, figure)


def embed(model, faces, seed=0):
    """(N, 2): t-SNE of the mean latents of Faces."""
    return plots.embed(encode_all(model, faces.images)[0].numpy(), seed)


def draw_embedding(path, points, has):
    """Writes the points (N, 2) once for each attribute of `has`, {name: bool (N,)}, coloured by it."""
    figure, axes = plots.plt.subplots(1, len(has), figsize=(plots.TEXT_WIDTH, 2.6), squeeze=False)
    for panel, (name, values) in zip(axes[0], has.items()):
        for value, colour in ((False, plots.BLUE), (True, plots.ORANGE)):
            panel.scatter(*points[np.asarray(values) == value].T, s=2, linewidths=0, color=colour,
                          label=f"{'' if value else 'not '}{name}")
        panel.set(xticks=[], yticks=[])
        panel.legend(markerscale=3, handletextpad=0)
    plots.save(path, figure)


def draw_figures(folder, training, faces, has):
    """Writes curves.svg of the training in the folder `training` into `folder`, and tsne.svg of Faces where `has`, see
    draw_embedding, is not empty."""
    draw_curves(folder / "curves.svg", load_checkpoint(training / "last.pt", "p4_vae", ["metrics"])["metrics"])
    if has:
        draw_embedding(folder / "tsne.svg", embed(load_model(training / "model.pt")[0], faces), has)


def main():
    args = parse_args()
    # What is missing is told before hours of training, and what is misspelt before the faces are read.
    table = read_attributes(args.attributes) if args.attributes else None
    if args.figures:
        make_output_dir(args.figures)
    judge = Judge(args.data_dir, not args.no_identity)
    has = {} if table is None else dict(attributes_of(judge.validation, table, SHOWN))
    flags = ["--attributes", args.attributes] if args.attributes else []
    flags += ["--epochs", args.epochs] if args.epochs else []
    study(args, ROOT / "p4_vae/train.py", "beta", {beta: ["--beta", beta, *flags] for beta in args.betas},
          lambda beta, folder: measure(folder, beta, judge, args.count))
    if args.figures:
        draw_figures(args.figures, args.output_dir / args.betas[-1], judge.validation, has)


if __name__ == "__main__":
    run(main)
