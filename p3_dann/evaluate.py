"""Compares a CSV file of predicted digits with one of true digits.

    python3 p3_dann/evaluate.py PRED_CSV TRUE_CSV      # both have the header image_name,label

Prints the accuracy over the true file's images, the confusion matrix, and what is wrong with the answers. A name that
is missing, doubled or answered with something else than 0 to 9 counts as a wrong answer.
"""

import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset import read_labels  # noqa: E402
from utils import UserError, argument_parser, run  # noqa: E402

NO_ANSWER = 10


def read_answers(csv_path):
    """A list of (name, label) strings; unlike dataset.read_labels it takes faulty rows, to count them."""
    try:
        table = pd.read_csv(csv_path, dtype=str, keep_default_na=False, index_col=False, skipinitialspace=True)
        return list(zip(table["image_name"], table["label"]))
    except KeyError as error:
        raise UserError(f"{csv_path} has no column {error}; its first line must be image_name,label")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {csv_path} ({error}); name a CSV file with the header image_name,label")


def compare(answers, names, labels):
    """(confusion matrix, faults) of the `answers` to the images `names` with true `labels`.

    confusion: int64 (10, 11), rows the true digit, columns the answered one, the last one NO_ANSWER.
    faults: {what: names} of names missing, doubled, unknown to the truth, or answered with no digit.
    """
    counts = Counter(name for name, _ in answers)
    digits = {str(digit): digit for digit in range(10)}
    answered = {name: digits.get(label.strip(), NO_ANSWER) for name, label in answers if counts[name] == 1}
    confusion = torch.zeros(10, NO_ANSWER + 1, dtype=torch.int64)
    for name, label in zip(names, labels.tolist()):
        confusion[label, answered.get(name, NO_ANSWER)] += 1
    true_names = set(names)
    faults = {
        "missing": [name for name in names if name not in counts],
        "doubled": [name for name, count in counts.items() if count > 1],
        "not in the true file": [name for name in counts if name not in true_names],
        "answered with no digit": [name for name, digit in answered.items() if digit == NO_ANSWER],
    }
    return confusion, faults


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("pred_csv", type=Path, help="the answers")
    parser.add_argument("true_csv", type=Path, help="the truth")
    args = parser.parse_args()
    confusion, faults = compare(read_answers(args.pred_csv), *read_labels(args.true_csv))

    correct, total = confusion.diagonal().sum().item(), confusion.sum().item()
    print(f"accuracy = {correct / total:.4f} ({correct}/{total})")
    for what, which in faults.items():
        if which:
            print(f"{len(which)} names {what}: {', '.join(which[:5])}{' ...' if len(which) > 5 else ''}")
    print("\ntrue digit in rows, answer in columns, - for none")
    print("      " + "".join(f"{column:>6}" for column in [*range(10), "-"]))
    for digit, row in enumerate(confusion.tolist()):
        print(f"{digit:>6}" + "".join(f"{count:>6}" for count in row))


if __name__ == "__main__":
    run(main)
