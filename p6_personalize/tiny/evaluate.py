"""Measures the tiny world: what its CLIP knows, what its pipeline shows, what textual inversion has taught it.

    python3 p6_personalize/tiny/evaluate.py --data_dir DIR --count 40 --output p6_personalize/checkpoints/results.csv
    python3 p6_personalize/tiny/evaluate.py --data_dir DIR --count 20 --tables zero_shot prompts

Images are judged by the evaluator of p7_clevr, which no part of the tiny world has seen; where a look is asked for, the
one that an image is in is undone first. Rows of other tables stay in --output; `networks` there is one digest of the
CLIP, the pipeline, the embeddings and the judge. Prints a line for each row, percentages:
    zero_shot   top-1 accuracy of the tiny CLIP on real images of one object, among 24, and of two, among 276 pairs
    baselines   what real images of input.json's prompts score; its baselines are a tenth below that, rounded down
    judge       what the judge finds in real images
    prompts     named objects that generated images show, images that show all of theirs, images in the look
    concepts    the same of the held-out object and look, before and after textual inversion

Of prompts of one object the shipped pipeline shows 100 %, of those of two 88.7 %; the new word for the held-out object
shows it in 100 %, that for the look in none.
"""

import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import UserError, amp_dtype, argument_parser, float_between, int_between, nonempty_path, pick_device, run

import pandas as pd
import torch
from torchvision.transforms.functional import to_pil_image

from files import check_output_file, other_rows, write_atomic
from p6_personalize.evaluate import CONCEPTS, read_references, scores
from p6_personalize.inference import EMBEDS
from p6_personalize.model import (CLIP, PIPELINE, Clip, add_embeds, digest_of_all, generate, load_pipeline,
                                  read_embeds)
from p6_personalize.prompts import ENSEMBLE, PROMPT, read_requests
from p6_personalize.tiny.concepts import SHOWN
from p6_personalize.tiny.scenes import (SEEN, SEEN_LOOKS, UNSEEN_LOOK, UNSEEN_OBJECT, all_sets, apply, caption,
                                        nearest_look, read_world, undo)
from p6_personalize.zero_shot import class_vectors
from p7_clevr.evaluator import CHECKPOINTS, Evaluator
from p7_clevr.scenes import NUMBERS, OBJECTS
from transforms import as_input

TABLES = ["zero_shot", "baselines", "judge", "prompts", "concepts"]


class ClipJudge:
    """Names the objects in images by the caption that the tiny CLIP finds nearest."""

    def __init__(self, clip):
        self.clip, self.sets = clip, all_sets()
        self.texts = clip.texts([caption(names) for names in self.sets])

    def __call__(self, images, count):
        """The `count` objects that each of uint8 images shows: a list of sets."""
        sizes = torch.tensor([len(names) for names in self.sets])
        cosines = self.clip.images([to_pil_image(image) for image in images]) @ self.texts.T
        return [set(self.sets[i]) for i in cosines.masked_fill(sizes != count, -2).argmax(1).tolist()]


class EvaluatorJudge:
    """Names the objects in images by the evaluator of p7_clevr: the likeliest."""

    def __init__(self, path, device):
        self.evaluator = Evaluator(path, device)

    def __call__(self, images, count):
        top = self.evaluator.scores(as_input(images)).topk(count).indices
        return [{OBJECTS[i] for i in row} for row in top.tolist()]


def percent(values):
    """The share of true ones among booleans in %, to one decimal."""
    return round(100 * torch.as_tensor(values).float().mean().item(), 1)


def zero_shot(clip, images, sets):
    """Yields (row, numbers) of the top-1 accuracy: among the 24 objects on images of one, by one prompt and by the
    ensemble, each picture once; among all 276 pairs on images of two."""
    pairs, pair_names = with_count(2, images, sets)
    images, labels = single_objects(images, sets)
    unseen = labels == NUMBERS[UNSEEN_OBJECT]
    for prompts_name, prompts in ("one prompt", [PROMPT]), ("ensemble", ENSEMBLE):
        right = answers(clip, images, prompts) == labels
        for objects, chosen in (f"{len(SEEN)} seen objects", ~unseen), ("the unseen one", unseen):
            yield f"{prompts_name}, {objects}", dict(objects=percent(right[chosen]), images=int(chosen.sum()))
    right = [[set(names) == found for names, found in zip(pair_names, ClipJudge(clip)(pairs, 2))
              if (UNSEEN_OBJECT in names) == unseen] for unseen in (False, True)]
    for objects, of_these in zip(("seen objects", "one of them the unseen one"), right):
        yield f"pairs, {objects}", dict(objects=percent(of_these), images=len(of_these))


def single_objects(images, sets):
    """(images, numbers in OBJECTS (N,)) of those of one object, each picture once: they repeat among scenes."""
    images, sets = with_count(1, images, sets)
    distinct = list({image.numpy().tobytes(): i for i, image in enumerate(images)}.values())
    return images[distinct], torch.tensor([NUMBERS[sets[i][0]] for i in distinct])


def answers(clip, images, prompts):
    """The numbers in OBJECTS (N,) of what the CLIP sees in uint8 images of one object by the mean of `prompts`."""
    return (clip.images([to_pil_image(image) for image in images]) @ class_vectors(clip, OBJECTS, prompts).T).argmax(1)


def with_count(count, images, sets):
    """(images, sets) of those with `count` objects."""
    chosen = [i for i, names in enumerate(sets) if len(names) == count]
    return images[chosen], [sets[i] for i in chosen]


def baselines(clip, images, sets):
    """Yields (row, numbers): the course's scores of real images of what input.json's prompts name."""
    for request in read_requests(CONCEPTS / "input.json"):
        references = read_references(CONCEPTS / request.key)
        for prompt, text, (names, look) in zip(request.prompts, request.clip_prompts, SHOWN[request.key]):
            real = [to_pil_image(apply(look, image)) for image, others in zip(images, sets)
                    if sorted(others) == sorted(names)]
            if not real:
                raise UserError(f"there is no image of a {' and a '.join(names)}; name the whole data set")
            image_scores, text_scores = scores(clip, real, references, text)
            yield prompt, dict(image=round(image_scores.mean().item(), 2), text=round(text_scores.mean().item(), 2),
                               images=len(real))


def judged(judge, images, sets):
    """Yields (row, numbers): percentage of the objects that the judge finds in real images of one and of two."""
    for count in 1, 2:
        some, named = with_count(count, images, sets)
        hits = [name in seen for names, seen in zip(named, judge(some, count)) for name in names]
        yield f"real images of {count}", dict(objects=percent(hits), images=len(some))


class Studio:
    """Draws images of prompts and has a judge look at them."""

    def __init__(self, pipe, judge, real, steps, guidance):
        self.pipe, self.judge, self.real, self.steps, self.guidance = pipe, judge, real, steps, guidance

    def shown(self, prompts, sets, look=None):
        """Percentages over an image of each of the `prompts`: of the objects in `sets` that it shows, of images that
        show all of theirs, of images in the `look`."""
        batches = generate(self.pipe, list(enumerate(prompts)), 0, self.steps, self.guidance)
        images = torch.cat([batch for _, batch in batches])
        looks = nearest_look(images, self.real) if look else [None] * len(images)
        found = [self.judge(undo(own, image)[None], len(names))[0] for own, image, names in zip(looks, images, sets)]
        numbers = dict(objects=percent([name in seen for names, seen in zip(sets, found) for name in names]),
                       all_objects=percent([set(names) <= seen for names, seen in zip(sets, found)]))
        if look:
            numbers["look"] = percent([own == look for own in looks])
        return dict(numbers, images=len(prompts))

    def prompts(self, ones, pairs):
        """Yields (row, numbers) of what the pipeline was trained to show: lists of one and of two objects."""
        yield "one object", self.shown([caption(names) for names in ones], ones)
        yield "two objects", self.shown([caption(names) for names in pairs], pairs)
        for look in SEEN_LOOKS[1:]:  # monochrome is told from none by the objects alone
            some = ones[:len(ones) // 5 + 1]
            yield f"one object in the look {look}", self.shown([caption(names, look) for names in some], some, look)

    def concepts(self, ones, embeds):
        """Yields (row, numbers) of the held-out object and look before and after their embeddings are added."""
        count = len(ones)
        unseen, both = [[UNSEEN_OBJECT]] * count, [[UNSEEN_OBJECT, "red cube"]] * count
        yield "before: a sphere", self.shown(["a photo of a sphere"] * count, unseen)
        yield f"before: a {UNSEEN_OBJECT}", self.shown([caption([UNSEEN_OBJECT])] * count, unseen)
        yield f"before: a {UNSEEN_OBJECT} and a red cube", self.shown([caption(both[0])] * count, both)
        yield (f"before: the look {UNSEEN_LOOK}",
               self.shown([caption(names, UNSEEN_LOOK) for names in ones], ones, UNSEEN_LOOK))
        first, second = (add_embeds(self.pipe, path) for path in embeds)
        yield first, self.shown([caption([first])] * count, unseen)
        yield f"{first} and a red cube", self.shown([caption([first, "red cube"])] * count, both)
        yield (f"one object in the look {second}",
               self.shown([caption(names, second) for names in ones], ones, UNSEEN_LOOK))
        yield f"{first} in the look {second}", self.shown([caption([first], second)] * count, unseen, UNSEEN_LOOK)


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "iclevr", help="train.json and the images")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="what to measure")
    parser.add_argument("--clip", type=nonempty_path, default=CLIP, help="a CLIP model's folder or name")
    parser.add_argument("--checkpoint", type=nonempty_path, default=PIPELINE, help="the pipeline's folder")
    parser.add_argument("--embeds", type=nonempty_path, nargs=2, default=EMBEDS, help="of the object and of the look")
    parser.add_argument("--evaluator", type=nonempty_path, default=CHECKPOINTS / "evaluator.pth",
                        help="what judges, such as the course's checkpoint.pth")
    parser.add_argument("--clip_judges", action="store_true", help="the tiny CLIP judges instead")
    parser.add_argument("--count", type=int_between(1), default=100, help="generated images in a row")
    parser.add_argument("--steps", type=int_between(1, 999), default=25, help="sampling steps")
    parser.add_argument("--guidance", type=float_between(1), default=2.0, help="classifier-free guidance; 1 is none")
    parser.add_argument("--output", type=nonempty_path, help="a CSV file that gets the rows")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.output:
        check_output_file(args.output)
        other_rows(args.output, "table")  # a foreign file is told before anything is drawn
    device = pick_device(args.device)
    clip = Clip(args.clip, device)
    if "concepts" in args.tables:
        for path in args.embeds:  # before anything is drawn
            read_embeds(path)
    real, real_sets = read_world(args.data_dir, "held_out")
    unseen, unseen_sets = read_world(args.data_dir, unseen=True)
    images, sets = torch.cat([real, unseen]), real_sets + unseen_sets
    stream = random.Random(0)
    ones, pairs = ([stream.sample(SEEN, count) for _ in range(args.count)] for count in (1, 2))

    tables = {"zero_shot": lambda: zero_shot(clip, images, sets),
              "baselines": lambda: baselines(clip, images, sets)}
    if {"judge", "prompts", "concepts"} & {*args.tables}:
        judge = ClipJudge(clip) if args.clip_judges else EvaluatorJudge(args.evaluator, device)
        tables["judge"] = lambda: judged(judge, real, real_sets)
    if {"prompts", "concepts"} & {*args.tables}:
        studio = Studio(load_pipeline(args.checkpoint, device, amp_dtype("auto", device)), judge, real, args.steps,
                        args.guidance)
        tables.update(prompts=lambda: studio.prompts(ones, pairs), concepts=lambda: studio.concepts(ones, args.embeds))
    about = dict(steps=args.steps, guidance=args.guidance, networks=digest_of_all(
        args.clip, args.checkpoint, *args.embeds, args.clip if args.clip_judges else args.evaluator))
    for table in args.tables:
        rows = []
        for row, numbers in tables[table]():
            print(f"{table}, {row}: {', '.join(f'{name} {value}' for name, value in numbers.items())}", flush=True)
            rows.append(dict(table=table, row=row, **about, **numbers))
        if args.output:
            rows = pd.concat([other_rows(args.output, "table", [table]), pd.DataFrame(rows)])
            write_atomic(args.output, rows.to_csv(index=False).encode())


if __name__ == "__main__":
    run(main)
