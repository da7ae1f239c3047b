"""Problem 1: the diffusion mathematics, training, the wrapper hw2_1.sh, the grader and the evaluation."""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

import digit_classifier
from dataset import load_split
from p1_ddpm import diffusion, evaluate, inference, train
from p1_ddpm.model import Attention, UNet
from utils import UserError, image_generators, randn, save_checkpoint, save_png, write_atomic

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(channels=[8, 16], blocks=1)


# --- Schedule and forward process ---------------------------------------------------------------

def test_linear_schedule_has_the_known_values():
    alphas_cumprod = diffusion.noise_schedule("linear", 1000)
    assert alphas_cumprod.dtype == torch.float64 and len(alphas_cumprod) == 1001
    known = {0: 1, 1: 0.9999, 2: 0.999780092072, 22: 0.993220357296, 962: 8.5730961e-5, 982: 5.7877932e-5}
    for t, value in known.items():
        assert alphas_cumprod[t].item() == pytest.approx(value, rel=1e-7)


def test_cosine_schedule_is_the_closed_form():
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    alphas_cumprod = diffusion.noise_schedule("cosine", 1000)
    for t in (1, 250, 500, 900):  # before beta is cut at 0.999
        assert alphas_cumprod[t].item() == pytest.approx(f[t] / f[0], rel=1e-9)


def test_forward_process_has_the_moments_of_equation_4():
    torch.manual_seed(0)
    alphas_cumprod = diffusion.noise_schedule()
    x0 = torch.full((20000, 1, 1, 1), 0.7)
    x = diffusion.diffuse(x0, torch.full((20000,), 400), torch.randn_like(x0), alphas_cumprod)
    alpha_bar = alphas_cumprod[400].item()
    assert x.mean().item() == pytest.approx(0.7 * math.sqrt(alpha_bar), abs=0.02)
    assert x.var().item() == pytest.approx(1 - alpha_bar, rel=0.03)


def test_loss_is_algorithm_1_and_labels_are_dropped_at_the_given_rate():
    torch.manual_seed(0)
    alphas_cumprod, seen = diffusion.noise_schedule(), {}

    def model(x, t, labels):
        seen.update(x=x, t=t, labels=labels)
        return torch.zeros_like(x)

    x0, labels = torch.zeros(20000, 1, 2, 2), torch.full((20000,), 3)
    t, loss = diffusion.ddpm_loss(model, x0, labels, alphas_cumprod, null_label=10)
    # With x0 = 0 and a prediction of 0 the loss is |v|^2 = alpha-bar |eps|^2, and x_t is sqrt(1 - alpha-bar) eps.
    ratio = (alphas_cumprod[t] / (1 - alphas_cumprod[t])).float()
    torch.testing.assert_close(loss, ratio * seen["x"].square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)
    assert t.min() == 1 and t.max() == 1000 and torch.equal(t, seen["t"])
    assert set(seen["labels"].tolist()) == {3, 10}
    assert (seen["labels"] == 10).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_the_loss_of_a_perfect_network_is_zero():
    alphas_cumprod = diffusion.noise_schedule("cosine")

    def knows_x0(x, t, labels):  # v from x_t and x_0 = 0.4
        a, s = (part[:, None, None, None].float() for part in (alphas_cumprod[t].sqrt(), (1 - alphas_cumprod[t]).sqrt()))
        return a * (x - a * 0.4) / s - s * 0.4

    _, loss = diffusion.ddpm_loss(knows_x0, torch.full((500, 1, 2, 2), 0.4), torch.zeros(500).long(), alphas_cumprod, 10)
    assert loss.max() < 1e-6


# --- Samplers -----------------------------------------------------------------------------------

def exact_gaussian(alphas_cumprod, mean, std):
    """predict(x, t) of a network that knows E[x_0 | x_t] for x_0 ~ N(mean, std^2) exactly."""
    def predict(x, t):
        a, s = diffusion.signal_and_noise(alphas_cumprod, t)
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        return x0, (x - a * x0) / s
    return predict


@pytest.mark.parametrize("name, steps, eta", [("ddpm", 1000, 0), ("ddim", 200, 0), ("ddim", 1000, 1), ("dpmpp", 30, 0)])
def test_samplers_reach_the_moments_of_a_gaussian(name, steps, eta):
    mean, std = 0.3, 0.4
    alphas_cumprod = diffusion.noise_schedule()
    predict = exact_gaussian(alphas_cumprod, mean, std)
    generators = image_generators(0, [0])
    x = randn(generators, (20000,))
    levels = diffusion.uniform_levels(1000, steps)
    *_, (t, x) = diffusion.SAMPLERS[name](predict, x, levels, alphas_cumprod, generators, eta)
    assert t == 0
    assert x.mean().item() == pytest.approx(mean, abs=0.015)
    assert x.std().item() == pytest.approx(std, abs=0.015)


def bounded_model(x, t, labels):
    """A prediction of v whose x0 is 0.9 tanh(x + label / 10), so that clamping never acts."""
    a, s = diffusion.signal_and_noise(diffusion.noise_schedule(), int(t[0]))
    return (a * x - 0.9 * torch.tanh(x + labels[:, None, None, None] / 10)) / s


def sample_bounded(name, steps, eta=0.0, seed=0):
    alphas_cumprod = diffusion.noise_schedule()
    predict = diffusion.guided_predictor(bounded_model, torch.tensor([1, 5]), 10, alphas_cumprod, 0)
    generators = image_generators(seed, range(2))
    x = randn(generators, (3, 4, 4))
    return [x] + [x for _, x in diffusion.SAMPLERS[name](predict, x, diffusion.uniform_levels(1000, steps),
                                                         alphas_cumprod, generators, eta)]


@pytest.mark.parametrize("name", ["ddim", "dpmpp"])
def test_samplers_agree_with_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    shared = dict(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", timestep_spacing="trailing",
                  prediction_type="v_prediction")
    scheduler = (diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **shared) if name == "ddim"
                 else diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", final_sigmas_type="zero", **shared))
    scheduler.set_timesteps(20)
    ours = sample_bounded(name, 20)
    x = ours[0]
    for k, t in enumerate(scheduler.timesteps):  # diffusers counts steps from 0
        x = scheduler.step(bounded_model(x, torch.tensor([t + 1] * 2), torch.tensor([1, 5])), t, x).prev_sample
        torch.testing.assert_close(x, ours[k + 1], rtol=1e-3, atol=2e-4)


def test_ddim_with_eta_1_is_ancestral_sampling():
    for a, b in zip(sample_bounded("ddpm", 50), sample_bounded("ddim", 50, eta=1.0)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sample_bounded("ddim", 50, eta=0.5)[-1], sample_bounded("ddim", 50)[-1], atol=1e-2)


def test_levels_are_all_steps_or_equal_strides():
    assert diffusion.uniform_levels(1000, 1000) == list(range(1000, -1, -1))
    assert diffusion.uniform_levels(1000, 4) == [1000, 750, 500, 250, 0]
    for name in ("linear", "cosine"):
        alphas_cumprod = diffusion.noise_schedule(name)
        for steps in (1, 2, 7, 20, 200, 999, 1000):
            levels = diffusion.log_snr_levels(alphas_cumprod, steps)
            assert levels[0] == 1000 and levels[-1] == 0 and len(levels) == steps + 1
            assert all(a > b for a, b in zip(levels, levels[1:]))
        a, s = zip(*(diffusion.signal_and_noise(alphas_cumprod, t) for t in diffusion.log_snr_levels(alphas_cumprod, 12)[2:9]))
        strides = np.diff(np.log(a) - np.log(s))
        assert strides.max() / strides.min() < 1.05


def test_strides_in_log_snr_cost_fewer_steps():
    # The probability flow of N(0.3, 0.05^2), narrow as images are: each x_T has one x_0, known exactly.
    alphas_cumprod = diffusion.noise_schedule("cosine")
    predict = exact_gaussian(alphas_cumprod, 0.3, 0.05)
    x = torch.linspace(-2, 2, 9)[:, None]
    a, s = diffusion.signal_and_noise(alphas_cumprod, 1000)
    exact = 0.3 + 0.05 * (x - a * 0.3) / math.sqrt(a**2 * 0.05**2 + s**2)
    errors = []
    for levels in (diffusion.log_snr_levels(alphas_cumprod, 16), diffusion.uniform_levels(1000, 16)):
        *_, (_, x0) = diffusion.dpmpp(predict, x, levels, alphas_cumprod, None)
        errors.append((x0 - exact).abs().max().item())
    assert errors[0] < 0.005 and errors[0] < 0.1 * errors[1]


# --- Guidance -----------------------------------------------------------------------------------

def guided_calls(guidance, interval, steps=10, total=1000):
    """The images that the network sees in each of the sampler's steps, and the prediction at t = 10."""
    sizes = []

    def model(x, t, labels):
        sizes.append(len(x))
        return 0.1 * labels.float()[:, None, None, None] * torch.ones_like(x)

    alphas_cumprod = diffusion.noise_schedule(steps=total)
    predict = diffusion.guided_predictor(model, torch.tensor([2, 3]), 10, alphas_cumprod, guidance, interval)
    generators = image_generators(0, range(2))
    x = randn(generators, (3, 4, 4))
    list(diffusion.ddim(predict, x, diffusion.uniform_levels(total, steps), alphas_cumprod, generators))
    return list(sizes), predict(0.01 * x, 10)[1]


def test_guidance_0_is_the_conditional_model_alone():
    sizes, eps = guided_calls(0, (1, 1000))
    assert sizes == [2] * 10
    torch.testing.assert_close(eps[:, 0, 0, 0], torch.tensor([0.2, 0.3]), atol=1e-3, rtol=0)


def test_guidance_extrapolates_from_the_unconditional_model():
    sizes, eps = guided_calls(2, (1, 1000))
    assert sizes == [4] * 10
    torch.testing.assert_close(eps[:, 0, 0, 0], torch.tensor([3 * 0.2 - 2 * 1.0, 3 * 0.3 - 2 * 1.0]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("total", [1000, 50])
def test_guidance_skips_the_unconditional_pass_outside_its_interval(total):
    # t = T, 0.9 T, ..., 0.1 T
    assert guided_calls(2, (300, 700), total=total)[0] == [2, 2, 2, 4, 4, 4, 4, 4, 2, 2]


# --- The network --------------------------------------------------------------------------------

def random_unet(seed=0, **config):
    """A UNet whose zero-initialised layers are random too, so that every part of it matters."""
    torch.manual_seed(seed)
    model = UNet(**{**TINY, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_network_depends_on_image_time_and_label():
    model, x = random_unet(), torch.randn(1, 3, 28, 28)
    t, label = torch.tensor([500]), torch.tensor([3])
    out = model(x, t, label)
    assert out.shape == x.shape and out.dtype == torch.float32
    for other in (model(x + 0.1, t, label), model(x, t - 400, label), model(x, t, label + 1), model(x, t, label * 0 + 10)):
        assert (other - out).abs().max() > 1e-3


def test_attention_is_scaled_dot_product_attention():
    torch.manual_seed(0)
    attention = Attention(16, heads=2)
    torch.nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 16, 7, 7)
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
    q, k, v = (part.reshape(2, 49, 2, 8).transpose(1, 2) for part in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 49, 16).transpose(1, 2)
    torch.testing.assert_close(attention(x), x + attention.out(mixed.reshape(2, 16, 7, 7)), rtol=1e-4, atol=1e-5)


# --- Training -----------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """hw2_data with scikit-learn's 8x8 digits as MNIST-M: 64 training and 40 validation images."""
    folder = tmp_path_factory.mktemp("hw2 data")
    digits = load_digits()
    (folder / "digits/mnistm/data").mkdir(parents=True)
    for split, rows in (("train", range(64)), ("val", range(64, 104))):
        table = pd.DataFrame([(f"{i:05d}.png", digits.target[i]) for i in rows], columns=["image_name", "label"])
        table.to_csv(folder / f"digits/mnistm/{split}.csv", index=False)
        for i in rows:
            grey = Image.fromarray((digits.images[i] * 15.9).astype(np.uint8))
            grey.resize((28, 28)).convert("RGB").save(folder / f"digits/mnistm/data/{i:05d}.png")
    return folder


def run_train(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *map(str, arguments)])
    train.main()


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_resumed_training_equals_an_uninterrupted_one(tmp_path, data_dir, monkeypatch, capsys, amp):
    flags = ["--data_dir", data_dir, "--channels", 8, 16, "--epochs", 3, "--batch_size", 16, "--warmup", 4,
             "--dropout", 0.1, "--amp", amp, "--noise_steps", 20]
    run_train(monkeypatch, *flags, "--output_dir", tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(path, data):
        if b'"epoch": 2' in data:  # amid the files of the second epoch
            raise Killed
        write_atomic(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_atomic", kill)
        with pytest.raises(Killed):
            run_train(monkeypatch, *flags, "--output_dir", tmp_path / "parts")
    assert len(torch.load(tmp_path / "parts/last.pt", weights_only=True)["metrics"]) == 1
    for more, message in (([], "--resume"), (["--resume", "--lr", 1], "same flags"),
                          (["--resume", "--epochs", 4], "same flags")):
        with pytest.raises(UserError, match=message):
            run_train(monkeypatch, *flags, "--output_dir", tmp_path / "parts", *more)
    run_train(monkeypatch, *flags, "--output_dir", tmp_path / "parts", "--resume", "--dry_run")
    assert "epochs 2 to 2" in capsys.readouterr().out
    run_train(monkeypatch, *flags, "--output_dir", tmp_path / "parts", "--resume")

    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    for index, moments in whole["optimizer"]["state"].items():
        assert all(torch.equal(v, parts["optimizer"]["state"][index][k]) for k, v in moments.items())
    assert whole["optimizer"]["param_groups"] == parts["optimizer"]["param_groups"]
    assert all(torch.equal(v, parts["model"][k]) for k, v in whole["model"].items())
    assert all(torch.equal(v, parts["ema"]["shadow"][k]) for k, v in whole["ema"]["shadow"].items())
    lines = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3] and all(len(line["loss_quarters"]) == 4 for line in lines)
    assert Image.open(tmp_path / "parts/samples_003.png").size == (291, 291)
    averaged = parts["ema"]["shadow"]["first.weight"]
    for name, weights, expected in (("model.pt", "ema", averaged.half().float()), ("last.pt", "ema", averaged),
                                    ("last.pt", "model", parts["model"]["first.weight"])):
        model, alphas_cumprod = inference.load_model(tmp_path / "parts" / name, "cpu", weights)
        assert torch.equal(model.state_dict()["first.weight"], expected)
    with pytest.raises(UserError, match="last.pt, which holds all"):
        inference.load_model(tmp_path / "parts/model.pt", "cpu", "model")
    assert len(alphas_cumprod) == 21
    run_train(monkeypatch, *flags, "--output_dir", tmp_path / "parts", "--resume", "--epochs", 4)
    assert len(torch.load(tmp_path / "parts/last.pt", weights_only=True)["metrics"]) == 4


def test_training_lowers_the_loss(tmp_path, data_dir, monkeypatch):
    run_train(monkeypatch, "--data_dir", data_dir, "--channels", 16, 16, "--epochs", 25, "--batch_size", 16,
              "--warmup", 4, "--lr", 3e-3, "--sample_every", 100, "--output_dir", tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]


def test_two_processes_train_together(tmp_path, data_dir, torchrun):
    done = torchrun("p1_ddpm/train.py", "--data_dir", data_dir, "--output_dir", tmp_path, "--epochs", 1,
                    "--batch_size", 16, "--device", "cpu", "--channels", 8, 16)
    assert done.returncode == 0, done.stderr
    assert "64 images" in done.stdout and "2 process(es)" in done.stdout and done.stdout.count("epoch 1: loss") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "model.pt", "metrics.jsonl", "samples_001.png"}
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["ema"]["updates"] == 4 and all(value.isfinite().all() for value in state["model"].values())


def test_a_dry_run_writes_nothing(tmp_path, data_dir, monkeypatch, capsys):
    run_train(monkeypatch, "--data_dir", data_dir, "--output_dir", tmp_path / "out", "--channels", 8, 16, "--dry_run")
    assert "epoch 1: loss" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--data_dir", "nowhere"], "get_dataset.sh"), (["--resume"], "there is no checkpoint"),
    (["--channels", "9", "16"], "multiples of 8"), (["--batch_size", "1000"], "larger than the 64"),
    (["--device", "cpu", "--amp", "fp16"], "needs a GPU"), (["--output_dir", __file__], "is a file"),
    (["--schedule", "linear", "--noise_steps", "100"], "more --noise_steps")])
def test_training_refuses_bad_flags(tmp_path, data_dir, monkeypatch, flags, message):
    with pytest.raises(UserError, match=message):
        run_train(monkeypatch, "--data_dir", data_dir, "--output_dir", tmp_path, *flags)


# --- The wrapper --------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("check point") / "tiny.pt"
    save_checkpoint(path, kind="p1_ddpm", model_config=TINY, schedule=["linear", 1000], ema=random_unet().state_dict())
    return path


def inference_flags(*flags):
    """inference.py's flags, at their defaults but for `flags`, as main() has them."""
    parser = argparse.ArgumentParser()
    inference.add_sampling_arguments(parser)
    return parser.parse_args([str(flag) for flag in flags])


def wrapper(*arguments, cwd, before=""):
    """hw2_1.sh as a user runs it, from the folder `cwd`."""
    command = ["bash", "-c", before + 'exec bash "$0" "$@"', str(ROOT / "hw2_1.sh"), *map(str, arguments)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                   "CDPATH": str(ROOT.parent)}  # some users export it; cd prints where it goes then
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_wrapper_draws_1000_images_of_the_right_names(tmp_path, checkpoint):
    (tmp_path / "out put").mkdir()
    (tmp_path / "out put/notes.txt").write_text("mine")
    flags = ["--checkpoint", checkpoint, "--steps", 2, "--device", "cpu"]
    done = wrapper("out put", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out put").iterdir()}
    assert names == digit_classifier.expected_names() | {"notes.txt"} and len(names) == 1001
    assert (tmp_path / "out put/notes.txt").read_text() == "mine"
    image = Image.open(tmp_path / "out put/3_017.png")
    assert image.size == (28, 28) and image.mode == "RGB"

    wrapper("again", *flags, cwd=tmp_path)
    for name in digit_classifier.expected_names():
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out put" / name).read_bytes()


def test_images_depend_neither_on_the_batch_nor_on_their_number(checkpoint):
    model, alphas_cumprod = inference.load_model(checkpoint, "cpu")

    def draw(numbers, batch_size, *changes):
        args = inference_flags("--sampler", "ddpm", "--steps", 8, "--batch_size", batch_size, *changes)
        drawn = inference.generate(model, alphas_cumprod, numbers, args, torch.device("cpu"))
        return torch.cat([images for _, images, _ in drawn]).int()

    numbers = [(digit, number) for digit in range(3) for number in (1, 2, 3)]
    whole = draw(numbers, 9)
    assert whole.float().std() > 10
    assert (whole - draw(numbers, 2)).abs().max() <= 1
    assert (whole[4] - draw([(1, 2)], 9)[0]).abs().max() <= 1
    assert (whole[4] - draw([(1, 2)], 9, "--seed", 1)[0]).abs().max() > 50


def test_trajectory_keeps_the_asked_states(tmp_path, checkpoint):
    done = wrapper("out", "--checkpoint", checkpoint, "--sampler", "ddpm", "--steps", 10, "--spacing", "uniform",
                   "--per_class", 2, "--trajectory", 1000, 400, 0, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = sorted(path.name for path in (tmp_path / "out/trajectory").iterdir())
    assert kept == sorted(f"{digit}_t{t:04d}.png" for digit in range(10) for t in (0, 400, 1000))
    assert (tmp_path / "out/trajectory/0_t0000.png").read_bytes() == (tmp_path / "out/0_001.png").read_bytes()


def test_wrapper_refuses_bad_input_in_one_sentence(tmp_path, checkpoint):
    good = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(good[:len(good) // 2])
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "model_config": dict(channels=[16, 16])}, tmp_path / "misfit.pt")
    torch.save({**content, "schedule": ["unknown", 1000]}, tmp_path / "schedule.pt")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/trajectory").write_text("mine")
    cases = [([], "output_dir"), (["out", "--interval", "500", "300"], "is empty"), (["out", "--sampler", "dpmpp", "--eta", "1"], "ddim alone"),
             (["taken", "--trajectory", "1000"], "trajectory is a file"), (["file"], "is a file"), (["file/out"], "cannot write"), (["/proc/out"], "cannot write"),
             (["out", "--checkpoint", "gone.pt"], "there is no checkpoint gone.pt"),
             (["out", "--checkpoint", "cut.pt"], "damaged"), (["out", "--checkpoint", "foreign.pt"], "not a checkpoint of"),
             (["out", "--checkpoint", "misfit.pt"], "do not fit"),
             (["out", "--checkpoint", "schedule.pt"], "do not fit"), (["out", "--steps", "0"], "below 1"),
             (["out", "--steps", "1001"], "above the 1000"), (["out", "--guidance", "nan"], "not a number"),
             (["out", "--trajectory", "999"], "visits only")]
    if not torch.cuda.is_available():
        cases.append((["out", "--device", "cuda"], "no CUDA device"))
    cases = [(arguments + (["--checkpoint", checkpoint] if arguments and "--checkpoint" not in arguments else []), message)
             for arguments, message in cases]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda case: wrapper(*case[0], cwd=tmp_path), cases))
    for (arguments, message), done in zip(cases, results):
        assert done.returncode == 2, (arguments, done.stderr)
        assert message in done.stderr and "Traceback" not in done.stderr, (arguments, done.stderr)
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_nothing_half_written(tmp_path, checkpoint):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/0_001.png").write_text("mine")
    done = wrapper("out", "--checkpoint", checkpoint, "--steps", 1, "--per_class", 1, "--trajectory", 1000,
                   cwd=tmp_path, before="ulimit -f 1; ")  # no file above 1 KiB: pure noise does not fit
    assert done.returncode == 2 and "Traceback" not in done.stderr and "make room" in done.stderr, done.stderr
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["0_001.png"]
    assert (tmp_path / "out/0_001.png").read_text() == "mine"


def test_an_interrupt_leaves_nothing_half_written(tmp_path, checkpoint):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", ROOT / "hw2_1.sh", "out", "--checkpoint", checkpoint, "--sampler", "ddpm", "--steps",
                                "1000", "--batch_size", "5"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    try:
        deadline = time.time() + 120
        while not list(tmp_path.glob("out/.unfinished-*")) and process.poll() is None and time.time() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[1].endswith(b"interrupted\n") and process.returncode == 130
    finally:
        process.kill()
    assert list((tmp_path / "out").iterdir()) == []

    (tmp_path / "out/.unfinished-killed").mkdir()  # what SIGKILL leaves, the next run removes
    assert wrapper("out", "--checkpoint", checkpoint, "--steps", 1, "--per_class", 1, cwd=tmp_path).returncode == 0
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png"}


# --- The grader ---------------------------------------------------------------------------------

@pytest.fixture
def always_3(tmp_path):
    """Classifier.pth, in the course's format, of a network that answers 3 to every image."""
    model = digit_classifier.Classifier()
    torch.nn.init.zeros_(model.fc3.weight)
    torch.nn.init.constant_(model.fc3.bias, 0)
    model.fc3.bias.data[3] = 1
    torch.save({"state_dict": model.state_dict()}, tmp_path / "Classifier.pth")
    return tmp_path / "Classifier.pth"


def grade(folder, checkpoint, cwd):
    return subprocess.run([sys.executable, ROOT / "digit_classifier.py", "--folder", folder, "--checkpoint", checkpoint],
                          cwd=cwd, capture_output=True, text=True)


def test_grader_prints_the_courses_line_and_names_odd_files(tmp_path, always_3):
    black = torch.zeros(3, 28, 28, dtype=torch.uint8)
    folder = tmp_path / "drawn digits"
    folder.mkdir()
    for name in ("3_001.png", "3_002.png", "3_extra.png", "cat.png"):
        save_png(folder / name, black)
    save_png(folder / "5_001.png", torch.zeros(3, 32, 32, dtype=torch.uint8))
    (folder / "notes.txt").write_text("not an image")
    done = grade("drawn digits", always_3, tmp_path)
    assert done.returncode == 0 and done.stdout == "acc = 0.75 (correct/total = 3/4)\n", done.stderr
    for part in ("1 file(s) not graded, they are no images: notes.txt", "begin with a digit: cat.png", "3_extra.png",
                 "997 file(s) missing: 0_001.png", "1 file(s) resized, they are not 28x28: 5_001.png"):
        assert part in done.stderr


def test_grader_is_silent_about_a_complete_folder(tmp_path, always_3):
    (tmp_path / "out").mkdir()
    save_png(tmp_path / "black.png", torch.zeros(3, 28, 28, dtype=torch.uint8))
    for name in digit_classifier.expected_names():
        shutil.copy(tmp_path / "black.png", tmp_path / "out" / name)
    done = grade(tmp_path / "out", always_3, "/")
    assert done.stdout == "acc = 0.1 (correct/total = 100/1000)\n" and "warning" not in done.stderr


def test_grader_refuses_bad_input(tmp_path, always_3):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1_001.png").write_bytes(b"\x89PNG")
    torch.save({"weights": 1}, tmp_path / "foreign.pth")
    torch.save(torch.zeros(1, 3), tmp_path / "tensor.pth")
    for folder, checkpoint, message in (("gone", always_3, "no folder gone"), ("empty", always_3, "no images"),
                                        ("broken", always_3, "1_001.png cannot be read"),
                                        ("broken", "gone.pth", "there is no classifier checkpoint gone.pth"),
                                        ("broken", "tensor.pth", "tensor.pth does not hold"),
                                        ("broken", "foreign.pth", "foreign.pth does not hold")):
        done = grade(folder, checkpoint, tmp_path)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_classifier_is_the_courses_network():
    shapes = {name: tuple(value.shape) for name, value in digit_classifier.Classifier().state_dict().items()}
    assert list(shapes) == [f"{layer}.{kind}" for layer in ("conv1", "conv2", "fc1", "fc2", "fc3")
                            for kind in ("weight", "bias")]
    assert shapes["conv2.weight"] == (16, 6, 5, 5) and shapes["fc1.weight"] == (128, 256)
    assert sum(math.prod(shape) for shape in shapes.values()) == 44674


def test_classifier_learns(tmp_path, data_dir, monkeypatch, capsys):
    def run(checkpoint):
        monkeypatch.setattr(sys, "argv", ["digit_classifier.py", "--train", str(data_dir), "--epochs", "150",
                                          "--device", "cpu", "--checkpoint", str(checkpoint)])
        digit_classifier.main()

    run(tmp_path / "new/Classifier.pth")
    accuracies = [float(a) for a in re.findall(r"validation accuracy ([\d.]+) %", capsys.readouterr().out)]
    images, labels, _ = load_split(data_dir, "mnistm", "train")
    model = digit_classifier.load_classifier(tmp_path / "new/Classifier.pth")
    assert len(accuracies) == 150 and (digit_classifier.classify(model, images)[1] == labels).float().mean() > 0.8
    with pytest.raises(UserError, match="is a folder"):
        run(tmp_path / "new")


def test_augmentation_keeps_shape_and_range_and_differs_by_image():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 28, 28).expand(8, -1, -1, -1) * 2 - 1
    out = digit_classifier.augment(x)
    assert out.shape == x.shape and out.abs().max() <= 1
    assert (out[0] - out[1]).abs().max() > 0.1


def test_the_number_of_threads_moves_a_pixel_by_one_at_most():
    model, alphas_cumprod = inference.load_model(inference.CHECKPOINT, "cpu")
    args = inference_flags()
    threads, drawn = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            [(_, images, _)] = inference.generate(model, alphas_cumprod, [(d, 1) for d in range(10)], args, "cpu")
            drawn.append(images.int())
    finally:
        torch.set_num_threads(threads)
    difference = (drawn[0] - drawn[1]).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


def test_the_committed_checkpoints_draw_digits_that_the_grader_recognises(tmp_path):
    done = wrapper("out", "--per_class", 10, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    graded = grade("out", ROOT / "Classifier.pth", tmp_path)
    correct, total = map(int, graded.stdout.split("=")[-1].strip(" )\n").split("/"))
    assert total == 100 and correct >= 95, graded.stdout


# --- The evaluation -----------------------------------------------------------------------------

def test_frechet_distance_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert evaluate.frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-6)
    assert evaluate.frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)


def test_distances_are_root_mean_squares_in_grey_levels():
    black, grey = torch.zeros(1, 3, 28, 28, dtype=torch.uint8), torch.full((1, 3, 28, 28), 10, dtype=torch.uint8)
    assert evaluate.rms_distances(evaluate.as_rows(black), evaluate.as_rows(grey)).item() == pytest.approx(10)
    assert evaluate.diversity(torch.cat([black, grey, grey])) == pytest.approx(20 / 3)


def test_judge_tells_real_digits_from_copies_and_noise(data_dir, always_3):
    judge = evaluate.Judge(data_dir, always_3)
    real = judge(judge.val_images, judge.val_labels)
    assert real["frechet"] == pytest.approx(0, abs=1e-6)
    assert real["accuracy"] == pytest.approx((judge.val_labels == 3).float().mean().item())
    assert all(ratio == pytest.approx(1) for ratio in real["diversity"].values())
    copies = judge(judge.train_images[:20], judge.train_labels[:20])
    assert copies["nearest_drawn"].max() < 0.1 < real["nearest_drawn"].min()
    same = judge(judge.val_images[:1].expand(20, -1, -1, -1), torch.full((20,), 3))
    assert same["diversity"][3] == pytest.approx(0, abs=0.02) and "diversity" in evaluate.report(same)


def test_evaluate_script(tmp_path, data_dir, always_3):
    def evaluated(folder):
        return subprocess.run([sys.executable, ROOT / "p1_ddpm/evaluate.py", folder, "--data_dir", data_dir, "--checkpoint",
                               always_3], cwd=tmp_path, capture_output=True, text=True)

    (tmp_path / "drawn").mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in ("3_001", "3_002", "3_003", "5_001"):
        save_png(tmp_path / f"drawn/{name}.png", torch.randint(256, (3, 28, 28), generator=generator, dtype=torch.uint8))
    done = evaluated("drawn")
    assert done.returncode == 0, done.stderr
    assert re.search(r"images +4\naccuracy +75 %   per digit 3: 100 5: 0\n", done.stdout), done.stdout
    assert "996 file(s) missing" in done.stderr
    for path in (tmp_path / "drawn").glob("3_*"):
        path.unlink()
    failed = evaluated("drawn")
    assert failed.returncode == 2 and "must hold several images of a digit" in failed.stderr
