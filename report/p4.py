"""2020's problem 1 in the report: the autoencoder's architecture, curves, reconstructions, samples, latents."""

import json

from plots import TEXT_WIDTH, image_grid

import pandas as pd
import torch

from faces import attributes_of, faces_to_test, read_attributes, save_grid
from files import load_checkpoint, read_jsonl
from p4_vae.evaluate import evaluate
from p4_vae.inference import generate, reconstruct
from p4_vae.model import load_model
from p4_vae.studies import SHOWN, draw_curves, draw_embedding, embed
from report.layers import draw_chains, trace
from report.records import require_records



def architecture(path, model):
    """Draws encoder and decoder as one forward pass runs them; returns the two parts of what PyTorch prints."""
    x, z = torch.rand(1, 3, 64, 64), torch.zeros(1, model.latents)
    device = next(model.parameters()).device
    draw_chains(path, {"encoder": ((3, 64, 64), trace(model.encoder, lambda: model.encode(x.to(device)))),
                       "decoder": ((model.latents,), trace(model.decoder, lambda: model.decode(z.to(device))))})
    encoder, decoder = str(model).split("\n  (decoder)")
    return [encoder, f"  (decoder){decoder}"]


def build(folder, checkpoints, source, attributes, device, quick):
    """Draws the figures into `folder` and returns the numbers that p4.typ shows.

    checkpoints: the folder of vae.pt, of its training's metrics.jsonl and of results.csv. source: a FaceSource with
    the validation faces; attributes: the file that tells who of them smiles. quick: few faces.
    """
    require_records(checkpoints, {"metrics.jsonl": "p4_vae/train.py", "results.csv": "p4_vae/studies.py --output"})
    metrics = read_jsonl(checkpoints / "metrics.jsonl")
    model, latents = load_model(checkpoints / "vae.pt", device)
    content = load_checkpoint(checkpoints / "vae.pt", "p4_vae", ["recipe", "config"])
    faces = faces_to_test([source])
    faces = faces.take(slice(40 if quick else 1000))
    ten = faces.draw(10, seed=0)
    printed = architecture(folder / "p4_architecture.svg", model)
    draw_curves(folder / "p4_curves.svg", metrics)
    rows, errors = reconstruct(model, ten.images)
    image_grid(folder / "p4_pairs.svg", torch.cat([ten.images, *rows]), 10, row_names=["test image", "reconstruction"],
               column_names=[f"{error:.4f}" for error in errors.tolist()], width=TEXT_WIDTH)
    for name, mixture in ("p4_samples", None), ("p4_fitted", latents["mixture"]):  # as the wrapper writes them
        save_grid(folder / f"{name}.png", generate(model, range(32), 0, mixture))
    has = attributes_of(faces, read_attributes(attributes), SHOWN)
    draw_embedding(folder / "p4_tsne.svg", embed(model, faces), dict(has))
    rows_of_study = pd.read_csv(checkpoints / "results.csv", dtype=dict(beta=str))
    mse, kl = evaluate(model, faces.images)
    return dict(parameters=sum(p.numel() for p in model.parameters()), printed=printed, recipe=content["recipe"],
                config=content["config"], epochs=metrics[-1]["epoch"], steps=metrics[-1]["step"],
                minutes=sum(row["seconds"] for row in metrics) / 60, first=metrics[0], last=metrics[-1], mse=mse, kl=kl,
                faces=len(faces.images), numbers=ten.numbers.tolist(),
                results=json.loads(rows_of_study.to_json(orient="records")))
