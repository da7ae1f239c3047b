"""Scores the images of a personalised pipeline as the course does: by CLIP, against the references and the text.

    python3 p6_personalize/evaluate.py input.json out_dir --data_dir REFERENCES --clip openai/clip-vit-base-patch32
    python3 p6_personalize/evaluate.py p6_personalize/tiny/concepts/input.json out_dir

A score is 100 times a cosine: with an image's mean over the references in --data_dir/<key> (image), with the text of
prompt_4_clip_eval (text). A prompt counts by the means over those five of its 25 images whose image + 2.5 text is the
largest, and passes where both reach the baseline. In the tiny world, the second command, three of four pass; of Stable
Diffusion 1.4 others report four of four.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, nonempty_path, pick_device, run

from dataset import list_images, read_rgb
from p6_personalize.model import CLIP, Clip
from p6_personalize.prompts import IMAGES, read_requests

CONCEPTS = ROOT / "p6_personalize/tiny/concepts"


def read_references(folder):
    """The images in a folder by their names, PIL in RGB; UserError when there are none, or one cannot be read."""
    return [read_rgb(folder / name) for name in list_images(folder)]


def scores(clip, images, references, text):
    """(image scores, text scores), float (N,) each, of N PIL images for a list of PIL references and a text."""
    vectors = clip.images(images)
    image = 100 * (vectors @ clip.images(references).T).mean(1)
    return image, 100 * (vectors @ clip.texts([text])[0])


def best_five(image, text):
    """(image score, text score): the means of the five images with the largest image + 2.5 text."""
    chosen = (image + 2.5 * text).argsort(descending=True)[:5]
    return image[chosen].mean().item(), text[chosen].mean().item()


def folder_of(output_dir, request, number):
    """Where the images of a request's prompt `number` lie."""
    return output_dir / request.key / str(number)


def file_name(request, number, n):
    return f"source{request.key}_prompt{number}_{n}.png"


def read_answers(output_dir, request, number):
    """The 25 images of a prompt, PIL; UserError when there are not exactly these files, which stops the scorer."""
    folder = folder_of(output_dir, request, number)
    expected = {file_name(request, number, n) for n in range(IMAGES)}
    found = set(list_images(folder))
    if found != expected:
        wrong = sorted(expected - found)[:1] or sorted(found - expected)[:1]
        raise UserError(f"{folder} must hold exactly {IMAGES} images and holds {len(found)}; look at {wrong[0]}")
    return [read_rgb(folder / name) for name in sorted(expected)]


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("input_json", type=nonempty_path, help="the course's input.json")
    parser.add_argument("output_dir", type=nonempty_path, help="what inference.py has written")
    parser.add_argument("--data_dir", type=nonempty_path, help="a folder of references for each key")
    parser.add_argument("--clip", type=nonempty_path, help="a CLIP model's folder or name")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    args = parser.parse_args()
    requests = read_requests(args.input_json)
    if args.input_json.resolve() == (CONCEPTS / "input.json").resolve():
        args.data_dir, args.clip = args.data_dir or CONCEPTS, args.clip or CLIP
    elif not args.data_dir or not args.clip:
        raise UserError(f"{args.input_json} is not the tiny world's; name the references by --data_dir and a CLIP by "
                        "--clip")
    for request in requests:
        if not request.clip_prompts or not request.baselines:
            raise UserError(f"entry \"{request.key}\" of {args.input_json} has no prompt_4_clip_eval or no baseline, "
                            "by which to score")
    answers = {(request.key, number): read_answers(args.output_dir, request, number)
               for request in requests for number in range(len(request.prompts))}
    references = {request.key: read_references(args.data_dir / request.key) for request in requests}
    clip = Clip(args.clip, pick_device(args.device))
    passed = 0
    for request in requests:
        for number, (prompt, text, baseline) in enumerate(zip(request.prompts, request.clip_prompts,
                                                              request.baselines)):
            image, word = best_five(*scores(clip, answers[request.key, number], references[request.key], text))
            good = image >= baseline[0] and word >= baseline[1]
            passed += good
            print(f"{request.key}/{number} {'PASS' if good else 'FAIL'}: image {image:.2f} (baseline {baseline[0]}), "
                  f"text {word:.2f} (baseline {baseline[1]}): {prompt}")
    print(f"{passed} of {len(answers)} prompts pass")


if __name__ == "__main__":
    run(main)
