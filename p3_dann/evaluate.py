"""Compares a CSV file of predicted digits with one of true digits.

    python3 p3_dann/evaluate.py PRED_CSV TRUE_CSV      # both have the header image_name,label

Prints the accuracy over the true file's images, the confusion matrix, and what is wrong with the predictions. A name
that is missing, doubled or predicted to be something else than 0 to 9 counts as wrong.
"""

import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, nonempty_path, run

import torch

from dataset import read_labels, string_columns

NO_DIGIT = 10


def read_predictions(csv_path):
    """A list of (name, label) strings; unlike dataset.read_labels it takes faulty rows, to count them."""
    try:
        table = string_columns(csv_path, ["image_name", "label"])
        return list(zip(table["image_name"], table["label"]))
    except KeyError as error:
        raise UserError(f"{csv_path} has no column {error}; its first line must be image_name,label")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {csv_path} ({error}); name a CSV file with the header image_name,label")


def compare(predictions, names, labels):
    """(confusion matrix, faults) of `predictions`, (name, label) strings, for the images `names` with true `labels`.

    confusion: int64 (10, 11), rows the true digit, columns the predicted one, the last one NO_DIGIT.
    faults: {what: names} of names missing, doubled, unknown to the truth, or predicted to be no digit.
    """
    counts = Counter(name for name, _ in predictions)
    digits = {str(digit): digit for digit in range(10)}
    predicted = {name: digits.get(label.strip(), NO_DIGIT) for name, label in predictions if counts[name] == 1}
    confusion = torch.zeros(10, NO_DIGIT + 1, dtype=torch.int64)
    for name, label in zip(names, labels.tolist()):
        confusion[label, predicted.get(name, NO_DIGIT)] += 1
    true_names = set(names)
    faults = {
        "missing": [name for name in names if name not in counts],
        "doubled": [name for name, count in counts.items() if count > 1],
        "not in the true file": [name for name in counts if name not in true_names],
        "predicted to be no digit": [name for name, digit in predicted.items() if digit == NO_DIGIT],
    }
    return confusion, faults


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("pred_csv", type=nonempty_path, help="the predictions")
    parser.add_argument("true_csv", type=nonempty_path, help="the truth")
    args = parser.parse_args()
    confusion, faults = compare(read_predictions(args.pred_csv), *read_labels(args.true_csv))

    correct, total = confusion.diagonal().sum().item(), confusion.sum().item()
    print(f"accuracy = {correct / total:.4f} ({correct}/{total})")
    for what, which in faults.items():
        if which:
            print(f"{len(which)} names {what}: {', '.join(which[:5])}{' ...' if len(which) > 5 else ''}")
    print("\nconfusion matrix: true digit in rows, predicted digit in columns, - for none")
    print("      " + "".join(f"{column:>6}" for column in [*range(10), "-"]))
    for digit, row in enumerate(confusion.tolist()):
        print(f"{digit:>6}" + "".join(f"{count:>6}" for count in row))


if __name__ == "__main__":
    run(main)
