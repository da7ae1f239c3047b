"""Problem 1's part of the report: the network's drawing, digits, the reverse process, the studies."""

import json

from files import digest_of, load_checkpoint, read_jsonl, save_png
from plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, TEXT_WIDTH, VERMILION, image_grid, plt, save
from utils import UserError, image_generators, randn

import numpy as np
import pandas as pd
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torchvision.utils import make_grid

from digit_classifier import classify, frechet_distance
from p1_ddpm.diffusion import SPACINGS
from p1_ddpm.evaluate import Judge, same_class_draw, summary
from p1_ddpm.inference import SHIPPED, digits, generate, sample
from p1_ddpm.model import Attention, ResidualBlock, load_model
from p1_ddpm.studies import DEFAULTS, FLAGS, OF_OTHERS, TABLES, as_text, means, settings
from report.records import require_records
from transforms import to_uint8

SAMPLER_NAMES = {"ddim": "DDIM", "ddpm": "Algorithm 2", "dpmpp": "DPM-Solver++"}
STATES = (1000, 800, 600, 400, 200, 0)
COLOURS = {"residual block": SKY, "attention": ORANGE, "convolution": GREY, "output": GREY}
SHORT = {"residual block": "residual", "convolution": "conv"}


# --- The architecture ---------------------------------------------------------------------------

@torch.no_grad()
def trace(model):
    """The blocks of `model` in the order in which they run: a list of dicts.

    name, kind, channels (in, out), side of the output's map, conditioned (does the embedding of t and label enter?),
    skip: the name of the earlier block whose output is concatenated to the input, or None. All of it is observed in
    one forward pass, so the drawing cannot differ from the code.
    """
    blocks, outputs = [], {}

    def hook(name):
        def record(module, inputs, output):
            x, previous = inputs[0], outputs[blocks[-1]["name"]] if blocks else inputs[0]
            added = x[:, previous.shape[1]:] if x.shape[1] > previous.shape[1] else None
            skip = next((n for n, o in outputs.items() if added is not None and torch.equal(o, added)), None)
            kind = {ResidualBlock: "residual block", Attention: "attention"}.get(
                type(module), "output" if name == "last" else "convolution")
            blocks.append(dict(name=name, kind=kind, channels=(x.shape[1], output.shape[1]), side=output.shape[-1],
                               conditioned=len(inputs) > 1, skip=skip))
            outputs[name] = output
        return record

    watched = [(name, module) for name, module in model.named_modules()
               if isinstance(module, (ResidualBlock, Attention)) or name in ("first", "downsample", "upsample", "last")]
    handles = [module.register_forward_hook(hook(name)) for name, module in watched]
    device = next(model.parameters()).device
    x = torch.randn(1, *model.image_shape, generator=torch.Generator().manual_seed(0))
    model(x.to(device), torch.tensor([500], device=device), torch.tensor([7], device=device))
    for handle in handles:
        handle.remove()
    return blocks


def architecture(path, model):
    """Draws what `trace` has seen: one column for each block, one level for each resolution."""
    blocks = trace(model)
    sides = sorted({block["side"] for block in blocks}, reverse=True)
    place = {block["name"]: (1.2 * i, -1.5 * sides.index(block["side"])) for i, block in enumerate(blocks)}
    figure, axes = plt.subplots(figsize=(TEXT_WIDTH, 2.5))
    right = 1.2 * (len(blocks) - 1)
    axes.add_patch(FancyBboxPatch((0, 1.35), right, 0.35, boxstyle="round,pad=0.1", fc=PURPLE, alpha=0.6))
    axes.text(right / 2, 1.52, "embedding of timestep t + embedding of label y (one entry more: no label)", ha="center",
              va="center")
    for i, block in enumerate(blocks):
        x, y = place[block["name"]]
        axes.add_patch(FancyBboxPatch((x - 0.43, y - 0.45), 0.86, 0.9, boxstyle="round,pad=0.05",
                                      fc=COLOURS[block["kind"]], alpha=0.8))
        text = f"{SHORT.get(block['kind'], block['kind'])}\n{block['channels'][0]}\n→ {block['channels'][1]}"
        axes.text(x, y, text, ha="center", va="center")
        if i:
            x0, y0 = place[blocks[i - 1]["name"]]
            axes.add_patch(FancyArrowPatch((x0 + 0.48, y0), (x - 0.48, y), shrinkA=0, shrinkB=0, arrowstyle="-|>",
                                           mutation_scale=6))
        if block["conditioned"]:
            axes.plot([x, x], [1.25, y + 0.5], color=PURPLE, zorder=0)
        if block["skip"]:
            x0, y0 = place[block["skip"]]
            axes.add_patch(FancyArrowPatch((x0, y0 - 0.5), (x, y - 0.5), connectionstyle="arc3,rad=0.12", ls="--",
                                           arrowstyle="-|>", mutation_scale=8, color=BLUE))
    for side in sides:
        axes.text(-0.7, -1.5 * sides.index(side), f"{side}×{side}", ha="right", va="center")
    channels, height, width = model.image_shape
    for x, text in ((0, f"x: {height}×{width}×{channels}\nin {model.patch}×{model.patch} patches"),
                    (right, f"patches\nto v: {height}×{width}×{channels}")):
        axes.text(x, -0.65, text, ha="center", va="top")
    axes.set(xlim=(-1.7, right + 0.8), ylim=(0.6 - 1.5 * len(sides), 1.9))
    axes.axis("off")
    save(path, figure)
    return blocks


# --- Digits -------------------------------------------------------------------------------------

def digits_of_same_noise(model, alphas_cumprod, device, sampling=SHIPPED):
    """(a grid of ten digits of each class, what it was on the way) with seed 0.

    The grid: uint8 (10 classes, 3, 28, 28), row k the class k; a column has the noise of 0_001.png, 0_002.png, ... in
    every row. On the way: {t: the grid} at every timestep that the sampler visits.
    """
    labels = torch.arange(model.num_classes, device=device).repeat_interleave(10)
    noise = randn(image_generators(DEFAULTS["seed"], range(1, 11)), model.image_shape, device)
    x = noise.repeat(model.num_classes, 1, 1, 1)
    states = {len(alphas_cumprod) - 1: x}
    generators = image_generators(DEFAULTS["seed"], range(len(x)), stream=1)  # what a sampler adds is not x_T again
    for t, x in sample(model, alphas_cumprod, labels, x, generators, sampling):
        states[t] = x
    states = {t: to_uint8((x + 1) / 2).cpu() for t, x in states.items()}
    return states[0], states


def reverse_process(path, states, alphas_cumprod, row_names=()):
    """Draws six of the `states`, {t: uint8 (rows, 3, 28, 28)}, as columns, for each of STATES the nearest that is not
    shown already; returns their (t, image's share). The share is sqrt(alpha-bar_t).
    """
    total, shown = len(alphas_cumprod) - 1, []
    for wanted in STATES:
        shown.append(min(states.keys() - shown, key=lambda t: abs(1000 * t / total - wanted)))
    image_grid(path, torch.stack([states[t] for t in shown], dim=1).flatten(0, 1), len(shown), row_names=row_names,
               column_names=[f"t = {t}" for t in shown], width=5)
    return [(t, alphas_cumprod[t].sqrt().item()) for t in shown]


def strengths(path, model, alphas_cumprod, device):
    """Draws the first image of each digit, from the same noise, with four strengths of guidance."""
    rows = (0.0, 1.0, SHIPPED.guidance, 4.0)
    images = [images for guidance in rows for _, images, _ in
              generate(model, alphas_cumprod, *digits(10, 1), SHIPPED._replace(guidance=guidance), DEFAULTS["seed"],
                       device)]
    image_grid(path, torch.cat(images), 10, row_names=[f"w = {guidance:g}" for guidance in rows], width=4.5)


def losses(path, metrics):
    """Draws the loss of each quarter of the timesteps over the epochs."""
    table = pd.DataFrame(metrics)
    figure, axes = plt.subplots(figsize=(4.5, 1.9))
    for i, (colour, name) in enumerate(zip((GREEN, BLUE, ORANGE, VERMILION), ("first", "second", "third", "last"))):
        axes.plot(table.epoch, table.loss_quarters.str[i], color=colour, label=f"{name} quarter of t")
    axes.plot(table.epoch, table.loss, "k--", label="all")
    axes.set(xlabel="epoch", ylabel="mean squared error of v", yscale="log")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(path, figure)


# --- The studies --------------------------------------------------------------------------------

def guidance_figure(path, rows):
    """Accuracy, Frechet ratio and diversity against the strength of guidance, for the rows of table guidance."""
    table = rows.astype(dict(guidance=float)).sort_values("guidance")
    figure, panels = plt.subplots(1, 3, figsize=(TEXT_WIDTH, 1.7))
    for axes, (column, name, colour) in zip(panels, (("accuracy", "accuracy, %", BLUE), ("frechet_ratio",
                                                     "Fréchet ratio", VERMILION), ("diversity", "diversity", GREEN))):
        axes.plot(table.guidance, table[column], color=colour, marker="o")
        axes.set(xlabel="guidance w", ylabel=name)
    save(path, figure)


def steps_figure(path, rows):
    """Frechet ratio and diversity against the number of steps, one series for each sampler and spacing; a line for all
    steps of Algorithm 2. rows: of the tables steps, spacing and reference."""
    table = rows[rows.table != "reference"].drop_duplicates(FLAGS).astype(dict(steps=int)).sort_values("steps")
    series = [(SAMPLER_NAMES[name], name, "log_snr") for name in SAMPLER_NAMES]
    series += [("DDIM, trimmed strides", "ddim", "trimmed"), ("DDIM, equal strides in t", "ddim", "uniform")]
    figure, panels = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 1.9))
    for (name, sampler, spacing), colour, marker in zip(series, (BLUE, VERMILION, GREEN, PURPLE, ORANGE), "osDv^"):
        group = table[(table.sampler == sampler) & (table.spacing == spacing)]
        for axes, column in zip(panels, ("frechet_ratio", "diversity")):
            axes.plot(group.steps, group[column], color=colour, marker=marker, label=name)
    for axes, column, label in zip(panels, ("frechet_ratio", "diversity"), ("Fréchet ratio", "diversity")):
        for row in rows[rows.table == "reference"].to_dict("records"):
            axes.axhline(row[column], color=VERMILION, linestyle="--", label=f"{SAMPLER_NAMES['ddpm']}, all steps")
        axes.set(xlabel="steps", ylabel=label, xscale="log")
        ticks = sorted(set(table.steps))
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
    panels[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(path, figure)


def passes(row, alphas_cumprod):
    """How often an image goes through the network with the setting of a row of results: twice at a guided step."""
    low, high = map(float, row["interval"].split(" to "))
    thousandths = [1000 * t / (len(alphas_cumprod) - 1)
                   for t in SPACINGS[row["spacing"]](alphas_cumprod, int(row["steps"]))[:-1]]
    return len(thousandths) + (float(row["guidance"]) > 0) * sum(low <= t <= high for t in thousandths)


def read_results(path, checkpoint, timesteps):
    """The rows of results.csv that the report shows: those of `checkpoint`, which has so many timesteps, with the
    settings of TABLES, and those of the tables ema and trainings, which are about other networks.

    UserError when a row is missing; that of table reference, which takes as long as the others together, may be.
    """
    results = pd.read_csv(path, dtype=dict.fromkeys(["checkpoint", *FLAGS], str))
    wanted = pd.DataFrame([dict(table=table, **as_text(setting)) for table in TABLES if table not in OF_OTHERS
                           for setting in settings(table, timesteps)])
    own = results[results.checkpoint == digest_of(checkpoint)].drop_duplicates(["table", *FLAGS], keep="last")
    rows = wanted.merge(own, how="left")
    missing = set(rows[rows.accuracy.isna()].table) - {"reference"}
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))} for {checkpoint}; run p1_ddpm/studies.py "
                        f"--output {path}")
    return pd.concat([rows.dropna(subset="accuracy"), results[results.table.isin(["ema", "trainings"])]])


def trainings(rows):
    """The rows of table trainings as a list of dicts, one for each checkpoint: how well the grader recognises digits
    without guidance, by DDIM and by Algorithm 2, and the means of the shipped sampling."""
    found = []
    for checkpoint, own in rows.groupby("checkpoint", sort=False):
        made = means(own).set_index(["sampler", "guidance"])
        row = dict(checkpoint=checkpoint, epochs=int(own.epochs.iloc[0]))
        for name in "ddim", "ddpm":
            row[name], row[f"{name}_std"] = made.loc[(name, "0.0"), ["accuracy", "accuracy_std"]]
        for name in "panel", "panel_least", "frechet_ratio", "diversity":
            columns = [name, f"{name}_std"]
            row |= made.loc[(SHIPPED.sampler, str(SHIPPED.guidance)), columns].to_dict()
        found.append(row)
    return found


def as_records(rows):
    """A DataFrame of results as a list of dicts of plain values, which JSON and typst know."""
    return json.loads(rows.astype(dict(steps=int, guidance=float)).to_json(orient="records"))


# --- How good the images are --------------------------------------------------------------------

def quality(model, alphas_cumprod, judges, device, per_class, sampling=SHIPPED):
    """{domain: the measures of evaluate.py}, as plain numbers, for the digits of hw2_1.sh and what they are judged by.

    judges: {domain: its Judge} in the order of the model's classes.
    """
    keys, labels = digits(model.num_classes, per_class)
    images = torch.cat([images for _, images, _ in
                        generate(model, alphas_cumprod, keys, labels, sampling, DEFAULTS["seed"], device)])
    return {domain: measures_of(judge, images[labels // 10 == i], labels[labels // 10 == i] % 10)
            for i, (domain, judge) in enumerate(judges.items())}


def measures_of(judge, images, labels):
    """The measures of evaluate.py for images of a domain, and how well its classifiers know real validation digits."""
    measures = judge(images, labels)
    grader, *panel = [100 * (classify(network, judge.val_images)[1] == judge.val_labels).float().mean().item()
                      for network in (judge.classifier, *judge.panel)]
    return dict(summary(measures), images=len(images), frechet_floor=measures["frechet_floor"], grader=grader,
                graders=[min(panel), max(panel)], real_training=len(judge.train_images),
                real_validation=len(judge.val_images),
                copies={kind: 100 * measures[f"copies_{kind}"] for kind in ("generated", "real")},
                nearest={kind: [measures[f"nearest_{kind}"].min().item(), measures[f"nearest_{kind}"].median().item()]
                         for kind in ("generated", "real")})


def damaged(judge, labels, floor):
    """{what was done to real training digits of these labels: their Frechet ratio}, to compare others with."""
    rng = np.random.default_rng(0)
    real = judge.train_images[same_class_draw(judge.train_labels, labels, rng)]
    noise = torch.from_numpy(rng.normal(scale=8, size=tuple(real.shape)))
    images = dict(noise=(real + noise).round().clamp(0, 255).byte(), one_pixel=real.roll(1, dims=3),
                  two_pixels=real.roll(2, dims=3))
    return {name: frechet_distance(classify(judge.classifier, changed)[0], judge.val_features) / floor
            for name, changed in images.items()}


# --- All of it ----------------------------------------------------------------------------------

def build(folder, checkpoints, data_dir, device, quick):
    """Draws the figures into `folder` and returns the numbers that p1.typ shows.

    checkpoints: the folder of ddpm.pt, of its training's record metrics.jsonl and of its studies' results.csv.
    quick: few images.
    """
    require_records(checkpoints, {"metrics.jsonl": "p1_ddpm/train.py", "results.csv": "p1_ddpm/studies.py --output"})
    metrics = read_jsonl(checkpoints / "metrics.jsonl")
    checkpoint = checkpoints / "ddpm.pt"
    model, alphas_cumprod = load_model(checkpoint, device)
    rows = read_results(checkpoints / "results.csv", checkpoint, len(alphas_cumprod) - 1)
    content = load_checkpoint(checkpoint, "p1_ddpm", ["recipe", "config"])
    judge = Judge(data_dir)
    blocks = architecture(folder / "p1_architecture.svg", model)
    grid, states = digits_of_same_noise(model, alphas_cumprod, device)
    image_grid(folder / "p1_grid.svg", grid, 10, row_names=range(10), column_names=range(1, 11), width=4.2)
    save_png(folder / "p1_strip.png", make_grid(grid, nrow=10, padding=1, pad_value=255))
    shares = reverse_process(folder / "p1_states.svg", {t: images[:1] for t, images in states.items()}, alphas_cumprod)
    strengths(folder / "p1_strengths.svg", model, alphas_cumprod, device)
    losses(folder / "p1_losses.svg", metrics)
    guidance_figure(folder / "p1_guidance.svg", rows[rows.table == "guidance"])
    steps_figure(folder / "p1_steps.svg", rows[rows.table.isin(["steps", "spacing", "reference"])])
    measures = quality(model, alphas_cumprod, dict(mnistm=judge), device, 3 if quick else 100)["mnistm"]
    labels = torch.arange(10).repeat_interleave(measures["images"] // 10)
    return dict(
        parameters=sum(p.numel() for p in model.parameters()), blocks=len(blocks), epochs=metrics[-1]["epoch"],
        minutes=sum(epoch["seconds"] for epoch in metrics) / 60, loss=metrics[-1]["loss"],
        quarters=[metrics[i]["loss_quarters"] for i in (0, -1)], sampling=SHIPPED._asdict(),
        shares=shares, visited=list(states), schedule=content["config"]["schedule"], recipe=content["recipe"],
        quality=dict(measures, damaged=damaged(judge, labels, measures["frechet_floor"])), results=as_records(rows),
        candidates=[dict(row, passes=passes(row, alphas_cumprod)) for row in
                    as_records(means(rows[rows.table == "candidates"]).sort_values("frechet_ratio"))],
        trainings=trainings(rows[rows.table == "trainings"]), checkpoint=digest_of(checkpoint),
        **{table: as_records(means(rows[rows.table == table])) for table in ("seeds", "ddim")})
