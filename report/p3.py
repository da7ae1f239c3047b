"""Problem 3's part of the report: the table of accuracies, t-SNE pictures, confusion matrices, training curves."""

import json

from dataset import DOMAIN_NAMES, load_split
from files import read_jsonl
from plots import (BLUE, GREEN, ORANGE, TEXT_WIDTH, VERMILION, draw_digits, draw_domains, embed, image_grid, plt,
                   save)

import numpy as np
import pandas as pd
import torch

from p3_dann import choice
from p3_dann.features import proxy_a_distance, sample_features
from p3_dann.methods import ALL_PAIRS, PAIRS, run_name
from p3_dann.model import load_model
from p3_dann.prediction import predict
from p3_dann.studies import ABLATION, means, shipped
from report.records import require_records


def scenario(pair):
    """'MNIST-M → SVHN'"""
    return " → ".join(DOMAIN_NAMES[domain] for domain in pair)


# --- The features -------------------------------------------------------------------------------

def latent_space(models, adapted, data_dir, split, count, own_statistics=True):
    """t-SNE embeddings of `count` images of the split of each domain of every pair, and what distances they have.

    models, adapted: {pair: network before, after adaptation}. Returns {pair: dict(before, after)}, each of which is
    (points, digits, is_target), and {pair: dict(before, statistics, after)} of proxy A-distances: `statistics` is
    before adaptation, each domain normalised by its own statistics, as it is after when `own_statistics`.
    """
    embeddings, distances = {}, {}
    for pair in models:
        samples = {name: sample_features(model[pair], data_dir, pair, own, count, split=split) for name, model, own in (
            ("before", models, False), ("statistics", models, True), ("after", adapted, own_statistics))}
        distances[pair] = {name: proxy_a_distance(*features) for name, (features, _) in samples.items()}
        is_target = np.repeat([False, True], [len(digits) for digits in samples["before"][1]])
        embeddings[pair] = {name: (embed(np.concatenate(samples[name][0])), np.concatenate(samples[name][1]), is_target)
                            for name in ("before", "after")}
    return embeddings, distances


def tsne_figure(path, embeddings):
    """A row for each pair of domains: by digit and by domain, each before and after adaptation side by side."""
    figure, panels = plt.subplots(len(embeddings), 4, figsize=(TEXT_WIDTH, 1.55 * len(embeddings)), squeeze=False)
    for row, (pair, embedding) in zip(panels, embeddings.items()):
        row[0].set_ylabel(scenario(pair))
        for i, when in enumerate(("before", "after")):
            points, digits, is_target = embedding[when]
            draw_digits(row[i], points, digits)
            draw_domains(row[2 + i], points, is_target, ("source", "target"))
    for axes, title in zip(panels[0], ("before, by digit", "after, by digit", "before, by domain", "after, by domain")):
        axes.set_title(title)
    for axes, place in (panels[0][0], "outside lower left"), (panels[0][2], "outside lower right"):
        figure.legend(*axes.get_legend_handles_labels(), loc=place, ncol=10, markerscale=3, handletextpad=0,
                      columnspacing=1)
    save(path, figure)


def strip_picture(path, embedding):
    """One embedding by digit, without words, for the README's picture."""
    points, digits, _ = embedding
    figure, axes = plt.subplots(figsize=(3, 3))
    draw_digits(axes, points, digits)
    save(path, figure)


# --- The answers --------------------------------------------------------------------------------

def confusion_matrix(labels, answers):
    """How often each answer (columns) is given to each true digit (rows): (10, 10)."""
    return torch.bincount(10 * labels + answers, minlength=100).reshape(10, 10)


def mistakes_figure(path, images, labels, answers, count=12):
    """Draws the first `count` of the images whose answer is wrong; above each its digit and the answer."""
    wrong = (answers != labels).nonzero().flatten()[:count]
    image_grid(path, images[wrong], len(wrong),
               column_names=[f"{label} → {answer}" for label, answer in zip(labels[wrong], answers[wrong])])


def confusion_figure(path, matrices):
    """Draws {pair: confusion matrix} side by side, in per cent of each true digit."""
    figure, panels = plt.subplots(1, len(matrices), figsize=(TEXT_WIDTH, 2.7))
    for axes, (pair, counts) in zip(panels, matrices.items()):
        shares = (counts / counts.sum(dim=1, keepdim=True)).numpy()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
        axes.grid(False)
        for row in range(10):
            for column in range(10):
                share = shares[row, column]
                axes.text(column, row, round(100 * share), ha="center", va="center",
                          color="white" if share > 0.5 else "black")
        axes.set(title=scenario(pair), xlabel="answer", ylabel="true digit", xticks=range(10), yticks=range(10))
    save(path, figure)


def mistakes(counts, worst=3):
    """Of a confusion matrix: the `worst` digits with their accuracy in %, and as many (digit, answer, count) of the
    commonest mistakes."""
    accuracy = 100 * counts.diagonal() / counts.sum(dim=1)
    wrong = counts - counts.diagonal().diag()
    pairs = [divmod(place, 10) for place in wrong.flatten().argsort(descending=True, stable=True)[:worst].tolist()]
    return dict(worst=[(digit, accuracy[digit].item()) for digit in accuracy.argsort(stable=True)[:worst].tolist()],
                pairs=[(digit, answer, wrong[digit, answer].item()) for digit, answer in pairs])


# --- The trainings ------------------------------------------------------------------------------

def training_figure(path, metrics):
    """Losses, accuracies and lambda over the epochs of the trainings: {pair: rows of metrics.jsonl}."""
    figure, panels = plt.subplots(1, len(metrics), figsize=(TEXT_WIDTH, 1.9), sharey=True)
    for axes, (pair, rows) in zip(panels, metrics.items()):
        table = pd.DataFrame(rows)
        for column, name, colour in (
                ("accuracy", "source accuracy", BLUE), ("domain_accuracy", "domain accuracy", VERMILION),
                ("domain_loss", "domain loss", ORANGE), ("confident", "confident", GREEN)):
            axes.plot(table.epoch, table[column], color=colour, label=name)
        axes.plot(table.epoch, table.lambda_, "k:", label="lambda")
        axes.set(title=scenario(pair), xlabel="epoch", xticks=table.epoch[1::2])
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(path, figure)


def ablation(results):
    """Rows (what differs from DANN on SVHN, accuracy, accuracy with one view) of seed 0; empty until all are there."""
    names = {"nothing": "mnistm_svhn_dann_s0", **{f"lambda = {end}": f"mnistm_svhn_dann_lambda_{end}_s0"
                                                  for end in (0.1, 0.3)},
             **{what: f"ablation_{name}" for name, (what, _) in ABLATION.items()}}
    runs = results.set_index("run")
    if not set(names.values()) <= set(runs.index):
        return []
    return [(what, runs.accuracy[name], runs.one_view[name]) for what, name in names.items()]


def choices(results):
    """What the rule chose between, a dict for each pair of domains and setting of DANN, in the order of ALL_PAIRS: its
    `pair`, lambda's end, its accuracy and scores of seed 0, and whether it was `picked`."""
    found, picked, rows = choice.candidates(results), shipped(results), []
    for pair in ALL_PAIRS:
        name = run_name("dann", *pair)
        for row in found[name].to_dict("records") if name in found else []:
            rows.append(dict(row, pair=scenario(pair), picked=row["experiment"] == picked[name],
                             setting=row["experiment"].removeprefix(name).removeprefix("_lambda_") or "1"))
    return rows


# --- All of it ----------------------------------------------------------------------------------

def build(folder, checkpoints, data_dir, device, quick):
    """Draws the figures into `folder` and returns the numbers that p3.typ shows.

    checkpoints: the folder of what p3_dann/studies.py --publish has written. quick: few images.
    """
    require_records(checkpoints, {"results.csv": "p3_dann/studies.py --publish"})
    results = pd.read_csv(checkpoints / "results.csv")
    before, after, metrics = {}, {}, {}
    recipe = load_model(checkpoints / f"{run_name('dann', *PAIRS[0])}.pt")[1]
    for pair in PAIRS:
        name = run_name("dann", *pair)
        before[pair], _ = load_model(checkpoints / f"{run_name('source_only', *pair)}.pt", device)
        after[pair], _ = load_model(checkpoints / f"{name}.pt", device)
        metrics[pair] = read_jsonl(checkpoints / f"{name}.jsonl")
    embeddings, distances = latent_space(before, after, data_dir, "val", 40 if quick else 1000)
    tsne_figure(folder / "p3_tsne.svg", embeddings)
    strip_picture(folder / "p3_strip.png", embeddings[PAIRS[0]]["after"])
    matrices = {}
    for pair, model in after.items():
        images, labels, _ = load_split(data_dir, pair[1], "val")
        answers = predict(model, images).argmax(dim=1)
        matrices[pair] = confusion_matrix(labels, answers)
        if pair == PAIRS[0]:
            mistakes_figure(folder / "p3_mistakes.svg", images, labels, answers)
    confusion_figure(folder / "p3_confusion.svg", matrices)
    training_figure(folder / "p3_training.svg", metrics)
    return dict(
        parameters=sum(p.numel() for p in model.parameters()), recipe=recipe, widths=model.config["widths"],
        features=model.config["num_features"], ablation=ablation(results), picked=shipped(results),
        choices=choices(results),
        means=json.loads(means(results).to_json(orient="records")),
        **{name: {pair[1]: value for pair, value in of_pair.items()} for name, of_pair in (
            ("distances", distances), ("last", {pair: rows[-1] for pair, rows in metrics.items()}),
            ("mistakes", {pair: mistakes(matrix) for pair, matrix in matrices.items()}),
            ("validation", {pair: int(matrix.sum()) for pair, matrix in matrices.items()}))})
