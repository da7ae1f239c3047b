"""Looks at the features: how well do digits keep apart and domains mix?

    python3 p3_dann/features.py MODEL FIGURE.png     # MODEL: a model.pt of train.py or a file of p3_dann/checkpoints
    python3 p3_dann/features.py MODEL FIGURE.png --before SOURCE_ONLY     # beside the network before adaptation

Draws the t-SNE embedding of validation images of source and target twice, coloured by digit and by domain, and gives
the proxy A-distance of the features: 2 where a linear classifier tells the domains apart, 0 where it has to guess.
"""

import copy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, int_between, nonempty_path, run

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import plots
from dataset import DOMAIN_NAMES, DOMAINS, load_split
from p3_dann.augment import standardize
from p3_dann.methods import METHODS
from p3_dann.model import load_model
from p3_dann.prediction import adapt_statistics, outputs


def extract_features(model, images, own_statistics):
    """The extractor's output (N, num_features), float64, for uint8 `images` (N, 3, 28, 28).

    own_statistics: normalise by these images' statistics, as in DANN's training, where each domain has its own;
    otherwise by the ones that the model predicts with, as in AdaMatch's, where the domains share them.
    """
    if own_statistics:
        model = copy.deepcopy(model)
        adapt_statistics(model, images)
    return outputs(model, images, lambda batch: model.features(standardize(batch))).double().numpy()


def proxy_a_distance(source_features, target_features, seed=0):
    """2 (1 - 2 error) of a linear domain classifier on held-out features (Ben-David et al. 2006).

    Trained on one random half, tested on the other; an error above 1/2 counts as 1/2, so that 0 <= distance <= 2.
    """
    features = np.concatenate([source_features, target_features])
    domains = np.repeat([0, 1], [len(source_features), len(target_features)])
    order = np.random.default_rng(seed).permutation(len(features))
    train, test = order[:len(order) // 2], order[len(order) // 2:]
    scaler = StandardScaler().fit(features[train])
    classifier = LogisticRegression(C=0.01, max_iter=1000).fit(scaler.transform(features[train]), domains[train])
    error = 1 - classifier.score(scaler.transform(features[test]), domains[test])
    return 2 * (1 - 2 * min(error, 0.5))


def has_own_statistics(recipe):
    """Whether the network of `recipe` was trained on two domains, each normalised by its own statistics."""
    method = METHODS[recipe["method"]]
    return bool(method.unlabelled) and not method.two_views


def sample_features(model, data_dir, domains, own_statistics, count=1000, seed=0, split="val"):
    """([features of each domain], [digits of each domain]) of `count` images of the split of each of two domains.

    The sample depends on `seed` alone, so pictures of different models show the same images. own_statistics: see
    `extract_features`.
    """
    features, digits = [], []
    for domain in domains:
        images, labels, _ = load_split(data_dir, domain, split)
        if len(images) < 2:
            raise UserError(f"{data_dir} holds a single digit of {domain} to look at; name one with more")
        chosen = np.random.default_rng(seed).permutation(len(images))[:count]
        features.append(extract_features(model, images[chosen], own_statistics))
        digits.append(labels[chosen].numpy())
    return features, digits


def picture(path, networks, data_dir, source, target, count=1000, seed=0):
    """Draws `count` validation images of each domain into the file `path`, as each of `networks` sees them.

    networks: {title: (model, recipe)}. Returns their proxy A-distances, {title: distance}.
    """
    embeddings, distances = {}, {}
    for title, (model, recipe) in networks.items():
        features, digits = sample_features(model, data_dir, (source, target), has_own_statistics(recipe), count, seed)
        distances[title] = proxy_a_distance(*features, seed)
        embeddings[f"{title}: proxy A-distance {distances[title]:.2f}"] = plots.embed(np.concatenate(features), seed)
    is_target = np.repeat([False, True], [len(labels) for labels in digits])
    plots.tsne_pictures(path, embeddings, np.concatenate(digits), is_target,
                        [DOMAIN_NAMES[domain] for domain in (source, target)])
    return distances


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("checkpoint", type=nonempty_path, help="the model")
    parser.add_argument("figure", type=nonempty_path, help="the PNG or SVG file to write")
    parser.add_argument("--before", type=nonempty_path, help="a model to draw beside it, such as a source_only one")
    parser.add_argument("--source", choices=DOMAINS, help="first domain; the model's when not given")
    parser.add_argument("--target", choices=DOMAINS, help="second domain; the model's when not given")
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--seed", type=int_between(0), default=0, help="seed of the sample and the embedding")
    args = parser.parse_args()
    plots.check_figure(args.figure)
    networks = {"before adaptation": load_model(args.before)} if args.before else {}
    model, recipe = load_model(args.checkpoint)
    networks[recipe["method"]] = model, recipe
    source, target = args.source or recipe["source"], args.target or recipe["target"]
    if source == target:
        raise UserError(f"{source} would be compared with itself; name another --source or --target")
    distances = picture(args.figure, networks, args.data_dir, source, target, seed=args.seed)
    print(f"proxy A-distance: {', '.join(f'{title} {distance:.2f}' for title, distance in distances.items())}; "
          f"wrote {args.figure}")


if __name__ == "__main__":
    run(main)
