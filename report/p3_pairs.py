"""2020's problems 3 and 4 in the report: DANN and AdaMatch between any two of the three domains."""


from dataset import load_split
from files import read_jsonl

import pandas as pd

from p3_dann.methods import ALL_PAIRS, PAIRS_2020, run_name
from p3_dann.model import load_model
from p3_dann.prediction import accuracy, predict
from p3_dann.choice import candidates, rank_correlations
from p3_dann.studies import ADAMATCH_ABLATION, ADAMATCH_ABLATION_PAIRS, means, shipped
from report.p3 import choices, confusion_figure, confusion_matrix, latent_space, mistakes, scenario, tsne_figure
from report.records import require_records

HARDEST = ("svhn", "mnistm")  # the pair whose mistakes are looked at


def accuracies(results):
    """A dict for each of ALL_PAIRS: its `pair`, and of each row of the assignment's table mean, std and seeds, or None
    where a training is missing."""
    table, picked = means(results).set_index(["experiment", "target", "statistics"]), shipped(results)

    def cell(method, source, target, statistics):
        key = picked[run_name(method, source, target)], target, statistics
        if key not in table.index:
            return None
        row = table.loc[key]
        return dict(mean=row["mean"], std=None if pd.isna(row["std"]) else row["std"], seeds=int(row["seeds"]))

    return [dict(pair=scenario(pair), source=cell("source_only", *pair, "source"),
                 statistics=cell("source_only", *pair, "target"), dann=cell("dann", *pair, "target"),
                 adamatch=cell("adamatch", *pair, "target"), target=cell("target_only", *pair, "target"))
            for pair in ALL_PAIRS]


def ablation(results):
    """Rows (what AdaMatch does without, accuracy on each of ADAMATCH_ABLATION_PAIRS or None), where any is there."""
    runs = results.drop_duplicates("run").set_index("run").accuracy
    names = [run_name("adamatch", *pair) for pair in ADAMATCH_ABLATION_PAIRS]
    rows = [(what, *(runs.get(f"ablation_{name}_{ending}") for name in names))
            for ending, (what, _) in ADAMATCH_ABLATION.items()]
    return [row for row in rows if any(value is not None for value in row[1:])]


def longer(results):
    """{row of `accuracies`: [accuracy from MNIST-M to SVHN with its own budget, and with AdaMatch's steps]} of seed 0,
    where the latter is there."""
    runs = results[results.target == "svhn"].drop_duplicates(["run", "statistics"])
    runs = runs.set_index(["run", "statistics"]).accuracy
    cases = dict(source=("mnistm_source_only", "source"), statistics=("mnistm_source_only", "target"),
                 dann=("mnistm_svhn_dann", "target"), target=("svhn_target_only", "target"))
    values = {row: [runs.get((f"{budget}{name}_s0", statistics)) for budget in ("", "long_")]
              for row, (name, statistics) in cases.items()}
    values["adamatch"] = 2 * [runs.get(("mnistm_svhn_adamatch_s0", "target"))]
    return {row: pair for row, pair in values.items() if pair[-1] is not None}


def over_training(path):
    """{name: the mean over all steps} of the numbers in a training's record."""
    rows = pd.DataFrame(read_jsonl(path)).select_dtypes("number")
    steps = rows.step.diff().fillna(rows.step)
    return {name: float((rows[name] * steps).sum() / steps.sum()) for name in rows}


def build(folder, checkpoints, data_dir, device, quick):
    """Draws the figures into `folder` and returns the numbers that p3_pairs.typ shows; arguments: see p3.build."""
    runs = [run_name(method, *pair) for method in ("dann", "adamatch") for pair in (PAIRS_2020[2], HARDEST)]
    require_records(checkpoints, dict.fromkeys(["results.csv", *(f"{run}.jsonl" for run in runs)],
                                               "p3_dann/studies.py --publish"))
    results = pd.read_csv(checkpoints / "results.csv")
    networks = {method: {pair: load_model(checkpoints / f"{run_name(method, *pair)}.pt", device)[0]
                         for pair in PAIRS_2020} for method in ("source_only", "dann", "adamatch", "target_only")}
    splits = {split: {pair: load_split(data_dir, pair[1], split)[:2] for pair in PAIRS_2020}
              for split in ("val", "test")}
    tests = {method: {scenario(pair): accuracy(model, *splits["test"][pair]) for pair, model in models.items()}
             for method, models in networks.items()}
    distances, recipes = {}, {}
    for method in "dann", "adamatch":
        _, recipes[method] = load_model(checkpoints / f"{run_name(method, *PAIRS_2020[2])}.pt", device)
        embeddings, apart = latent_space(networks["source_only"], networks[method], data_dir, "test",
                                         40 if quick else 600, method == "dann")
        tsne_figure(folder / f"p3_pairs_{method}.svg", embeddings)
        distances[method] = {scenario(pair): values for pair, values in apart.items()}
    record = {method: {scenario(pair): over_training(checkpoints / f"{run_name(method, *pair)}.jsonl")
                       for pair in (PAIRS_2020[2], HARDEST)} for method in recipes}
    matrices = {}
    for pair in (PAIRS_2020[1], HARDEST):
        model, _ = load_model(checkpoints / f"{run_name('adamatch', *pair)}.pt", device)
        images, labels, _ = load_split(data_dir, pair[1], "val")
        matrices[pair] = confusion_matrix(labels, predict(model, images).argmax(dim=1))
    confusion_figure(folder / "p3_pairs_confusion.svg", matrices)
    counts = {scenario(pair): {split: len(sets[pair][1]) for split, sets in splits.items()} for pair in PAIRS_2020}
    return dict(accuracies=accuracies(results), distances=distances, recipes=recipes, record=record, tests=tests,
                counts=counts, longer=longer(results), ablation=ablation(results),
                ablation_epochs=ADAMATCH_ABLATION["complete"][1]["epochs"],
                choices=choices(results), rank_correlations=rank_correlations(candidates(results)),
                parameters=sum(p.numel() for p in model.parameters()),
                widths=model.config["widths"], features=model.config["num_features"],
                mistakes={scenario(pair): mistakes(matrix) for pair, matrix in matrices.items()})
