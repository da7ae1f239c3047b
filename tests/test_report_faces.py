"""The report of 2020's problems 1 and 2, from tiny checkpoints and made-up faces and records."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import p4_vae.inference
import p5_gan.inference
from conftest import ROOT, call
from files import save_checkpoint
from p4_vae.model import VAE
from p5_gan.model import Discriminator, Generator
from p5_gan.studies import RECIPES
from report import build, p5
from report.layers import trace
from UNet import UNet
from utils import UserError

MEASURES = dict(face_rate=0.5, kid=0.01, frechet=0.1, diversity=0.9, nearest=30.0)


def save(folder, name, kind, model, config, rows, **rest):
    """A checkpoint and the record of its training."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = dict(beta="auto", epochs=2, batch_size=8, lr=0.001, muon_lr=0.02, weight_decay=0.01, warmup=2, ema=0.9)
    save_checkpoint(folder / name, kind=kind, config=config, recipe=recipe, metrics=rows[-1:], ema=model.state_dict(),
                    **rest)


@pytest.fixture(scope="module")
def chapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("chapters")
    torch.manual_seed(0)
    config = dict(latents=4, channels=2)
    mixture = dict(weights=torch.ones(1), means=torch.zeros(1, 4), factors=torch.eye(4)[None])
    rows = [dict(step=step, epoch=step / 2, mse=0.01 / step, kl=9.0 * step, seconds=60) for step in (1, 2, 3, 4)]
    vae = VAE(**config)
    vae.set_eigenfaces(torch.randint(256, (20, 3, 64, 64)))  # so that the latents of faces differ
    save(root / "p4_vae/checkpoints", "vae.pt", "p4_vae", vae, config, rows,
         latents=dict(mixture=mixture, attributes={}))
    pd.DataFrame([dict(beta=beta, prior=prior, count=100, mse=0.01, kl=9, **MEASURES)
                  for beta in ("1e-4", "1e-5", "1e-7", "auto") for prior in ("normal", "fitted")]).to_csv(
        root / "p4_vae/checkpoints/results.csv", index=False)
    rows = [dict(step=step, epoch=step / 2, real_logit=0.5, generated_logit=-0.5, accuracy=0.7, augmented=0.1,
                 seconds=60) for step in (1, 2, 3, 4)]
    save(root / "p5_gan/checkpoints", "gan.pt", "p5_gan", Generator(**config), config, rows)
    names = "gan", "vae_normal", "vae_fitted", "ddim", "ddpm", "real"
    pd.DataFrame([dict(name=name, checkpoint="" if name == "real" else "ab", count=100, **MEASURES)
                  for name in names]).to_csv(
        root / "p5_gan/checkpoints/faces.csv", index=False)
    recipes = [dict(recipe=name, checkpoint="ab" if name == "ours" else "", count=100, seconds=60, steps=9,
                    images=1280, **MEASURES) for name in RECIPES]
    pd.DataFrame(recipes).to_csv(
        root / "p5_gan/checkpoints/results.csv", index=False)
    (root / "p2_ddim/checkpoints").mkdir(parents=True)
    save_checkpoint(root / "p2_ddim/checkpoints/face64.pt", kind="p2_ddim", config=dict(channel=8, size=64),
                    recipe=dict(epochs=7), ema=UNet(channel=8).state_dict())
    (root / "p2_ddim/checkpoints/metrics.jsonl").write_text(json.dumps(dict(step=1, loss=0.5, seconds=90)) + "\n")
    return root


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A folder of 30 validation faces, and their attributes beside it."""
    folder = tmp_path_factory.mktemp("my faces") / "faces"
    folder.mkdir()
    rng, lines = np.random.default_rng(0), ["30", "Male Smiling"]
    for number in range(8001, 8031):
        Image.fromarray(rng.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(folder / f"{number:06d}.png")
        lines.append(f"{number:06d}.jpg {1 if number % 2 else -1} {1 if number % 3 else -1}")
    (folder.parent / "list.txt").write_text("\n".join(lines))
    return folder


def test_the_report_on_faces_is_whole(chapters, faces, tmp_path):
    call(build, "--quick", "--assignment", "dlcv2020_hw3", "--only", "p4", "--chapters", chapters, "--faces",
         faces, "--attributes", faces.parent / "list.txt", "--device", "cpu", "--output_dir", tmp_path)
    call(build, "--quick", "--assignment", "dlcv2020_hw3", "--only", "p5", "--chapters", chapters, "--device",
         "cpu", "--output_dir", tmp_path)
    pdf = (tmp_path / "assignments/dlcv2020_hw3/report_p4_p5.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 4
    text = "".join((ROOT / f"report/{part}.typ").read_text() for part in ("p4", "p5"))
    named = {name for name in re.findall(r'(?:drawing|picture)\("(\w+)"|/(p4_\w+)\.png', text) for name in name if name}
    assert named == {path.stem for path in (tmp_path / "report/build").glob("p*_*.*g")}
    for script, name in (p4_vae.inference, "p4_vae/checkpoints/vae"), (p5_gan.inference, "p5_gan/checkpoints/gan"):
        call(script, "--checkpoint", chapters / f"{name}.pt", "--grid", tmp_path / "out.png", "--device", "cpu")
        shown = tmp_path / f"report/build/{name[:2]}_samples.png"
        assert (tmp_path / "out.png").read_bytes() == shown.read_bytes()  # the wrapper's picture
    p4, p5 = (json.loads((tmp_path / f"report/build/{part}.json").read_text()) for part in ("p4", "p5"))
    assert p4["minutes"] == p5["minutes"] == 4 and p4["faces"] == 30 and len(set(p4["numbers"])) == 10
    assert p4["printed"][0].startswith("VAE(") and p5["printed"][1].startswith("Discriminator(")
    assert [row["name"] for row in p5["faces"]] == ["gan", "vae_normal", "vae_fitted", "ddim", "ddpm", "real"]


def test_missing_records_are_told(tmp_path, faces):
    for part, name in (("p4", "p4_vae/checkpoints/metrics.jsonl"), ("p5", "p5_gan/checkpoints/metrics.jsonl")):
        with pytest.raises(UserError, match=f"there is no {tmp_path}/{name}"):
            call(build, "--quick", "--only", part, "--assignment", "dlcv2020_hw3", "--chapters", tmp_path,
                 "--output_dir", tmp_path, "--faces", faces, "--attributes", faces.parent / "list.txt")
    with pytest.raises(UserError, match="there is no .*nowhere, which p4 needs; name it with --faces"):
        call(build, "--quick", "--output_dir", tmp_path, "--faces", tmp_path / "nowhere")


def test_the_drawing_follows_the_modules():
    generator, discriminator = Generator(8, 2), Discriminator(2)
    drawn = trace([*generator.first, *generator.layers], lambda: generator(torch.randn(2, 8)))
    assert [shape for _, _, shape in drawn] == [(256,), (8, 8, 8), (4, 16, 16), (2, 32, 32), (3, 64, 64)]
    assert drawn[1][1] == "4×4, /2"
    layers = [*discriminator.layers, discriminator.last]
    drawn = trace(layers, lambda: discriminator(torch.randn(1, 3, 64, 64)))
    assert [shape for _, _, shape in drawn] == [(2, 32, 32), (4, 16, 16), (8, 8, 8), (16, 4, 4), (1, 1, 1)]
    assert len(p5.find_noises(p5.NOISES)) >= 8
