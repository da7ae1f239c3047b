"""Problem 3: the adversary's gradient, what training may know, and a prediction that always answers."""

import csv
import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import training
from conftest import ENVIRONMENT, ROOT, call, close
from dataset import load_split, read_images
from files import read_jsonl, save_checkpoint
from p3_dann import augment, batches, choice, evaluate, features, inference, methods, studies, train
from p3_dann.batches import Batch, balanced_draw, draw_batch, load_training_images
from p3_dann.methods import METHODS, Objective, lambda_schedule, predicted_domain, run_name
from p3_dann.model import Dann, GradientReversal, load_model
from p3_dann.prediction import adapt_statistics, predict
from training import seed_all
from utils import UserError

TINY = dict(widths=(4, 4, 4), num_features=8)
DOMAINS = dict(source="mnistm", target="svhn")


def random_images(count, seed=0):
    return torch.randint(0, 256, (count, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def save_image(path, seed=0, mode="RGB", size=(28, 28)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_csv(path, rows):
    path.write_text("".join(f"{','.join(map(str, row))}\n" for row in rows))


@pytest.fixture
def tiny_network(monkeypatch):
    """Makes training use a network that is quick to train, and epochs of two steps."""
    monkeypatch.setattr(train, "Dann", lambda **network: Dann(**TINY, **network))
    monkeypatch.setattr(train, "STEPS_PER_EPOCH", 2)


def train_tiny(data_dir, output_dir, *flags):
    call(train, "--data_dir", data_dir, "--output_dir", output_dir, "--epochs", 2, "--batch_size", 8,
         "--warmup", 1, "--device", "cpu", *flags)
    return torch.load(output_dir / "model.pt", weights_only=True)["ema"]


def same_tensors(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- The methods --------------------------------------------------------------------------------

@pytest.fixture
def single_process():
    """A group of one process, so that DistributedDataParallel does all that it does for several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name, data_dir, single_process):
    """On one batch the class loss falls; what has a part in the loss changes, and nothing else."""
    method = METHODS[name]
    seed_all(0)
    images, labels = load_training_images(data_dir, method, DOMAINS)
    assert list(images) == [DOMAINS[role] for role in method.roles] and len(labels) == 40
    batch = draw_batch(images, labels, 16, two_views=method.two_views)
    assert len(batch.unlabelled) == len(method.unlabelled)
    assert len(batch.strong) == (len(method.roles) if method.two_views else 0)
    assert all(view.shape == (16, 1, 28, 28) for view in (batch.images, *batch.unlabelled, *batch.strong))
    model = Dann(**TINY, **(method.network | dict(dropout=0.0)))
    before = {name: value.clone() for name, value in model.named_parameters()}
    objective = nn.parallel.DistributedDataParallel(Objective(model, method, {}), static_graph=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(15):
        loss, metrics = objective(batch, step / 15)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(metrics["loss"].item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(value.shape == () and value.isfinite() and not value.requires_grad for value in metrics.values())
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    unused = set() if name == "dann" else {name for name in before if name.startswith("discriminator")}
    assert changed == before.keys() - unused


def test_every_class_is_drawn_as_often_as_another():
    """Of 900 threes and 100 sevens half the draws are sevens, up to five standard deviations; no other class occurs."""
    seed_all(0)
    labels = torch.tensor([3] * 900 + [7] * 100)
    drawn = labels[balanced_draw(labels, 4000)]
    assert abs((drawn == 7).sum() - 2000) < 5 * (4000 * 0.25) ** 0.5 and set(drawn.tolist()) == {3, 7}


@pytest.mark.parametrize("two_views", [False, True])
def test_an_image_keeps_its_label_and_has_both_of_its_views(monkeypatch, data_dir, two_views):
    images, labels = load_training_images(data_dir, METHODS["adamatch"], DOMAINS)
    monkeypatch.setattr(batches, "weakly", augment.standardize)
    seed_all(0)
    batch = draw_batch(images, labels, 16, augment.PARTS, two_views)  # with nothing changed, so that they are found

    def places(drawn, domain):
        known = augment.standardize(load_split(data_dir, domain, "train")[0])
        return torch.cdist(drawn.flatten(1), known.flatten(1)).argmin(dim=1)

    _, true_labels, _ = load_split(data_dir, "mnistm", "train")
    assert torch.equal(true_labels[places(batch.images, "mnistm")], batch.labels) and len(batch.labels.unique()) > 3
    for weak, strong, domain in zip((batch.images, *batch.unlabelled), batch.strong, DOMAINS.values()):
        assert torch.equal(places(weak, domain), places(strong, domain))


def test_names_follow_from_what_a_method_sees():
    assert [run_name(name, "usps", "svhn") for name in METHODS] == [
        "usps_source_only", "svhn_target_only", "usps_svhn_dann", "usps_svhn_adamatch"]
    assert [predicted_domain(dict(method=name, **DOMAINS)) for name in METHODS] == ["mnistm", "svhn", "svhn", "svhn"]
    assert len(methods.ALL_PAIRS) == len(set(methods.ALL_PAIRS)) == 6


def test_gradient_reversal_negates_and_scales():
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    y = GradientReversal.apply(x, 0.25)
    assert torch.equal(y, x)
    (y ** 2).sum().backward()
    assert torch.equal(x.grad, -0.25 * 2 * x.detach())


def test_domain_loss_reaches_features_reversed_and_discriminator_upright():
    """By hand: sigmoid(z) - t is the derivative of the domain loss by the logit z = w f, f = v x."""
    model = Dann(**TINY)
    model.features, model.discriminator = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    model.classifier = nn.Linear(1, 10, bias=False)
    nn.init.constant_(model.features.weight, 0.5)
    nn.init.constant_(model.discriminator.weight, 2.0)
    nn.init.zeros_(model.classifier.weight)  # so that the class loss sends no gradient to the features
    batch = Batch(torch.tensor([[1.0]]), torch.tensor([4]), [torch.tensor([[3.0]])])
    loss, metrics = METHODS["dann"](model, batch, progress=0.25, lambda_max=0.1)
    loss.backward()
    by_logit = [torch.sigmoid(torch.tensor(1.0)).item() / 2, (torch.sigmoid(torch.tensor(3.0)).item() - 1) / 2]
    assert model.discriminator.weight.grad.item() == pytest.approx(by_logit[0] * 0.5 + by_logit[1] * 1.5, rel=1e-5)
    upright = by_logit[0] * 2.0 * 1.0 + by_logit[1] * 2.0 * 3.0
    lambda_ = lambda_schedule(0.25, 0.1)
    assert model.features.weight.grad.item() == pytest.approx(-lambda_ * upright, rel=1e-5)
    assert metrics["lambda_"].item() == pytest.approx(lambda_, rel=1e-6)
    assert metrics["domain_accuracy"] == 0.5  # the target's logit is 3, the source's 1: both are taken for the target's


def test_lambda_schedule():
    assert lambda_schedule(0.0, 0.3) == 0.0
    assert lambda_schedule(0.5) == pytest.approx(0.9866143, abs=1e-7)
    assert lambda_schedule(1.0, 0.3) == pytest.approx(0.3, rel=1e-4)
    values = [lambda_schedule(p / 20) for p in range(21)]
    assert values == sorted(values)


@pytest.mark.parametrize("seed", range(2))
def test_dann_beats_source_only_on_a_shifted_domain(seed):
    """Two classes at x = -1 and +1 in the source, at +1 and +3 in the target; a second input names the domain.

    Only who makes both domains look the same finds out that the second input has to be subtracted from the first.
    """
    generator = torch.Generator().manual_seed(seed)
    labels, target_labels = torch.randint(0, 2, (2, 200), generator=generator)

    def place(labels, is_target):
        x = 2.0 * labels - 1 + 2 * is_target + 0.3 * torch.randn(200, generator=generator)
        return torch.stack([x, torch.full((200,), float(is_target))], dim=1)

    source, target = place(labels, False), place(target_labels, True)
    accuracy = {}
    for name, settings in (("source_only", {}), ("dann", dict(lambda_max=0.1))):
        seed_all(seed)
        model = Dann(**TINY, num_classes=2, dropout=0.0)
        model.features, model.classifier, model.discriminator = nn.Linear(2, 4), nn.Linear(4, 2), nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        for step in range(150):
            loss, _ = METHODS[name](model, Batch(source, labels, [target]), step / 150, **settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy[name] = (model(target).argmax(dim=1) == target_labels).float().mean().item()
    assert accuracy["source_only"] < 0.7 and accuracy["dann"] > 0.9


# --- AdaMatch's parts, by hand ------------------------------------------------------------------

def test_adamatch_s_threshold_is_relative_to_the_source_s_confidence():
    source = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    assert methods.relative_threshold(source, 0.9).item() == pytest.approx(0.9 * (0.5 + 0.7) / 2, rel=1e-6)


def test_adamatch_aligns_the_target_s_classes_with_the_source_s():
    """Where the source has a class twice as often as the target, its probability doubles, up to the sum."""
    answers = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    aligned = methods.align(answers, torch.tensor([0.6, 0.4]), torch.tensor([0.3, 0.7]))
    expected = torch.tensor([[2.0 * 0.5, 4 / 7 * 0.5], [2.0 * 0.2, 4 / 7 * 0.8]])
    assert close(aligned, expected / expected.sum(dim=1, keepdim=True), share=1e-6)


def test_adamatch_s_running_distribution_follows_the_mean():
    running = torch.tensor([0.5, 0.5])
    for _ in range(2):
        methods.follow(running, torch.tensor([[1.0, 0.0], [0.6, 0.4]]), decay=0.75)  # mean 0.8
    assert close(running, torch.tensor([0.8 - 0.3 * 0.75 ** 2, 0.2 + 0.3 * 0.75 ** 2]), share=1e-6)


def test_adamatch_interpolates_every_logit_at_its_own_place():
    seed_all(0)
    first, second = torch.zeros(300, 10), torch.ones(300, 10)
    mixed = methods.interpolate(first, second)
    assert mixed.min() >= 0 and mixed.max() <= 1 and len(mixed.unique()) > 2900
    assert mixed.mean().item() == pytest.approx(0.5, abs=0.03)  # 5 standard errors of a uniform number's mean
    seed_all(1)
    place = torch.rand(2, 3)
    seed_all(1)
    a, b = torch.arange(6.0).view(2, 3), torch.tensor([[3.0, -1, 0], [7, 2, 5]])
    assert close(methods.interpolate(a, b), place * a + (1 - place) * b, share=1e-6)


def test_adamatch_s_ramp():
    values = [methods.half_cosine_ramp(progress) for progress in (0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)]
    half = 2 ** -0.5
    assert values == pytest.approx([0, (1 - half) / 2, 0.5, (1 + half) / 2, 1, 1, 1], abs=1e-12)


def test_the_source_s_pass_leaves_the_running_statistics():
    seed_all(0)
    model = Dann(**TINY).train()
    x, buffers = torch.randn(8, 1, 28, 28), {name: value.clone() for name, value in model.named_buffers()}
    with methods.without_recording(model):
        shifted = model.features(x + 1)
    assert same_tensors(dict(model.named_buffers()), buffers)
    model.features(x + 1)
    assert not same_tensors(dict(model.named_buffers()), buffers)
    with pytest.raises(ZeroDivisionError), methods.without_recording(model):
        1 / 0
    assert all(norm.track_running_stats for norm in model.modules() if hasattr(norm, "track_running_stats"))
    assert close(shifted, model.features(x + 1))  # the batch's own statistics in both


class Answers(nn.Module):
    """A network of 3 classes whose logits are its inputs times a weight of 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("source_classes", torch.tensor([0.5, 0.25, 0.25]))
        self.register_buffer("target_classes", torch.tensor([0.25, 0.5, 0.25]))

    def forward(self, x):
        return self.weight * x


def test_adamatch_s_loss_by_hand():
    """Both of the source's passes agree here, so interpolation leaves them; log-probabilities serve as logits."""
    def logits(*rows):
        return torch.tensor(rows).log()

    weak, strong = logits([0.8, 0.1, 0.1], [0.2, 0.6, 0.2]), logits([0.6, 0.2, 0.2], [0.1, 0.8, 0.1])
    target = logits([0.50, 0.45, 0.05], [0.25, 0.40, 0.35])
    target_strong = logits([0.3, 0.3, 0.4], [0.2, 0.5, 0.3])
    batch, networks = Batch(weak, torch.tensor([0, 1]), [target], [strong, target_strong]), Answers()
    loss, metrics = METHODS["adamatch"](networks, batch, progress=0.25)
    source = torch.tensor([0.50, 0.25, 0.25]) * 0.99 + torch.tensor([0.5, 0.35, 0.15]) * 0.01
    running = torch.tensor([0.25, 0.50, 0.25]) * 0.99 + torch.tensor([0.375, 0.425, 0.2]) * 0.01
    assert close(networks.source_classes, source, 1e-5) and close(networks.target_classes, running, 1e-5)
    # Aligned, about (1.0, 0.225, 0.05) / 1.275 and (0.5, 0.2, 0.35) / 1.05: digit 0 both times, sure at 0.78 alone, as
    # the threshold is 0.9 (0.8 + 0.6) / 2 = 0.63. Without alignment the second would be a 1.
    class_loss = -(np.log(0.8) + np.log(0.6)) / 2 - (np.log(0.6) + np.log(0.8)) / 2
    target_loss = -np.log(0.3) / 2
    assert loss.item() == pytest.approx(class_loss + 0.5 * target_loss, rel=1e-5)
    assert metrics["counted"] == 0.5 and metrics["weight"] == 0.5 and metrics["accuracy"] == 1
    assert metrics["target_loss"].item() == pytest.approx(target_loss, rel=1e-5)
    loss.backward()
    gradient = networks.weight.grad.clone()
    for part, expected in (("target", class_loss), ("ramp", class_loss + target_loss), ("interpolation", loss.item()),
                           ("relative", class_loss)):  # nothing is sure at 0.9
        without, _ = METHODS["adamatch"](Answers(), batch, progress=0.25, leave_out=[part])
        assert without.item() == pytest.approx(expected, rel=1e-5), part
    without, _ = METHODS["adamatch"](Answers(), batch, progress=0.25, threshold=0.5, leave_out=["alignment"])
    assert without.item() == pytest.approx(class_loss + 0.5 * -(np.log(0.3) + np.log(0.5)) / 2, rel=1e-5)
    # The teacher's answers pass no gradient on: that of the loss is that of the labels, the first pseudo-label's among.
    networks.weight.grad = None
    classes = nn.functional.cross_entropy(networks(torch.cat([weak, strong])), torch.tensor([0, 1, 0, 1]))
    (2 * classes + 0.5 * nn.functional.cross_entropy(networks(target_strong[:1]), torch.tensor([0])) / 2).backward()
    assert close(networks.weight.grad, gradient)


# --- The network's input and statistics ---------------------------------------------------------

def test_standardize():
    images = random_images(4)
    x = augment.standardize(images)
    assert x.shape == (4, 1, 28, 28)
    assert x.mean(dim=(1, 2, 3)).abs().max() < 1e-5 * x.std()
    assert ((x.std(dim=(1, 2, 3)) - 1).abs() < 0.1).all()
    dim = augment.standardize(images.float() * 0.5 + 60)  # contrast and brightness do not count
    assert close(dim / dim.std(), x / x.std(), share=0.01)
    flat = torch.full((1, 3, 28, 28), 77, dtype=torch.uint8)
    assert torch.equal(augment.standardize(flat), torch.zeros(1, 1, 28, 28))


def test_adapt_statistics_takes_those_of_the_images():
    seed_all(0)
    model, images = Dann(**TINY), random_images(30)
    adapt_statistics(model, images)
    first_convolution, norm = model.features[0][0], model.features[0][1]
    with torch.no_grad():
        out = first_convolution(augment.standardize(images))
    assert (norm.running_mean - out.mean(dim=(0, 2, 3))).abs().max() < 1e-4 * out.std()
    assert close(norm.running_var, out.var(dim=(0, 2, 3)))
    assert not model.training


def test_prediction_is_in_evaluation_mode_and_independent_of_the_batch():
    seed_all(0)
    model, images = Dann(**TINY), random_images(9)
    adapt_statistics(model, images)
    expected = predict(model, images)
    model.train()  # dropout and batch statistics would show
    for batch_size in (1, 4, 9):
        assert close(predict(model, images, batch_size), expected)
    assert not model.training
    assert close(expected.sum(dim=1), torch.ones(9))


def test_prediction_is_the_mean_over_views():
    seed_all(0)
    model, images = Dann(**TINY), random_images(9)
    adapt_statistics(model, images)
    looks = list(augment.views(images))
    plain = augment.standardize(images)
    assert len(looks) == 3 and close(looks[1], -plain, share=1e-3)
    with torch.no_grad():
        mean = torch.stack([model(look).softmax(dim=1) for look in looks]).mean(dim=0)
        assert close(predict(model, images), mean)
        assert close(predict(model, images, average=False), model(plain).softmax(dim=1))
    # The magnified view shows the middle of the image, larger.
    square = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    square[..., 4:24, 4:24] = 255
    small, inverted, large = (look > 0 for look in augment.views(square))
    assert small.sum() < 20 ** 2 < large.sum() and inverted.sum() == 28 ** 2 - 20 ** 2


def test_a_prediction_that_is_nan_is_told():
    seed_all(0)
    model = Dann(**TINY)
    adapt_statistics(model, random_images(9))
    model.features[0][1].running_var.fill_(-1.0)  # finite, but its root is not
    with pytest.raises(UserError, match="image 1 comes out as NaN"):
        predict(model, random_images(3))


# --- Augmentation -------------------------------------------------------------------------------

def test_augmentation_without_randomness_changes_nothing():
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment.random_sharpness(images, sharpen=0, blur=0), images)
    plain = augment.random_intensity(images, scale=(1, 1), offset=0, noise=0)
    assert torch.equal(plain.abs(), images)


def test_sharpness_lies_between_a_blur_and_its_opposite():
    """Two means over 3x3 pixels make a tent of a point, so its middle goes from 81 to 9."""
    points = torch.zeros(200, 1, 28, 28)
    points[..., 14, 14] = 81
    tent = torch.tensor([1.0, 2, 3, 2, 1])
    blurred = augment.random_sharpness(points, sharpen=-1, blur=1)  # all the way
    assert close(blurred[7, 0, 12:17, 12:17], torch.outer(tent, tent)) and (blurred > 0).sum() == 25 * 200
    seed_all(0)
    amounts = (81 - augment.random_sharpness(points)[..., 14, 14]) / 72
    assert -0.51 < amounts.min() < -0.45 and 0.95 < amounts.max() < 1.01


def test_intensity_changes_polarity_contrast_and_brightness():
    seed_all(0)
    edges = torch.arange(2.0).repeat_interleave(14).expand(200, 1, 28, 28)  # 0 on the left, 1 on the right
    changed = augment.random_intensity(edges, noise=0)
    brightness, contrast = changed[..., 0, 0], changed[..., 0, 27] - changed[..., 0, 0]
    assert 70 < (contrast > 0).sum() < 130
    assert 0.24 < contrast.abs().min() < 0.3 and 1.4 < contrast.abs().max() < 1.51
    assert -0.51 < brightness.min() < -0.4 and 0.4 < brightness.max() < 0.51
    noise = (augment.random_intensity(edges, scale=(1, 1), offset=0).abs() - edges).std(dim=(1, 2, 3))
    assert noise.min() < 0.02 and 0.08 < noise.max() < 0.12


def test_row_of_digits_keeps_the_digit_in_the_middle():
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 28, 28)
    row = augment.row_of_digits(images, columns=20)
    assert row.shape == (5, 1, 28, 60)
    assert torch.equal(row[..., 20:40], images[..., 4:24])


def test_parts_of_the_augmentation_can_be_left_out():
    images = random_images(8)
    assert torch.equal(augment.augment(images, "mnistm", augment.PARTS), augment.standardize(images))
    still = [part for part in augment.PARTS if part != "intensity"]
    seed_all(0)
    mirrored = augment.augment(images, "svhn", still)  # only intensity: shape as before, up to polarity and noise
    plain = augment.standardize(images)
    correlation = (mirrored * plain).mean(dim=(1, 2, 3)) / (mirrored.std(dim=(1, 2, 3)) * plain.std(dim=(1, 2, 3)))
    assert (correlation.abs() > 0.8).all()


def test_augmentation_is_a_property_of_the_domain():
    """A blot in the middle: MNIST-M's become larger than SVHN's, and have neighbours unless these are left out; USPS',
    which fill their frame, become smaller."""
    images = torch.zeros(200, 3, 28, 28, dtype=torch.uint8)
    images[:, :, 8:20, 8:20] = 255
    still = ["sharpness", "intensity", "backgrounds"]
    area, edge = {}, {}
    for domain, without in (("mnistm", still), ("mnistm", [*still, "neighbours"]), ("svhn", still), ("usps", still)):
        seed_all(0)
        bright = augment.augment(images, domain, without) > 0
        area[domain, len(without)] = bright.flatten(1).sum(dim=1).float().quantile(torch.tensor([0.0, 1.0])).tolist()
        edge[domain, len(without)] = bright[..., :3].flatten(1).any(dim=1).float().mean().item()
    assert area["mnistm", 4][1] > 1.4 * area["svhn", 3][1] and area["usps", 3][0] < 0.8 * area["svhn", 3][0]
    assert edge["mnistm", 3] > 0.3 > edge["mnistm", 4] and edge["svhn", 3] < 0.1


def test_backgrounds_are_painted_behind_half_of_usps_and_svhn():
    """A background is the difference to the digit's colour, as MNIST-M's: under a black image it shows as it is."""
    seed_all(0)
    black = torch.zeros(400, 3, 28, 28, dtype=torch.uint8)
    painted = augment.on_backgrounds(black)
    assert painted.shape == (400, 1, 28, 28) and 0 <= painted.min() and painted.max() <= 255
    assert painted.std(dim=(1, 2, 3)).median() > 10 and painted.std(dim=0).min() > 10
    seed_all(0)
    assert close(augment.on_backgrounds(255 - black), 255 - painted)
    still = [part for part in augment.PARTS if part != "backgrounds"]
    for domain in "usps", "svhn":
        plain = augment.augment(black, domain, still).flatten(1).abs().amax(dim=1) == 0
        assert 0.4 < plain.float().mean() < 0.6
        assert augment.augment(black, domain, augment.PARTS).abs().max() == 0
    assert augment.augment(black, "mnistm", still).abs().max() == 0


def test_the_strong_view_s_parts_by_hand(monkeypatch):
    ramp = torch.arange(5.0).view(1, 1, 1, 5) * 10 + 100  # 100 ... 140
    monkeypatch.setattr(augment, "uniform", lambda low, high, count, device: torch.full((count, 1, 1, 1), high / 2))
    assert augment.solarize(ramp).flatten().tolist() == [100, 110, 120, 110, 100]  # level 120: the brighter inverted
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.full((1, 1, 1, 1), 2))
    assert augment.posterize(ramp).flatten().tolist() == pytest.approx([100, 100, 120, 120, 140], rel=1e-3)
    holes = augment.cutout(torch.ones(1, 1, 28, 28))  # half a side of 3.5 about 13.5
    assert holes.sum() == 28 ** 2 - 8 ** 2 and holes[0, 0, 10:18, 10:18].sum() == 0


@pytest.mark.parametrize("part", ["solarize", "posterize", "cutout"])
def test_the_strong_view_has_its_parts(part):
    images = torch.nn.functional.interpolate(random_images(8)[..., :7, :7].float(), scale_factor=4).to(torch.uint8)
    others = [name for name in augment.PARTS if name != part]
    views = {}
    for strong in True, False:
        seed_all(0)
        views[strong] = augment.augment(images, "svhn", others, strong=strong)
    assert torch.equal(views[False], augment.standardize(images)) and not torch.equal(views[True], views[False])


def test_strong_views_are_magnified_as_their_domain_says(monkeypatch):
    asked = []
    monkeypatch.setattr(augment, "random_affine", lambda images, zoom, size=None, **_: asked.append(zoom) or images)
    for strong in False, True:
        augment.augment(random_images(2), "svhn", ["neighbours"], strong=strong)
    assert asked == [augment.AUGMENTATIONS["svhn"].zoom, augment.AUGMENTATIONS["svhn"].strong_zoom]
    assert len({*asked}) == 2


def test_weak_views_stay_near_and_strong_ones_do_not():
    seed_all(0)
    images = torch.nn.functional.interpolate(random_images(60)[..., :7, :7].float(), scale_factor=4, mode="bilinear")
    plain = augment.standardize(images)

    def likeness(view):
        return ((view * plain).mean(dim=(1, 2, 3)) / (view.std(dim=(1, 2, 3)) * plain.std(dim=(1, 2, 3)) + 1e-9)).abs()

    weak = augment.weakly(images)
    strong, usual = (augment.augment(images, "svhn", strong=strong) for strong in (True, False))
    assert weak.shape == strong.shape == plain.shape
    assert likeness(weak).mean() > likeness(usual).mean() > likeness(strong).mean()
    signs = (weak * plain).mean(dim=(1, 2, 3)).sign()
    assert 15 < (signs > 0).sum() < 45  # either polarity


# --- Training -----------------------------------------------------------------------------------

@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.unlabelled])
def test_target_labels_do_not_matter(tmp_path, data_dir, tiny_network, method):
    expected = train_tiny(data_dir, tmp_path / "plain", "--method", method)
    for variant in ("shuffled", "removed"):
        changed = tmp_path / f"{variant} data"
        shutil.copytree(data_dir, changed)
        for split in ("train", "val"):
            path = changed / "digits" / "svhn" / f"{split}.csv"
            header, *rows = [line.split(",") for line in path.read_text().splitlines()]
            labels = [label for _, label in rows]
            random.Random(0).shuffle(labels)
            if variant == "shuffled":
                write_csv(path, [header, *((name, label) for (name, _), label in zip(rows, labels))])
            else:
                write_csv(path, [["image_name"], *([name] for name, _ in rows)])
        assert same_tensors(train_tiny(changed, tmp_path / variant, "--method", method), expected)
    assert not same_tensors(train_tiny(data_dir, tmp_path / "other", "--method", method, "--seed", 1),
                            expected)


def test_the_shipped_statistics_are_of_the_predicted_domain(monkeypatch, tmp_path, data_dir, tiny_network):
    """What adapt_statistics makes of a network is tested by itself."""
    given = []
    monkeypatch.setattr(train, "adapt_statistics", lambda model, images: given.append(images))
    for method, domain in ("dann", "svhn"), ("source_only", "mnistm"), ("target_only", "svhn"), ("adamatch", None):
        train_tiny(data_dir, tmp_path / method, "--method", method)
        if domain:
            assert torch.equal(given.pop(), load_split(data_dir, domain, "train")[0])
        assert not given  # adamatch's are common to all domains


@pytest.mark.parametrize("method, domain", [("source_only", "mnistm"), ("target_only", "svhn")])
def test_a_method_of_one_domain_needs_no_other(tmp_path, data_dir, tiny_network, method, domain):
    lonely = tmp_path / "data"
    shutil.copytree(data_dir / "digits" / domain, lonely / "digits" / domain)
    weights = train_tiny(lonely, tmp_path / "out", "--method", method)
    report = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(report["validation_accuracy"]) == {domain}
    assert same_tensors(weights, train_tiny(data_dir, tmp_path / "again", "--method", method))


@pytest.mark.parametrize("method, when", [("dann", "second epoch"), ("dann", "end"), ("adamatch", "second epoch")])
def test_resumed_training_equals_an_uninterrupted_one(monkeypatch, tmp_path, data_dir, tiny_network, method, when):
    expected = train_tiny(data_dir, tmp_path / "whole", "--method", method)
    write_jsonl = training.write_jsonl

    def interrupt(path, rows):
        if len(rows) == 2 and (when == "second epoch" or "validation_accuracy" in rows[-1]):
            raise KeyboardInterrupt
        write_jsonl(path, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "write_jsonl", interrupt)
        train_tiny(data_dir, tmp_path / "parts", "--method", method)
    assert not (tmp_path / "parts" / "model.pt").exists()
    resumed = train_tiny(data_dir, tmp_path / "parts", "--method", method, "--resume")
    assert same_tensors(resumed, expected) and ("source_classes" in resumed) == (method == "adamatch")
    whole, parts = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    for line in whole + parts:
        del line["seconds"], line["images_per_second"]
    assert parts == whole and [line["step"] for line in whole] == [2, 4]
    assert {"loss", "accuracy", "confident", *({"dann": ["domain_loss", "domain_accuracy", "lambda_"],
            "adamatch": ["target_loss", "counted", "weight"]}[method])} <= whole[0].keys()
    _, recipe = load_model(tmp_path / "parts" / "model.pt")
    assert (recipe["method"], recipe["source"], recipe["target"]) == (method, "mnistm", "svhn")


@pytest.mark.parametrize("method, settings, column, schedule", [
    ("dann", dict(lambda_max=0.3), "lambda_", functools.partial(lambda_schedule, lambda_max=0.3)),
    ("adamatch", dict(threshold=0.7, leave_out=["alignment", "relative"]), "weight", methods.half_cosine_ramp)])
def test_flags_reach_the_method_and_its_batches(monkeypatch, tmp_path, data_dir, tiny_network, method, settings, column,
                                                schedule):
    calls, left_out, passed, function = [], [], [], METHODS[method]

    @functools.wraps(function)
    def look(networks, batch, progress, **settings):
        calls.append((progress, settings))
        return function(networks, batch, progress, **settings)

    def draw(images, labels, count, without, two_views):
        left_out.append((without, two_views))
        return draw_batch(images, labels, count, without, two_views)

    def distribute(objective, process, static_graph):
        return lambda batch, progress: passed.append(progress) or objective(batch, progress)

    monkeypatch.setitem(METHODS, method, look)
    monkeypatch.setattr(train, "draw_batch", draw)
    monkeypatch.setattr(training, "distribute", distribute)  # which averages the gradients of several processes
    flags = studies.flags(dict(settings, method=method, without=["geometry", "sharpness"]))
    train_tiny(data_dir, tmp_path, *flags)
    steps = [step / 4 for step in range(4)]
    assert calls == [(progress, settings) for progress in steps] and passed == steps
    assert left_out == [(["geometry", "sharpness"], function.two_views)] * 4
    assert [line[column] for line in read_jsonl(tmp_path / "metrics.jsonl")] == pytest.approx(
        [(schedule(first) + schedule(second)) / 2 for first, second in (steps[:2], steps[2:])], abs=1e-5)


def test_a_method_s_defaults_can_be_overruled(monkeypatch):
    for flags, expected in (([], (12, 128)), (["--method", "adamatch"], (60, 64)),
                            (["--epochs", "7", "--method", "adamatch"], (7, 64))):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        args = train.parse_args()
        assert (args.epochs, args.batch_size) == expected


def test_mistakes_in_training_are_told(tmp_path, data_dir, tiny_network):
    for flags, message in ((["--source", "svhn"], "two domains"), (["--resume"], "start without --resume"),
                           (["--threshold", "0.7"], "--method dann has no --threshold"),
                           (["--method", "adamatch", "--lambda_max", "3"], "adamatch has no --lambda_max"),
                           (["--without", "geometry", "cutout"], "dann has no strong view, so it is always"),
                           (["--batch_size", "1"], "one image"), (["--lr", "1e30"], "loss is not finite")):
        with pytest.raises(UserError, match=message):
            train_tiny(data_dir, tmp_path / "out", *flags)
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(UserError, match="nowhere"):
        train_tiny(tmp_path / "nowhere", tmp_path / "out")
    few = tmp_path / "few"
    shutil.copytree(data_dir, few)
    write_csv(few / "digits/svhn/train.csv", [("image_name", "label"), ("00000.png", 0)])
    with pytest.raises(UserError, match="single training image of svhn"):
        train_tiny(few, tmp_path / "out")
    train_tiny(data_dir, tmp_path / "out")
    with pytest.raises(UserError, match="--resume"):
        train_tiny(data_dir, tmp_path / "out")
    with pytest.raises(UserError, match="was trained with --lr 0.003; resume"):
        train_tiny(data_dir, tmp_path / "out", "--resume", "--lr", "0.1")
    with pytest.raises(UserError, match="model.pt"):
        load_model(tmp_path / "out" / "last.pt")


def test_class_distributions_follow_all_processes(tmp_path, torchrun):
    (tmp_path / "follow.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import utils, torch
from p3_dann.methods import follow
torch.distributed.init_process_group("gloo")
running = torch.tensor([0.0, 1.0])
follow(running, torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]][torch.distributed.get_rank()]), decay=0.5)
sys.stdout.write(f"running {{running.tolist()}}\\n")
""")
    done = torchrun(tmp_path / "follow.py")
    assert done.stdout.count("running [0.25, 0.75]\n") == 2, done.stderr


def test_dry_run_of_two_processes_writes_nothing(tmp_path, data_dir, torchrun):
    result = torchrun("p3_dann/train.py", "--dry_run", "--device", "cpu", "--data_dir", data_dir, "--output_dir",
                      tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "two steps of 16 images" in result.stdout and not list(tmp_path.iterdir())


def test_studies_are_what_the_checkpoints_folder_holds(monkeypatch):
    checkpoints = ROOT / "p3_dann/checkpoints"
    table = pd.read_csv(checkpoints / "results.csv")
    runs = {folder: settings for trainings in studies.TABLES.values() for folder, settings in trainings.items()}
    assert len(runs) == sum(map(len, studies.TABLES.values())) and set(table.run) <= runs.keys()
    shipped, names = studies.shipped(table), {path.stem for path in checkpoints.glob("*.pt")}
    assert names == {path.stem for path in checkpoints.glob("*.jsonl")} <= studies.MODELS.keys()
    assert set(studies.FIRST) <= names
    for name in names:
        settings = runs[f"{shipped[name]}_s0"]
        _, recipe = load_model(checkpoints / f"{name}.pt")
        assert {key: recipe[key] for key in settings} == settings and f"{shipped[name]}_s0" in set(table.run)
        last = json.loads((checkpoints / f"{name}.jsonl").read_text().splitlines()[-1])
        assert last["epoch"] == recipe["epochs"] and set(last["validation_accuracy"]) == {"mnistm", "svhn", "usps"}
    for settings in runs.values():
        monkeypatch.setattr(sys, "argv", ["train.py", *studies.flags(settings)])
        assert settings.items() <= vars(train.parse_args()).items()


def test_studies_start_a_training_go_on_with_it_or_leave_it(monkeypatch, tmp_path, capsys):
    commands, threads, status = [], [], 0

    class Training:
        def __init__(self, command, stdout, stderr, env):
            commands.append(command)
            threads.append(env.get("OMP_NUM_THREADS"))
            stdout.write("its last line\n")

        def wait(self):
            return status

    monkeypatch.setattr(subprocess, "Popen", Training)
    monkeypatch.setattr(studies, "STARTED", [])
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folder, settings = tmp_path / "no geometry", studies.TABLES["ablation"]["ablation_no_geometry"]
    for jobs, resume in (1, False), (2, True):
        studies.train(folder, settings, tmp_path / "data", jobs)
        assert commands[-1][:2] == [sys.executable, str(ROOT / "p3_dann/train.py")]
        monkeypatch.setattr(sys, "argv", commands[-1][1:])
        args = vars(train.parse_args())
        assert args.items() >= dict(settings, data_dir=tmp_path / "data", output_dir=folder, resume=resume).items()
        (folder / "last.pt").touch()
    assert threads == [None, "3"] and len(studies.STARTED) == 2
    assert capsys.readouterr().out == "no geometry: its last line\n" * 2
    status = 1
    with pytest.raises(UserError, match="no geometry failed; its log.txt says why"):
        studies.train(folder, settings, tmp_path / "data", 1)
    (folder / "model.pt").touch()
    studies.train(folder, settings, tmp_path / "data", 1)
    assert len(commands) == 3


def test_studies_measure_and_publish_their_networks(monkeypatch, tmp_path, data_dir):
    """With trainings replaced by untrained networks. The ablation is published after, into the same table."""
    trained = []

    def train_nothing(folder, settings, *_):
        if (folder / "model.pt").exists():
            return
        trained.append(folder.name)
        folder.mkdir(parents=True)
        seed_all(len(trained))
        model = Dann(**TINY)
        adapt_statistics(model, random_images(50))
        save_checkpoint(folder / "model.pt", kind="p3_dann", config=model.config, ema=model.state_dict(),
                        recipe=dict(seed=0) | settings)
        training.write_jsonl(folder / "metrics.jsonl", [dict(seconds=30.0), dict(seconds=45.0)])

    published = tmp_path / "p3_dann/checkpoints"
    published.mkdir(parents=True)
    some = {"main": ["mnistm_source_only_s0", *(f"mnistm_usps_dann_s{seed}" for seed in studies.SEEDS)],
            "ablation": ["ablation_lambda_0"], "choice": ["mnistm_usps_dann_lambda_0.1_s0"]}
    tables = {table: {run: studies.TABLES[table][run] for run in runs} for table, runs in some.items()}
    monkeypatch.setattr(studies, "TABLES", tables)
    monkeypatch.setattr(studies, "train", train_nothing)
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    for table in ("ablation", "main", "main", "choice"):
        call(studies, "--publish", "--data_dir", data_dir, "--output_dir", tmp_path / table,
             "--tables", table, "--runs", "*_[ls]*")
    assert trained == [*tables["ablation"], *tables["main"], *tables["choice"]]
    with pytest.raises(UserError, match="no training of main is called nothing"):
        call(studies, "--data_dir", data_dir, "--output_dir", tmp_path / "x", "--runs", "nothing")
    table = pd.read_csv(published / "results.csv")
    assert set(table.run) == set(trained) and set(table.minutes) == {1.2}
    assert table[list(choice.SCORES)].notna().all(axis=None) and set(table.confident) == {0}
    lower = table[table.method == "source_only"]  # with its own statistics and each target's
    assert sorted(lower[["target", "statistics"]].values.tolist()) == [
        ["svhn", "source"], ["svhn", "target"], ["usps", "source"], ["usps", "target"]]
    name, digits = "mnistm_source_only", data_dir / "digits/usps"
    model, _ = load_model(published / f"{name}.pt")
    assert (published / f"{name}.pt").read_bytes() == (tmp_path / f"main/{name}_s0/model.pt").read_bytes()
    images, labels, _ = load_split(data_dir, "usps", "val")
    row = lower[lower.target == "usps"].set_index("statistics")
    for statistics in ("source", "target"):
        right = (predict(model, images).argmax(dim=1) == labels).float().mean().item()
        assert row.accuracy[statistics] == pytest.approx(100 * right, abs=0.01)
        adapt_statistics(model, read_images(sorted((digits / "data").iterdir())[:40]))  # the training images
    means = studies.means(table).set_index(["experiment", "target", "statistics"])
    dann = table[table.run.str.startswith("mnistm_usps_dann_s")]
    assert means.seeds["mnistm_usps_dann", "usps", "target"] == 3
    assert means.loc["mnistm_usps_dann", "usps", "target"][["mean", "std"]].tolist() == pytest.approx(
        [dann.accuracy.mean(), dann.accuracy.std()], abs=0.01)


# --- Prediction ---------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small untrained network that answers differently for different images."""
    seed_all(1)
    model = Dann(**TINY)
    adapt_statistics(model, random_images(50))
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    save_checkpoint(path, kind="p3_dann", config=model.config, ema=model.state_dict(),
                    recipe=dict(method="dann", **DOMAINS))
    return path


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def answers_of(checkpoint, folder, names):
    """What the network says to the images `names`, {name: digit as text}; they differ."""
    labels = predict(load_model(checkpoint)[0], read_images([folder / name for name in names])).argmax(dim=1)
    assert len(labels.unique()) > 1
    return dict(zip(names, map(str, labels.tolist())))


def test_wrapper_answers_every_image_once(tmp_path, checkpoint):
    folder = tmp_path / "test dir"
    folder.mkdir()
    for seed, (name, mode, size) in enumerate([
            ("b.png", "RGB", (28, 28)), ("a, first.png", "L", (28, 28)), ("c d.jpg", "RGB", (60, 31)),
            ("E.PNG", "RGBA", (5, 90)), ("f.png", "P", (28, 28)), ("g.png", "1", (300, 200)), ("h.jpeg", "L", (28, 28)),
            ("i.png", "I;16", (28, 28))]):
        if mode == "I;16":
            Image.fromarray(np.random.default_rng(seed).integers(0, 65536, size, dtype=np.uint16)).save(folder / name)
        else:
            save_image(folder / name, seed, mode, size)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no image either")
    result = subprocess.run(["bash", ROOT / "hw2_3.sh", "test dir", "new dir/pred.csv", "--checkpoint", checkpoint],
                            cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    header, *rows = read_rows(tmp_path / "new dir" / "pred.csv")
    assert header == ["image_name", "label"]
    assert [name for name, _ in rows] == sorted(
        ["b.png", "a, first.png", "c d.jpg", "E.PNG", "f.png", "g.png", "h.jpeg", "i.png", "broken.png", "empty.jpg"])
    answers = dict(rows)
    guesses = [answers.pop("broken.png"), answers.pop("empty.jpg")]
    assert answers == answers_of(checkpoint, folder, list(answers))
    digits = list(answers.values())
    assert digits.count(guesses[0]) == max(map(digits.count, digits)) and guesses[1] == guesses[0]
    for name in ("broken.png", "empty.jpg", "notes.txt"):
        assert name in result.stderr
    assert "Traceback" not in result.stderr and os.listdir(tmp_path / "new dir") == ["pred.csv"]


@pytest.mark.parametrize("mistake, message", [
    ("no folder", "there is no folder .*some images"), ("empty folder", "no images"),
    ("unreadable images", "none of the 2 images can be read"),
    ("output is a folder", "is a folder"), ("output below a file", "is a file"), ("damaged checkpoint", "damaged"),
    ("weights of NaN", "NaN"), ("another network", "do not fit Dann"),
])
def test_mistakes_in_prediction_are_told(tmp_path, checkpoint, mistake, message):
    images, output, weights = tmp_path / "some images", tmp_path / "pred.csv", tmp_path / "weights.pt"
    images.mkdir()
    shutil.copy(checkpoint, weights)
    content = torch.load(checkpoint, weights_only=True)
    if mistake == "no folder":
        images.rmdir()
    elif mistake != "empty folder":
        save_image(images / "0.png")
    if mistake == "unreadable images":
        for name in ("0.png", "1.png"):
            (images / name).write_bytes(b"no image")
    elif mistake == "output is a folder":
        output.mkdir()
    elif mistake == "output below a file":
        output.write_text("mine")
        output = output / "pred.csv"
    elif mistake == "damaged checkpoint":
        weights.write_bytes(checkpoint.read_bytes()[:1000])
    elif mistake == "weights of NaN":
        content["ema"]["features.0.0.weight"][0] = float("nan")
        torch.save(content, weights)
    elif mistake == "another network":
        torch.save(dict(content, config=dict(content["config"], num_features=9)), weights)
    with pytest.raises(UserError, match=message):
        call(inference, images, output, "--checkpoint", weights)
    assert not output.is_file()


@pytest.mark.parametrize("path, target", [
    ("/x/hw2_data/digits/svhn/test", "svhn"), ("/x/USPS/test", "usps"), ("/x/usps/old/SVHN", "svhn"),
    ("/x/svhn-28x28", "svhn"), ("/x/usps_test/", "usps"), ("/x/mnistm/data", "mnistm"),
    ("/x/mysvhns/uspstest", None), ("/x/test", None), ("/x/usps/svhn-from-mnistm/t", None),
])
def test_target_from_path(path, target):
    assert inference.target_from_path(path) == target


def test_target_from_a_relative_path(monkeypatch, tmp_path):
    (tmp_path / "svhn" / "test").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "svhn")
    assert inference.target_from_path("test") == "svhn" and inference.target_from_path("../mnistm") == "mnistm"
    (tmp_path / "mnistm").mkdir()
    monkeypatch.chdir(tmp_path / "mnistm")
    assert inference.target_from_path("../svhn/test") == "svhn"
    assert inference.target_from_path("../street") is None  # the folder that ".." leaves tells nothing


def test_target_from_images(tmp_path):
    colour = random_images(9)
    grey = colour[:, :1].expand(-1, 3, -1, -1)
    assert inference.target_from_images(colour) == "svhn"
    assert inference.target_from_images(grey) == "usps"
    assert inference.target_from_images(torch.cat([grey[:4], colour[:5]])) == "svhn"
    for seed, mode in enumerate(["L", "RGB"]):
        save_image(tmp_path / f"{mode}.jpg", seed, mode)
    images, readable = inference.read([tmp_path / "L.jpg", tmp_path / "RGB.jpg", tmp_path / "none.jpg"])
    assert readable.tolist() == [True, True, False]
    assert [inference.target_from_images(images[i:i + 1]) for i in range(2)] == ["usps", "svhn"]


@pytest.mark.parametrize("folder, mode, target, reason, warning", [
    ("USPS", "L", "usps", "named by the path", ""),
    ("svhn", "RGB", "svhn", "named by the path", ""),
    ("mnistm", "RGB", "mnistm", "named by the path", ""),
    ("x", "L", "usps", "by its colours, as the path names no single domain", ""),
    ("svhn-from-mnistm", "RGB", "svhn", "by its colours, as the path names no single domain", ""),
    ("dann-usps", "RGB", "svhn", "by its colours, against the path", "names usps, but the images are coloured"),
    ("svhn", "L", "svhn", "named by the path", "names svhn, but the images are grey"),
    ("mnistm", "L", "mnistm", "named by the path", "names mnistm, but the images are grey"),
])
def test_the_target_picks_the_network(monkeypatch, tmp_path, capsys, checkpoint, folder, mode, target, reason, warning):
    name = {"svhn": "mnistm_svhn_dann", "usps": "mnistm_usps_dann", "mnistm": "mnistm_source_only"}[target]
    monkeypatch.setattr(inference, "CHECKPOINTS", tmp_path)
    shutil.copy(checkpoint, tmp_path / f"{name}.pt")  # any other choice is an error
    (tmp_path / folder).mkdir()
    for seed in range(3):
        save_image(tmp_path / folder / f"{seed}.png", seed, mode)
    call(inference, tmp_path / folder, tmp_path / "pred.csv")
    assert len(read_rows(tmp_path / "pred.csv")) == 4
    out, err = capsys.readouterr()
    assert f"({reason})" in out and warning in err and bool(warning) == ("--target" in err)


@pytest.mark.parametrize("flags, name", [
    (["svhn"], "mnistm_svhn_dann"), (["usps", "--method", "adamatch"], "mnistm_usps_adamatch"),
    (["mnistm", "--method", "adamatch"], "mnistm_source_only"),
    (["mnistm", "--assignment", "2020"], "usps_mnistm_dann"),
    (["usps", "--assignment", "2020", "--method", "adamatch"], "svhn_usps_adamatch"),
])
def test_each_assignment_has_its_networks(monkeypatch, tmp_path, capsys, checkpoint, flags, name):
    save_image(tmp_path / "a.png")
    monkeypatch.setattr(inference, "CHECKPOINTS", tmp_path)
    target, *flags = flags
    for command in ([tmp_path, target, tmp_path / "pred.csv", *flags],
                    [*flags, tmp_path, tmp_path / "pred.csv", "--target", target]):
        with pytest.raises(UserError, match=f"there is no .*{name}.pt; .*hw2_download.sh"):
            call(inference, *command)
    shutil.copy(checkpoint, tmp_path / f"{name}.pt")
    for command in ([tmp_path, target, tmp_path / "pred.csv", *flags],
                    [*flags, tmp_path, tmp_path / "pred.csv", "--target", target]):
        call(inference, *command)
        assert f"taken to be {target} (as asked); network {tmp_path / name}.pt" in capsys.readouterr().out
    call(inference, *command, "--checkpoint", tmp_path / f"{name}.pt")
    assert f"1 images, as asked; network {tmp_path / name}.pt, made for svhn" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required"), (["images"], "the following arguments are required"),
    (["images", "images/a.png"], "is named as an image is"),
    (["images", "svnh", "pred.csv"], "argument target: invalid choice: 'svnh'"),
    (["images", "", "pred.csv"], "argument target: invalid choice: ''"), (["", "svhn", "pred.csv"], "path is empty"),
    (["images", "svhn", ""], "path is empty"), (["images", "svhn", "pred.csv", "more"], "unrecognized arguments: more"),
    (["nowhere", "svhn", "pred.csv"], "nowhere"), (["empty", "usps", "pred.csv"], "no images"),
    (["images", "usps", "empty"], "is a folder"), (["images", "usps"], "would be called usps, a domain"),
    (["images", "usps", "pred.csv", "--target", "svhn"], "given twice"),
])
def test_mistakes_at_2020_s_doors_are_told(monkeypatch, tmp_path, capsys, checkpoint, arguments, message):
    """What hw3_p3.sh and hw3_p4.sh hand on is in tests/test_wrappers.py; here what becomes of it."""
    for name in ("images", "empty"):
        (tmp_path / name).mkdir()
    save_image(tmp_path / "images/a.png")
    for target, name in (("svhn", "mnistm_svhn_adamatch"), ("usps", "svhn_usps_adamatch")):
        shutil.copy(checkpoint, tmp_path / f"{name}.pt")
    monkeypatch.setattr(inference, "CHECKPOINTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, SystemExit)) as error:
        call(inference, "--assignment", "2020", "--method", "adamatch", *arguments)
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
    assert message in str(error.value) + capsys.readouterr().err and not (tmp_path / "pred.csv").exists()


def test_2020_s_doors_answer_every_image(tmp_path, checkpoint):
    (tmp_path / "test dir").mkdir()
    for seed in range(3):
        save_image(tmp_path / f"test dir/{seed}.png", seed)
    (tmp_path / "test dir/broken.png").write_bytes(b"no image")
    doors = [subprocess.Popen(["bash", ROOT / f"assignments/dlcv2020_hw3/hw3_p{problem}.sh", "test dir", "mnistm",
                               f"new/{problem}.csv", "--checkpoint", checkpoint], cwd=tmp_path, env=ENVIRONMENT,
                              stderr=subprocess.PIPE, text=True) for problem in (3, 4)]
    for problem, door in zip((3, 4), doors):
        _, error = door.communicate(timeout=300)
        assert door.returncode == 0 and "broken.png" in error and "Traceback" not in error, error
        header, *rows = read_rows(tmp_path / f"new/{problem}.csv")
        assert header == ["image_name", "label"] and [name for name, _ in rows] == sorted(
            path.name for path in (tmp_path / "test dir").iterdir())
        expected = answers_of(checkpoint, tmp_path / "test dir", [f"{seed}.png" for seed in range(3)])
        assert dict(rows).items() >= expected.items()


def test_committed_checkpoints():
    """They are small, made for what inference.py takes them for, and read scikit-learn's digits, another domain."""
    weak = ("mnistm_usps_dann", "svhn_usps_dann")  # which read 74 to 80 % of them
    paths = {path.stem: path for path in (ROOT / "p3_dann/checkpoints").glob("*.pt")}
    assert max(path.stat().st_size for path in paths.values()) <= 2e6
    for (_, method, target), name in inference.NETWORKS.items():
        model, recipe = load_model(paths[name])
        assert recipe["method"] in (method, "source_only") and predicted_domain(recipe) == target
        assert name.split("_")[0] == recipe["source"]
        digits = load_digits()
        images = np.zeros((200, 28, 28), np.uint8)
        for image, digit in zip(images, digits.images):
            image[4:24, 4:24] = Image.fromarray((digit * 15.9).astype(np.uint8)).resize((20, 20), Image.BICUBIC)
        answers = predict(model, torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1)).argmax(dim=1)
        assert (answers.numpy() == digits.target[:200]).mean() > (0.7 if name in weak else 0.8)


# --- Choice without labels ----------------------------------------------------------------------

def test_scores_by_hand():
    sure, even, wrong = torch.eye(2)[[0, 1]], torch.full((2, 2), 0.5), torch.eye(2)[[0, 0]]
    assert [choice.infomax(answers) for answers in (sure, even, wrong)] == pytest.approx([np.log(2), 0, 0], abs=1e-6)
    mixed = torch.tensor([[0.95, 0.05], [0.6, 0.4], [0.02, 0.98], [0.9, 0.1]])
    assert choice.confident(mixed, level=0.9) == 0.5
    # Two answers each of two classes: each has one neighbour, at a similarity that outweighs the others' by e^20.
    assert choice.neighbourhood_density(sure.repeat(2, 1)) == pytest.approx(0, abs=1e-6)
    assert choice.neighbourhood_density(even.repeat(2, 1)) == pytest.approx(np.log(3), rel=1e-6)
    a, b, c = torch.tensor([1.0, 0]), torch.tensor([1.0, 1]) / 2, torch.tensor([0.0, 1])
    weights = np.exp(np.array([2 ** -0.5, 0]) / 0.5)  # of a to b and c; b lies between them
    weights /= weights.sum()
    expected = (-2 * (weights * np.log(weights)).sum() + np.log(2)) / 3
    assert choice.neighbourhood_density(torch.stack([a, b, c]), temperature=0.5) == pytest.approx(expected, rel=1e-5)


def test_the_rule_picks_by_the_score_of_a_pair_s_networks_of_seed_0():
    rows = [dict(run=f"{name}_s{seed}", method="dann", source="mnistm", target="usps", seed=seed, accuracy=accuracy,
                 infomax=score, density=-score, confident=accuracy, source_validation=accuracy)
            for name, scores, accuracy in (("mnistm_usps_dann", (1.0, 1.2), 96),
                                           ("mnistm_usps_dann_lambda_0.1", (1.3, 1.1), 97),
                                           ("mnistm_usps_dann_lambda_0.3", (1.1, 1.9), 98))
            for seed, score in enumerate(scores)]
    others = [dict(rows[0], run="ablation_lambda_0", infomax=9),
              dict(rows[0], run="long_mnistm_usps_dann_s0", infomax=9),
              dict(rows[0], run="mnistm_source_only_s0", method="source_only", infomax=9),
              dict(rows[0], run="mnistm_svhn_dann_s0", target="svhn", infomax=np.nan)]
    table = pd.DataFrame(rows + others)
    candidates = choice.candidates(table)
    assert list(candidates) == ["mnistm_usps_dann"] and len(candidates["mnistm_usps_dann"]) == 3
    assert choice.pick(candidates["mnistm_usps_dann"]) == "mnistm_usps_dann_lambda_0.1"
    correlations = choice.rank_correlations(candidates)  # accuracies' ranks 1 2 3, the score's 1 3 2
    assert correlations == pytest.approx(dict(infomax=0.5, density=-0.5, confident=1, source_validation=1))
    assert studies.shipped(table)["mnistm_usps_dann"] == "mnistm_usps_dann_lambda_0.1"
    some = table[table.run != "mnistm_usps_dann_lambda_0.3_s0"]
    assert studies.shipped(some)["mnistm_usps_dann"] == "mnistm_usps_dann"
    assert choice.candidates(table.drop(columns=list(choice.SCORES))) == {}


def test_label_free_scores_need_no_target_label(tmp_path, data_dir, checkpoint):
    model, recipe = load_model(checkpoint)
    scores = choice.label_free_scores(model, recipe, "svhn", data_dir)
    assert set(scores) == set(choice.SCORES) and all(np.isfinite(list(scores.values())))
    blind = tmp_path / "data"
    shutil.copytree(data_dir, blind)
    for split in ("train", "val"):
        path = blind / f"digits/svhn/{split}.csv"
        pd.read_csv(path).image_name.to_csv(path, index=False)
    assert choice.label_free_scores(model, recipe, "svhn", blind) == scores
    lonely = choice.label_free_scores(model, dict(recipe, method="target_only"), "svhn", data_dir)
    assert "source_validation" not in lonely
    images, labels, _ = load_split(data_dir, "mnistm", "val")
    for method in "adamatch", "dann":  # dann's network predicts the source, too, with that domain's statistics
        if method == "dann":
            adapt_statistics(model, load_split(data_dir, "mnistm", "train")[0])
        right = 100 * (predict(model, images).argmax(dim=1) == labels).float().mean().item()
        scores = choice.label_free_scores(load_model(checkpoint)[0], dict(recipe, method=method), "svhn", data_dir)
        assert scores["source_validation"] == pytest.approx(right, abs=1e-3)


# --- Evaluation and features --------------------------------------------------------------------

def test_compare_counts_faults_as_wrong():
    names, labels = ["a", "b", "c", "d", "e"], torch.tensor([1, 2, 3, 4, 5])
    predictions = [("a", "1"), ("b", " 3"), ("c", "3"), ("c", "3"), ("d", "four"), ("z", "0")]
    confusion, faults = evaluate.compare(predictions, names, labels)
    assert confusion.sum() == 5 and confusion.diagonal().sum() == 1
    assert confusion[2, 3] == 1 and confusion[[3, 4, 5], [10, 10, 10]].tolist() == [1, 1, 1]
    assert faults == {"missing": ["e"], "doubled": ["c"], "not in the true file": ["z"],
                      "predicted to be no digit": ["d"]}


def test_evaluate_script(tmp_path, capsys):
    write_csv(tmp_path / "pred.csv", [("image_name", "label"), ("a.png", 1), ("b.png", 2)])
    write_csv(tmp_path / "true.csv", [("image_name", "label"), ("b.png", 3), ("a.png", 1)])
    call(evaluate, tmp_path / "pred.csv", tmp_path / "true.csv")
    assert capsys.readouterr().out.startswith("accuracy = 0.5000 (1/2)\n")
    with pytest.raises(UserError, match="none.csv"):
        call(evaluate, tmp_path / "pred.csv", tmp_path / "none.csv")


def test_proxy_a_distance():
    points = np.random.default_rng(0).normal(size=(800, 5))
    assert features.proxy_a_distance(points[:400], points[400:] + 10) == pytest.approx(2)
    assert features.proxy_a_distance(points[:400], points[400:]) < 0.3


def test_features_are_normalised_by_their_own_statistics_or_the_model_s(checkpoint):
    images = nn.functional.interpolate(random_images(60)[..., :7, :7].float(), scale_factor=4)  # other than its own
    model, _ = load_model(checkpoint)
    own, shared = (torch.from_numpy(features.extract_features(model, images, flag)).float() for flag in (True, False))
    with torch.no_grad():
        assert close(shared, model.features(augment.standardize(images)))
        adapt_statistics(model, images)
        expected = model.features(augment.standardize(images))
    assert close(own, expected) and not close(shared, expected, share=0.05)


def test_picture(monkeypatch, tmp_path, capsys, data_dir, checkpoint):
    asked, extract = [], features.extract_features
    monkeypatch.setattr(features, "extract_features", lambda *args: asked.append(args[2]) or extract(*args))
    content = torch.load(checkpoint, weights_only=True)
    torch.save(dict(content, recipe=dict(content["recipe"], method="source_only")), tmp_path / "before.pt")
    for flags in [], ["--before", tmp_path / "before.pt"]:
        call(features, checkpoint, tmp_path / "new" / "figure.png", "--data_dir", data_dir,
             "--target", "usps", *flags)
        with Image.open(tmp_path / "new" / "figure.png") as image:
            assert min(image.size) > 300
    said = capsys.readouterr().out.splitlines()
    dann = re.fullmatch(r"proxy A-distance: (dann [\d.]+); wrote .*", said[0])[1]
    assert re.fullmatch(rf"proxy A-distance: before adaptation [\d.]+, {dann}; wrote .*", said[1])
    assert asked == [True] * 2 + [False] * 2 + [True] * 2  # DANN's domains have their own statistics
    images, labels, _ = load_split(data_dir, "svhn", "val")
    _, digits = features.sample_features(load_model(checkpoint)[0], data_dir, ("mnistm", "svhn"), False)
    chosen = np.random.default_rng(0).permutation(len(images))
    assert digits[1].tolist() == labels[chosen].tolist() != labels.tolist()
    monkeypatch.setattr(features, "picture", None)  # a mistake is told before t-SNE takes its time
    with pytest.raises(UserError, match="svhn would be compared with itself"):
        call(features, checkpoint, tmp_path / "figure.png", "--data_dir", data_dir, "--source", "svhn")
    with pytest.raises(UserError, match="a figure is an .svg or a .png file; name .*figure.pdf so"):
        call(features, checkpoint, tmp_path / "figure.pdf", "--data_dir", data_dir)


def test_domains_share_adamatch_s_statistics_and_have_their_own_in_dann():
    assert [features.has_own_statistics(dict(method=name)) for name in METHODS] == [False, False, True, False]
