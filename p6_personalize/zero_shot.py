"""Classifies images with CLIP by the names of the classes alone (Radford et al. 2021, section 3.1).

    python3 p6_personalize/zero_shot.py clip_zeroshot/val --id2label id2label.json --clip openai/clip-vit-base-patch32

The folder holds images <class>_<number>.png, the json file a name for every class: {"0": "bicycle", ...}. Prints top-1
and top-5 accuracy, accuracy per class and the commonest confusions; --output gets a row for every image, --figure five
right and five wrong cases. Others report up to 58.7 % by CLIP ViT-B/32 on the course's 2,500 images of 50 classes; the
tiny CLIP names 97.1 % of 138 images of one object (tiny/evaluate.py).
"""

import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, int_between, nonempty_path, pick_device, run

import pandas as pd
import torch
from tqdm import tqdm

import plots
from dataset import list_images, read_rgb
from files import check_output_file, read_json, write_atomic
from p6_personalize.model import Clip
from p6_personalize.prompts import ENSEMBLE, PROMPT, is_unicode


def read_classes(path):
    """{number: name} of the classes in id2label.json."""
    content = read_json(path)
    if not isinstance(content, dict) or not content or not all(
            key.isdecimal() and isinstance(name, str) and name and is_unicode(name) for key, name in content.items()):
        raise UserError(f"{path} holds no table of classes; it should look like {{\"0\": \"bicycle\"}}")
    return {int(key): name for key, name in content.items()}


def read_labels(folder, names):
    """(file names, their classes) of the images <class>_<number> in a folder, sorted."""
    files = list_images(folder)
    found = [re.fullmatch(r"(\d+)_\d+\.\w+", file) for file in files]
    for file, match in zip(files, found):
        if not match or int(match[1]) not in names:
            raise UserError(f"{folder} holds {file}, which is not named <class>_<number>.png by one of the "
                            f"{len(names)} classes in --id2label; rename or move it")
    return files, [int(match[1]) for match in found]


def class_vectors(clip, names, prompts):
    """Unit vectors (classes, D): the mean over the prompts of each name's."""
    vectors = torch.stack([clip.texts([prompt.replace("{}", name) for name in names]) for prompt in prompts]).mean(0)
    return vectors / vectors.norm(dim=1, keepdim=True)


def classify(clip, paths, classes, batch_size=64):
    """Cosines (N, classes) of the image files with the vectors of the classes."""
    rows = []
    with tqdm(total=len(paths), desc="images", unit="", disable=None) as bar:
        for start in range(0, len(paths), batch_size):
            batch = paths[start:start + batch_size]
            rows.append(clip.images([read_rgb(path) for path in batch], batch_size) @ classes.T)
            bar.update(len(batch))
    return torch.cat(rows)


def draw_cases(path, right, wrong):
    """Writes a figure of up to five right and five wrong cases, lists of (image, predicted, label), with their
    classes."""
    figure, axes = plots.plt.subplots(2, 5, figsize=(plots.TEXT_WIDTH, 3.6), squeeze=False)
    for row, cases in zip(axes, (right, wrong)):
        for axis in row:
            axis.axis("off")
        for axis, (image, predicted, label) in zip(row, cases):
            axis.imshow(image)
            axis.set_title(predicted if predicted == label else f"{predicted}\n({label})")
    plots.save(path, figure)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=nonempty_path, help="the images <class>_<number>.png")
    parser.add_argument("--id2label", type=nonempty_path, required=True, help="id2label.json")
    parser.add_argument("--clip", type=nonempty_path, required=True, help="a CLIP model's folder or name")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prompt", default=PROMPT, help="the text of a class, with {} for its name")
    texts.add_argument("--ensemble", action="store_true", help=f"the mean of {len(ENSEMBLE)} prompts instead of one")
    parser.add_argument("--output", type=nonempty_path, help="a CSV file: image_name, label, predicted and top5")
    parser.add_argument("--figure", type=nonempty_path, help="an .svg or .png of five right and five wrong cases")
    parser.add_argument("--batch_size", type=int_between(1), default=64, help="images at a time")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    args = parser.parse_args()
    if "{}" not in args.prompt:
        raise UserError(f"--prompt {args.prompt!r} has no {{}}, where the name of the class goes")
    names = read_classes(args.id2label)
    files, labels = read_labels(args.folder, names)
    if args.output:
        check_output_file(args.output)
    if args.figure:
        plots.check_figure(args.figure)
    for file in files:  # one that is damaged is told before minutes of CLIP
        read_rgb(args.folder / file)
    clip = Clip(args.clip, pick_device(args.device))
    numbers = sorted(names)
    classes = class_vectors(clip, [names[number] for number in numbers], ENSEMBLE if args.ensemble else [args.prompt])
    cosines = classify(clip, [args.folder / file for file in files], classes, args.batch_size)
    ranked = [[names[numbers[i]] for i in row] for row in cosines.topk(min(5, len(names))).indices.tolist()]

    table = pd.DataFrame(dict(image_name=files, label=[names[label] for label in labels],
                              predicted=[row[0] for row in ranked], top5=["|".join(row) for row in ranked]))
    right = table.predicted == table.label
    among = pd.Series([label in row for label, row in zip(table.label, ranked)])
    print(f"{len(files)} images, {len(names)} classes: top 1 {100 * right.mean():.2f} %, "
          f"top 5 {100 * among.mean():.2f} %")
    for name, share in right.groupby(table.label).mean().sort_values().items():
        print(f"  {100 * share:6.2f} %  {name}")
    wrong = table[~right]
    for (label, predicted), count in Counter(zip(wrong.label, wrong.predicted)).most_common(10):
        print(f"  {count} of {label} taken for {predicted}")
    if args.output:
        write_atomic(args.output, table.to_csv(index=False).encode())
    if args.figure:
        draw_cases(args.figure, *([(read_rgb(args.folder / case.image_name), case.predicted, case.label)
                                   for case in cases.sample(min(5, len(cases)), random_state=0).itertuples()]
                                  for cases in (table[right], wrong)))


if __name__ == "__main__":
    run(main)
