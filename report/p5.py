"""2020's problem 2 in the report: the players' architecture and record, faces, and three kinds of generators."""

import json
from pathlib import Path

from plots import BLUE, GREEN, ORANGE, TEXT_WIDTH, VERMILION, image_grid, plt, save

import pandas as pd
import torch

from faces import save_grid
from files import load_checkpoint, read_jsonl
from p2_ddim.ddim import sample, step_generators, stretch
from p2_ddim.inference import find_noises, load_noise
from p2_ddim.model import load_model as load_unet
from p4_vae.inference import generate as generate_vae
from p4_vae.model import load_model as load_vae
from p5_gan.inference import generate
from p5_gan.model import Discriminator, load_model
from p5_gan.studies import RECIPES
from report.layers import draw_chains, trace
from report.records import require_records

NOISES = Path(__file__).resolve().parents[1] / "p2_ddim/noise64"


def architecture(path, generator, discriminator):
    """Draws both players as one forward pass runs them; returns what PyTorch prints of them."""
    device = next(generator.parameters()).device
    z, x = torch.zeros(1, generator.latents, device=device), torch.zeros(1, 3, 64, 64)
    players = {"generator": [*generator.first, *generator.layers],
               "discriminator": [*discriminator.layers, discriminator.last]}
    draw_chains(path, {"generator": ((generator.latents,), trace(players["generator"], lambda: generator(z))),
                       "discriminator": ((3, 64, 64), trace(players["discriminator"], lambda: discriminator(x)))})
    return [str(generator), str(discriminator)]


def match_figure(path, metrics):
    """Whether the players match: the logits and the discriminator's accuracy over the epochs."""
    table = pd.DataFrame(metrics)
    figure, (logits, accuracy) = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 1.8))
    for name, label, colour in (("real_logit", "real", BLUE), ("generated_logit", "generated", ORANGE)):
        logits.plot(table.epoch, table[name], color=colour, label=label)
    logits.set(xlabel="epoch", title="mean logit")
    logits.legend()
    for name, label, colour in (("accuracy", "discriminator's accuracy", GREEN),
                                ("augmented", "share augmented", VERMILION)):
        accuracy.plot(table.epoch, table[name], color=colour, label=label)
    accuracy.set(xlabel="epoch", ylim=(0, 1))
    accuracy.legend()
    save(path, figure)


def side_by_side(path, chapters, device, gan_faces, quick):
    """Eight faces of each model, one row each."""
    vae, latents = load_vae(chapters / "p4_vae/checkpoints/vae.pt", device)
    unet = load_unet(chapters / "p2_ddim/checkpoints/face64.pt", device)
    noises = torch.cat([load_noise(path) for path in find_noises(NOISES)[:8]]).to(device)
    ddim, ddpm = (stretch(sample(unet, noises, 2 if quick else 50, eta, step_generators(0, range(8)))).cpu()
                  for eta in (0.0, 1.0))
    rows = {"VAE, N(0, I)": generate_vae(vae, range(8), 0), "VAE, fitted": generate_vae(vae, range(8), 0,
                                                                                       latents["mixture"]),
            "GAN": gan_faces[:8], "DDIM": ddim, "DDPM": ddpm}
    image_grid(path, torch.cat(list(rows.values())), 8, row_names=list(rows), width=4.6)


def build(folder, chapters, device, quick):
    """Draws the figures into `folder` and returns the numbers that p5.typ shows.

    chapters: the folder that holds p5_gan/checkpoints with gan.pt, its training's metrics.jsonl, faces.csv and
    results.csv, and those of p4_vae and p2_ddim, of the latter with its metrics.jsonl, to stand beside it.
    """
    checkpoints = chapters / "p5_gan/checkpoints"
    require_records(checkpoints, {"metrics.jsonl": "p5_gan/train.py", "faces.csv": "p5_gan/evaluate.py --output",
                                  "results.csv": "p5_gan/studies.py --output"})
    beside = chapters / "p2_ddim/checkpoints"
    require_records(beside, {"metrics.jsonl": "p2_ddim/train.py"})
    metrics = read_jsonl(checkpoints / "metrics.jsonl")
    generator = load_model(checkpoints / "gan.pt", device)
    content = load_checkpoint(checkpoints / "gan.pt", "p5_gan", ["recipe", "config"])
    discriminator = Discriminator(content["config"]["channels"]).eval()
    printed = architecture(folder / "p5_architecture.svg", generator, discriminator)
    match_figure(folder / "p5_match.svg", metrics)
    faces = generate(generator, range(32), 0)
    save_grid(folder / "p5_samples.png", faces)  # as the wrapper writes them
    side_by_side(folder / "p5_models.svg", chapters, device, faces, quick)
    rows, recipes = (json.loads(pd.read_csv(checkpoints / name).to_json(orient="records"))
                     for name in ("faces.csv", "results.csv"))
    for row in recipes:
        flags = RECIPES.get(row["recipe"], [])
        row["channels"] = dict(zip(flags, flags[1:])).get("--channels", content["config"]["channels"])
    diffusion = read_jsonl(beside / "metrics.jsonl")
    return dict(diffusion=dict(minutes=sum(row["seconds"] for row in diffusion) / 60, loss=diffusion[-1]["loss"]),
                parameters=[sum(p.numel() for p in network.parameters()) for network in (generator, discriminator)],
                printed=printed, recipe=content["recipe"], config=content["config"], epochs=metrics[-1]["epoch"],
                steps=metrics[-1]["step"], minutes=sum(row["seconds"] for row in metrics) / 60, first=metrics[0],
                lowest=min(metrics, key=lambda row: row["accuracy"]), last=metrics[-1], recipes=recipes, faces=rows)
