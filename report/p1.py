"""Problem 1's part of the report: the network's drawing, digits, the reverse process, the studies."""

import argparse
import json

import pandas as pd
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from digit_classifier import classify
from p1_ddpm.diffusion import SAMPLERS, guided_predictor
from p1_ddpm.evaluate import Judge, summary
from p1_ddpm.inference import add_sampling_arguments, check_steps, generate, load_model
from p1_ddpm.model import Attention, ResidualBlock
from p1_ddpm.study import FLAGS, TABLES, as_text, digest_of, means, settings
from report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, image_grid, plt, save
from utils import UserError, image_generators, load_checkpoint, randn, to_uint8

SAMPLER_NAMES = {"ddpm": "Algorithm 2", "ddim": "DDIM", "dpmpp": "DPM-Solver++"}
STATES = (1000, 800, 600, 400, 200, 0)
COLOURS = {"residual block": SKY, "attention": ORANGE, "convolution": GREY, "output": GREY}
SHORT = {"residual block": "residual", "convolution": "conv"}


def sampling_arguments(*flags):
    """The Namespace of inference.py's sampling flags, at their defaults but for `flags`."""
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    return parser.parse_args(list(flags))


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
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    model(torch.randn(1, 3, 28, 28, generator=generator).to(device), torch.tensor([500], device=device),
          torch.tensor([7], device=device))
    for handle in handles:
        handle.remove()
    return blocks


def architecture(path, model):
    """Draws what `trace` has seen: one column for each block, one level for each resolution."""
    blocks = trace(model)
    sides = sorted({block["side"] for block in blocks}, reverse=True)
    place = {block["name"]: (1.2 * i, -1.5 * sides.index(block["side"])) for i, block in enumerate(blocks)}
    figure, axes = plt.subplots(figsize=(6.7, 2.8))
    right = 1.2 * (len(blocks) - 1)
    axes.add_patch(FancyBboxPatch((0, 1.35), right, 0.35, boxstyle="round,pad=0.1", fc=PURPLE, alpha=0.6))
    axes.text(right / 2, 1.52, "embedding of step t + embedding of label y (one more entry: no label)", ha="center",
              va="center", fontsize=8)
    for i, block in enumerate(blocks):
        x, y = place[block["name"]]
        axes.add_patch(FancyBboxPatch((x - 0.43, y - 0.4), 0.86, 0.8, boxstyle="round,pad=0.05",
                                      fc=COLOURS[block["kind"]], alpha=0.8))
        text = f"{SHORT.get(block['kind'], block['kind'])}\n{block['channels'][0]}\n→ {block['channels'][1]}"
        axes.text(x, y, text, ha="center", va="center", fontsize=6.5)
        if i:
            axes.add_patch(FancyArrowPatch(place[blocks[i - 1]["name"]], (x, y), shrinkA=15, shrinkB=15,
                                           arrowstyle="-|>", mutation_scale=6))
        if block["conditioned"]:
            axes.plot([x, x], [1.25, y + 0.45], color=PURPLE, lw=1, zorder=0)
        if block["skip"]:
            x0, y0 = place[block["skip"]]
            axes.add_patch(FancyArrowPatch((x0, y0 - 0.45), (x, y - 0.45), connectionstyle="arc3,rad=0.12", ls="--",
                                           arrowstyle="-|>", mutation_scale=8, color=BLUE))
    for side in sides:
        axes.text(-0.7, -1.5 * sides.index(side), f"{side}×{side}", ha="right", va="center", fontsize=8)
    for x, text in ((0, "x: 28×28×3\nin 2×2 patches"), (right, "patches\nto v: 28×28×3")):
        axes.text(x, -0.6, text, ha="center", va="top", fontsize=6.5)
    axes.set(xlim=(-1.7, right + 0.8), ylim=(0.6 - 1.5 * len(sides), 1.9))
    axes.axis("off")
    save(path, figure)
    return blocks


# --- Digits -------------------------------------------------------------------------------------

@torch.no_grad()
def digits_of_same_noise(model, alphas_cumprod, device, args):
    """uint8 (100, 3, 28, 28): row d the digit d; a column has the noise of 0_001.png, 0_002.png, ... in every row."""
    labels = torch.arange(10, device=device).repeat_interleave(10)
    noise = randn(image_generators(args.seed, range(1, 11)), (3, 28, 28), device).repeat(10, 1, 1, 1)
    predict = guided_predictor(model, labels, model.null_label, alphas_cumprod, args.guidance, args.interval)
    generators = image_generators(args.seed, range(100))
    levels = check_steps(args, alphas_cumprod)
    *_, (_, images) = SAMPLERS[args.sampler](predict, noise, levels, alphas_cumprod, generators, args.eta)
    return to_uint8((images + 1) / 2).cpu()


def reverse_process(model, alphas_cumprod, device):
    """The first "0" of hw2_1.sh on its way by Algorithm 2, every step of it.

    Returns uint8 (len(STATES), 3, 28, 28) and the image's share sqrt(alpha-bar_t) in each state.
    """
    total = len(alphas_cumprod) - 1
    args = sampling_arguments("--sampler", "ddpm", "--steps", str(total))
    keep = [t * total // 1000 for t in STATES]
    [(_, _, states)] = generate(model, alphas_cumprod, [(0, 1)], args, device, keep)
    return torch.cat([states[t] for t in keep]), alphas_cumprod[keep].sqrt().tolist()


def losses(path, metrics):
    """Draws the loss of each quarter of the noise steps over the epochs."""
    table = pd.DataFrame(metrics)
    figure, axes = plt.subplots(figsize=(4.5, 2.6))
    for i, (colour, name) in enumerate(zip((GREEN, BLUE, ORANGE, VERMILION), ("first", "second", "third", "last"))):
        axes.plot(table.epoch, table.loss_quarters.str[i], color=colour, label=f"{name} quarter of t")
    axes.plot(table.epoch, table.loss, "k--", lw=1, label="all")
    axes.set(xlabel="epoch", ylabel="mean squared error of v", yscale="log")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save(path, figure)


def guidance_figure(path, study):
    """Accuracy, Frechet ratio and diversity against the strength of guidance."""
    rows = study[study.table == "guidance"]
    figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.1))
    for ax, (column, name, colour) in zip(axes, (("accuracy", "accuracy, %", BLUE), ("frechet_ratio", "Fréchet ratio",
                                                 VERMILION), ("diversity", "diversity", GREEN))):
        ax.plot(rows.guidance.astype(float), rows[column], "o-", color=colour)
        ax.set(xlabel="guidance", ylabel=name)
    save(path, figure)


def steps_figure(path, study):
    """Frechet ratio and accuracy against the number of steps, one line for each sampler."""
    rows = study[study.table.isin(["steps", "reference"])]
    figure, axes = plt.subplots(1, 2, figsize=(6.5, 2.3))
    for (name, group), colour in zip(rows.groupby("sampler"), (VERMILION, BLUE, GREEN)):
        for ax, column in zip(axes, ("frechet_ratio", "accuracy")):
            ax.plot(group.steps.astype(int), group[column], "o-", color=colour, label=SAMPLER_NAMES[name])
    for ax, label in zip(axes, ("Fréchet ratio", "accuracy, %")):
        ax.set(xlabel="steps", ylabel=label, xscale="log")
        ticks = sorted(set(rows.steps))
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
    axes[0].legend(fontsize=7)
    save(path, figure)


# --- All of it ----------------------------------------------------------------------------------

def quality(model, alphas_cumprod, args, data_dir, device, per_class):
    """The measures of evaluate.py for the digits that hw2_1.sh draws, and of what they are judged by, as plain numbers."""
    numbers = [(digit, number) for digit in range(10) for number in range(1, per_class + 1)]
    images = torch.cat([images for _, images, _ in generate(model, alphas_cumprod, numbers, args, device)])
    judge = Judge(data_dir)
    measures = judge(images, torch.tensor([digit for digit, _ in numbers]))
    grader = (classify(judge.classifier, judge.val_images)[1] == judge.val_labels).float().mean().item()
    return dict(summary(measures), images=len(images), frechet_floor=measures["frechet_floor"],
                real_training=len(judge.train_images), real_validation=len(judge.val_images), grader=100 * grader,
                nearest={kind: [measures[f"nearest_{kind}"].min().item(), measures[f"nearest_{kind}"].median().item()]
                         for kind in ("drawn", "real")})


def read_study(path, checkpoint, total):
    """The rows of study.csv behind the report's tables: those of `checkpoint`, of `total` noise steps, whose flags are
    the defaults but for what their table varies; and the rows of table ema, which are about a training.

    UserError when a row is missing; that of table reference, which takes as long as the others together, may be.
    """
    flags = [flag for flag in FLAGS if flag != "per_class"]
    study = pd.read_csv(path, dtype=dict.fromkeys(["checkpoint", *flags], str))
    wanted = pd.DataFrame([dict(table=table, **as_text(setting, flags)) for table in TABLES if table != "ema"
                           for setting in settings(table, sampling_arguments(), total)])
    rows = wanted.merge(study[study.checkpoint == digest_of(checkpoint)].drop_duplicates(["table", *flags], keep="last"),
                        how="left")
    missing = set(rows[rows.accuracy.isna()].table) - {"reference"}
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))} for {checkpoint}; run p1_ddpm/study.py")
    rows = pd.concat([rows.dropna(subset="accuracy"), study[study.table == "ema"]])
    rows = rows.astype(dict(steps=int, guidance=float, seed=int))
    return rows.sort_values(["sampler", "spacing", "steps", "guidance"], kind="stable")


def build(args, folder, device):
    """Draws the figures into `folder` and returns the numbers that p1.typ shows.

    Beside the checkpoint lie the record of its training, metrics.jsonl, and of its study, study.csv.
    """
    checkpoint = args.p1_checkpoint
    records = [checkpoint.parent / name for name in ("metrics.jsonl", "study.csv")]
    for path, maker in zip(records, ("train.py", "study.py")):
        if not path.exists():
            raise UserError(f"there is no {path}; p1_ddpm/{maker} makes it")
    metrics = [json.loads(line) for line in records[0].read_text().splitlines()]
    model, alphas_cumprod = load_model(checkpoint, device)
    study = read_study(records[1], checkpoint, len(alphas_cumprod) - 1)
    content = load_checkpoint(checkpoint, "p1_ddpm", ["recipe", "schedule"])
    sampling = sampling_arguments()
    blocks = architecture(folder / "p1_architecture.png", model)
    image_grid(folder / "p1_grid.png", digits_of_same_noise(model, alphas_cumprod, device, sampling), 10,
               row_names=range(10), column_names=range(1, 11), scale=1.1)
    states, signal = reverse_process(model, alphas_cumprod, device)
    image_grid(folder / "p1_states.png", states, len(STATES), column_names=[f"t = {t}" for t in STATES], scale=1.8)
    losses(folder / "p1_losses.png", metrics)
    guidance_figure(folder / "p1_guidance.png", study)
    steps_figure(folder / "p1_steps.png", study)
    return dict(
        parameters=sum(p.numel() for p in model.parameters()), blocks=len(blocks), epochs=metrics[-1]["epoch"],
        minutes=sum(epoch["seconds"] for epoch in metrics) / 60, loss=metrics[-1]["loss"],
        quarters=[metrics[i]["loss_quarters"] for i in (0, -1)],
        sampler=sampling.sampler, steps=sampling.steps, spacing=sampling.spacing, guidance=sampling.guidance,
        interval=sampling.interval, signal=signal,
        schedule=content["schedule"][0], noise_steps=len(alphas_cumprod) - 1, recipe=content["recipe"],
        quality=quality(model, alphas_cumprod, sampling, args.data_dir, device, 3 if args.quick else 100),
        study=json.loads(study.to_json(orient="records")),
        **{table: json.loads(means(study[study.table == table]).sort_values("frechet_ratio").to_json(orient="records"))
           for table in ("choice", "confirm", "seeds")})
