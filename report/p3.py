"""Problem 3's part of the report: the table of experiments, t-SNE pictures, confusion matrices, training curves."""

import json

import pandas as pd
import torch

from dataset import load_split
from p3_dann.experiments import ABLATION, means
from p3_dann.model import load_model, predict
from p3_dann.tsne import picture, proxy_a_distance, sample_features
from report.figures import BLUE, GREEN, ORANGE, VERMILION, plt, save
from utils import UserError

TARGETS = ("svhn", "usps")


def confusion_matrix(model, data_dir, domain):
    """How often each answer (columns) is given to each true digit (rows): (10, 10), on the validation images."""
    images, labels, _ = load_split(data_dir, domain, "val")
    answers = predict(model, images).argmax(dim=1)
    return torch.bincount(10 * labels + answers, minlength=100).reshape(10, 10)


def confusion_figure(path, matrices):
    """Draws {name: confusion matrix} side by side, in per cent of each true digit."""
    figure, axes = plt.subplots(1, len(matrices), figsize=(6.5, 3.3))
    for ax, (name, counts) in zip(axes, matrices.items()):
        shares = counts / counts.sum(dim=1, keepdim=True)
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        ax.grid(False)
        for row in range(10):
            for column in range(10):
                share = shares[row, column].item()
                ax.text(column, row, round(100 * share), ha="center", va="center", fontsize=6,
                        color="white" if share > 0.5 else "black")
        ax.set(title=name, xlabel="answer", ylabel="true digit", xticks=range(10), yticks=range(10))
    save(path, figure)


def mistakes(counts, worst=3):
    """Of a confusion matrix: the `worst` digits with their accuracy in %, and as many (digit, answer, count) of the
    commonest mistakes."""
    accuracy = 100 * counts.diagonal() / counts.sum(dim=1)
    wrong = counts - counts.diagonal().diag()
    pairs = [divmod(place, 10) for place in wrong.flatten().argsort(descending=True, stable=True)[:worst].tolist()]
    return dict(worst=[(digit, accuracy[digit].item()) for digit in accuracy.argsort(stable=True)[:worst].tolist()],
                pairs=[(digit, answer, wrong[digit, answer].item()) for digit, answer in pairs])


def training_figure(path, metrics):
    """Losses, accuracies and lambda over the epochs of the DANN trainings: {target: rows of metrics.jsonl}."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(7.2, 2.5), sharey=True)
    for ax, (target, rows) in zip(axes, metrics.items()):
        table = pd.DataFrame(rows)
        for column, name, colour in (("source", "source accuracy", BLUE), ("domain", "domain accuracy", VERMILION),
                                     ("domain_loss", "domain loss", ORANGE),
                                     ("confident", "confident target images", GREEN)):
            ax.plot(table.epoch, table[column], color=colour, label=name)
        ax.plot(table.epoch, table.lambda_, "k:", label="lambda")
        ax.set(title=f"MNIST-M to {target.upper()}", xlabel="epoch", xticks=table.epoch[1::2])
    axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save(path, figure)


def ablation(results):
    """Rows (what differs from DANN on SVHN, accuracy, accuracy with one view) of seed 0; empty until all are there."""
    names = {"nothing": "mnistm_svhn_dann_s0", "lambda = 0.1": "lambda_0.1_svhn_s0",
             **{what: f"ablation_{name}" for name, (what, _) in ABLATION.items()}}
    runs = results.set_index("run")
    if not set(names.values()) <= set(runs.index):
        return []
    return [(what, runs.accuracy[name], runs.one_view[name]) for what, name in names.items()]


def build(args, folder, device):
    """Draws the figures into `folder` and returns the numbers that p3.typ shows."""
    path = args.p3_checkpoints / "results.csv"
    if not path.exists():
        raise UserError(f"there is no {path}; p3_dann/experiments.py --publish makes it")
    results = pd.read_csv(path)
    count = 40 if args.quick else 1000
    matrices, metrics, distances = {}, {}, {}
    source_model, source_recipe = load_model(args.p3_checkpoints / "mnistm_source.pt", device)
    for target in TARGETS:
        name = f"mnistm_{target}_dann"
        model, recipe = load_model(args.p3_checkpoints / f"{name}.pt", device)
        metrics[target] = [json.loads(line) for line in (args.p3_checkpoints / f"{name}.jsonl").read_text().splitlines()]
        metrics[target] = [row for row in metrics[target] if "epoch" in row]
        matrices[f"DANN on {target.upper()}"] = confusion_matrix(model, args.data_dir, target)
        distances[target] = dict(
            before=picture(folder / f"p3_tsne_{target}_before.png", source_model, source_recipe, args.data_dir,
                           "mnistm", target, count),
            statistics=proxy_a_distance(*sample_features(source_model, args.data_dir, ("mnistm", target), True, count)[0]),
            after=picture(folder / f"p3_tsne_{target}.png", model, recipe, args.data_dir, "mnistm", target, count))
    confusion_figure(folder / "p3_confusion.png", matrices)
    training_figure(folder / "p3_training.png", metrics)
    return dict(
        parameters=sum(p.numel() for p in model.parameters()), recipe=recipe, distances=distances,
        widths=model.config["widths"], features=model.config["num_features"],
        mistakes={target: mistakes(matrix) for target, matrix in zip(TARGETS, matrices.values())},
        last={target: rows[-1] for target, rows in metrics.items()},
        seeds=int(results[results["mode"] == "dann"].seed.nunique()),
        validation={target: int(matrix.sum()) for target, matrix in zip(TARGETS, matrices.values())},
        means=json.loads(means(results).to_json(orient="records")), ablation=ablation(results))
