"""Generates the images of learnt concepts that the course's input.json asks for.

    bash assignments/dlcv2024_hw2/hw2_3.sh input.json out_dir sd-v1-4.ckpt --embeds NEW1.safetensors NEW2.safetensors
    python3 p6_personalize/inference.py p6_personalize/tiny/concepts/input.json out_dir     # with the tiny pipeline

Writes out_dir/<key>/<prompt>/source<key>_prompt<prompt>_<0..24>.png, 25 images a prompt. All concepts are loaded at
once, so that one prompt may name several. The noise of an image depends on --seed, its prompt's place and its number. A
run that was interrupted goes on where it stopped; images of other settings are replaced. The second command takes 35
seconds on two CPU cores with bfloat16 units; of its four prompts p6_personalize/evaluate.py passes three.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (UserError, add_amp_argument, amp_dtype, argument_parser, float_between, int_between, nonempty_path,
                   pick_device, run)

from tqdm import tqdm

from files import digest_of, lock, make_output_dir, read_json, save_png, write_atomic
from p6_personalize.evaluate import file_name, folder_of
from p6_personalize.model import (HERE, PIPELINE, add_embeds, default_guidance, digests_of, generate, load_pipeline,
                                  read_embeds)
from p6_personalize.prompts import IMAGES, read_requests

EMBEDS = [HERE / "checkpoints/new1.safetensors", HERE / "checkpoints/new2.safetensors"]  # of the tiny pipeline


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("input_json", type=nonempty_path, help="the concepts and their prompts")
    parser.add_argument("output_dir", type=nonempty_path, help="folder for the images; made if need be")
    parser.add_argument("checkpoint", type=nonempty_path, nargs="?", default=PIPELINE,
                        help="the pipeline's folder or single file")
    parser.add_argument("--embeds", type=nonempty_path, nargs="+",
                        help="learned_embeds files, one for each token; when not given, with our pipeline, ours")
    parser.add_argument("--steps", type=int_between(1, 999), default=25, help="sampling steps")
    parser.add_argument("--guidance", type=float_between(1),
                        help="classifier-free guidance, 1 is none; when not given 7.5, with a tiny pipeline 2")
    parser.add_argument("--seed", type=int_between(0), default=0, help="seed of the noise")
    parser.add_argument("--batch_size", type=int_between(1), default=5, help="images at a time")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add_amp_argument(parser)
    args = parser.parse_args()
    if not args.embeds and args.checkpoint.resolve() != PIPELINE.resolve():  # another has embeddings of its own
        raise UserError(f"{args.checkpoint} has learnt no token of {args.input_json}; name the learned_embeds file of "
                        "each by --embeds")
    args.embeds = args.embeds or EMBEDS
    args.guidance = args.guidance or default_guidance(args.checkpoint)
    return args


def require_learnt(requests, tokens, where):
    """UserError when a concept's own token is not among the learnt ones."""
    for request in requests:
        if request.token not in tokens:
            raise UserError(f"entry \"{request.key}\" of {where} asks for {request.token}, and --embeds brings "
                            f"{', '.join(tokens)}; train it with p6_personalize/train.py")


def check_prompts(requests, tokens, pipe):
    """Says which prompts will not show what they ask for."""
    for request in requests:
        for prompt in request.prompts:
            if request.token not in prompt:
                print(f"the prompt {prompt!r} does not name {request.token} and will not show it", file=sys.stderr)
            for word in re.findall(r"<[^<>\s]+>", prompt):
                if word not in tokens:
                    print(f"the prompt {prompt!r} names {word}, which --embeds does not bring", file=sys.stderr)
            said = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)  # with all tokens of a word of several vectors
            if len(pipe.tokenizer(said).input_ids) > pipe.tokenizer.model_max_length:
                print(f"the prompt {prompt!r} is too long and will be cut off", file=sys.stderr)


def noise_number(place, number, n):
    """The number that keys the noise of image `n` of prompt `number` of the request at `place` in input.json."""
    return 1_000_000 * place + 1000 * number + n


def settings_of(args, dtype, requests):
    """What decides how the images look, as a dict of plain types: settings.json."""
    return dict(prompts={request.key: request.prompts for request in requests}, checkpoint=digests_of(args.checkpoint),
                embeds=[digest_of(path) for path in args.embeds],
                steps=args.steps, guidance=args.guidance, seed=args.seed, dtype=str(dtype))


def open_folder(output_dir, settings, requests):
    """Makes the folders; removes the images that were made with other settings.

    UserError on files that the scorer would count as images, and on images of which settings.json does not tell: those
    may be anyone's.
    """
    path = make_output_dir(output_dir) / "settings.json"
    known, to_delete = path.is_file(), []
    old = read_json(path) if known else None
    if known and not (isinstance(old, dict) and old.keys() == json.loads(settings).keys()):
        raise UserError(f"{path} is not of this script; move it away")
    same = known and path.read_bytes() == settings.encode()
    for request in requests:
        for number in range(len(request.prompts)):
            folder = make_output_dir(folder_of(output_dir, request, number))
            ours = {file_name(request, number, n) for n in range(IMAGES)}
            for file in folder.iterdir():
                if file.name in ours and not known:
                    raise UserError(f"{folder} holds {file.name}, and no {path} says how it was made; move it away")
                if file.name in ours:
                    to_delete += [] if same and file.stat().st_size else [file]
                elif file.name.startswith(f".source{request.key}_"):  # a write that was killed
                    to_delete.append(file)
                elif not file.name.startswith("."):
                    raise UserError(f"{folder} holds {file.name}, which the scorer would count; move it away")
    for file in to_delete:
        file.unlink()
    write_atomic(path, settings.encode())


def main():
    args = parse_args()
    device = pick_device(args.device)
    dtype = amp_dtype(args.amp, device)
    requests = read_requests(args.input_json)
    tokens = [read_embeds(path)[0] for path in args.embeds]
    require_learnt(requests, tokens, args.input_json)  # before the checkpoint, which may take minutes
    lock(make_output_dir(args.output_dir))
    pipe = load_pipeline(args.checkpoint, device, dtype)
    for path in args.embeds:
        add_embeds(pipe, path)
    check_prompts(requests, tokens, pipe)
    open_folder(args.output_dir, json.dumps(settings_of(args, dtype, requests), indent=1), requests)

    wanted = {noise_number(place, number, n):
              (folder_of(args.output_dir, request, number) / file_name(request, number, n), prompt)
              for place, request in enumerate(requests) for number, prompt in enumerate(request.prompts)
              for n in range(IMAGES)}
    jobs = [(index, prompt) for index, (path, prompt) in wanted.items() if not path.exists()]
    with tqdm(total=len(wanted), initial=len(wanted) - len(jobs), desc="images", disable=None) as bar:
        for batch, images in generate(pipe, jobs, args.seed, args.steps, args.guidance, args.batch_size):
            for (index, _), image in zip(batch, images):
                save_png(wanted[index][0], image)
            bar.update(len(batch))
    print(f"{len(wanted)} images in {args.output_dir}")


if __name__ == "__main__":
    run(main)
