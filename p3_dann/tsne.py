"""Looks at the features: how well do digits keep apart and domains mix?

    python3 p3_dann/tsne.py MODEL FIGURE.png     # MODEL: a model.pt of train.py or a file of p3_dann/checkpoints

Draws the t-SNE embedding of validation images of source and target twice, coloured by digit and by domain, and gives
the proxy A-distance of the features: 2 where a linear classifier tells the domains apart, 0 where it has to guess.
"""

import copy
import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset import DOMAINS, load_split  # noqa: E402
from p3_dann.augment import standardize  # noqa: E402
from p3_dann.model import adapt_statistics, load_model, outputs  # noqa: E402
from utils import argument_parser, int_at_least, make_output_dir, run, write_atomic  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

NAMES = {"mnistm": "MNIST-M", "svhn": "SVHN", "usps": "USPS"}
# Ten colours that stay apart for colour-blind eyes: Okabe and Ito's eight, a grey and a wine red.
PALETTE = ["#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999", "#882255"]


def extract_features(model, images, own_statistics):
    """The extractor's output (N, num_features), float64, for uint8 `images` (N, 3, 28, 28).

    own_statistics: normalise by these images' statistics, as in DANN's training, where each domain has its own;
    otherwise by the ones that the model predicts with.
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


def embed(source_features, target_features, seed=0):
    """(N_source + N_target, 2): scikit-learn's t-SNE (van der Maaten and Hinton 2008) of both domains together."""
    features = np.concatenate([source_features, target_features])
    perplexity = min(30, (len(features) - 1) / 3)
    return TSNE(init="pca", learning_rate="auto", perplexity=perplexity, random_state=seed).fit_transform(features)


def draw(path, points, digits, is_target, names):
    """Writes the two pictures side by side as a PNG file.

    points: (N, 2); digits: (N,) 0..9; is_target: bool (N,); names: of source and target.
    """
    figure, (by_digit, by_domain) = plt.subplots(1, 2, figsize=(7.5, 3.4), layout="constrained")
    for digit in range(10):
        by_digit.scatter(*points[digits == digit].T, s=3, color=PALETTE[digit], label=str(digit))
    for which, name, colour in zip((~is_target, is_target), names, (PALETTE[5], PALETTE[1])):
        by_domain.scatter(*points[which].T, s=3, color=colour, label=name, alpha=0.6)
    for axes, heading in (by_digit, "by digit"), (by_domain, "by domain"):
        axes.set(xticks=[], yticks=[], title=heading)
        axes.legend(markerscale=3, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def sample_features(model, data_dir, domains, own_statistics, count=1000, seed=0):
    """([features of each domain], [digits of each domain]) of `count` validation images of each of two domains.

    The sample depends on `seed` alone, so pictures of different models show the same images. own_statistics: see
    `extract_features`.
    """
    features, digits = [], []
    for domain in domains:
        images, labels, _ = load_split(data_dir, domain, "val")
        chosen = np.random.default_rng(seed).permutation(len(images))[:count]
        features.append(extract_features(model, images[chosen], own_statistics))
        digits.append(labels[chosen].numpy())
    return features, digits


def picture(path, model, recipe, data_dir, source, target, count=1000, seed=0):
    """Draws `count` validation images of each domain into the PNG file `path`; returns the proxy A-distance."""
    features, digits = sample_features(model, data_dir, (source, target), recipe["mode"] == "dann", count, seed)
    distance = proxy_a_distance(*features, seed)
    is_target = np.repeat([False, True], [len(f) for f in features])
    draw(path, embed(*features, seed), np.concatenate(digits), is_target,
         [NAMES[domain] for domain in (source, target)])
    return distance


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="the model")
    parser.add_argument("figure", type=Path, help="the PNG file to write")
    parser.add_argument("--source", choices=DOMAINS, help="first domain; the model's when not given")
    parser.add_argument("--target", choices=DOMAINS, help="second domain; the model's when not given")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of the sample and the embedding")
    args = parser.parse_args()
    model, recipe = load_model(args.checkpoint)
    make_output_dir(args.figure.parent)
    source, target = args.source or recipe["source"], args.target or recipe["target"]
    distance = picture(args.figure, model, recipe, args.data_dir, source, target, seed=args.seed)
    print(f"proxy A-distance {distance:.2f}; wrote {args.figure}")


if __name__ == "__main__":
    run(main)
