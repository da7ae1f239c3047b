"""NYCU's lab 6 in the report: the network, both grids, the way from noise to a scene, the studies."""

import json

from plots import BLUE, GREEN, TEXT_WIDTH, VERMILION, image_grid, plt, points_with_bars, save
from utils import UserError

import pandas as pd
import torch

from files import digest_of, load_checkpoint, read_jsonl
from p1_ddpm.inference import visited_timesteps
from p1_ddpm.studies import as_text, means
from p7_clevr.evaluator import Evaluator
from p7_clevr.inference import SHIPPED, STRIP, generate, load_guide, number_scenes, strip_timesteps
from p7_clevr.model import Level, load_model
from p7_clevr.scenes import OBJECTS, multi_hot, official_sets
from p7_clevr.studies import DEFAULTS, FLAGS, MEASURES, TABLES, graders, sets_of
from report.p1 import losses
from report.records import require_records
from transforms import as_input


# --- The network --------------------------------------------------------------------------------

@torch.no_grad()
def levels(model):
    """The residual blocks of `model` in the order in which they run, as dicts: way ("down" or "up"), side of the map,
    channels (in, out), whether positions and objects are attended to, parameters. Seen in one forward pass."""
    seen = []

    def record(name):
        def hook(level, inputs, output):
            seen.append(dict(way=name.split(".")[0], side=output.shape[-1],
                             channels=(inputs[0].shape[1], output.shape[1]), positions=level.positions is not None,
                             objects=level.objects is not None, parameters=sum(p.numel() for p in level.parameters())))
        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules()
               if isinstance(module, Level)]
    device = next(model.parameters()).device
    model(torch.zeros(1, *model.image_shape, device=device), torch.ones(1, device=device),
          torch.zeros(1, len(OBJECTS), device=device))
    for handle in handles:
        handle.remove()
    return seen


# --- Pictures -----------------------------------------------------------------------------------

def missed(evaluator, images, sets):
    """For each of the uint8 images (N, 3, 64, 64) those of its objects that the evaluator does not find: N sets."""
    scores = evaluator.scores(as_input(images))
    return [set(names) - {OBJECTS[i] for i in row.topk(len(names)).indices} for row, names in zip(scores, sets)]


def scene_grid(path, images, sets, misses, columns=8):
    """Draws uint8 images (N, 3, 64, 64) under the names of their objects, missed ones coloured and in italics."""
    rows, lines = len(images) // columns, max(map(len, sets))
    figure, panels = plt.subplots(rows, columns, figsize=(TEXT_WIDTH, rows * (TEXT_WIDTH / columns + 0.09 * lines)),
                                  squeeze=False)
    for axes, image, names, wrong in zip(panels.flat, images, sets, misses):
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="none")
        axes.axis("off")
        for line, name in enumerate(reversed(names)):
            style = dict(color=VERMILION, style="italic") if name in wrong else {}
            axes.text(0.5, 1.03 + 0.115 * line, name, transform=axes.transAxes, ha="center", fontsize=5.5, **style)
    save(path, figure)


# --- The studies --------------------------------------------------------------------------------

def read_results(path, checkpoint):
    """The rows of results.csv by the shipped graders, with the settings of TABLES, about the file `checkpoint`, and, in
    the table "ablation", about other networks; UserError when a table is missing."""
    rows = pd.read_csv(path, dtype=dict.fromkeys(["checkpoint", *FLAGS], str))
    judged = rows.graders == graders(path.parent / "evaluator.pth", path.parent)
    wanted = pd.DataFrame([dict(table=table, **as_text({**DEFAULTS, **changes}, FLAGS))
                           for table, settings in TABLES.items() for changes in settings])
    rows = rows[judged & ((rows.checkpoint == digest_of(checkpoint)) | (rows.table == "ablation"))].merge(wanted)
    found = wanted.merge(rows, how="left")
    lacking = sorted(set(found[found.accuracy.isna()].table))
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)} for {checkpoint}; run p7_clevr/studies.py --output {path}")
    return rows


def over_seeds(rows):
    """Means over the seeds of the `rows` of one table, with steps, guidance and scale as numbers."""
    return means(rows, FLAGS, MEASURES).astype(dict(steps=int, guidance=float, scale=float))


def guidance_figure(path, table):
    """Accuracy by both graders, scenes with an object too many, and Frechet ratio against the strength of guidance."""
    figure, panels = plt.subplots(1, 3, figsize=(TEXT_WIDTH, 1.8))
    table = table.sort_values("guidance")
    for axes, name, series in zip(panels, ("accuracy", "scenes with an object too many", "Fréchet ratio"), (
            (("accuracy", BLUE, "evaluator"), ("judge", VERMILION, "judge")), (("too_many", GREEN, None),),
            (("frechet_ratio", GREEN, None),))):
        for column, colour, label in series:
            beside = 0.08 * (column == "judge")  # else equal values would hide each other
            points_with_bars(axes, table.guidance + beside, table[column], table[f"{column}_std"], colour, label=label)
        axes.set(xlabel="guidance w", title=name)
    panels[0].legend(*[[plt.Line2D([], [], color=colour, marker="o", markerfacecolor="white", linestyle="none")
                        for colour in (BLUE, VERMILION)],
                       ["evaluator", "judge"]], loc="lower right")
    save(path, figure)


# --- All of it ----------------------------------------------------------------------------------

def build(folder, checkpoints, device, quick):
    """Draws the figures into `folder` and returns the numbers that p7.typ shows.

    checkpoints: the folder of scenes.pt and the graders, of the records of their trainings and of results.csv. quick:
    few steps.
    """
    require_records(checkpoints, {"scenes.jsonl": "p7_clevr/train.py", "results.csv": "p7_clevr/studies.py --output"})
    checkpoint = checkpoints / "scenes.pt"
    content = load_checkpoint(checkpoint, "p7_clevr", ["recipe", "config"])
    model, alphas_cumprod = load_model(checkpoint, device)
    rows = read_results(checkpoints / "results.csv", checkpoint)
    tables = {name: over_seeds(group) for name, group in rows.groupby("table") if name != "ablation"}
    tables["ablation"] = rows[rows.table == "ablation"]
    records = {name: read_jsonl(checkpoints / f"{name}.jsonl") for name in ("scenes", "evaluator", "judge", "noisy")}
    networks = {name: Evaluator(checkpoints / f"{name}.pth", device) for name in ("evaluator", "judge")}
    shipped = SHIPPED._replace(steps=2) if quick else SHIPPED
    keep = strip_timesteps(visited_timesteps(shipped, alphas_cumprod))

    def draw(scenes, sampling=shipped, name="evaluator", scale=0.0, keep=()):
        """(images, states of the last scene) for a list of (number, objects), seed 0."""
        guide = load_guide(checkpoints / f"{name}.pth", scale, alphas_cumprod, device)
        batches = list(generate(model, alphas_cumprod, scenes, sampling, 0, device, 32, guide, keep))
        return torch.cat([images for _, images, _ in batches]), batches[-1][2]

    losses(folder / "p7_losses.svg", records["scenes"])
    guidance_figure(folder / "p7_guidance.svg", tables["guidance"])
    lists = official_sets()
    images, states = draw(number_scenes(*lists.values(), [STRIP]), keep=keep)
    image_grid(folder / "p7_denoising.svg", torch.stack([states[t][-1] for t in keep]), len(keep),
               column_names=[f"t = {t}" for t in keep])
    accuracies = {}
    for (name, sets), own in zip(lists.items(), images[:-1].split([len(sets) for sets in lists.values()])):
        scene_grid(folder / f"p7_{name}.svg", own, sets, missed(networks["evaluator"], own, sets))
        accuracies[name] = {grader: network.eval(as_input(own), multi_hot(sets))
                            for grader, network in networks.items()}
    others = [names for kind in ("held_out", "four", "five") for names in sets_of(kind)[:8]]
    own, _ = draw(number_scenes([], [], [], others))
    scene_grid(folder / "p7_others.svg", own, others, missed(networks["evaluator"], own, others))
    first = number_scenes([], lists["new_test"][:8])
    scales = tables["classifier"].groupby("guide").scale.max()
    compared = {"w = 0": draw(first, shipped._replace(guidance=0.0))[0],
                f"w = {shipped.guidance:g}": images[len(lists["test"]):][:8]}
    for guide in "evaluator", "noisy":
        compared[f"{guide},\ns = {scales[guide]:g}"] = draw(first, name=guide, scale=scales[guide])[0]
    image_grid(folder / "p7_guided.svg", torch.cat(list(compared.values())), 8, row_names=list(compared), width=5.6)
    return dict(
        parameters=sum(p.numel() for p in model.parameters()), levels=levels(model), recipe=content["recipe"],
        network=content["config"]["network"], schedule=content["config"]["schedule"], sampling=SHIPPED._asdict(),
        steps=records["scenes"][-1]["step"], loss=records["scenes"][-1]["loss"],
        loss_eps=records["scenes"][-1]["loss_eps"],
        minutes={name: sum(line["seconds"] for line in lines) / 60 for name, lines in records.items()},
        graders={name: records[name][-1]["accuracy"] for name in ("evaluator", "judge", "noisy")},
        grader_parameters={name: sum(p.numel() for p in network.network.parameters())
                           for name, network in networks.items()},
        accuracies=accuracies, strip=keep,
        tables={name: json.loads(table.to_json(orient="records")) for name, table in tables.items()})
