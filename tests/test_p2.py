"""Problem 2: the sampler, its scripts and the training of UNet.py. Narrow networks, small images, no data set."""

import functools
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from p2_ddim import ddim, train  # noqa: E402
from UNet import UNet, channel_of  # noqa: E402
from utils import UserError  # noqa: E402

torch.set_num_threads(1)  # for networks this small, a second thread costs more than it gives


# --- Training -----------------------------------------------------------------------------------

@pytest.fixture
def faces(tmp_path):
    """A zip of twelve 40x50 JPEGs with a centred bright disc of varying colour, and one file that is no image."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:50, :40]
    disc = ((y - 24.5) ** 2 + (x - 19.5) ** 2 < 200)[..., None]
    path = tmp_path / "my faces.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("faces/readme.txt", "no image")
        for i in range(12):
            Image.fromarray((disc * rng.integers(100, 255, 3)).astype(np.uint8)).save(tmp_path / "face.jpg")
            archive.write(tmp_path / "face.jpg", f"faces/{i:06d}.jpg")
    return path


def run_train(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    monkeypatch.setattr(train, "sample", functools.partial(ddim.sample, steps=1))
    train.main()


def tiny(data, out, *more):
    return ["--data_dir", data, "--output_dir", out, "--size", 32, "--channel", 4, "--epochs", 2, "--batch_size", 4,
            "--warmup", 2, "--save_every", 2, "--device", "cpu", *more]


def test_training_resumes_bit_for_bit(faces, tmp_path, monkeypatch):
    run_train(monkeypatch, *tiny(faces, tmp_path / "whole"))

    def interrupt(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_slim", interrupt)
        run_train(patch, *tiny(faces, tmp_path / "parts"))
    assert torch.load(tmp_path / "parts/last.pt", weights_only=True)["step"] == 2
    with pytest.raises(UserError, match="resume"):
        run_train(monkeypatch, *tiny(faces, tmp_path / "parts"))
    with pytest.raises(UserError, match="same flags"):
        run_train(monkeypatch, *tiny(faces, tmp_path / "parts", "--resume", "--lr", 1))
    run_train(monkeypatch, *tiny(faces, tmp_path / "parts", "--resume"))

    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 6
    for part in ("model", "ema"):
        a, b = (state[part]["shadow"] if part == "ema" else state[part] for state in (whole, parts))
        assert all(torch.equal(a[name], b[name]) for name in a)
    for i, moments in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, parts["optimizer"]["state"][i][name]) for name, value in moments.items())
    assert (tmp_path / "whole/samples_000006.png").read_bytes() == (tmp_path / "parts/samples_000006.png").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
