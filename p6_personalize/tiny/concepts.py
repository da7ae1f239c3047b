"""Writes the two concepts of the tiny world as the course hands out its own: five images of each, and input.json.

    python3 p6_personalize/tiny/concepts.py --data_dir DIR      # DIR is that of p7_clevr

concepts/0 holds the held-out object, alone, concepts/1 other scenes in the held-out look, from scenes that no training
sees. All images of one sphere alone are nearly the same, as it stands in the centre and is not turned, and there are
but four; the fifth is a mirror image.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, nonempty_path, run

from files import make_output_dir, save_png, write_atomic
from p6_personalize.tiny.scenes import UNSEEN_LOOK, UNSEEN_OBJECT, apply, read_world

# The scorer's baselines are a tenth below what real images reach by the tiny CLIP, rounded down: evaluate.py --tables
# baselines.
REQUESTS = {
    "0": dict(src_image=UNSEEN_OBJECT, token_name="<new1>",
              prompt=["a photo of a <new1>", "a photo of a <new1> and a red cube"],
              prompt_4_clip_eval=[f"a photo of a {UNSEEN_OBJECT}", f"a photo of a {UNSEEN_OBJECT} and a red cube"],
              baseline=[[89, 83], [24, 84]]),
    "1": dict(src_image=UNSEEN_LOOK, token_name="<new2>",
              prompt=["a photo of a blue cube in the style of <new2>", "a photo of a <new1> in the style of <new2>"],
              prompt_4_clip_eval=["a photo of a blue cube", f"a photo of a {UNSEEN_OBJECT}"],
              baseline=[[9, 56], [-3, 51]]),
}
# (objects, look) of each prompt.
SHOWN = {"0": [([UNSEEN_OBJECT], None), ([UNSEEN_OBJECT, "red cube"], None)],
         "1": [(["blue cube"], UNSEEN_LOOK), ([UNSEEN_OBJECT], UNSEEN_LOOK)]}


def different(images, count=5):
    """The first `count` images that are no copies of one another."""
    chosen = []
    for image in images:
        if all((image != other).any() for other in chosen):
            chosen.append(image)
        if len(chosen) == count:
            return chosen
    raise UserError(f"there are only {len(chosen)} different images of a concept; name the whole data set")


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "iclevr", help="the images")
    parser.add_argument("--output_dir", type=nonempty_path, default=ROOT / "p6_personalize/tiny/concepts",
                        help="where the concepts go")
    args = parser.parse_args()
    images, sets = read_world(args.data_dir, "held_out")
    scenes = [apply(UNSEEN_LOOK, image) for image, names in zip(images, sets) if len(names) == 2]
    images, sets = read_world(args.data_dir, unseen=True)
    alone = [image for image, names in zip(images, sets) if len(names) == 1]
    for key, images in ("0", alone + [image.flip(-1) for image in alone]), ("1", scenes):
        folder = make_output_dir(args.output_dir / key)
        for number, image in enumerate(different(images)):
            save_png(folder / f"{number}.png", image)
    write_atomic(args.output_dir / "input.json", (json.dumps(REQUESTS, indent=1) + "\n").encode())


if __name__ == "__main__":
    run(main)
