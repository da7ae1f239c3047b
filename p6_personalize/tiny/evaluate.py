"""Measures the tiny world: what its CLIP knows, what its pipeline shows, what textual inversion has taught it.

    python3 p6_personalize/tiny/evaluate.py --data_dir DIR                            # all of it
    python3 p6_personalize/tiny/evaluate.py --data_dir DIR --count 20 --tables zero_shot prompts

Pictures are judged by the evaluator of p7_clevr, which no part of the tiny world has seen, or by the tiny CLIP where
--evaluator is missing. For pictures in a look the look is undone first. Prints a line for each row of the README.
"""

import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import amp_dtype, argument_parser, as_input, float_between, int_at_least, nonempty_path, pick_device, run

import torch
from torchvision.transforms.functional import to_pil_image

from p6_personalize.inference import EMBEDS
from p6_personalize.model import CLIP, PIPELINE, Clip, add_embeds, generate, load_pipeline
from p6_personalize.prompts import ENSEMBLE, PROMPT
from p6_personalize.tiny.scenes import (SEEN, SEEN_LOOKS, UNSEEN_LOOK, UNSEEN_OBJECT, all_sets, caption, nearest_look,
                                        read_world, undo)
from p6_personalize.zero_shot import class_vectors
from p7_clevr.evaluator import CHECKPOINTS, Evaluator
from p7_clevr.scenes import NUMBERS, OBJECTS


class ClipJudge:
    """Names the objects in pictures by the caption that the tiny CLIP finds nearest."""

    def __init__(self, clip):
        self.clip, self.sets = clip, all_sets()
        self.texts = clip.texts([caption(names) for names in self.sets])

    def __call__(self, images, count):
        """The `count` objects that each of uint8 images shows: a list of sets."""
        sizes = torch.tensor([len(names) for names in self.sets])
        cosines = self.clip.images([to_pil_image(image) for image in images]) @ self.texts.T
        return [set(self.sets[i]) for i in cosines.masked_fill(sizes != count, -2).argmax(1).tolist()]


class EvaluatorJudge:
    """Names the objects in pictures by the evaluator of p7_clevr: the likeliest."""

    def __init__(self, path, device):
        self.evaluator = Evaluator(path, device)

    def __call__(self, images, count):
        top = self.evaluator.scores(as_input(images)).topk(count).indices
        return [{OBJECTS[i] for i in row} for row in top.tolist()]


def zero_shot(clip, images, sets):
    """Prints top-1 accuracy among the 24 objects on pictures of one, with one prompt and with the ensemble."""
    vectors = clip.images([to_pil_image(image) for image in images])
    labels = torch.tensor([NUMBERS[names[0]] for names in sets])
    unseen = labels == NUMBERS[UNSEEN_OBJECT]
    for name, prompts in ("one prompt", [PROMPT]), ("ensemble", ENSEMBLE):
        right = (vectors @ class_vectors(clip, OBJECTS, prompts).T).argmax(1) == labels
        print(f"zero-shot, {name}: {percent(right[~unseen])} of {len(SEEN)} seen objects, {percent(right[unseen])} of "
              f"the unseen one ({len(labels)} pictures)")


def percent(right):
    right = torch.as_tensor(right).float()
    return f"{100 * right.mean():.1f} %"


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "iclevr", help="train.json and the pictures")
    parser.add_argument("--tables", nargs="+", choices=["zero_shot", "prompts", "concepts"], help="what to measure",
                        default=["zero_shot", "prompts", "concepts"])
    parser.add_argument("--clip", type=nonempty_path, default=CLIP, help="a CLIP model's folder or name")
    parser.add_argument("--checkpoint", type=nonempty_path, default=PIPELINE, help="the pipeline's folder")
    parser.add_argument("--embeds", type=nonempty_path, nargs=2, default=EMBEDS, help="of the object and of the look")
    parser.add_argument("--evaluator", type=nonempty_path, default=CHECKPOINTS / "evaluator.pth",
                        help="what judges, such as the course's checkpoint.pth")
    parser.add_argument("--count", type=int_at_least(1), default=100, help="generated pictures in a row")
    parser.add_argument("--steps", type=int_at_least(1), default=25, help="sampling steps")
    parser.add_argument("--guidance", type=float_between(1), default=7.5, help="classifier-free guidance; 1 is none")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    args = parser.parse_args()
    device = pick_device(args.device)
    clip = Clip(args.clip, device)
    images, sets = (left + right if isinstance(left, list) else torch.cat([left, right]) for left, right in zip(
        read_world(args.data_dir, "held_out"), read_world(args.data_dir, "held_out", unseen=True)))
    if "zero_shot" in args.tables:
        alone = [i for i, names in enumerate(sets) if len(names) == 1]
        zero_shot(clip, images[alone], [sets[i] for i in alone])
    if args.tables == ["zero_shot"]:
        return
    judge = EvaluatorJudge(args.evaluator, device) if args.evaluator.exists() else ClipJudge(clip)
    print(f"judged by {args.evaluator if args.evaluator.exists() else 'the tiny CLIP'}")
    for count in 1, 2:
        chosen = [i for i, names in enumerate(sets) if len(names) == count]
        hits = [name in seen for i, seen in zip(chosen, judge(images[chosen], count)) for name in sets[i]]
        print(f"real pictures of {count}: {percent(hits)} of the objects")
    pipe = load_pipeline(args.checkpoint, device, amp_dtype("auto", device))

    def shown(row, prompts, sets, look=None):
        """Prints how many of the objects `sets` and how often the look the pictures of the prompts show."""
        batches = generate(pipe, list(enumerate(prompts)), 0, args.steps, args.guidance)
        pictures = torch.cat([images for _, images in batches])
        found = [judge(undo(look, picture)[None], len(names))[0] for picture, names in zip(pictures, sets)]
        print(f"{row}: {percent([name in seen for names, seen in zip(sets, found) for name in names])} of the objects, "
              f"all in {percent([set(names) <= seen for names, seen in zip(sets, found)])}" +
              (f", the look in {percent([name == look for name in nearest_look(pictures, images)])}" if look else ""))

    stream = random.Random(0)
    ones, pairs = ([stream.sample(SEEN, count) for _ in range(args.count)] for count in (1, 2))
    if "prompts" in args.tables:
        shown("prompts of one object", [caption(names) for names in ones], ones)
        shown("prompts of two objects", [caption(names) for names in pairs], pairs)
        for look in SEEN_LOOKS[1:]:  # monochrome is told from none by the objects alone
            some = ones[:args.count // 5 + 1]
            shown(f"one object in the look {look}", [caption(names, look) for names in some], some, look)
    if "concepts" in args.tables:
        unseen, both = [[UNSEEN_OBJECT]] * args.count, [[UNSEEN_OBJECT, "red cube"]] * args.count
        shown("before: a sphere", ["a photo of a sphere"] * args.count, unseen)
        shown(f"before: a {UNSEEN_OBJECT}", [f"a photo of a {UNSEEN_OBJECT}"] * args.count, unseen)
        first, second = (add_embeds(pipe, path) for path in args.embeds)
        shown(first, [f"a photo of a {first}"] * args.count, unseen)
        shown(f"{first} and a red cube", [f"a photo of a {first} and a red cube"] * args.count, both)
        shown(f"one object in the look {second}", [caption(names, second) for names in ones], ones, UNSEEN_LOOK)
        shown(f"{first} in the look {second}", [caption([first], second)] * args.count, unseen, UNSEEN_LOOK)


if __name__ == "__main__":
    run(main)
