"""Scenes: conditions and pictures, the evaluator, the network, classifier guidance, training, sampling, evaluation."""

import functools
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from utils import UserError, image_generators, randn

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn
from torchvision.models import resnet18

import training
from conftest import ENVIRONMENT, ROOT, assert_near, assert_same_training, call, interrupted, randomised
from files import digest_of, load_checkpoint, read_jsonl, save_checkpoint
from p1_ddpm.diffusion import ddim, ddpm, guided_predictor, uniform_timesteps
from p1_ddpm.inference import Sampling
from p7_clevr import evaluate, guidance, inference, scenes, studies, train, train_evaluator
from p7_clevr.evaluator import NETWORKS, Encoder, Evaluator, load_grader, top_k_hits
from p7_clevr.model import SceneUNet, load_model, scene_schedule
from report import build, p7, readme

TINY = dict(channels=[8, 8], condition="tokens", patch=8)
COLORS = dict(zip(scenes.COLORS, ("#575757", "#ad2323", "#2a4bd7", "#1d6914", "#814a19", "#8126c0", "#29d0d0",
                                  "#ffee33")))


def draw_scene(names, rng, size=(64, 64)):
    """A picture of these objects: squares, discs and upright bars side by side, the first one in the middle."""
    picture = Image.new("RGB", size, (140, 140, 140))
    pen = ImageDraw.Draw(picture)
    for name, x in zip(names, (32, 10, 54)):
        color, shape = name.split()
        y, (dx, dy) = 20 + rng.integers(20), dict(cube=(6, 6), sphere=(6, 6), cylinder=(3, 8))[shape]
        shape_of = pen.ellipse if shape == "sphere" else pen.rectangle
        box = [(x - dx) * size[0] / 64, (y - dy) * size[1] / 64, (x + dx) * size[0] / 64, (y + dy) * size[1] / 64]
        shape_of(box, fill=COLORS[color])
    return picture


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory):
    """i-CLEVR's layout with 60 scenes of three pictures."""
    folder, table = tmp_path_factory.mktemp("i clevr"), {}
    (folder / "iclevr").mkdir()
    for number in range(60):
        rng = np.random.default_rng(number)
        names = [scenes.OBJECTS[i] for i in rng.permutation(24)[:3]]
        for count in range(3):
            name = f"CLEVR_train_{number:06d}_{count}.png"
            table[name] = names[:count + 1]
            draw_scene(table[name], np.random.default_rng(number)).save(folder / "iclevr" / name)
    (folder / "train.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_encoder(one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "encoder", functools.partial(Encoder, (16, 16, 16), 16))
        yield


# --- Conditions and pictures --------------------------------------------------------------------

def test_objects_are_numbered_as_the_courses_objects_json():
    assert len(scenes.OBJECTS) == 24
    named = ("gray cube", "yellow cube", "red sphere", "yellow cylinder")
    assert [scenes.NUMBERS[name] for name in named] == [0, 7, 9, 23]
    official = scenes.official_sets()
    assert [(len(sets), sum(map(len, sets))) for sets in official.values()] == [(32, 72), (32, 84)]
    assert official["test"][3] == ["blue cube", "green cube"]


def test_multi_hot_knows_no_order():
    rows = scenes.multi_hot([["cyan cube", "red sphere"], ["red sphere", "cyan cube"], ["gray cube"]])
    assert torch.equal(rows[0], rows[1]) and rows.sum(1).tolist() == [2, 2, 1] and rows[0, 9] == rows[2, 0] == 1


def test_held_out_sets_are_100_new_triples_and_always_the_same():
    held_out = scenes.held_out_sets()
    assert len({frozenset(names) for names in held_out}) == 100 and {len(names) for names in held_out} == {3}
    assert held_out == scenes.held_out_sets()
    official = {frozenset(names) for sets in scenes.official_sets().values() for names in sets}
    assert official.isdisjoint(map(frozenset, held_out))
    assert [len(names) for names in scenes.random_sets(5, [2, 4], seed=0)] == [2, 4, 2, 4, 2]


def test_parts_share_no_scene_and_the_generator_sees_no_held_out_set(scenes_dir, monkeypatch):
    assert sorted(number for part in scenes.PARTS.values() for number in part) == list(range(20))
    table = json.loads((scenes_dir / "train.json").read_text())
    hidden = table["CLEVR_train_000001_2.png"]
    monkeypatch.setattr(scenes, "held_out_sets", lambda: [hidden[::-1]])
    read = {part: scenes.read_scenes(scenes_dir, part) for part in (*scenes.PARTS, None)}
    assert {part: len(images) for part, (images, _, _) in read.items()} == {
        "generator": 45 * 3 - 1, "grader": 12 * 3, "held_out": 3 * 3, None: 180}
    images, conditions, sets = read["generator"]
    assert frozenset(hidden) not in map(frozenset, sets) and hidden[:2] in sets
    assert torch.equal(conditions, scenes.multi_hot(sets)) and images.dtype == torch.uint8
    expected = np.asarray(Image.open(scenes_dir / "iclevr/CLEVR_train_000000_0.png"))
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), expected)


def test_pictures_are_read_alike_from_folders_and_zip_files_and_squeezed(scenes_dir, tmp_path):
    names = [f"CLEVR_train_000019_{count}.png" for count in range(3)]
    table = {name: json.loads((scenes_dir / "train.json").read_text())[name] for name in names}
    for folder in ("beside", "inside"):
        (tmp_path / folder).mkdir()
    with zipfile.ZipFile(tmp_path / "beside/iclevr.zip", "w") as beside, \
            zipfile.ZipFile(tmp_path / "inside/all.zip", "w") as inside:
        for name in names:
            beside.write(scenes_dir / "iclevr" / name, f"iclevr/{name}")
            inside.write(scenes_dir / "iclevr" / name, name)
        inside.writestr("train.json", json.dumps(table))
    (tmp_path / "beside/train.json").write_text(json.dumps(table))
    expected, _, _ = scenes.read_scenes(scenes_dir, "held_out")
    for source in ("beside", "beside/iclevr.zip", "inside", "inside/all.zip"):
        images, _, sets = scenes.read_scenes(tmp_path / source, "held_out")
        assert torch.equal(images, expected[:3]) and sets == list(table.values())
    (tmp_path / "inside/train.json").write_text(json.dumps({names[1]: table[names[1]]}))  # goes before the archive's
    assert torch.equal(scenes.read_scenes(tmp_path / "inside", "held_out")[0], expected[1:2])

    (tmp_path / "large").mkdir()  # as the course's: 320x240, RGBA
    (tmp_path / "large/train.json").write_text(json.dumps({names[0]: table[names[0]]}))
    large = draw_scene(table[names[0]], np.random.default_rng(19), (320, 240))
    large.convert("RGBA").save(tmp_path / "large" / names[0])
    large, _, _ = scenes.read_scenes(tmp_path / "large", "held_out")
    assert (large - expected[:1].float()).abs().mean() < 3  # edges are antialiased


def write_data(folder, table, pictures=()):
    folder.mkdir(exist_ok=True)
    (folder / "train.json").write_text(table if isinstance(table, str) else json.dumps(table))
    for name in pictures:
        Image.new("RGB", (64, 64)).save(folder / name)
    return folder


@pytest.mark.parametrize("table, message", [
    ({"a_000000_0.png": ["rad cube"]}, 'a_000000_0.png in .*train.json names "rad cube".*the nearest is "red cube"'),
    ({"a_000000_0.png": ["red cube", "red cube"]}, 'names "red cube" twice'),
    ({"a_000000_0.png": []}, "is no list of objects"), ({"a_000000_0.png": "red cube"}, "is no list of objects"),
    ({"a_000000_0.png": [["red cube"]]}, "none of the 24 objects"),
    ({"a.png": ["red cube"]}, "not like CLEVR_train_000000_0"),
    ({"a_000000_0.png": ["red cube"], "a_000001_0.png": ["red cube"]}, "lacks 1 of the 2 .*a_000001_0.png; add"),
    ([], "no table of images"), ("{", "is no JSON file"), ({"a_000019_0.png": ["red cube"]}, "names no scene")])
def test_bad_tables_are_refused(tmp_path, table, message):
    folder = write_data(tmp_path / "data", table, ["a_000000_0.png"])
    with pytest.raises(UserError, match=message):
        scenes.read_scenes(folder, "generator")


def test_missing_and_damaged_sources_are_refused(tmp_path):
    for source in ("gone", "gone.zip"):
        with pytest.raises(UserError, match="neither a folder nor a whole zip"):
            scenes.read_scenes(tmp_path / source)
    with pytest.raises(UserError, match="there is no .*train.json"):
        scenes.read_scenes(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="a.zip is neither"):
        scenes.read_scenes(tmp_path)


def test_the_background_is_seen_behind_what_stands_in_the_centre(scenes_dir):
    images, _, _ = scenes.read_scenes(scenes_dir)
    assert (images[:, :, 30, 32] != 140).float().mean() > 0.5  # an object is there most of the time
    assert (scenes.empty_background(images) - 140).abs().max() < 1


# --- The evaluator ------------------------------------------------------------------------------

def test_accuracy_is_the_hits_among_the_k_likeliest_pooled_over_all_labels():
    scores = torch.zeros(3, 24)
    scores[0, 5] = 1  # asked for 5: hit
    scores[1, [1, 2]] = torch.tensor([2.0, 1.0])  # asked for 2 and 3: one of two
    scores[2, [7, 8, 9]] = 1  # asked for 7, 8, 9: all, in any order
    labels = torch.zeros(3, 24)
    labels[0, 5] = labels[1, [2, 3]] = labels[2, [9, 8, 7]] = 1
    assert top_k_hits(scores, labels).tolist() == [1, 1, 3]
    assert top_k_hits(scores - 100, labels).tolist() == [1, 1, 3]


def test_hits_are_those_of_the_courses_loop():
    torch.manual_seed(0)
    scores, labels = torch.rand(50, 24), (torch.rand(50, 24) < 0.15).float()
    expected = [len(set(score.topk(int(label.sum())).indices.tolist()) & set(label.nonzero().flatten().tolist()))
                for score, label in zip(scores, labels)]
    assert top_k_hits(scores, labels).tolist() == expected


@pytest.fixture(scope="session")
def evaluator_file(tmp_path_factory):
    """A file as the course's checkpoint.pth: an untrained ResNet-18 with its last layer, under the key `model`."""
    path = tmp_path_factory.mktemp("evaluator") / "checkpoint.pth"
    torch.manual_seed(0)
    network = resnet18()
    network.fc = nn.Sequential(nn.Linear(512, 24), nn.Sigmoid())
    torch.save({"model": network.state_dict(), "epoch": 3}, path)
    return path


def test_the_courses_file_drops_in(evaluator_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = resnet18()
    network.fc = nn.Sequential(nn.Linear(512, 24), nn.Sigmoid())
    network.load_state_dict(torch.load(evaluator_file, weights_only=True)["model"])
    torch.manual_seed(1)
    images = torch.rand(6, 3, 64, 64) * 2 - 1
    labels = scenes.multi_hot([["red cube"], ["gray cube", "cyan sphere"]] * 3)
    evaluator = Evaluator(evaluator_file)
    with torch.no_grad():
        probabilities = network.eval()(images)
        assert_near(evaluator.network(images), probabilities, 1e-4)
    accuracy = evaluator.eval(images, labels)
    assert accuracy == top_k_hits(probabilities, labels).sum().item() / 9
    assert accuracy == evaluator.eval(images, labels.int().tolist())
    assert evaluator.features(images).shape == (6, 512)


def test_foreign_evaluators_are_refused(tmp_path, evaluator_file, checkpoint):
    torch.save({"model": nn.Linear(2, 2).state_dict()}, tmp_path / "foreign.pth")
    torch.save({"model": resnet18().state_dict()}, tmp_path / "imagenet.pth")
    (tmp_path / "generator.pth").write_bytes(checkpoint.read_bytes())
    (tmp_path / "cut.pth").write_bytes(evaluator_file.read_bytes()[:1000])
    save_checkpoint(tmp_path / "noisy.pth", config=dict(network="encoder", schedule=dict(timesteps=10)),
                    model=NETWORKS["encoder"]().state_dict())
    for name, message in (("foreign", "does not hold the weights"), ("generator", "does not hold the weights"),
                          ("imagenet", "do not fit ResNet18"), ("cut", "damaged"), ("gone", "there is no evaluator"),
                          ("noisy", "on noisy images")):
        with pytest.raises(UserError, match=message):
            Evaluator(tmp_path / f"{name}.pth")


# --- The network --------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [TINY, dict(channels=[8, 16, 16], condition="multi_hot", patch=4),
                                    dict(channels=[8, 8, 8], condition="tokens", patch=2)], ids=str)
def test_network_depends_on_picture_time_and_set(config):
    model = randomised(SceneUNet(**config))
    x, t = torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(1)), torch.tensor([3, 3])
    one = scenes.multi_hot([["red cube", "cyan sphere"], ["red cube", "cyan sphere"]])
    with torch.no_grad():
        v = model(x, t, one)
        assert v.shape == x.shape and v.dtype == torch.float32
        assert_near(model(x[:1], t[:1], one[:1]), v[:1], 1e-4)  # a batch is its pictures
        for other in (model(x, t * 100, one), model(x + 1, t, one), model(x, t, model.null(one)),
                      model(x, t, scenes.multi_hot([["red cube", "cyan cube"]] * 2))):
            assert (other - v).abs().max() > 0.01 * v.abs().max()


def test_a_place_attends_to_the_objects_of_the_set_alone():
    attention = randomised(SceneUNet(**TINY)).down[0][0].objects
    x = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(2))
    y = scenes.multi_hot([["red cube", "cyan cube"]])
    with torch.no_grad():
        out = attention(x, y)
        attention.value[:, :, 3] += 1  # of an object that is not in the set
        assert torch.equal(attention(x, y), out)
        attention.value[:, :, 6] += 1  # of the cyan cube
        assert not torch.equal(attention(x, y), out)


@pytest.mark.parametrize("config, message", [(dict(patch=3), "patches of 3"), (dict(channels=[8] * 5), "5 resolutions"),
                                             (dict(condition="class"), "unknown kind")])
def test_a_network_that_does_not_fit_together_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        SceneUNet(**{**TINY, **config})


def test_a_shifted_schedule_multiplies_signal_by_noise():
    plain, shifted = scene_schedule(), scene_schedule(shift=3)
    assert plain[0] == shifted[0] == 1 and shifted[-1] < 1e-6
    ratios = [(a / (1 - a)).sqrt()[1:] for a in (plain, shifted)]
    torch.testing.assert_close(ratios[1], 3 * ratios[0], rtol=1e-9, atol=0)


# --- Classifier guidance ------------------------------------------------------------------------

@pytest.fixture
def gaussian(monkeypatch):
    """log p(y | x) = -(mean of x - 0.5)^2, whose gradient at each of the N values of x is -2 (mean - 0.5) / N."""
    monkeypatch.setattr(guidance, "log_probability", lambda logits, labels: -(logits - 0.5).square())
    network = nn.Module()
    network.logits = lambda x, t=None: x.flatten(1).mean(1)
    return network


def test_log_probability_is_that_of_what_is_there_and_of_what_is_not():
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    p = logits.sigmoid()[0]
    expected = math.log(p[0]) + math.log(1 - p[1]) + math.log(p[2])
    assert guidance.log_probability(logits, torch.tensor([[1.0, 0, 1]])).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_are_those_of_the_closed_form(gaussian):
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alphas_cumprod = scene_schedule("linear", 1000)
    closed = (-2 * (x.flatten(1).mean(1) - 0.5) / 48)[:, None, None, None].expand_as(x)
    assert_near(guidance.noisy_gradient(gaussian, None)(x, 600, None), closed, 1e-5)
    with torch.no_grad():  # samplers run so
        clean = guidance.clean_gradient(gaussian, None, alphas_cumprod)(torch.zeros_like(x), 600, x)
    assert_near(clean, alphas_cumprod[600].sqrt().float() * closed, 1e-5)


def standard_normal(alphas_cumprod):
    """predict(x, t) for images that are standard normal themselves: v is 0."""
    return guided_predictor(lambda x, t, y: torch.zeros_like(x), torch.zeros(1, 24), None, alphas_cumprod, 0)


def test_algorithm_2_is_the_papers_eps(gaussian):
    """eps - sqrt(1 - alpha-bar) s g, and x0 = (x - sqrt(1 - alpha-bar) eps) / sqrt(alpha-bar), by hand."""
    alphas_cumprod, t, s = scene_schedule("linear", 1000), 400, 3.0
    x = 0.2 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    gradient = guidance.noisy_gradient(gaussian, None)
    x0, eps = guidance.algorithm_2(standard_normal(alphas_cumprod), gradient, alphas_cumprod, s)(x, t)
    a, b = alphas_cumprod[t].sqrt().item(), (1 - alphas_cumprod[t]).sqrt().item()
    by_hand = b * x - b * s * (-2 * (x.flatten(1).mean(1) - 0.5) / 48)[:, None, None, None]  # eps of v = 0 is b x
    assert_near(eps, by_hand, 1e-4)
    assert_near(x0, (x - b * by_hand) / a, 1e-4)
    plain = standard_normal(alphas_cumprod)(x, t)
    unguided = guidance.algorithm_2(standard_normal(alphas_cumprod), gradient, alphas_cumprod, 0)(x, t)
    for ours, theirs in zip(unguided, plain):
        assert_near(ours, theirs, 1e-5)


def test_algorithm_1_shifts_the_mean_by_the_variance_times_the_gradient(gaussian):
    alphas_cumprod, steps, s = scene_schedule("linear", 1000), [500, 400, 300], 3.0
    x = 0.2 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    predict, gradient = standard_normal(alphas_cumprod), guidance.noisy_gradient(gaussian, None)

    def way(scale):
        generators = image_generators(0, [0, 1])
        return list(guidance.algorithm_1(predict, gradient, x, steps, alphas_cumprod, generators, scale))

    plain = list(ddpm(predict, x, steps, alphas_cumprod, image_generators(0, [0, 1])))
    assert torch.equal(way(0)[-1][1], plain[-1][1])
    guided = way(s)
    assert [t for t, _ in guided] == steps[1:]
    variance = (1 - alphas_cumprod[400]) / (1 - alphas_cumprod[500]) * (1 - alphas_cumprod[500] / alphas_cumprod[400])
    by_hand = (variance * s * -2 * (x.flatten(1).mean(1) - 0.5) / 48).float()
    assert_near(guided[0][1] - way(0)[0][1], by_hand[:, None, None, None].expand_as(x), 1e-4)


@pytest.mark.parametrize("algorithm", [1, 2])
def test_guidance_reaches_the_mean_of_the_product_of_two_gaussians(monkeypatch, algorithm):
    """Images N(0, 0.3^2) and a classifier log p(y | x0) = -(x0 - 0.2)^2 / (2 * 0.3^2): guided, their mean is 0.1.

    The classifier of noisy pictures is known too: x0 given x_t is Gaussian with mean k x_t and variance `rest`.
    """
    alphas_cumprod = scene_schedule("linear", 1000)
    size, pull = 0.3**2, 0.2

    def predict(x, t):
        a = alphas_cumprod[t].item()
        x0 = math.sqrt(a) * size / (a * size + 1 - a) * x
        return x0, (x - math.sqrt(a) * x0) / math.sqrt(1 - a)

    def gradient(x, t, x0):
        a = alphas_cumprod[t].item()
        k, rest = math.sqrt(a) * size / (a * size + 1 - a), size * (1 - a) / (a * size + 1 - a)
        return k * (pull - x0) / (size + rest)

    generators = image_generators(0, range(50))
    x = randn(generators, (1, 8, 8))
    timesteps = uniform_timesteps(alphas_cumprod, 1000)
    if algorithm == 1:
        *_, (_, x) = guidance.algorithm_1(predict, gradient, x, timesteps, alphas_cumprod, generators, 1.0)
    else:
        predict = guidance.algorithm_2(predict, gradient, alphas_cumprod, 1.0)
        *_, (_, x) = ddim(predict, x, timesteps, alphas_cumprod, generators)
    # Three standard errors of 3,200 values, and 5 % for strides that are not infinitely short.
    assert x.mean().item() == pytest.approx(0.1, abs=0.005 + 3 * 0.3 / math.sqrt(2 * 3200))
    assert x.std().item() == pytest.approx(0.3 / math.sqrt(2), rel=0.05 + 3 / math.sqrt(2 * 3200))


# --- Training -----------------------------------------------------------------------------------

def run_train(scenes_dir, output_dir, *arguments):
    call(train, "--device", "cpu", "--amp", "off", "--data_dir", scenes_dir, "--output_dir", output_dir, "--channels",
         8, 8, "--patch", 8, "--batch_size", 16, "--timesteps", 4, "--warmup", 2, *arguments)


def train_grader(scenes_dir, output_dir, *arguments):
    call(train_evaluator, "--device", "cpu", "--amp", "off", "--data_dir", scenes_dir, "--output_dir", output_dir,
         "--network", "encoder", "--batch_size", 12, "--lr", 1e-2, "--warmup", 2, "--ema", 0.9, *arguments)


@pytest.mark.parametrize("train_one, flags", [
    (run_train, "--epochs 1 --optimizer adamw --dropout 0.1"), (run_train, "--epochs 1 --optimizer muon --dropout 0.1"),
    (train_grader, "--epochs 2 --noisy")])
def test_resumed_training_equals_an_uninterrupted_one(tmp_path, scenes_dir, train_one, flags):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--save_every", 3, *flags.split()]
    train_one(scenes_dir, whole, *flags)

    with interrupted():
        train_one(scenes_dir, parts, *flags)
    assert torch.load(parts / "last.pt", weights_only=True)["step"] == 3
    train_one(scenes_dir, parts, *flags, "--resume")
    assert_same_training(whole, parts)
    assert len(read_jsonl(parts / "metrics.jsonl")) > 1


def owners(scenes_dir, part):
    """A function that looks pictures x (B, 3, 64, 64) in [-1, 1] up in a part of the data and tells their multi-hot
    sets."""
    images, conditions, _ = scenes.read_scenes(scenes_dir, part)
    known = {x.numpy().tobytes(): condition for x, condition in zip(inference.as_input(images), conditions)}
    return lambda x: torch.stack([known[picture.numpy().tobytes()] for picture in x])


def test_pictures_train_with_their_own_sets_and_the_log_tells_their_loss(tmp_path, scenes_dir, monkeypatch):
    own, ddpm_loss, update = owners(scenes_dir, "generator"), train.ddpm_loss, training.update
    drawn, updates = [], []

    def watched(model, x0, condition, null, alphas_cumprod, label_drop):
        assert torch.equal(condition, own(x0)) and not null.any() and label_drop == 0.3
        drawn.append(ddpm_loss(model, x0, condition, null, alphas_cumprod, label_drop))
        return drawn[-1]

    monkeypatch.setattr(train, "ddpm_loss", watched)
    monkeypatch.setattr(training, "update", lambda parts, loss, *rest: (updates.append(loss.item()),
                                                                        update(parts, loss, *rest)))
    run_train(scenes_dir, tmp_path, "--epochs", 1, "--save_every", 3, "--shift", 2, "--label_drop", 0.3)
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 8] and all(len(line["loss_quarters"]) == 4 for line in lines)
    t, loss = (torch.cat(values).detach() for values in zip(*drawn[3:6]))
    alpha_bar = scene_schedule("cosine", 4, 2.0)[t]
    by_hand = dict(loss=loss * (4 * (1 - alpha_bar) + alpha_bar), loss_eps=loss * alpha_bar)
    told = {name: pytest.approx(value.mean().item(), rel=1e-4, abs=1e-5) for name, value in by_hand.items()}  # rounded
    assert {name: lines[1][name] for name in by_hand} == told and np.mean(updates[3:6]) == told["loss"]
    assert Image.open(tmp_path / "samples_000008.png").size == (8 * 65 + 1, 4 * 65 + 1)
    model, alphas_cumprod = load_model(tmp_path / "model.pt")  # what training has written, inference reads
    average = load_checkpoint(tmp_path / "last.pt", "p7_clevr", [])["ema"]
    assert torch.equal(model.state_dict()["first.weight"], average["first.weight"].half().float())
    assert torch.equal(alphas_cumprod, scene_schedule("cosine", 4, 2.0))


def test_a_grader_is_asked_for_the_labels_of_the_pictures_that_it_sees(tmp_path, scenes_dir, monkeypatch):
    own, network, compare = owners(scenes_dir, "grader"), NETWORKS["encoder"], nn.functional.binary_cross_entropy
    passes, right = [], []

    def watched_network():
        model = network()
        model.register_forward_hook(lambda module, inputs, output: passes.append((inputs[0], output)))
        return model

    def watched_loss(probabilities, labels, **options):
        x, output = passes[-1]
        right.append(torch.equal(probabilities, output) and torch.equal(labels, own(x)))
        return compare(probabilities, labels, **options)

    monkeypatch.setitem(NETWORKS, "encoder", watched_network)
    monkeypatch.setattr(nn.functional, "binary_cross_entropy", watched_loss)
    monkeypatch.setattr(train_evaluator, "augment", lambda x, labels, background, paste: (x, labels))
    train_grader(scenes_dir, tmp_path, "--epochs", 1)
    assert right == [True] * 3


def test_training_lowers_the_loss(tmp_path, scenes_dir, monkeypatch):
    monkeypatch.setattr(train, "sample_grid", lambda *arguments: None)
    run_train(scenes_dir, tmp_path, "--epochs", 4, "--lr", 3e-3, "--save_every", 8, "--channels", 24, 8, "--patch", 4,
              "--timesteps", 1000)
    losses = [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]


def test_two_processes_train_together(tmp_path, scenes_dir, train_together):
    shared = ["--data_dir", scenes_dir, "--epochs", 1, "--device", "cpu", "--amp", "off", "--output_dir"]
    generator = [*shared, tmp_path / "scenes", "--batch_size", 32, "--channels", 8, 8, "--patch", 8, "--timesteps", 4]
    grader = [*shared, tmp_path / "grader", "--batch_size", 12, "--network", "encoder"]
    printed = train_together(("p7_clevr.train", generator), ("p7_clevr.train_evaluator", grader))
    assert "2 process(es), 4 steps" in printed and "2 process(es), 3 steps" in printed
    assert {path.name for path in (tmp_path / "scenes").iterdir()} == {
        "last.pt", "model.pt", "metrics.jsonl", "samples_000004.png"}


def test_a_dry_run_writes_nothing(tmp_path, scenes_dir, capsys):
    run_train(scenes_dir, tmp_path / "out", "--dry_run")
    call(train_evaluator, "--device", "cpu", "--data_dir", scenes_dir, "--output_dir", tmp_path / "out", "--network",
         "encoder", "--dry_run")
    assert capsys.readouterr().out.count("dry run: two steps of 8 images went well") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--data_dir", "nowhere"], "neither a folder nor"), (["--channels", 9, 8], "divisible"),
    (["--channels", 8, 8, "--patch", 7], "do not fit together"), (["--batch_size", 1000], "larger than the"),
    (["--schedule", "linear", "--timesteps", 100], "more --timesteps")])
def test_training_refuses_bad_flags(tmp_path, scenes_dir, flags, message):
    with pytest.raises(UserError, match=message):
        run_train(scenes_dir, tmp_path / "out", *flags)


def test_pasting_adds_the_objects_of_another_picture(scenes_dir):
    images, labels, _ = scenes.read_scenes(scenes_dir, "grader")
    torch.manual_seed(0)
    background = scenes.empty_background(images) / 127.5 - 1
    x, y = train_evaluator.augment(images.float() / 127.5 - 1, labels, background, paste=1.0)
    assert x.shape == images.shape and torch.equal(y, labels.maximum(labels.roll(1, 0)))
    assert (x - background).abs().mean() > 1.2 * (images.float() / 127.5 - 1 - background).abs().mean()
    names = [["red cube"], ["green cube"], ["blue cube"]]
    pictures = np.stack([np.asarray(draw_scene(cube, np.random.default_rng(0))) for cube in names])
    pictures = inference.as_input(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    x, y = train_evaluator.augment(pictures, scenes.multi_hot(names), background, paste=1.0)
    first, second = x.topk(2, dim=1).values.unbind(1)
    shown = [[((x.argmax(1) == channel) & (first - second > 0.3))[i].any() for channel in range(3)] for i in range(3)]
    assert torch.equal(torch.tensor(shown), y[:, [scenes.NUMBERS[cube] for [cube] in names]] > 0)


@pytest.fixture(scope="module")
def graders(tmp_path_factory, scenes_dir):
    """A folder with judge.pth, trained for a moment, and noisy.pth and shifted.pth, whose pictures are noisy."""
    folder = tmp_path_factory.mktemp("graders")
    for name, flags in (("judge", ["--epochs", 25, "--paste", 0]), ("noisy", ["--epochs", 1, "--noisy"]),
                        ("shifted", ["--epochs", 1, "--noisy", "--shift", 2])):
        train_grader(scenes_dir, folder / "training" / name, "--save_every", 25, *flags)
        os.replace(folder / "training" / name / "model.pt", folder / f"{name}.pth")
    return folder


def test_a_grader_learns_and_its_file_is_an_evaluator(graders, scenes_dir):
    lines = read_jsonl(graders / "training/judge/metrics.jsonl")
    share = 2 / 24  # of the objects, in the mean over pictures of one, two and three
    knows_nothing = -24 * (share * math.log(share) + (1 - share) * math.log(1 - share))
    assert lines[-1]["loss"] < 0.9 * knows_nothing and 0 <= lines[-1]["accuracy"] <= 1
    images, labels, _ = scenes.read_scenes(scenes_dir, "held_out")
    evaluator = Evaluator(graders / "judge.pth")
    accuracy = evaluator.eval(inference.as_input(images), labels)
    assert accuracy == pytest.approx(lines[-1]["accuracy"], abs=0.12)  # two of 18 labels, for half precision
    for name, shift in ("noisy", 3.0), ("shifted", 2.0):
        assert load_grader(graders / f"{name}.pth")[1]["schedule"] == dict(name="cosine", timesteps=1000, shift=shift)


# --- Sampling and the lab's wrapper ---------------------------------------------------------------

def save_tiny(path, weights, schedule=dict(name="cosine", timesteps=1000, shift=3.0), **network):
    save_checkpoint(path, kind="p7_clevr", ema=weights, metrics=[dict(epoch=1)],
                    config=dict(network={**TINY, **network}, schedule=schedule))
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("check point") / "tiny.pt", randomised(SceneUNet(**TINY)).state_dict())


def images_of(checkpoint, sets, batch_size=4, seed=0, sampling=Sampling("ddpm", 4), **options):
    model, alphas_cumprod = load_model(checkpoint)
    batches = inference.generate(model, alphas_cumprod, sets, sampling, seed, "cpu", batch_size, **options)
    return torch.cat([images for _, images, _ in batches]).int()


def test_neither_the_order_of_labels_nor_the_batch_changes_a_scene(checkpoint):
    sets = [(0, ["red cube", "cyan sphere"]), (5, ["gray cube"]), (7, ["red cube", "blue cube", "gray cylinder"])]
    whole = images_of(checkpoint, sets, 3)
    assert whole.float().std() > 10
    assert torch.equal(images_of(checkpoint, [(number, names[::-1]) for number, names in sets], 3), whole)
    # Sums in another order, rounded to whole grey levels.
    assert (images_of(checkpoint, sets, 2) - whole).abs().max() <= 1
    assert (images_of(checkpoint, sets[2:], 1) - whole[2:]).abs().max() <= 1
    assert (images_of(checkpoint, sets, 3, seed=1) - whole).abs().max() > 50
    other = images_of(checkpoint, [(0, ["red cube", "cyan cube"])], 1)
    assert (other - whole[:1]).abs().max() > 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp"])
@pytest.mark.parametrize("name", ["judge", "noisy"])
def test_classifier_guidance_raises_the_classifiers_opinion(checkpoint, graders, sampler, name):
    sets = [(number, ["red cube", "cyan sphere"]) for number in range(4)]
    model, alphas_cumprod = load_model(checkpoint)
    guide = inference.load_guide(graders / f"{name}.pth", 1.0, alphas_cumprod, "cpu")
    assert guide.noisy == (name == "noisy")
    labels = scenes.multi_hot([names for _, names in sets])
    opinions = []
    for options in (dict(), dict(guide=guide)):
        images = images_of(checkpoint, sets, sampling=Sampling(sampler, 8, guidance=1.0), **options)
        with torch.no_grad():
            opinions.append(guidance.log_probability(guide.network.logits(inference.as_input(images)), labels).mean())
    assert opinions[1] > opinions[0]


def picture(path):
    return torch.from_numpy(np.asarray(Image.open(path)).astype(int)).permute(2, 0, 1)


@pytest.fixture
def lab(tmp_path, checkpoint, evaluator_file):
    """lab(*arguments): main() of the wrapper's script with the tiny checkpoint, from the folder tmp_path."""
    def run(*arguments):
        call(inference, "--device", "cpu", "--checkpoint", checkpoint, "--evaluator", evaluator_file, "--steps", 2,
             *arguments)
    return run


def test_the_lab_writes_what_the_course_asks_for(tmp_path, lab, checkpoint, capsys):
    sampling = Sampling("ddim", 7, "uniform", guidance=0)
    lab(tmp_path / "out", "--steps", 7, "--spacing", "uniform", "--sampler", "ddim", "--guidance", 0)
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert files == {f"images/{name}/{number}.png" for name in ("test", "new_test") for number in range(32)} | {
        "grid_test.png", "grid_new_test.png", "denoising.png"}
    for name, number, key in ("test", 3, 3), ("new_test", 5, 1005):
        expected = images_of(checkpoint, [(key, scenes.official_sets()[name][number])], sampling=sampling)
        assert (picture(tmp_path / f"out/images/{name}/{number}.png") - expected).abs().max() <= 1
    assert Image.open(tmp_path / "out/grid_test.png").size == (8 * 66 + 2, 4 * 66 + 2)
    strip = np.asarray(Image.open(tmp_path / "out/denoising.png"))
    assert strip.shape == (68, 8 * 66 + 2, 3)
    assert strip[2:66, 2:66].std() > strip[2:66, -66:-2].std()  # noise comes first
    out = capsys.readouterr().out
    assert re.search(r"^test: accuracy 0\.\d{4} \(32 images\)\nnew_test: accuracy 0\.\d{4} \(32 images\)\n", out)


def test_any_wish_is_drawn_eight_times(tmp_path, lab, checkpoint, graders, capsys):
    names, path = ["red sphere", "cyan cube"], graders / "noisy.pth"
    guide = inference.load_guide(path, 2.0, scene_schedule(shift=3.0), "cpu")
    drawn = []
    for flags, options in ([], {}), (["--seed", 1], dict(seed=1)), (["--guide", path, "--scale", 2], dict(guide=guide)):
        lab(tmp_path / "out", "--labels", *names, *flags)
        assert "red sphere, cyan cube: accuracy" in capsys.readouterr().out
        assert {file.name for file in (tmp_path / "out").iterdir()} == {*(f"{n}.png" for n in range(8)), "grid.png"}
        drawn.append(torch.stack([picture(tmp_path / f"out/{number}.png") for number in range(8)]))
        expected = images_of(checkpoint, [(number, names) for number in range(8)], 8,
                             sampling=inference.SHIPPED._replace(steps=2), **options)
        assert (drawn[-1] - expected).abs().max() <= 1
    assert min((drawn[0] - other).abs().max() for other in drawn[1:]) > 5


def test_five_objects_may_be_asked_for_and_scenes_of_a_longer_list_are_told(tmp_path, lab, capsys):
    (tmp_path / "data").mkdir()
    for count in 2, 1:
        for name in ("test", "new_test"):
            (tmp_path / "data" / f"{name}.json").write_text(json.dumps([list(scenes.OBJECTS[:5])] * count))
        assert "stay" not in capsys.readouterr().err
        lab(tmp_path / "out", "--data_dir", tmp_path / "data")
        assert (tmp_path / "out/images/new_test/0.png").exists()
    assert re.search("other scenes in .*images/test stay: 1.png\n", capsys.readouterr().err)


@pytest.mark.parametrize("content, message", [
    ([["red cube"], ["red cub"]], 'entry 1 of .*test.json names "red cub".*nearest is "red cube"'),
    ([["red cube", "red cube"]], 'names "red cube" twice'), ([[]], "is no list of objects"), ([], "no list of lists"),
    ("[[", "is no JSON file"), (None, "there is no .*test.json")])
def test_bad_conditions_are_refused(tmp_path, lab, content, message):
    (tmp_path / "data").mkdir()
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "data/test.json").write_text(text)
    with pytest.raises(UserError, match=message):
        lab(tmp_path / "out", "--data_dir", tmp_path / "data")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, message", [
    (["out", "--labels", "rad sphere"], 'the nearest is "red sphere"'), (["out", "--steps", 1001], "above the 1000"),
    (["out", "--checkpoint", "gone.pt"], "there is no checkpoint gone.pt"), (["file"], "is a file"),
    (["half"], "cannot write to the output folder half/images"),
    (["out", "--checkpoint", "foreign.pt"], "not a checkpoint of p7_clevr"),
    (["out", "--evaluator", "foreign.pt"], "does not hold the weights"),
    (["out", "--checkpoint", "misfit.pt"], "do not fit"), (["out", "--checkpoint", "schedule.pt"], "does not describe"),
    (["out", "--checkpoint", "nan.pt"], "hold NaN"), (["out", "--checkpoint", "huge.pt"], "image 0 comes out as NaN"),
    (["out", "--scale", 1, "--guide", "other.pth"], "other timesteps"),
    (["out", "--guide", "gone.pth"], "gone.pth has no strength")])
def test_inference_refuses_bad_input(tmp_path, lab, checkpoint, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    weights = torch.load(checkpoint, weights_only=True)["ema"]
    torch.save({"state_dict": {}}, "foreign.pt")
    save_tiny("misfit.pt", weights, channels=[8, 16])
    save_tiny("schedule.pt", weights, schedule=dict(name="unknown"))
    save_tiny("nan.pt", {**weights, "first.bias": torch.full((8,), float("nan"))})
    save_tiny("huge.pt", {**weights, "first.bias": torch.full((8,), 3e38)})  # finite, but their sum is not
    save_checkpoint("other.pth", config=dict(network="encoder", schedule=dict(name="cosine", timesteps=500)),
                    model=NETWORKS["encoder"]().state_dict())
    Path("file").write_text("mine")
    Path("half").mkdir()
    Path("half/images").write_text("mine")
    with pytest.raises(UserError, match=message):
        lab(*arguments)
    assert not list(Path().rglob("*.png")) and Path("file").read_text() == "mine"


def test_the_wrapper_refuses_bad_input_from_any_folder_in_one_sentence(tmp_path, checkpoint, evaluator_file):
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data/test.json").write_text('[["red cube"], ["red cub"]]')
    done = subprocess.run(["bash", ROOT / "assignments/nycu2024_lab6/lab6.sh", "out put", "--data_dir", "my data"],
                          cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out put").exists()
    assert done.stderr == ('inference.py: error: entry 1 of my data/test.json names "red cub", which is none of the 24 '
                           'objects; the nearest is "red cube"\n')


# --- Evaluation and studies ---------------------------------------------------------------------

def test_things_are_counted_before_the_background():
    background = torch.full((3, 64, 64), 140.0)
    images = background.repeat(3, 1, 1, 1)
    images[1, :, 10:20, 10:20] = 30
    images[1, 0, 40:50, 40:44] = 200
    images[2, :, 10:20, 10:20] -= 20  # a shadow
    images[2, :, 40:42, 40:42] = 30  # a speck
    assert evaluate.count_objects(images.to(torch.uint8), background).tolist() == [0, 2, 0]


def test_the_floor_is_the_distance_of_real_images_of_as_many_objects():
    judge = evaluate.Judge.__new__(evaluate.Judge)
    judge.sets = [["red cube"], ["red cube", "gray cube"], ["gray cube"], ["red cube", "gray cube", "cyan cube"]]
    judge.real_features = torch.tensor([[1.0], [50.0], [3.0], [70.0]]) * torch.eye(2)[0]
    judge.held_out_features = torch.tensor([[4.0], [6.0], [8.0]]) * torch.eye(2)[0]
    sets = [["cyan cube"], ["blue cube"]]  # so the first and the third: of mean 2 and variance 2
    assert judge.floor(sets) == pytest.approx((6 - 2) ** 2 + 4 + 2 - 2 * math.sqrt(4 * 2))


@pytest.fixture
def shipped(graders, evaluator_file, tmp_path, monkeypatch):
    """The graders of the tests in the place of the shipped ones."""
    for name in ("judge", "noisy"):
        (tmp_path / f"{name}.pth").write_bytes((graders / f"{name}.pth").read_bytes())
    (tmp_path / "evaluator.pth").write_bytes((graders / "judge.pth").read_bytes())
    for module in (evaluate, studies, inference):
        monkeypatch.setattr(module, "CHECKPOINTS", tmp_path)
    return tmp_path


def test_the_judge_tells_real_pictures_from_noise(shipped, scenes_dir):
    judge = evaluate.Judge(scenes_dir, evaluator=shipped / "evaluator.pth", judge=shipped / "judge.pth")
    images, _, sets = scenes.read_scenes(scenes_dir, "grader")
    real = judge(images, sets)
    assert real["too_many"] == 0 and real["color_mean"] < 10 and real["accuracy"] == real["judge"]
    assert real["frechet_ratio"] == pytest.approx(real["frechet"] / judge.floor(sets))
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noise = judge(noise, sets)
    assert noise["frechet"] > 3 * real["frechet"] and noise["color_std"] > 20
    four, one = judge(images[:5], [list(scenes.OBJECTS[:4])] * 5), judge(images[:1], sets[:1])
    assert math.isnan(four["frechet_ratio"])  # real pictures show three at most
    assert math.isnan(one["frechet"]) and math.isnan(one["frechet_ratio"])  # and one has no covariance


def test_evaluate_script(shipped, scenes_dir, lab, tmp_path, capsys, monkeypatch):
    lab(tmp_path / "out")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "out"), "--data_dir", str(scenes_dir),
                                      "--evaluator", str(shipped / "evaluator.pth")])
    monkeypatch.setattr(evaluate.Judge.__init__, "__defaults__", ("cpu", *[shipped / "judge.pth"] * 2))
    evaluate.main()
    out = capsys.readouterr().out
    assert re.search(r"^test: accuracy 0\.\d{4}, by the judge 0\.\d{4}; objects too many in \d+ % of the ", out)
    assert "times that of real images" in out and "of real images: 1" in out
    os.remove(tmp_path / "out/images/test/7.png")
    with pytest.raises(UserError, match="there is no image .*7.png"):
        evaluate.main()
    for name in "test", "new_test":
        (tmp_path / f"{name}.json").write_text('[["red cube"], ["red cube", "cyan sphere"], ["gray cube"]]')
    lab(tmp_path / "others", "--data_dir", tmp_path)
    sys.argv[1:2] = [str(tmp_path / "others"), "--conditions", str(tmp_path)]
    evaluate.main()
    for name, objects in ("test", 1), ("new_test", 4):  # a set each, one of more objects than any real picture shows
        (tmp_path / f"{name}.json").write_text(json.dumps([scenes.OBJECTS[:objects]]))
    capsys.readouterr()
    evaluate.main()
    out = capsys.readouterr().out
    assert re.search(r"^Frechet distance \d+\.\d\d$", out, re.MULTILINE) and "nan" not in out


def test_a_study_measures_each_setting_once(shipped, evaluator_file, scenes_dir, checkpoint, tmp_path, monkeypatch,
                                            capsys):
    monkeypatch.setattr(evaluate.Judge.__init__, "__defaults__", ("cpu", *[shipped / "judge.pth"] * 2))
    monkeypatch.setattr(studies, "TABLES", {
        "scale": studies.each("choice", (1, 2), dict(scale=0.0), dict(scale=0.1, guide="noisy")),
        "again": studies.each("choice", (2,), {}), "five": studies.each("five", (1,), {})})
    sets_of, measure, measured = studies.sets_of, studies.measure, []
    monkeypatch.setattr(studies, "sets_of", lambda kind, judge: sets_of(kind, judge)[:12])
    monkeypatch.setattr(studies, "measure", lambda *arguments: measured.append(arguments) or measure(*arguments))
    flags = ["--device", "cpu", "--output", tmp_path / "results.csv", "--data_dir", scenes_dir, "--checkpoint",
             checkpoint, "--steps", 1, "--evaluator", shipped / "evaluator.pth", "--tables", "scale", "again", "five"]
    call(studies, *flags)
    out = capsys.readouterr().out
    assert len(measured) == 5 and "±" in out and "| scale |" in out
    rows = studies.pd.read_csv(tmp_path / "results.csv")
    assert list(rows.table) == ["scale"] * 4 + ["again", "five"] and list(rows.condition.unique()) == ["tokens"]
    assert rows.accuracy.between(0, 1).all() and rows.frechet_ratio.isna().tolist() == [False] * 5 + [True]
    call(studies, *flags)
    assert len(measured) == 5 and len(studies.pd.read_csv(tmp_path / "results.csv")) == 6
    capsys.readouterr()
    call(studies, *flags, "--evaluator", evaluator_file, "--tables", "five")  # another grader: measured anew
    assert len(measured) == 6 and "±" not in capsys.readouterr().out
    with pytest.raises(SystemExit):  # every row has a seed of its own
        call(studies, *flags, "--seed", 1)
    monkeypatch.setattr(studies, "load_model", None)  # told before the networks are read
    for columns in "table,accuracy", "table,graders":  # the latter are p1_ddpm's
        (tmp_path / "results.csv").write_text(f"{columns}\nfive,1\n")
        with pytest.raises(UserError, match="results.csv is no table"):
            call(studies, *flags)


def test_graders_are_all_files_that_judge_or_guide(tmp_path):
    for name in "evaluator", "judge", "noisy", "other":
        (tmp_path / f"{name}.pth").write_text(name)
    told = [digest_of(tmp_path / f"{name}.pth") for name in ("other", "evaluator", "judge", "noisy")]
    assert studies.graders(tmp_path / "other.pth", tmp_path).split() == told
    assert studies.graders(tmp_path / "evaluator.pth", tmp_path).split() == told[1:]


def test_tables_vary_flags_and_report_what_took_part_in_no_choice():
    for table in studies.TABLES.values():
        assert all(row.keys() <= studies.DEFAULTS.keys() and row["sets"] for row in table)
    judge = evaluate.Judge.__new__(evaluate.Judge)
    judge.sets = [["red cube"]] * 400
    kinds = {kind: studies.sets_of(kind, judge) for kind in ("choice", "held_out", "test", "new_test", "four", "five")}
    assert [len(sets) for sets in kinds.values()] == [160, 100, 32, 32, 32, 32]
    assert len(studies.sets_of("real", judge)) == 150
    choice = {frozenset(names) for names in kinds.pop("choice")}
    assert all(choice.isdisjoint(map(frozenset, sets)) for sets in kinds.values())
    seeds = [{row["seed"] for row in studies.TABLES[name]} for name in ("guidance", "seeds")]
    assert seeds[0].isdisjoint(seeds[1])


# --- What is shipped, and the report ------------------------------------------------------------

@pytest.mark.parametrize("script, name, arguments", [
    (train, "scenes.pt", []), (train_evaluator, "evaluator.pth", []),
    (train_evaluator, "judge.pth", "--network encoder --optimizer adamw --epochs 130 --paste 0.3 --seed 1".split()),
    (train_evaluator, "noisy.pth", "--network encoder --optimizer adamw --epochs 130 --paste 0.3 --noisy".split())])
def test_the_shipped_networks_have_the_settings_of_the_printed_commands(monkeypatch, script, name, arguments):
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    wanted, path = training.recipe(script.parse_args()), ROOT / "p7_clevr/checkpoints" / name
    shipped = load_checkpoint(path, "p7_clevr" if script is train else "p7_clevr_evaluator", ["recipe", "metrics"])
    free = {"sample_every"}  # when a picture is drawn changes no weight
    assert {key: wanted[key] for key in shipped["recipe"].keys() - free} == {
        key: value for key, value in shipped["recipe"].items() if key not in free}
    lines = read_jsonl(path.with_suffix(".jsonl"))
    assert lines[-1] == shipped["metrics"][-1] and lines[-1]["epoch"] == shipped["recipe"]["epochs"]
    if script is train_evaluator:
        assert " ".join(arguments) in script.__doc__


def test_the_shipped_networks_draw_and_recognise_scenes(monkeypatch):
    """In a third of the steps, alone and guided by the classifier of noisy images."""
    monkeypatch.setitem(NETWORKS, "encoder", Encoder)
    folder = ROOT / "p7_clevr/checkpoints"
    sets = scenes.official_sets()["test"][:4]
    _, alphas_cumprod = load_model(folder / "scenes.pt")
    guide = inference.load_guide(folder / "noisy.pth", 1.0, alphas_cumprod, "cpu")
    for options in {}, dict(guide=guide):
        images = images_of(folder / "scenes.pt", list(enumerate(sets)),
                           sampling=inference.SHIPPED._replace(steps=10), **options)
        x, labels = inference.as_input(images), scenes.multi_hot(sets)
        for name in "evaluator", "judge":  # by chance a twentieth
            assert Evaluator(folder / f"{name}.pth").eval(x, labels) >= 0.6
    assert top_k_hits(guide.network.logits(x), labels).sum() >= 0.6 * labels.sum()


def test_the_shipped_setting_is_the_one_that_the_rule_picks():
    """The rule that the report's appendix tells."""
    folder = ROOT / "p7_clevr/checkpoints"
    rows = p7.read_results(folder / "results.csv", folder / "scenes.pt").query("table in ['guidance', 'steps']")
    best = rows[rows.accuracy > rows.accuracy.max() - 1.5 / 400].drop_duplicates(studies.FLAGS)  # 160 sets, 400 labels
    best = best[best.steps.astype(int) == best.steps.astype(int).min()]
    best = best[best.accuracy == best.accuracy.max()]
    assert best[list(Sampling._fields)].to_dict("records") == [
        studies.as_text(inference.SHIPPED._asdict(), Sampling._fields)]


@pytest.fixture
def chapter(tmp_path, graders, evaluator_file):
    """The folder of p7_clevr/checkpoints with a tiny network, made-up records and the graders of the tests."""
    folder = tmp_path / "chapters/p7_clevr/checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_checkpoint(folder / "scenes.pt", kind="p7_clevr", ema=randomised(SceneUNet(**TINY)).state_dict(),
                    recipe=dict(label_drop=0.1, epochs=4, batch_size=64, lr=0.001, muon_lr=0.02, warmup=9, ema=0.999),
                    config=dict(network=TINY, schedule=dict(name="cosine", timesteps=1000, shift=3.0)), metrics=[])
    for name in "evaluator", "judge", "noisy":
        source = evaluator_file if name == "evaluator" else graders / f"{name}.pth"
        (folder / f"{name}.pth").write_bytes(source.read_bytes())
    lines = [dict(step=100 * i, epoch=i, loss=1 / i, loss_eps=0.5 / i, loss_quarters=[1 / i] * 4, accuracy=0.8,
                  seconds=60.0) for i in (1, 2, 4)]
    for name in "scenes", "evaluator", "judge", "noisy":
        training.write_jsonl(folder / f"{name}.jsonl", lines)
    rng = np.random.default_rng(0)
    about = dict(checkpoint=digest_of(folder / "scenes.pt"), epochs=96, channels="48 96 192", condition="tokens",
                 schedule="cosine, shift 3")
    others = [dict(epochs=16), dict(epochs=16, condition="multi_hot"), dict(epochs=16, schedule="cosine, shift 1"),
              dict(epochs=16, schedule="linear, shift 3"), dict(channels="64 128 256")]
    networks = [about, *(dict(about, checkpoint=f"{number:08x}", **other) for number, other in enumerate(others))]
    studies.pd.DataFrame(
        [dict(network, table=table, graders=studies.graders(folder / "evaluator.pth", folder),
              **studies.as_text({**studies.DEFAULTS, **changes}, studies.FLAGS), **dict.fromkeys(studies.MEASURES, 0.5))
         | dict(accuracy=rng.uniform(0.5, 1)) for table, rows in studies.TABLES.items()
         for network in networks[:None if table == "ablation" else 1] for changes in rows
         ]).to_csv(folder / "results.csv", index=False)
    return folder


def test_the_report_shows_every_figure_and_the_numbers_of_the_records(chapter, tmp_path, monkeypatch):
    argv = ["build.py", "--quick", "--assignment", "nycu2024_lab6", "--device", "cpu", "--chapters",
            str(tmp_path / "chapters"), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    build.main()
    named = re.findall(r'drawing\("(\w+)"', (ROOT / "report/p7.typ").read_text())
    assert sorted(named) == sorted(path.stem for path in (tmp_path / "report/build").glob("*.svg"))
    pdf = (tmp_path / "assignments/nycu2024_lab6/report.pdf").read_bytes()
    assert pdf.rstrip().endswith(b"%%EOF") and 5 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
    numbers = json.loads((tmp_path / "report/build/p7.json").read_text())
    rows = studies.pd.read_csv(chapter / "results.csv").query("table == 'seeds' and sets == 'test'")
    [test] = [row for row in numbers["tables"]["seeds"] if row["sets"] == "test"]
    assert test["accuracy"] == pytest.approx(rows.accuracy.mean()) and test["seeds"] == len(rows) == 5
    assert (numbers["steps"], numbers["minutes"]["judge"], numbers["loss"]) == (400, 3, 0.25)
    assert len({row["checkpoint"] for row in numbers["tables"]["ablation"]}) == 6  # others stand in no other table
    assert [(level["way"], level["side"]) for level in numbers["levels"]] == [
        ("down", 8), ("down", 4), ("up", 4), ("up", 8)]
    rows = studies.pd.read_csv(chapter / "results.csv")
    others = [rows.assign(**other, accuracy=-1) for other in (dict(guidance=9.0), dict(graders="00000000"))]
    studies.pd.concat([rows, *others]).to_csv(chapter / "results.csv", index=False)
    assert len(p7.read_results(chapter / "results.csv", chapter / "scenes.pt")) == len(rows)
    monkeypatch.setattr(readme, "ROOT", tmp_path / "chapters")
    told = readme.p7_numbers()
    assert told["p7.seeds.test.accuracy"] == readme.mean_and_std(100 * rows.query(
        "table == 'seeds' and sets == 'test'").accuracy, 1)
    [multi_hot] = rows.query("table == 'ablation' and condition == 'multi_hot' and guidance == 2").accuracy
    assert told["p7.ablation.48_96_192_multi_hot_cosine_shift_3_16"] == f"{100 * multi_hot:.2f}"
    rows.query("table != 'classifier'").to_csv(chapter / "results.csv", index=False)
    with pytest.raises(UserError, match="lacks classifier for"):
        build.main()


def test_what_the_evaluator_misses_is_named(evaluator_file):
    evaluator = Evaluator(evaluator_file)
    images = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    order = evaluator.scores(inference.as_input(images)).argsort(dim=1, descending=True)
    first, second, last = ([scenes.OBJECTS[row[place]] for row in order] for place in (0, 1, 23))
    assert p7.missed(evaluator, images, list(map(list, zip(last, first)))) == [{name} for name in last]
    assert p7.missed(evaluator, images, list(map(list, zip(second, first)))) == [set()] * 3
