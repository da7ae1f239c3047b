"""2024's problem 3 in the report: CLIP's right and wrong answers, the two concepts and the pictures of them."""

import json

from files import read_jsonl
from plots import BLUE, VERMILION, TEXT_WIDTH, image_grid, plt, save
from utils import UserError, amp_dtype

import pandas as pd
import torch
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from p6_personalize.evaluate import CONCEPTS, best_five, read_references, scores
from p6_personalize.inference import noise_number
from p6_personalize.model import (PIPELINE, Clip, add_embeds, default_guidance, digest_of_all, generate,
                                  load_pipeline)
from p6_personalize.prompts import IMAGES, PROMPT, read_requests
from p6_personalize.tiny.evaluate import ClipJudge, answers, single_objects, with_count
from p6_personalize.tiny.scenes import UNSEEN_LOOK, UNSEEN_OBJECT, caption, read_world
from p6_personalize.zero_shot import draw_cases
from p7_clevr.evaluator import CHECKPOINTS
from p7_clevr.scenes import OBJECTS
from report.records import require_records


def cases(clip, images, sets):
    """(five right answers, five wrong ones): lists of (picture, predicted, label), each of another label.

    On pictures of one object, as zero_shot counts them, and where these do not suffice on pictures of two.
    """
    ones, labels = single_objects(images, sets)
    seen = [(image, [OBJECTS[label]], [OBJECTS[answer]])
            for image, label, answer in zip(ones, labels, answers(clip, ones, [PROMPT]))]
    twos, named = with_count(2, images, sets)
    found = ({}, {})
    for image, names, answer in [*seen, *zip(twos, named, ClipJudge(clip)(twos, 2))]:
        label, predicted = (",\n".join(sorted(objects)) for objects in (names, answer))
        found[predicted != label].setdefault(label, (to_pil_image(image), predicted, label))
    return [list(chosen.values())[:5] for chosen in found]


def curve_figure(path, records):
    """Image and text score of the eight validation images at each saved step, a panel for each concept's metrics."""
    figure, panels = plt.subplots(1, len(records), figsize=(TEXT_WIDTH, 1.7), squeeze=False)
    for axes, (token, metrics) in zip(panels[0], records.items()):
        for name, colour in ("image", BLUE), ("text", VERMILION):
            axes.plot([line["step"] for line in metrics], [line[f"{name}_score"] for line in metrics], color=colour,
                      label=f"{name} score")
        axes.set(title=token, xlabel="steps")
    panels[0][0].set_ylabel("100 cosine")
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(path, figure)


def build(folder, checkpoints, scenes_dir, device, quick):
    """Draws the figures into `folder` and returns the numbers that p6.typ shows.

    checkpoints: the folder with the tiny CLIP and pipeline, embeddings and records. scenes_dir: p7_clevr's data. quick:
    few steps.
    """
    require_records(checkpoints, {"new1.jsonl": "p6_personalize/train.py", "new2.jsonl": "p6_personalize/train.py",
                                  "results.csv": "p6_personalize/tiny/evaluate.py"})
    records = {f"<{name}>": read_jsonl(checkpoints / f"{name}.jsonl") for name in ("new1", "new2")}
    table = pd.read_csv(checkpoints / "results.csv", dtype=dict(networks=str))
    judged = ("clip", "pipeline", "new1.safetensors", "new2.safetensors")
    networks = digest_of_all(*(checkpoints / name for name in judged), CHECKPOINTS / "evaluator.pth")
    if set(table.get("networks", [])) != {networks}:
        raise UserError(f"{checkpoints / 'results.csv'} is of other networks than those beside it; run "
                        f"p6_personalize/tiny/evaluate.py --output {checkpoints / 'results.csv'}")
    clip = Clip(checkpoints / "clip", device)
    pipe = load_pipeline(checkpoints / "pipeline", device, amp_dtype("auto", device))
    draw_cases(folder / "p6_cases.svg", *cases(clip, *read_world(scenes_dir, "held_out")))

    def draw(jobs):
        """uint8 (jobs, 3, H, W): the pictures of a list of (number, prompt)."""
        batches = generate(pipe, jobs, 0, 2 if quick else 25, default_guidance(PIPELINE))
        return torch.cat([images for _, images in batches])

    requests, shown = read_requests(CONCEPTS / "input.json"), 8
    references = {request.key: read_references(CONCEPTS / request.key) for request in requests}
    image_grid(folder / "p6_concepts.svg", torch.stack([pil_to_tensor(x) for row in references.values() for x in row]),
               5, row_names=[request.token for request in requests], width=2.6)
    before = {"a sphere": "a photo of a sphere", f"a {UNSEEN_OBJECT}": caption([UNSEEN_OBJECT]),
              f"a blue cube,\nlook {UNSEEN_LOOK}": caption(["blue cube"], UNSEEN_LOOK)}
    image_grid(folder / "p6_before.svg", draw([(n, prompt) for prompt in before.values() for n in range(shown)]), shown,
               row_names=list(before), width=5)
    for name in "new1", "new2":
        add_embeds(pipe, checkpoints / f"{name}.safetensors")
    results, grid = [], []
    for place, request in enumerate(requests):
        for number, prompt in enumerate(request.prompts):
            pictures = draw([(noise_number(place, number, n), prompt) for n in range(shown if quick else IMAGES)])
            image, text = best_five(*scores(clip, [to_pil_image(x) for x in pictures], references[request.key],
                                            request.clip_prompts[number]))
            results.append(dict(prompt=prompt, image=image, text=text, baseline=request.baselines[number]))
            grid.append(pictures[:shown])
    image_grid(folder / "p6_images.svg", torch.cat(grid), shown, width=5,
               row_names=[row["prompt"].removeprefix("a photo of ").replace(" in the", ",\nin the").replace(
                   " and", "\nand") for row in results])
    curve_figure(folder / "p6_curve.svg", records)
    count = {name: sum(weight.numel() for weight in part.parameters()) for name, part in
             dict(unet=pipe.unet, vae=pipe.vae, text=pipe.text_encoder, clip=clip.model).items()}
    return dict(scores=results, parameters=count,
                results={f"{row.table}: {row.row}": json.loads(row.dropna().to_json()) for _, row in table.iterrows()},
                minutes={token: sum(line["seconds"] for line in metrics) / 60 for token, metrics in records.items()},
                steps={token: metrics[-1]["step"] for token, metrics in records.items()})
