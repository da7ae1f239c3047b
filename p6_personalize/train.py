"""Learns one concept from three to ten images as a new word (textual inversion, Gal et al. 2022).

    python3 p6_personalize/train.py hw2_data/textual_inversion/0 --checkpoint sd-v1-4.ckpt --initializer_token dog
    python3 p6_personalize/train.py p6_personalize/tiny/concepts/0 --initializer_token sphere --batch_size 8
    python3 p6_personalize/train.py FOLDER --initializer_token dog --dry_run     # two steps; --resume goes on

--checkpoint is a folder in diffusers' format or Stable Diffusion 1's single file. Writes into --output_dir:
    step_*/learned_embeds.safetensors   every --save_every steps, for pipe.load_textual_inversion; beside it
                                        samples.png, eight images of --validation_prompt from fixed noise
    learned_embeds.safetensors          the last one, or with --choose the one that CLIP likes best
    last.pt, metrics.jsonl              for --resume; a line for each saved step

For a style, the second concept: --placeholder_token "<new2>" --learnable_property style --initializer_token cartoon
--steps 3000, and an --output_dir of its own. 2024's README has the tiny world's commands; <new1> takes 45 seconds.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (UserError, add_amp_argument, argument_parser, autocast, float_between, int_between, nonempty_path,
                   run)

import torch
from torchvision.utils import make_grid

import training
from dataset import list_images
from files import digest_of, make_output_dir, save_png, write_atomic
from p6_personalize.evaluate import read_references
from p6_personalize.inversion import add_token, diffusion_loss, encode, random_square, save_embeds, token_ids, validate
from p6_personalize.model import PIPELINE, Clip, check_begun, default_guidance, digests_of, load_pipeline
from p6_personalize.prompts import TEMPLATES


def parse_args():
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("data_dir", type=nonempty_path, help="the folder of the concept's images")
    add("--output_dir", type=nonempty_path, default=ROOT / "p6_personalize/output/concept", help="where embeddings go")
    add("--checkpoint", type=nonempty_path, default=PIPELINE, help="the pipeline's folder or single file")
    add("--placeholder_token", default="<new1>", help="the new word")
    add("--initializer_token", required=True, help="the word of one token that it starts from")
    add("--num_vectors", type=int_between(1), default=1, help="embeddings of the new word")
    add("--learnable_property", choices=sorted(TEMPLATES), default="object", help="what the images have in common")
    add("--steps", dest="epochs", metavar="STEPS", type=int_between(1), default=300, help="training steps")
    add("--epochs", type=int_between(1), default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # as messages call it
    add("--batch_size", type=int_between(1), default=1, help="images per step")
    add("--lr", type=float_between(0), default=1e-3, help="Adam's learning rate, constant")
    add("--crop", type=float_between(0.1, 1), default=0.9, help="smallest side of a random crop, as a share")
    add("--save_every", type=int_between(1), default=50, help="steps between saved embeddings")
    add("--validation_prompt", help="a prompt with the new word, to see what it has learnt at each saved step")
    add("--choose", type=nonempty_path, metavar="CLIP", help="a CLIP that chooses a step by image + 2.5 text")
    add("--guidance", type=float_between(1), help="of the samples; 1 is none, not given 7.5, with a tiny pipeline 2")
    add("--gradient_checkpointing", action="store_true", help="compute twice to save memory")
    add("--resume", action="store_true", help="go on from last.pt in --output_dir")
    add("--dry_run", action="store_true", help="train two steps, write nothing")
    add("--seed", type=int_between(0), default=0, help="seed of all random numbers")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    add_amp_argument(parser)  # of all that is not learnt
    return parser.parse_args()


def main():
    args = parse_args()
    if args.validation_prompt and args.placeholder_token not in args.validation_prompt:
        raise UserError(f"--validation_prompt {args.validation_prompt!r} lacks the new word {args.placeholder_token}")
    if (args.choose or args.guidance) and not args.validation_prompt:
        raise UserError("--choose and --guidance are about images of a --validation_prompt; give one")
    checkpoint, choose = vars(args).pop("checkpoint"), vars(args).pop("choose")  # --resume compares their content
    references = read_references(args.data_dir)
    process, saved = training.start(args, "p6_personalize", "learned_embeds.safetensors")
    if process.count > 1:
        raise UserError("textual inversion trains in one process; start it without torchrun")
    clip = Clip(choose, process.device) if choose else None
    config = dict(references=[digest_of(args.data_dir / name) for name in list_images(args.data_dir)],
                  checkpoint=digests_of(checkpoint), choose=choose and digests_of(choose))
    check_begun(saved, config, args.output_dir / "last.pt")
    pipe = load_pipeline(checkpoint, process.device)
    for part in pipe.unet, pipe.vae:  # not the text encoder, through which the gradient comes to the rows
        part.to(process.dtype or torch.float32)
    rows = add_token(pipe, args.placeholder_token, args.initializer_token, args.num_vectors)
    if args.gradient_checkpointing:
        pipe.unet.train()  # where the libraries do it; neither network has dropout or batch statistics
        pipe.unet.enable_gradient_checkpointing()
    adam = torch.optim.Adam([dict(params=rows.parameters(), lr=args.lr, highest_lr=args.lr)])
    parts = training.make_parts(rows, [adam], process, saved)
    metrics, means = saved["metrics"] if saved else [], training.Means()
    size, templates = pipe.unet.config.sample_size * pipe.vae_scale_factor, TEMPLATES[args.learnable_property]
    print(f"{len(references)} images, {rows.rows.numel()} numbers to learn, {process.device}, "
          f"{process.dtype or torch.float32}", flush=True)

    for step in training.steps(args, process, saved, args.epochs):
        images = torch.stack([random_square(references[i], size, args.crop)
                              for i in torch.randint(len(references), (args.batch_size,)).tolist()])
        prompts = [templates[i].format(args.placeholder_token)
                   for i in torch.randint(len(templates), (args.batch_size,)).tolist()]
        with autocast(process.device, process.dtype):
            text = pipe.text_encoder(token_ids(pipe, prompts))[0]
            loss = diffusion_loss(pipe.unet, encode(pipe, images.to(process.device)), text, pipe.scheduler)
        training.update(parts, loss.mean(), 1.0, decay=0.0, clip=None)
        means.add(loss=loss)
        if not training.due(args, step, args.epochs):
            continue
        if not rows.rows.isfinite().all():
            raise UserError(f"the embedding is not finite at step {step + 1}; train anew with a lower --lr")
        folder = make_output_dir(args.output_dir / f"step_{step + 1:05d}")
        save_embeds(folder / "learned_embeds.safetensors", args.placeholder_token, rows.rows)
        if args.validation_prompt:
            samples, marks = validate(pipe, process.dtype, args.validation_prompt,
                                      args.guidance or default_guidance(checkpoint), clip, references,
                                      args.validation_prompt.replace(args.placeholder_token, args.initializer_token))
            save_png(folder / "samples.png", make_grid(samples, nrow=4))
            means.add(**marks)
        training.log(metrics, means, step, 1, args, parts, process)
        training.save_training(args.output_dir, parts, step, kind="p6_personalize", config=config,
                               recipe=training.recipe(args), metrics=metrics)
    if not args.dry_run:
        best = max(metrics, key=lambda row: row["image_score"] + 2.5 * row["text_score"]) if clip else metrics[-1]
        chosen = args.output_dir / f"step_{best['step']:05d}" / "learned_embeds.safetensors"
        write_atomic(args.output_dir / chosen.name, chosen.read_bytes())
        print(f"{args.output_dir / chosen.name} is that of step {best['step']}")


if __name__ == "__main__":
    run(main)
