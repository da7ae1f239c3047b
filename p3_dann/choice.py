"""Choosing between trained networks without a label of the target: scores, how they order, and the rule that picks.

    infomax             entropy of the mean answer minus mean entropy of the answers: sure, and of all classes
                        (Shi and Sha 2012, section 3.2); in nats, up to log 10
    density             soft neighbourhood density (Saito et al. 2021): how many others an answer lies near; in nats
    confident           share of the answers that are more than 90 % sure
    source_validation   accuracy in % on the source's validation digits

The first three are of the answers to unlabelled training images of the target.
"""

import copy
import math

import torch

from dataset import load_split
from p3_dann.methods import METHODS, run_name
from p3_dann.prediction import accuracy, adapt_statistics, predict

SCORES = ("infomax", "density", "confident", "source_validation")
RULE = "infomax"  # the highest of the networks of seed 0, which are those shipped, picks for every pair and method


def entropy(probabilities):
    """Of distributions (..., C), in nats: (...)."""
    return torch.special.entr(probabilities).sum(dim=-1)


def infomax(answers):
    """Of class probabilities (N, C): between 0 and log C."""
    return (entropy(answers.mean(dim=0)) - entropy(answers).mean()).item()


def neighbourhood_density(answers, temperature=0.05):
    """Of class probabilities (N, C), the mean entropy of each one's similarities to the others: up to log (N - 1).

    The similarity is the cosine, made a distribution over the others by a softmax (Saito et al. 2021, equations 1-3,
    with their temperature).
    """
    directions = torch.nn.functional.normalize(answers, dim=1)
    similarity = directions @ directions.T / temperature
    similarity.fill_diagonal_(-torch.inf)
    return entropy(similarity.softmax(dim=1)).mean().item()


def confident(answers, level=0.9):
    """The share of class probabilities (N, C) whose highest exceeds `level`."""
    return (answers.amax(dim=1) > level).float().mean().item()


def label_free_scores(model, recipe, target, data_dir, count=2000):
    """{name of SCORES: its value} of a network as it predicts `target`; looks at `count` images of a domain at most."""
    def thinned(images):
        return images[::math.ceil(len(images) / count)]

    answers = predict(model, thinned(load_split(data_dir, target, "train", labelled=False)[0]))
    scores = dict(infomax=infomax(answers), density=neighbourhood_density(answers), confident=confident(answers))
    if "source" in METHODS[recipe["method"]].roles:
        if not METHODS[recipe["method"]].two_views:  # it predicts each domain with that domain's statistics
            model = copy.deepcopy(model)
            adapt_statistics(model, thinned(load_split(data_dir, recipe["source"], "train", labelled=False)[0]))
        images, labels, _ = load_split(data_dir, recipe["source"], "val")
        scores["source_validation"] = accuracy(model, thinned(images), thinned(labels))
    return {name: round(value, 4) for name, value in scores.items()}


def candidates(table):
    """{run_name: table of its settings} for each method and pair in the table of results: a row for each experiment
    with the accuracy and the scores of its network of seed 0."""
    table = table.reindex(columns=table.columns.union(SCORES, sort=False)).dropna(subset=[RULE])
    found = {}
    for key, rows in table[table.seed == 0].groupby(["method", "source", "target"]):
        name = run_name(*key)
        rows = rows[rows.run.str.startswith(name)]
        if METHODS[key[0]].unlabelled and len(rows):
            experiment = rows.run.str.removesuffix("_s0")
            found[name] = rows.assign(experiment=experiment)[["experiment", "accuracy", *SCORES]].reset_index(drop=True)
    return found


def pick(rows):
    """The experiment with the highest RULE among the candidates `rows`."""
    return rows.experiment[rows[RULE].idxmax()]


def rank_correlations(candidates):
    """{score: mean over `candidates` of three settings or more of Spearman's correlation with the accuracy}."""
    several = [rows for rows in candidates.values() if len(rows) > 2]
    return {name: sum(rows[name].rank().corr(rows.accuracy.rank()) for rows in several) / len(several)
            for name in SCORES if several}
