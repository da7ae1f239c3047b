"""Problem 1: the diffusion mathematics, the network, training, sampling, evaluation and studies."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

from utils import UserError, image_generators, randn

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

import digit_classifier
import training
from conftest import ENVIRONMENT, ROOT, assert_near, assert_same_training, call, randomised
from dataset import load_domains
from files import digest_of, load_checkpoint, read_jsonl, save_checkpoint, save_png
from p1_ddpm import diffusion, evaluate, inference, studies, train
from p1_ddpm.inference import Sampling
from p1_ddpm.model import Attention, UNet, load_model
from transforms import as_input

TINY = dict(channels=[8, 16], blocks=1)
pytestmark = pytest.mark.usefixtures("one_thread")


def random_unet(seed=0, **config):
    """A UNet whose zero-initialised layers are random too, so that every part of it matters."""
    torch.manual_seed(seed)
    return randomised(UNet(**{**TINY, **config}), seed)


# --- Schedule and forward process ---------------------------------------------------------------

def test_linear_schedule_has_the_known_values():
    alphas_cumprod = diffusion.noise_schedule("linear", 1000)
    assert alphas_cumprod.dtype == torch.float64 and len(alphas_cumprod) == 1001
    known = {0: 1, 1: 0.9999, 2: 0.999780092072, 22: 0.993220357296, 962: 8.5730961e-5, 982: 5.7877932e-5}
    for t, value in known.items():
        assert alphas_cumprod[t].item() == pytest.approx(value, rel=1e-7)  # as many digits as are known


def test_cosine_schedule_is_the_closed_form():
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    alphas_cumprod = diffusion.noise_schedule("cosine", 1000)
    for t in (1, 250, 500, 900):  # before beta is cut at 0.999
        assert alphas_cumprod[t].item() == pytest.approx(f[t] / f[0], rel=1e-9)  # a product of 900 doubles


def test_forward_process_has_the_moments_of_equation_4():
    torch.manual_seed(0)
    alphas_cumprod = diffusion.noise_schedule()
    x0 = torch.full((20000, 1, 1, 1), 0.7)
    x = diffusion.diffuse(x0, torch.full((20000,), 400), torch.randn_like(x0), alphas_cumprod)
    alpha_bar = alphas_cumprod[400].item()
    # Five standard errors of a mean and of a variance of 20,000.
    assert x.mean().item() == pytest.approx(0.7 * math.sqrt(alpha_bar), abs=5 * x.std().item() / math.sqrt(20000))
    assert x.var().item() == pytest.approx(1 - alpha_bar, rel=5 * math.sqrt(2 / 20000))


@pytest.mark.parametrize("condition, null", [
    (torch.full((20000,), 3), torch.full((20000,), 10)),  # a label
    (torch.tensor([[0.0, 1.0, 1.0]]).repeat(20000, 1), torch.zeros(20000, 3))])  # a set of labels
def test_loss_is_algorithm_1_and_conditions_are_dropped_whole_at_the_given_rate(condition, null):
    torch.manual_seed(0)
    alphas_cumprod, seen = diffusion.noise_schedule(), {}

    def model(x, t, condition):
        seen.update(x=x, t=t, condition=condition)
        return torch.zeros_like(x)

    t, loss = diffusion.ddpm_loss(model, torch.zeros(20000, 1, 2, 2), condition, null, alphas_cumprod)
    # With x0 = 0 and a prediction of 0 the loss is |v|^2 = alpha-bar |eps|^2, and x_t is sqrt(1 - alpha-bar) eps.
    ratio = (alphas_cumprod[t] / (1 - alphas_cumprod[t])).float()
    expected = ratio * seen["x"].square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # products of float32 alone
    assert t.min() == 1 and t.max() == 1000 and torch.equal(t, seen["t"])
    dropped = (seen["condition"] == null).reshape(20000, -1).all(1)
    assert torch.equal(seen["condition"][~dropped], condition[~dropped])
    error = 5 * math.sqrt(0.1 * 0.9 / 20000)  # five standard errors of a share
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=error)


def test_timesteps_are_uniform_or_logit_normal():
    torch.manual_seed(0)
    count, bins = 100_000, 10
    for share in (0.0, 0.5, 1.0):
        t = diffusion.draw_timesteps(count, 1000, share)
        assert t.dtype == torch.int64 and 1 <= t.min() and t.max() <= 1000
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        below = torch.special.ndtr(torch.special.logit(edges) - 0.4)  # how likely a logit-normal is below each edge
        expected = (1 - share) / bins + share * below.diff()
        found = torch.bincount((t - 1) * bins // 1000, minlength=bins) / count
        assert ((found - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 2e-4).all()  # t is whole


def test_the_loss_of_a_perfect_network_is_zero():
    torch.manual_seed(0)
    alphas_cumprod = diffusion.noise_schedule("cosine")

    def knows_x0(x, t, labels):  # v from x_t and x_0 = 0.4
        alpha_bar = diffusion.per_image(alphas_cumprod[t], x)
        a, s = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        return a * (x - a * 0.4) / s - s * 0.4

    labels = torch.zeros(500).long()
    _, loss = diffusion.ddpm_loss(knows_x0, torch.full((500, 1, 2, 2), 0.4), labels, labels, alphas_cumprod)
    assert loss.max() < 1e-6  # beside the square of v, which is about 1


# --- Samplers -----------------------------------------------------------------------------------

def exact_gaussian(alphas_cumprod, mean, std):
    """predict(x, t) of a network that knows E[x_0 | x_t] for x_0 ~ N(mean, std^2) exactly."""
    def predict(x, t):
        a, s = diffusion.signal_and_noise(alphas_cumprod, t)
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        return x0, (x - a * x0) / s
    return predict


@pytest.mark.parametrize("name, steps, options", [("ddpm", 1000, {}), ("ddim", 400, {}), ("ddim", 1000, dict(eta=1.0)),
                                                  ("dpmpp", 60, {})])
def test_samplers_reach_the_moments_of_a_gaussian(name, steps, options):
    mean, std = 0.3, 0.4
    alphas_cumprod = diffusion.noise_schedule()
    predict = exact_gaussian(alphas_cumprod, mean, std)
    generators = image_generators(0, [0])
    x = randn(generators, (20000,))
    timesteps = diffusion.uniform_timesteps(alphas_cumprod, steps)
    *_, (t, x) = diffusion.SAMPLERS[name](predict, x, timesteps, alphas_cumprod, generators, **options)
    assert t == 0
    # Five standard errors of 20,000 draws; the discretisation's own error is smaller.
    assert x.mean().item() == pytest.approx(mean, abs=0.015)
    assert x.std().item() == pytest.approx(std, abs=0.015)


def bounded_model(x, t, labels):
    """A prediction of v whose x0 is 0.9 tanh(x + label / 10), so that clamping never acts."""
    a, s = diffusion.signal_and_noise(diffusion.noise_schedule(), int(t[0]))
    return (a * x - 0.9 * torch.tanh(x + labels[:, None, None, None] / 10)) / s


def sample_bounded(name, steps, **options):
    alphas_cumprod = diffusion.noise_schedule()
    labels = torch.tensor([1, 5])
    predict = diffusion.guided_predictor(bounded_model, labels, labels, alphas_cumprod, 0)
    generators = image_generators(0, range(2))
    x = randn(generators, (3, 4, 4))
    timesteps = diffusion.uniform_timesteps(alphas_cumprod, steps)
    return [x] + [x for _, x in diffusion.SAMPLERS[name](predict, x, timesteps, alphas_cumprod, generators, **options)]


@pytest.mark.parametrize("name", ["ddim", "dpmpp"])
def test_samplers_agree_with_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    shared = dict(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", timestep_spacing="trailing",
                  prediction_type="v_prediction")
    scheduler = {
        "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **shared),
        "dpmpp": lambda: diffusers.DPMSolverMultistepScheduler(final_sigmas_type="zero", **shared)}[name]()
    scheduler.set_timesteps(20)
    ours = sample_bounded(name, 20)
    x = ours[0]
    for k, t in enumerate(scheduler.timesteps):  # diffusers counts timesteps from 0
        x = scheduler.step(bounded_model(x, torch.tensor([t + 1] * 2), torch.tensor([1, 5])), t, x).prev_sample
        assert_near(x, ours[k + 1], 1e-3)  # its schedule is a cumulative product in float32


def test_ddim_with_eta_1_is_ancestral_sampling():
    for a, b in zip(sample_bounded("ddpm", 50), sample_bounded("ddim", 50, eta=1.0)):
        assert_near(a, b, 1e-4)  # 50 steps of two formulas in float32
    a, b = sample_bounded("ddim", 50, eta=0.5)[-1], sample_bounded("ddim", 50)[-1]
    assert (a - b).abs().max() > 0.05 * b.abs().max()


def test_timesteps_are_all_or_in_equal_strides():
    alphas_cumprod = diffusion.noise_schedule()
    assert diffusion.uniform_timesteps(alphas_cumprod, 1000) == list(range(1000, -1, -1))
    assert diffusion.uniform_timesteps(alphas_cumprod, 4) == [1000, 750, 500, 250, 0]
    for name in ("linear", "cosine"):
        alphas_cumprod = diffusion.noise_schedule(name)
        for steps in (1, 2, 7, 20, 200, 999, 1000):
            for spacing in diffusion.SPACINGS.values():
                timesteps = spacing(alphas_cumprod, steps)
                assert timesteps[0] == 1000 and timesteps[-1] == 0 and len(timesteps) == steps + 1
                assert all(a > b for a, b in zip(timesteps, timesteps[1:]))
        for name, inner in ("log_snr", slice(2, 9)), ("trimmed", slice(1, -1)):
            visited = diffusion.SPACINGS[name](alphas_cumprod, 12)[inner]
            lambda_ = [math.log(a / s) for a, s in (diffusion.signal_and_noise(alphas_cumprod, t) for t in visited)]
            assert np.diff(lambda_).max() / np.diff(lambda_).min() < 1.05
        assert lambda_[-1] == pytest.approx(3.0, abs=0.05)


def test_strides_in_log_snr_cost_fewer_steps():
    # The probability flow of N(0.3, 0.05^2), narrow as images are: each x_T has one x_0, known exactly.
    alphas_cumprod = diffusion.noise_schedule("cosine")
    predict = exact_gaussian(alphas_cumprod, 0.3, 0.05)
    x = torch.linspace(-2, 2, 9)[:, None]
    a, s = diffusion.signal_and_noise(alphas_cumprod, 1000)
    exact = 0.3 + 0.05 * (x - a * 0.3) / math.sqrt(a**2 * 0.05**2 + s**2)
    errors = []
    for spacing in ("log_snr", "uniform"):
        timesteps = diffusion.SPACINGS[spacing](alphas_cumprod, 16)
        *_, (_, x0) = diffusion.dpmpp(predict, x, timesteps, alphas_cumprod, None)
        errors.append((x0 - exact).abs().max().item())
    assert errors[0] < 0.1 * 0.05 and errors[0] < 0.1 * errors[1]  # of the standard deviation; of the other's error


# --- Guidance -----------------------------------------------------------------------------------

def guided_calls(guidance, interval, steps=10, total=1000):
    """The images that the network sees in each of the sampler's steps, and v at t = 10, which eps shows where x = 0."""
    sizes = []

    def model(x, t, labels):
        assert t.shape == (len(x),)
        sizes.append(len(x))
        return 0.1 * labels.float()[:, None, None, None] * torch.ones_like(x)

    alphas_cumprod = diffusion.noise_schedule(timesteps=total)
    labels = torch.tensor([2, 3])
    predict = diffusion.guided_predictor(model, labels, torch.full_like(labels, 10), alphas_cumprod, guidance, interval)
    generators = image_generators(0, range(2))
    x = randn(generators, (3, 4, 4))
    list(diffusion.ddim(predict, x, diffusion.uniform_timesteps(alphas_cumprod, steps), alphas_cumprod, generators))
    _, eps = predict(torch.zeros_like(x), 10)
    return sizes[:steps], eps[:, 0, 0, 0] / diffusion.signal_and_noise(alphas_cumprod, 10)[0]


def test_guidance_0_is_the_conditional_model_alone():
    sizes, v = guided_calls(0, (1, 1000))
    assert sizes == [2] * 10
    torch.testing.assert_close(v, torch.tensor([0.2, 0.3]), rtol=1e-4, atol=0)  # a handful of float32 operations


def test_guidance_extrapolates_from_the_unconditional_model():
    sizes, v = guided_calls(2, (1, 1000))
    assert sizes == [4] * 10
    torch.testing.assert_close(v, torch.tensor([3 * 0.2 - 2 * 1.0, 3 * 0.3 - 2 * 1.0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("total", [1000, 50])
def test_guidance_skips_the_unconditional_pass_outside_its_interval(total):
    # t = T, 0.9 T, ..., 0.1 T
    assert guided_calls(2, (300, 700), total=total)[0] == [2, 2, 2, 4, 4, 4, 4, 4, 2, 2]


# --- The network --------------------------------------------------------------------------------

def test_network_depends_on_image_time_and_label():
    model, x = random_unet(), torch.randn(1, 3, 28, 28)
    t, label = torch.tensor([500]), torch.tensor([3])
    out = model(x, t, label)
    assert out.shape == x.shape and out.dtype == torch.float32
    for other in (model(x + 0.1, t, label), model(x, t - 400, label), model(x, t, label + 1),
                  model(x, t, model.null(label))):
        assert (other - out).abs().max() > 1e-3 * out.abs().max()


def test_attention_is_scaled_dot_product_attention():
    torch.manual_seed(0)
    attention = Attention(16, heads=2)
    torch.nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 16, 7, 7)
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
    q, k, v = (part.reshape(2, 49, 2, 8).transpose(1, 2) for part in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 49, 16).transpose(1, 2)
    assert_near(attention(x), x + attention.out(mixed.reshape(2, 16, 7, 7)), 1e-5)


@pytest.mark.parametrize("config", [dict(num_classes=10), dict(num_classes=20), dict(image_size=64, patch=4),
                                    dict(num_classes=3, image_channels=1, image_size=36, patch=3)], ids=str)
def test_any_classes_and_image_size_train_and_sample(config, tmp_path):
    model = random_unet(**config)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(model.num_classes, (6,), generator=generator)
    null = model.null(labels)
    assert null.shape == labels.shape and null.dtype == labels.dtype and not torch.equal(null, labels)
    alphas_cumprod = diffusion.noise_schedule("cosine", 50)

    x0 = torch.rand(6, *model.image_shape, generator=generator) * 2 - 1
    losses = {}
    for drop in (0.0, 1.0):
        torch.manual_seed(0)
        t, loss = diffusion.ddpm_loss(model, x0, labels, null, alphas_cumprod, drop)
        assert t.shape == loss.shape == (6,)
        losses[drop] = loss.detach()
    assert not torch.equal(losses[0.0], losses[1.0])
    loss.mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())

    save_checkpoint(tmp_path / "any.pt", kind="p1_ddpm", ema=model.state_dict(),
                    config=dict(network={**TINY, **config}, schedule=dict(name="cosine", timesteps=50)))
    model, alphas_cumprod = load_model(tmp_path / "any.pt")
    for sampler in diffusion.SAMPLERS:
        generators = image_generators(0, range(6))
        noise = randn(generators, model.image_shape)
        sampling = Sampling(sampler, steps=3, guidance=2.0, interval=(0, 1000))
        states = list(inference.sample(model, alphas_cumprod, labels, noise, generators, sampling))
        assert [t for t, _ in states] == diffusion.log_snr_timesteps(alphas_cumprod, 3)[1:]
        images = states[-1][1]
        assert images.shape == noise.shape and images.isfinite().all() and images.abs().max() <= 1
        unguided = list(inference.sample(model, alphas_cumprod, labels, noise, image_generators(1, range(6)),
                                         sampling._replace(guidance=0.0)))[-1][1]
        assert (images - unguided).abs().max() > 0.01 * images.abs().max()


@pytest.mark.parametrize("config, message", [(dict(channels=[8, 12]), "divisible"), (dict(image_size=30), "side 30")])
def test_a_network_that_does_not_fit_together_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**TINY, **config})


# --- Training -----------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """hw2_data with scikit-learn's 8x8 digits as MNIST-M, 64 training and 40 validation images, and dark on white as
    SVHN, 20 and 30."""
    folder = tmp_path_factory.mktemp("hw2 data")
    digits = load_digits()
    for domain, splits in (("mnistm", dict(train=range(64), val=range(64, 104))),
                           ("svhn", dict(train=range(200, 220), val=range(220, 250)))):
        (folder / f"digits/{domain}/data").mkdir(parents=True)
        for split, rows in splits.items():
            table = pd.DataFrame([(f"{i:05d}.png", digits.target[i]) for i in rows], columns=["image_name", "label"])
            table.to_csv(folder / f"digits/{domain}/{split}.csv", index=False)
            for i in rows:
                grey = np.abs(digits.images[i] * 15.9 - 255 * (domain == "svhn"))
                image = Image.fromarray(grey.astype(np.uint8)).resize((28, 28)).convert("RGB")
                image.save(folder / f"digits/{domain}/data/{i:05d}.png")
    return folder


def run_train(data_dir, output_dir, *arguments):
    call(train, "--device", "cpu", "--data_dir", data_dir, "--output_dir", output_dir, "--channels", 8, 16,
         "--batch_size", 16, *arguments)


@pytest.mark.parametrize("amp, optimizer", [("bf16", "adamw"), ("off", "muon")])
def test_resumed_training_equals_an_uninterrupted_one(tmp_path, data_dir, monkeypatch, amp, optimizer):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--epochs", 2, "--warmup", 3, "--dropout", 0.1, "--amp", amp, "--timesteps", 4, "--save_every", 3,
             "--optimizer", optimizer]
    run_train(data_dir, whole, *flags)

    class Killed(Exception):
        pass

    def kill(output_dir, parts, step, **description):
        if step == 5:  # amid the files of the second checkpoint
            raise Killed
        save_training(output_dir, parts, step, **description)

    save_training = training.save_training
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_training", kill)
        with pytest.raises(Killed):
            run_train(data_dir, parts, *flags)
    assert load_checkpoint(parts / "last.pt", "p1_ddpm", [])["step"] == 3
    run_train(data_dir, parts, *flags, "--resume")

    first = assert_same_training(whole, parts)
    assert len(first["optimizer"]) == (2 if optimizer == "muon" else 1)
    lines = read_jsonl(parts / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 8] and all(len(line["loss_quarters"]) == 4 for line in lines)
    assert Image.open(parts / "samples_000008.png").size == (291, 291)

    # What training has written, inference reads.
    averaged = first["ema"]["first.weight"]
    for name, weights, expected in (("model.pt", "ema", averaged.half().float()), ("last.pt", "ema", averaged),
                                    ("last.pt", "model", first["model"]["first.weight"])):
        model, alphas_cumprod = load_model(parts / name, "cpu", weights)
        assert torch.equal(model.state_dict()["first.weight"], expected) and len(alphas_cumprod) == 5
    with pytest.raises(UserError, match="last.pt, which holds all"):
        load_model(parts / "model.pt", "cpu", "model")


def test_two_domains_are_twenty_classes_of_one_network(tmp_path, data_dir):
    class_of = {as_input(image).numpy().tobytes(): label.item() for images, labels in
                load_domains(data_dir, ["mnistm", "svhn"], "train") for image, label in zip(images, labels)}
    seen = []

    def look(model, x0, condition, null, alphas_cumprod, label_drop, logit_normal):
        assert condition.tolist() == [class_of[image.numpy().tobytes()] for image in x0]
        assert (null == 20).all() and (label_drop, logit_normal) == (0.2, 0.7)
        seen.append(condition)
        return ddpm_loss(model, x0, condition, null, alphas_cumprod, label_drop, logit_normal)

    ddpm_loss = train.ddpm_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "ddpm_loss", look)
        run_train(data_dir, tmp_path, "--domains", "mnistm", "svhn", "--epochs", 1, "--timesteps", 4,
                  "--label_drop", 0.2, "--logit_normal", 0.7, "--ema", 0)
    seen = torch.cat(seen)
    assert len(seen) == 112  # an epoch: whole batches of 64 digits and three times 20
    assert 48 <= (seen < 10).sum() <= 64 and seen.max() >= 10 and set((seen // 10).tolist()) == {0, 1}
    last = load_checkpoint(tmp_path / "last.pt", "p1_ddpm", ["model", "ema"])
    assert all(torch.equal(value, last["ema"][name]) for name, value in last["model"].items())  # an average of one
    checkpoint = load_checkpoint(tmp_path / "model.pt", "p1_ddpm", ["config", "metrics"])
    assert checkpoint["config"]["network"]["num_classes"] == 20
    assert all(0 < checkpoint["metrics"][-1][f"val_loss_{domain}"] < 10 for domain in ("mnistm", "svhn"))
    assert Image.open(tmp_path / "samples_000007.png").size == (291, 581)  # twenty rows

    infer(tmp_path / "out", "--checkpoint", tmp_path / "model.pt", "--steps", 1, "--guidance", 0)
    for domain in ("mnistm", "svhn"):
        assert {path.name for path in (tmp_path / "out" / domain).iterdir()} == digit_classifier.expected_names(50)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mnistm", "svhn"}
    infer(tmp_path / "few", "--checkpoint", tmp_path / "model.pt", "--steps", 1, "--guidance", 0, "--per_class", 1)
    for name in ("mnistm/7_001.png", "svhn/7_001.png"):  # an image does not depend on how many there are
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_validation_loss_has_the_same_noise_at_every_call():
    model, alphas_cumprod = random_unet(num_classes=20), diffusion.noise_schedule("cosine", 50)
    images = torch.randint(256, (260, 3, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(260) % 20
    losses = diffusion.validation_loss(model, images, labels, alphas_cumprod)
    torch.rand(3)
    again = diffusion.validation_loss(model, images, labels, alphas_cumprod)
    assert losses.shape == (260,) and torch.equal(losses, again)
    unlabelled = diffusion.validation_loss(model, images, model.null(labels), alphas_cumprod)
    assert (losses != unlabelled).all()  # no label was dropped


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_the_loss(tmp_path, data_dir, monkeypatch, optimizer):
    monkeypatch.setattr(train, "sample_grid", lambda *arguments: None)
    run_train(data_dir, tmp_path, "--channels", 16, 16, "--epochs", 10, "--warmup", 4, "--lr", 3e-3, "--save_every", 5,
              "--optimizer", optimizer)
    losses = [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert np.mean(losses[-2:]) < 0.85 * losses[0]


def test_two_processes_train_together(tmp_path, data_dir, train_together):
    out = tmp_path / "out"
    printed = train_together(("p1_ddpm.train", ["--data_dir", data_dir, "--output_dir", out, "--epochs", 1, "--device",
                                                "cpu", "--batch_size", 16, "--channels", 8, 16, "--timesteps", 4]))
    assert "64 images" in printed and "2 process(es)" in printed and printed.count("4 steps") == 1
    assert {path.name for path in out.iterdir()} == {"last.pt", "model.pt", "metrics.jsonl", "samples_000004.png"}
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["step"] == 4 and all(value.isfinite().all() for value in state["model"].values())


def test_a_dry_run_writes_nothing(tmp_path, data_dir, capsys):
    run_train(data_dir, tmp_path / "out", "--dry_run")
    assert "dry run: two steps of 8 images went well" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--data_dir", "nowhere"], "get_dataset.sh"), (["--channels", 9, 16], "multiples of 8"),
    (["--batch_size", 1000], "larger than the 64"), (["--domains", "svhn", "svhn"], "names a domain twice"),
    (["--schedule", "linear", "--timesteps", 100], "more --timesteps")])
def test_training_refuses_bad_flags(tmp_path, data_dir, flags, message):
    with pytest.raises(UserError, match=message):
        run_train(data_dir, tmp_path, *flags)


@pytest.mark.parametrize("name, record", [("ddpm.pt", "metrics.jsonl"), ("mnistm_svhn.pt", "mnistm_svhn.jsonl")])
def test_the_shipped_checkpoints_are_those_of_the_commands_shown(name, record):
    both = re.search("train.py (--domains [^#\n]*)", (ROOT / "README.md").read_text())[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *(both.split() if "svhn" in name else [])])
        wanted = training.recipe(train.parse_args())
    path = inference.CHECKPOINT.with_name(name)
    shipped = load_checkpoint(path, "p1_ddpm", ["config", "recipe", "metrics"])
    shipped["recipe"].pop("sample_every", None)  # says what is drawn on the way
    assert {name: wanted[name] for name in shipped["recipe"]} == shipped["recipe"]
    last = json.loads(path.with_name(record).read_text().splitlines()[-1])
    assert last == shipped["metrics"][-1] and last["epoch"] == shipped["recipe"]["epochs"]


# --- Sampling -----------------------------------------------------------------------------------

def save_tiny(path, weights, **network):
    save_checkpoint(path, kind="p1_ddpm", ema=weights,
                    config=dict(network={**TINY, **network}, schedule=dict(name="linear", timesteps=1000)))
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("check point") / "tiny.pt", random_unet().state_dict())


def infer(*arguments):
    call(inference, "--device", "cpu", *arguments)


def wrapper(*arguments, cwd):
    """hw2_1.sh as a user starts it from the folder `cwd`: a running process."""
    environment = {**ENVIRONMENT, "CDPATH": str(ROOT.parent)}  # some users export it; cd prints where it goes then
    return subprocess.Popen(["bash", str(ROOT / "hw2_1.sh"), *map(str, arguments)], cwd=cwd, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """(its status, what it printed, and on stderr) of what ends within five minutes; else it is ended, and fails."""
    try:
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()  # nothing where it has ended
    return process.returncode, stdout, stderr


def test_wrapper_twice_at_once_gives_1000_whole_images_of_the_right_names(tmp_path, checkpoint):
    (tmp_path / "out put").mkdir()
    (tmp_path / "out put/notes.txt").write_text("mine")
    flags = ["--checkpoint", checkpoint, "--steps", 1, "--guidance", 0, "--device", "cpu"]
    processes = [wrapper("out put", *flags, cwd=tmp_path) for _ in range(2)]
    for status, stdout, stderr in map(finish, processes):
        assert status == 0 and stdout == "1000 images in out put\n", stderr
    names = {path.name for path in (tmp_path / "out put").iterdir()}
    assert names == digit_classifier.expected_names() | {"notes.txt"} and len(names) == 1001
    assert (tmp_path / "out put/notes.txt").read_text() == "mine"
    image = Image.open(tmp_path / "out put/3_017.png")
    assert image.size == (28, 28) and image.mode == "RGB"

    assert finish(wrapper("again", *flags, cwd=tmp_path))[0] == 0  # the same command makes the same bytes
    for name in digit_classifier.expected_names():
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out put" / name).read_bytes()


def test_the_networks_classes_and_images_decide_what_is_written(tmp_path):
    network = dict(num_classes=20, image_size=32)
    save_tiny(tmp_path / "20.pt", random_unet(**network).state_dict(), **network)
    infer(tmp_path / "out", "--checkpoint", tmp_path / "20.pt", "--per_class", 1, "--steps", 1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{label}_001.png" for label in range(20)}
    assert Image.open(tmp_path / "out/19_001.png").size == (32, 32)


def test_the_script_writes_what_its_flags_make(tmp_path):
    save_checkpoint(tmp_path / "two.pt", kind="p1_ddpm", ema=random_unet(num_classes=20).state_dict(),
                    config=dict(network={**TINY, "num_classes": 20}, domains=["mnistm", "svhn"],
                                schedule=dict(name="linear", timesteps=1000)))
    infer(tmp_path, "--checkpoint", tmp_path / "two.pt", "--per_class", 1, "--steps", 4, "--seed", 1, "--amp", "bf16")
    written = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path / f"{domain}/{digit}_001.png")))
                           for domain in ("mnistm", "svhn") for digit in range(10)]).permute(0, 3, 1, 2)
    model, alphas_cumprod = load_model(tmp_path / "two.pt")

    def images_of(seed, dtype):
        [(_, images, _)] = inference.generate(model, alphas_cumprod, *inference.digits(20, 1),
                                              inference.SHIPPED._replace(steps=4), seed, "cpu", dtype=dtype)
        return images

    assert torch.equal(written, images_of(1, torch.bfloat16))
    for other in (images_of(0, torch.bfloat16), images_of(1, None), written.roll(10, 0)):
        assert not torch.equal(written, other)


def test_images_depend_neither_on_the_batch_nor_on_their_number(checkpoint):
    model, alphas_cumprod = load_model(checkpoint)

    def images_of(keys, labels, batch_size, seed=0):
        batches = inference.generate(model, alphas_cumprod, keys, labels, Sampling("ddpm", 8), seed, "cpu", batch_size)
        return torch.cat([images for _, images, _ in batches]).int()

    keys, labels = inference.digits(3, 3)
    assert keys == [1, 2, 3, 1001, 1002, 1003, 2001, 2002, 2003] and labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    whole = images_of(keys, labels, 9)
    assert whole.float().std() > 10
    # Sums in another order, rounded to whole grey levels.
    assert (whole - images_of(keys, labels, 2)).abs().max() <= 1
    assert (whole[4] - images_of([1002], labels[4:5], 9)[0]).abs().max() <= 1
    assert (whole[4] - images_of([1002], labels[4:5], 9, seed=1)[0]).abs().max() > 50


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.05), pytest.param(torch.float16, 0.01, marks=(
    pytest.mark.skipif(torch.__version__ < "2.4", reason="this PyTorch has no float16 on the CPU")))])
def test_low_precision_moves_pixels_little(checkpoint, dtype, bound):
    """bfloat16's eight bits round each activation by up to 0.4 %, which the network's layers and the steps add up;
    float16, which older GPUs take, has eleven."""
    model, alphas_cumprod = load_model(checkpoint)
    def images_of(dtype):
        [(_, images, _)] = inference.generate(model, alphas_cumprod, *inference.digits(10, 1), Sampling(), 0, "cpu",
                                              dtype=dtype)
        return images

    exact, low = images_of(None).float(), images_of(dtype)
    assert torch.equal(low, images_of(dtype))
    difference = (exact - low.float()).square().mean().sqrt() / exact.std()
    assert 0 < difference < bound, difference


def test_kept_states_are_those_of_the_way(checkpoint):
    model, alphas_cumprod = load_model(checkpoint)
    sampling = Sampling("ddpm", 10, "uniform")
    keys = [1, 7001, 7002]
    batches = list(inference.generate(model, alphas_cumprod, keys, torch.tensor([0, 7, 7]), sampling, 0, "cpu", 2,
                                      keep=(1000, 400, 0)))
    assert [batch for batch, _, _ in batches] == [keys[:2], keys[2:]]
    for _, images, states in batches:
        assert list(states) == [1000, 400, 0] and torch.equal(states[0], images)
        assert all(state.shape == images.shape for state in states.values())
    noise = randn(image_generators(0, [1, 7001]), (3, 28, 28))
    assert torch.equal(batches[0][2][1000], inference.to_uint8((noise + 1) / 2))


def test_flags_are_the_sampling(monkeypatch):
    wrapper = (ROOT / "assignments/dlcv2024_hw2/hw2_1.sh").read_text()
    words = re.search(r'mnistm_svhn.pt" (.*) "\$@"', wrapper)[1].split()
    monkeypatch.setattr(sys, "argv", ["inference.py", "out", *words])
    assert inference.sampling_of(inference.parse_args()) == inference.SHIPPED_2024
    monkeypatch.setattr(sys, "argv", ["inference.py", "out"])
    assert inference.sampling_of(inference.parse_args()) == inference.SHIPPED
    monkeypatch.setattr(sys, "argv", "inference.py out --sampler ddpm --steps 7 --spacing uniform --eta 0.5 "
                                     "--guidance 3 --interval 1 900".split())
    assert inference.sampling_of(inference.parse_args()) == Sampling("ddpm", 7, "uniform", 0.5, 3.0, (1.0, 900.0))


@pytest.mark.parametrize("arguments, message", [
    ([], "output_dir"), ([""], "output_dir: the path is empty"), (["out", "--interval", 500, 300], "is empty"),
    (["out", "--steps", 1001], "above the 1000"),
    (["out", "--sampler", "dpmpp", "--eta", 1], "ddim alone"), (["out", "--per_class", 1000], "from 1 to 999"),
    (["out", "--steps", 0], "from 1 to inf"), (["out", "--guidance", "nan"], "not a number"), (["file"], "is a file"),
    (["file/out"], "cannot write"), (["out", "--checkpoint", ""], "path is empty"),
    (["out", "--checkpoint", "gone.pt"], "there is no checkpoint gone.pt"),
    (["out", "--checkpoint", "cut.pt"], "damaged"), (["out", "--checkpoint", "foreign.pt"], "not a checkpoint of"),
    (["out", "--checkpoint", "misfit.pt"], "do not fit"),
    (["out", "--checkpoint", "width.pt"], "does not describe"),
    (["out", "--checkpoint", "schedule.pt"], "does not describe"),
    (["out", "--checkpoint", "nan.pt"], "hold NaN.*name another checkpoint"),
    (["out", "--checkpoint", "huge.pt", "--per_class", 1], "image 1 comes out as NaN")])
def test_inference_refuses_bad_input(tmp_path, checkpoint, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    good, content = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    weights, config = content["ema"], content["config"]
    Path("cut.pt").write_bytes(good[:len(good) // 2])
    torch.save({"state_dict": {}}, "foreign.pt")
    save_tiny("misfit.pt", weights, channels=[16, 16])
    save_tiny("width.pt", weights, channels=[9, 16])
    config["schedule"]["name"] = "unknown"
    save_checkpoint("schedule.pt", kind="p1_ddpm", ema=weights, config=config)
    save_tiny("nan.pt", {**weights, "first.bias": torch.full((8,), float("nan"))})
    save_tiny("huge.pt", {**weights, "first.bias": torch.full((8,), 3e38)})  # finite, but their sum is not
    Path("file").write_text("mine")
    with pytest.raises((UserError, SystemExit)) as error:
        infer("--checkpoint", checkpoint, *arguments)
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")
    assert not Path("out").exists() or not list(Path("out").iterdir())
    assert Path("file").read_text() == "mine"


def test_an_interrupted_run_leaves_the_folder_as_it_was(tmp_path, checkpoint, monkeypatch):
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return guided_predictor(*arguments)

    guided_predictor = inference.guided_predictor
    monkeypatch.setattr(inference, "guided_predictor", interrupted)
    (tmp_path / "0_001.png").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        infer(tmp_path, "--checkpoint", checkpoint, "--steps", 1, "--batch_size", 5)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("0_001.png", "mine")]


def test_the_committed_model_and_the_number_of_threads(tmp_path, capsys):
    """Its digits are recognised, and another number of threads moves a pixel by one grey level at most."""
    threads = torch.get_num_threads()
    folders = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            folder = tmp_path / str(count)
            infer(folder, "--per_class", 1, "--amp", "off")
            folders.append(np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]))
    finally:
        torch.set_num_threads(threads)
    difference = np.abs(folders[0].astype(int) - folders[1])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    images = torch.from_numpy(folders[0]).permute(0, 3, 1, 2)
    predicted = digit_classifier.classify(digit_classifier.load_classifier(), images)[1]
    assert (predicted == torch.arange(10)).sum() >= 9  # 99.8 % of 1,000


# --- The evaluation -----------------------------------------------------------------------------

@pytest.fixture(scope="session")
def always_3(tmp_path_factory):
    """Classifier.pth, in the course's format, of a network that answers 3 to every image."""
    path = tmp_path_factory.mktemp("classifier") / "Classifier.pth"
    model = digit_classifier.Classifier()
    torch.nn.init.zeros_(model.fc3.weight)
    torch.nn.init.zeros_(model.fc3.bias)
    model.fc3.bias.data[3] = 1
    torch.save({"state_dict": model.state_dict()}, path)
    return path


def test_frechet_distance_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    # Roots of a product of covariances in double precision; the distance to itself is what is left of its trace.
    assert evaluate.frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-6)
    assert evaluate.frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6 * np.trace(cov_a))


def test_distances_are_root_mean_squares_in_grey_levels():
    black, grey = torch.zeros(1, 3, 28, 28, dtype=torch.uint8), torch.full((1, 3, 28, 28), 10, dtype=torch.uint8)
    # A float32 sum of 2,352 equal squares.
    assert evaluate.rms_distances(evaluate.as_rows(black), evaluate.as_rows(grey)).item() == pytest.approx(10, rel=1e-5)
    assert evaluate.diversity(torch.cat([black, grey, grey])) == pytest.approx(20 / 3, rel=1e-5)


def test_a_draw_has_as_many_of_each_digit_as_are_wanted_or_all():
    labels, rng = torch.tensor([3, 7, 3, 5, 7, 3]), np.random.default_rng(0)
    draws = [sorted(evaluate.same_class_draw(labels, torch.tensor([7, 3, 7, 7, 3]), rng)) for _ in range(20)]
    assert {tuple(draw) for draw in draws} == {(0, 1, 2, 4), (0, 1, 4, 5), (1, 2, 4, 5)}  # two of three 3s, both 7s


def test_judge_tells_real_digits_from_copies_and_noise(data_dir, always_3):
    judge = evaluate.Judge(data_dir, classifier=always_3)
    real = judge(judge.val_images, judge.val_labels)
    assert real["frechet"] == pytest.approx(0, abs=1e-6 * real["frechet_floor"])  # double precision
    assert real["accuracy"] == pytest.approx((judge.val_labels == 3).float().mean().item())
    assert all(ratio == pytest.approx(1) for ratio in real["diversity"].values())
    # More of each digit than there are: every draw is all of them.
    floor, spread = judge.floor(judge.train_labels.repeat(2))
    assert floor == pytest.approx(evaluate.frechet_distance(judge.train_features, judge.val_features), rel=1e-6)
    assert spread < 1e-6 * floor and real["frechet_floor_std"] > 0.01 * real["frechet_floor"]
    copies = judge(judge.train_images[:20], judge.train_labels[:20])
    # torch.cdist subtracts large squares for more than 25 rows: that leaves some hundredths of a grey level.
    assert copies["nearest_generated"].max() < 0.1 < real["nearest_generated"].min()
    assert copies["copies_generated"] == 1 and real["copies_generated"] == copies["copies_real"] == 0
    same = judge(judge.val_images[:1].expand(20, -1, -1, -1), torch.full((20,), 3))
    assert same["diversity"][3] == pytest.approx(0, abs=0.02) and "diversity" in evaluate.report(same)


def test_the_panel_has_a_mean_and_a_least(data_dir, always_3, monkeypatch):
    panel = [digit_classifier.load_classifier(always_3) for _ in range(3)]
    for grader in panel[1:]:  # these answer 5
        grader.fc3.bias.data = grader.fc3.bias.data.roll(2)
    monkeypatch.setattr(evaluate, "load_panel", lambda path: panel)
    judge = evaluate.Judge(data_dir, classifier=always_3)
    measures = judge(judge.val_images[:10], torch.tensor([3] * 6 + [5] * 4), neighbours=False)
    assert measures["panel"] == pytest.approx([0.6, 0.4, 0.4]) and measures["correct"] == 6
    total = evaluate.summary(measures)
    assert total["panel"] == pytest.approx(100 * 1.4 / 3) and total["panel_least"] == pytest.approx(40)
    svhn = evaluate.Judge(data_dir, "svhn", always_3)  # a panel of one
    measures = svhn(svhn.val_images, svhn.val_labels, neighbours=False)
    assert measures["panel"] == [measures["accuracy"]] and len(svhn.train_images) == 20


def test_evaluate_script(tmp_path, data_dir, always_3, capsys):
    generator = torch.Generator().manual_seed(0)
    for name in ("3_001", "3_002", "3_003", "5_001"):
        save_png(tmp_path / f"{name}.png", torch.randint(256, (3, 28, 28), generator=generator, dtype=torch.uint8))
    flags = [tmp_path, "--data_dir", data_dir, "--checkpoint", always_3]
    weights = torch.load(always_3, weights_only=True)["state_dict"]
    torch.save({"panel": [weights, weights]}, tmp_path / "panel.pth")
    call(evaluate, *flags, "--panel_checkpoint", tmp_path / "panel.pth")
    assert "panel             75 %   the least of 2 graders 75 %" in capsys.readouterr().out
    call(evaluate, *flags)
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith("acc = 0.75 (correct/total = 3/4)\n")
    assert re.search(r"images +4\naccuracy +75 %   per digit 3: 100 5: 0\npanel +[\d.]+ %   the least of 8", stdout)
    assert "copies            0 %" in stdout and "996 file(s) missing" in stderr
    for domain in ("mnistm", "svhn"):
        (tmp_path / "both" / domain).mkdir(parents=True)
        for path in tmp_path.glob("*.png"):
            shutil.copy(path, tmp_path / "both" / domain)
    call(evaluate, tmp_path / "both", *flags[1:])
    stdout, _ = capsys.readouterr()
    assert re.findall("(?m)^(MNIST-M|SVHN|acc = .*)$", stdout) == ["MNIST-M", "acc = 0.75 (correct/total = 3/4)",
                                                                "SVHN", "acc = 0.75 (correct/total = 3/4)"]
    for path in tmp_path.glob("3_*"):
        path.unlink()
    with pytest.raises(UserError, match="must hold several images of a digit"):
        call(evaluate, *flags)


# --- The studies --------------------------------------------------------------------------------

def test_a_study_measures_each_setting_once(tmp_path, data_dir, checkpoint, monkeypatch, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content.update(model=random_unet(1).state_dict(), metrics=[dict(epoch=2.5)])
    save_checkpoint(tmp_path / "last.pt", **content)
    flags = ["--checkpoint", tmp_path / "last.pt", "--output", tmp_path / "results.csv", "--data_dir", data_dir,
             "--device", "cpu", "--per_class", 2, "--tables", "guidance", "interval", "ema"]
    call(studies, *flags)
    printed = capsys.readouterr().out
    assert "| guidance | accuracy |" in printed and "| weights | accuracy |" in printed
    rows = pd.read_csv(tmp_path / "results.csv", dtype=dict(checkpoint=str))
    assert list(rows.columns) == ["table", "domain", "checkpoint", "epochs", "precision", "graders", *studies.FLAGS,
                                  *studies.MEASURES]
    assert rows.groupby("table").size().to_dict() == dict(guidance=6, interval=4, ema=2)
    assert set(rows.checkpoint) == {digest_of(tmp_path / "last.pt")} and set(rows.epochs) == {2.5}
    # One setting stands in all three tables, and is measured once.
    shared = rows[(rows.guidance == 1.5) & (rows.interval == "200 to 1000") & (rows.weights == "ema")]
    assert len(shared) == 3 and shared.seconds.nunique() == 1
    before = (tmp_path / "results.csv").read_bytes()
    monkeypatch.setattr(studies, "measure", None)  # a second call finds everything done
    call(studies, *flags)
    assert (tmp_path / "results.csv").read_bytes() == before
    monkeypatch.setattr(studies, "digest_of", lambda path: digest_of(path) if "Classifier" not in path.name else "new")
    monkeypatch.setattr(studies, "measure", lambda *_: dict(mnistm=dict.fromkeys(studies.MEASURES, 7)))
    call(studies, *flags)  # by other graders: in the place of the old rows
    again = pd.read_csv(tmp_path / "results.csv")
    assert len(again) == len(rows) and (again.accuracy == 7).all()


def test_a_study_of_two_domains_measures_each(tmp_path, data_dir, monkeypatch, capsys):
    save_checkpoint(tmp_path / "two.pt", kind="p1_ddpm", ema=random_unet(num_classes=20).state_dict(),
                    config=dict(network={**TINY, "num_classes": 20}, domains=["svhn", "mnistm"],
                                schedule=dict(name="linear", timesteps=1000)), metrics=[dict(epoch=1)])
    monkeypatch.setitem(studies.TABLES, "seeds", [dict(seed=5), dict(seed=6)])
    flags = ["--checkpoint", tmp_path / "two.pt", "--output", tmp_path / "results.csv", "--data_dir", data_dir,
             "--device", "cpu", "--per_class", 2, "--steps", 1, "--tables", "seeds"]
    call(studies, *flags)
    rows = pd.read_csv(tmp_path / "results.csv")
    assert rows[["domain", "seed"]].values.tolist() == [["svhn", 5], ["mnistm", 5], ["svhn", 6], ["mnistm", 6]]
    assert rows.frechet.nunique() == 4  # two sets of images, each with the real digits of its own domain
    assert "| domain | accuracy |" in capsys.readouterr().out
    call(studies, *flags)  # finds everything done
    assert len(pd.read_csv(tmp_path / "results.csv")) == 4


@pytest.mark.parametrize("flags, message", [
    (["--tables", "domains"], "--tables domains needs a network of several, and .* is of mnistm alone"),
    (["--tables", "guidance", "ema"], "lacks model"), (["--tables", "shipped", "--interval", 3, 2], "is empty")])
def test_a_study_that_cannot_be_is_told_before_work_is_done(tmp_path, checkpoint, monkeypatch, flags, message):
    save_checkpoint(tmp_path / "one.pt", **torch.load(checkpoint, weights_only=True), metrics=[dict(epoch=1)])
    monkeypatch.setattr(studies, "Judge", None)
    with pytest.raises(UserError, match=message):
        call(studies, "--checkpoint", tmp_path / "one.pt", "--output", tmp_path / "results.csv", *flags)
    assert len(list(tmp_path.iterdir())) == 1


def test_settings_are_the_tables_changes_to_the_flags():
    assert set(studies.DEFAULTS) == set(studies.FLAGS)
    for table, changes in studies.TABLES.items():
        rows = studies.settings(table, 1000)
        assert rows == [{**studies.DEFAULTS, **change} for change in changes]
    assert [row["steps"] for row in studies.settings("steps", 10)] == [8, 10, 10, 10] * 3
    assert studies.as_text(studies.DEFAULTS) == dict(
        sampler="dpmpp", steps="8", spacing="trimmed", guidance="2.5", interval="400 to 900", seed="0", weights="ema",
        eta="0.0", per_class="100")


def test_means_are_over_seeds_and_only_over_them():
    rows = pd.DataFrame([dict(dict.fromkeys(studies.FLAGS, "x"), domain="mnistm", guidance=guidance, seed=seed,
                              **dict.fromkeys(studies.MEASURES, value))
                         for guidance, seed, value in ((1, 0, 90.0), (1, 1, 92.0), (2, 0, 80.0))])
    assert studies.means(rows)[["guidance", "accuracy", "accuracy_std", "seeds"]].fillna(0).values.tolist() == [
        [1, 91, pytest.approx(math.sqrt(2)), 2], [2, 80, 0, 1]]
    lines = studies.markdown(rows).splitlines()
    assert lines[0].startswith("| guidance | accuracy |") and "| 91.00 ± 1.41 |" in lines[2] and "| 80.00 |" in lines[3]


def test_the_committed_results_are_those_of_the_committed_checkpoints():
    rows = pd.read_csv(inference.CHECKPOINT.parent / "results.csv", dtype=str)
    both = rows[rows.checkpoint == digest_of(inference.CHECKPOINT.with_name("mnistm_svhn.pt"))]
    shipped = {**studies.DEFAULTS, **inference.SHIPPED_2024._asdict(), "per_class": 50}
    wanted = [*[("shipped", shipped)] * 2, *(("seeds", dict(shipped, seed=seed)) for seed in range(30, 35)),
              *(("domains", setting) for setting in studies.settings("domains", 1000))]
    assert sorted(both[["table", "domain", *studies.FLAGS]].values.tolist()) == sorted(
        [table, domain, *studies.as_text(setting).values()] for table, setting in wanted
        for domain in ("mnistm", "svhn"))
    rows = rows[rows.checkpoint == digest_of(inference.CHECKPOINT)]
    for table in studies.TABLES:
        if table not in ("domains", "ema"):  # of other networks
            found = rows[rows.table == table][studies.FLAGS].values.tolist()
            wanted = [list(studies.as_text(setting).values()) for setting in studies.settings(table, 1000)]
            assert sorted(found) == sorted(wanted * (2 if table == "shipped" else 1)), table
    files = (*digit_classifier.CHECKPOINTS.values(), digit_classifier.PANEL)
    rows = rows[rows.table != "reference"]  # 40 minutes; it is older than the columns for graders and panel
    assert set(rows.graders) == set(both.graders) == {" ".join(map(digest_of, files))}
    for own in rows, both:  # the shipped sampling in float32 as well
        assert sorted(set(own.precision[own.table == "shipped"])) == ["bfloat16", "float32"]
        assert set(own.precision[own.table != "shipped"]) == {"bfloat16"}
