"""Makes the repository's modules importable from any current directory, keeps figures off the screen, runs scripts and
trainings, and makes a data set of random digits for the tests that need all three domains."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: F401  before torch, as every script does

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import training
from files import read_jsonl

MODULES = sorted(path for pattern in ("*.py", "report/*.py", "p?_*/**/*.py") for path in ROOT.glob(pattern))
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in MODULES
                 if '\nif __name__ == "__main__"' in path.read_text())
SHELL_SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for pattern in ("*.sh", "assignments/*/*.sh")
                       for path in ROOT.glob(pattern))
# A wrapper's: its python3 is the one that runs the tests.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def call(script, *arguments):
    """The main() of a script's module with these arguments, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        script.main()


def close(values, expected, share=1e-4):
    """Whether no value is further from the expected one than this share of the largest expected value.

    Float32 carries 7 digits, and processors and orders of sums differ in the last of them.
    """
    return (values - expected).abs().max() <= share * expected.abs().max()


def assert_near(actual, expected, share):
    """`close`, with the values in the message."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=share * expected.abs().max().item())


def randomised(model, seed=0):
    """`model` in evaluation mode, its zero-initialised layers random too, so that every part of it matters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@contextlib.contextmanager
def interrupted():
    """A training in this context ends as soon as it has written its first last.pt."""
    save_training = training.save_training

    def stop(*args, **description):
        save_training(*args, **description)
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_training", stop)
        yield


def assert_same_training(folder, other):
    """The last.pt and metrics.jsonl in two folders hold the same bit for bit, but for what the clock says; returns what
    last.pt holds."""
    first, second = (torch.load(path / "last.pt", weights_only=True) for path in (folder, other))
    for path, content in (folder, first), (other, second):
        assert read_jsonl(path / "metrics.jsonl") == content["metrics"]
    for row in first["metrics"] + second["metrics"]:
        del row["seconds"], row["images_per_second"]
    assert first.keys() == second.keys()
    for key, content in first.items():
        if key in ("kind", "config", "recipe"):
            assert content == second[key]
        else:
            torch.testing.assert_close(second[key], content, rtol=0, atol=0, msg=lambda message: f"{key}: {message}")
    return first


@pytest.fixture(scope="module")
def one_thread():
    """For networks of a few channels a second thread costs more than it gives, tenfold where something else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The course's layout with 40 random digits a domain and split; USPS's are grey."""
    root = tmp_path_factory.mktemp("hw2 data")
    for number, domain in enumerate(("mnistm", "svhn", "usps")):
        folder = root / "digits" / domain
        for images in "data", "test":
            (folder / images).mkdir(parents=True)
        for split in range(3):
            names = [f"{split * 40 + i:05d}.png" for i in range(40)]
            for i, name in enumerate(names):
                pixels = np.random.default_rng([number, split, i]).integers(0, 256, (28, 28, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert("L" if domain == "usps" else "RGB").save(
                    folder / ("data", "data", "test")[split] / name)
            table = pd.DataFrame(dict(image_name=names, label=[i % 10 for i in range(40)]))
            table.to_csv(folder / ("train.csv", "val.csv", "test.csv")[split], index=False)
    return root


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(script, flags...): runs a script of the repository in two processes and returns what subprocess.run
    returns; whatever waits for ever is ended after five minutes and fails."""
    def run(script, *flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}",
                   ROOT / script, *flags]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            stdout, stderr = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its workers, by force after half a minute
            pytest.fail("two processes waited for ever:\n" + "".join(process.communicate(timeout=100)))
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
    return run


AGREE = """
import hashlib, importlib, sys
sys.path.insert(0, {root!r})
import utils, torch, training

networks, make_parts = [], training.make_parts

def remember(model, *args):
    networks.append(model)
    return make_parts(model, *args)

def main():
    training.make_parts = remember
    for module, flags in {trainings!r}:
        sys.argv[1:] = flags
        importlib.import_module(module).main()
    for network in networks:
        content = torch.cat([tensor.detach().flatten() for tensor in network.{tensors}()]).numpy().tobytes()
        sys.stdout.write(f"weights {{hashlib.sha256(content).hexdigest()}}\\n")

utils.run(main)
"""


@pytest.fixture
def train_together(tmp_path, torchrun):
    """train_together((module, flags), ...): `torchrun` of each main(), such as p1_ddpm.train's; returns what it prints.

    Fails where the two processes' networks do not agree: each draws its own noise and images, so they do only if
    gradients are averaged. tensors: all that have to agree, where these are more than the parameters.
    """
    def run(*trainings, tensors="parameters"):
        trainings = [(module, list(map(str, flags))) for module, flags in trainings]
        (tmp_path / "agree.py").write_text(AGREE.format(root=str(ROOT), trainings=trainings, tensors=tensors))
        done = torchrun(tmp_path / "agree.py")
        assert done.returncode == 0, done.stderr
        weights = re.findall("weights (.+)", done.stdout)
        assert len(weights) == 2 * len(set(weights)) and len(set(weights)) >= len(trainings)
        return done.stdout
    return run
