"""Problem 3: the adversary's gradient, what training may know, and a prediction that always answers."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from p3_dann import augment, inference, train, tsne
from p3_dann.evaluate import compare
from p3_dann.model import Dann, GradientReversal, adapt_statistics, lambda_schedule, load_model, predict, standardize
from utils import UserError, save_checkpoint, seed_all

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(widths=(4, 4, 4), num_features=8)


def random_images(count, seed=0):
    return torch.randint(0, 256, (count, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def save_image(path, seed=0, mode="RGB", size=(28, 28)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_csv(path, rows):
    path.write_text("".join(f"{','.join(map(str, row))}\n" for row in rows))


@pytest.fixture
def tiny_network(monkeypatch):
    """Makes training use a network that is quick to train."""
    monkeypatch.setattr(train, "Dann", lambda: Dann(**TINY))
    monkeypatch.setattr(train, "STEPS_PER_EPOCH", 2)


def call(monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
    module.main()


def train_tiny(monkeypatch, data_dir, output_dir, *flags):
    call(monkeypatch, train, "--data_dir", data_dir, "--output_dir", output_dir, "--epochs", 2, "--batch_size", 8,
         "--device", "cpu", *flags)
    return torch.load(output_dir / "model.pt", weights_only=True)["ema"]


def same_tensors(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- The adversary ------------------------------------------------------------------------------

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
    source, target, lambda_ = torch.tensor([[1.0]]), torch.tensor([[3.0]]), 0.1
    loss, _ = train.losses(model, source, torch.tensor([4]), target, lambda_)
    loss.backward()
    by_logit = [torch.sigmoid(torch.tensor(1.0)).item() / 2, (torch.sigmoid(torch.tensor(3.0)).item() - 1) / 2]
    assert model.discriminator.weight.grad.item() == pytest.approx(by_logit[0] * 0.5 + by_logit[1] * 1.5, rel=1e-5)
    upright = by_logit[0] * 2.0 * 1.0 + by_logit[1] * 2.0 * 3.0
    assert model.features.weight.grad.item() == pytest.approx(-lambda_ * upright, rel=1e-5)


def test_lambda_schedule():
    assert lambda_schedule(0.0, 0.3) == 0.0
    assert lambda_schedule(0.5) == pytest.approx(0.9866143, abs=1e-7)
    assert lambda_schedule(1.0, 0.3) == pytest.approx(0.3, rel=1e-4)
    values = [lambda_schedule(p / 20) for p in range(21)]
    assert values == sorted(values)


# --- The network's input and statistics ---------------------------------------------------------

def test_standardize():
    images = random_images(4)
    x = standardize(images)
    assert x.shape == (4, 1, 28, 28)
    assert torch.allclose(x.mean(dim=(1, 2, 3)), torch.zeros(4), atol=1e-5)
    assert ((x.std(dim=(1, 2, 3)) - 1).abs() < 0.1).all()
    dim = standardize(images.float() * 0.5 + 60)  # contrast and brightness do not count
    assert torch.allclose(dim / dim.std(), x / x.std(), atol=0.02)
    assert torch.equal(standardize(torch.full((1, 3, 28, 28), 77, dtype=torch.uint8)), torch.zeros(1, 1, 28, 28))


def test_adapt_statistics_takes_those_of_the_images():
    model, images = Dann(**TINY), random_images(30)
    adapt_statistics(model, images)
    first_convolution, norm = model.features[0][0], model.features[0][1]
    with torch.no_grad():
        out = first_convolution(standardize(images))
    assert torch.allclose(norm.running_mean, out.mean(dim=(0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, out.var(dim=(0, 2, 3)), rtol=1e-4)
    assert not model.training


def test_prediction_is_in_evaluation_mode_and_independent_of_the_batch():
    seed_all(0)
    model, images = Dann(**TINY), random_images(23)
    adapt_statistics(model, images)
    expected = predict(model, images)
    model.train()  # dropout and batch statistics would show
    for batch_size in (1, 7, 23):
        assert torch.allclose(predict(model, images, batch_size), expected, atol=1e-6)
    assert not model.training
    assert torch.allclose(expected.sum(dim=1), torch.ones(23), atol=1e-5)


def test_prediction_is_the_mean_over_views():
    seed_all(0)
    model, images = Dann(**TINY), random_images(9)
    adapt_statistics(model, images)
    looks = list(augment.views(images))
    plain = standardize(images)
    assert len(looks) == 3 and torch.allclose(looks[1], -plain, atol=1e-4)
    with torch.no_grad():
        mean = torch.stack([model(look).softmax(dim=1) for look in looks]).mean(dim=0)
        assert torch.allclose(predict(model, images), mean, atol=1e-6)
        assert torch.allclose(predict(model, images, average=False), model(plain).softmax(dim=1), atol=1e-6)
    # The magnified view shows the middle of the image, larger.
    square = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    square[..., 4:24, 4:24] = 255
    small, inverted, large = (look > 0 for look in augment.views(square))
    assert small.sum() < 20 ** 2 < large.sum() and inverted.sum() == 28 ** 2 - 20 ** 2


def test_parts_of_the_augmentation_can_be_left_out():
    images = random_images(8)
    assert torch.equal(augment.augment_source(images, augment.PARTS), standardize(images))
    still = [part for part in augment.PARTS if part != "intensity"]
    mirrored = augment.augment_target(images, still)  # only intensity: shape as before, up to polarity and noise
    plain = standardize(images)
    correlation = (mirrored * plain).mean(dim=(1, 2, 3)) / (mirrored.std(dim=(1, 2, 3)) * plain.std(dim=(1, 2, 3)))
    assert (correlation.abs() > 0.8).all()
    seed_all(0)
    alone = augment.augment_source(images, ["neighbours"])
    seed_all(0)
    assert not torch.equal(alone, augment.augment_source(images))


# --- Augmentation -------------------------------------------------------------------------------

def test_augmentation_without_randomness_changes_nothing():
    images = torch.rand(3, 1, 28, 28)
    still = augment.random_affine(images, zoom=(1, 1), stretch=0, degrees=0, shear=0, shift=0)
    assert torch.allclose(still, images, atol=1e-4)
    assert torch.equal(augment.random_sharpness(images, sharpen=0, blur=0), images)
    plain = augment.random_intensity(images, scale=(1, 1), offset=0, noise=0)
    assert torch.equal(plain.abs(), images)


def test_row_of_digits_keeps_the_digit_in_the_middle():
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 28, 28)
    row = augment.row_of_digits(images, columns=20)
    assert row.shape == (5, 1, 28, 60)
    assert torch.equal(row[..., 20:40], images[..., 4:24])
    middle = augment.random_affine(row, zoom=(1, 1), stretch=0, degrees=0, shear=0, shift=0)[..., 4:24]
    assert torch.allclose(middle, images[..., 4:24], atol=1e-4)


def test_random_affine_zooms():
    images = torch.zeros(1, 1, 28, 28)
    images[..., 9:19, 9:19] = 1  # 100 pixels
    twice = augment.random_affine(images, zoom=(2, 2), stretch=0, degrees=0, shear=0, shift=0)
    assert twice.sum().item() == pytest.approx(400, rel=0.02)
    turned = augment.random_affine(images, zoom=(1, 1), stretch=0, degrees=45, shear=0, shift=0)
    assert turned.sum().item() == pytest.approx(100, rel=0.05)
    moved = augment.random_affine(images, zoom=(1, 1), stretch=0, degrees=0, shear=0, shift=0.2)
    assert moved.sum().item() == pytest.approx(100, rel=0.01) and not torch.allclose(moved, images, atol=0.1)


# --- Training -----------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
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
    for mode in ("source", "dann"):
        seed_all(seed)
        model = Dann(**TINY, num_classes=2, dropout=0.0)
        model.features, model.classifier, model.discriminator = nn.Linear(2, 4), nn.Linear(4, 2), nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(400):
            loss, _ = train.losses(model, source, labels, target if mode == "dann" else None,
                                   lambda_schedule(step / 400, 0.1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy[mode] = train.hits(model(target), target_labels).item()
    assert accuracy["source"] < 0.7 and accuracy["dann"] > 0.95


def test_target_labels_do_not_matter_to_dann(monkeypatch, tmp_path, data_dir, tiny_network):
    expected = train_tiny(monkeypatch, data_dir, tmp_path / "plain")
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
        assert same_tensors(train_tiny(monkeypatch, changed, tmp_path / variant), expected)


def test_mode_source_needs_no_target(monkeypatch, tmp_path, data_dir, tiny_network):
    lonely = tmp_path / "data"
    shutil.copytree(data_dir / "digits" / "mnistm", lonely / "digits" / "mnistm")
    weights = train_tiny(monkeypatch, lonely, tmp_path / "out", "--mode", "source")
    assert same_tensors(weights, train_tiny(monkeypatch, data_dir, tmp_path / "again", "--mode", "source"))


def test_mode_target_needs_no_source(monkeypatch, tmp_path, data_dir, tiny_network):
    lonely = tmp_path / "data"
    shutil.copytree(data_dir / "digits" / "usps", lonely / "digits" / "usps")
    train_tiny(monkeypatch, lonely, tmp_path / "out", "--mode", "target", "--target", "usps")
    report = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(report["validation_accuracy"]) == {"usps"}


def test_resumed_training_equals_an_uninterrupted_one(monkeypatch, tmp_path, data_dir, tiny_network):
    expected = train_tiny(monkeypatch, data_dir, tmp_path / "whole")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "write_jsonl", interrupt)  # called when the first epoch is saved
        train_tiny(patch, data_dir, tmp_path / "parts")
    assert not (tmp_path / "parts" / "model.pt").exists()
    assert same_tensors(train_tiny(monkeypatch, data_dir, tmp_path / "parts", "--resume"), expected)
    whole, parts = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                    for name in ("whole", "parts"))
    for line in whole + parts:
        line.pop("seconds", None)
    assert parts == whole and len(whole) == 3
    assert {"loss", "source", "domain", "lambda_", "confident"} <= whole[0].keys()


def test_training_changes_the_weights_and_seeds_differ(monkeypatch, tmp_path, data_dir, tiny_network):
    first, second = (train_tiny(monkeypatch, data_dir, tmp_path / seed, "--seed", seed) for seed in "01")
    assert not torch.equal(first["features.0.0.weight"], second["features.0.0.weight"])
    seed_all(0)
    assert not torch.allclose(first["features.0.0.weight"].float(), Dann(**TINY).features[0][0].weight, atol=1e-3)


def test_mistakes_in_training_are_told(monkeypatch, tmp_path, data_dir, tiny_network):
    with pytest.raises(UserError, match="two domains"):
        train_tiny(monkeypatch, data_dir, tmp_path / "out", "--source", "svhn")
    with pytest.raises(UserError, match="nowhere"):
        train_tiny(monkeypatch, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="last.pt"):
        train_tiny(monkeypatch, data_dir, tmp_path / "out", "--resume")
    train_tiny(monkeypatch, data_dir, tmp_path / "out")
    with pytest.raises(UserError, match="--resume"):
        train_tiny(monkeypatch, data_dir, tmp_path / "out")
    with pytest.raises(UserError, match="was trained with --lr 0.003; resume"):
        train_tiny(monkeypatch, data_dir, tmp_path / "out", "--resume", "--lr", "0.1")
    with pytest.raises(UserError, match="model.pt"):
        load_model(tmp_path / "out" / "last.pt")


def test_dry_run_of_two_processes(tmp_path, data_dir, torchrun):
    result = torchrun("p3_dann/train.py", "--dry_run", "--device", "cpu", "--data_dir", data_dir, "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    model, recipe = load_model(tmp_path / "dry_run" / "model.pt")
    assert recipe["mode"] == "dann" and predict(model, random_images(2)).isfinite().all()


# --- Prediction ---------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small untrained network that answers differently for different images."""
    seed_all(1)
    model = Dann(**TINY)
    adapt_statistics(model, random_images(50))
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    save_checkpoint(path, kind="p3_dann", config=model.config, ema=model.state_dict(),
                    recipe=dict(source="mnistm", target="svhn", mode="dann"))
    return path


def wrapper(*argv, cwd):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", ROOT / "hw2_3.sh", *map(str, argv)], cwd=cwd, capture_output=True, text=True,
                          env=environment)


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


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
    result = wrapper("test dir", "new dir/pred.csv", "--checkpoint", checkpoint, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    header, *rows = read_rows(tmp_path / "new dir" / "pred.csv")
    assert header == ["image_name", "label"]
    assert [name for name, _ in rows] == sorted(
        ["b.png", "a, first.png", "c d.jpg", "E.PNG", "f.png", "g.png", "h.jpeg", "i.png", "broken.png", "empty.jpg"])
    answers = dict(rows)
    assert set(answers.values()) <= set("0123456789")
    good = [label for name, label in rows if name not in ("broken.png", "empty.jpg")]
    assert good.count(answers["broken.png"]) == max(map(good.count, good))
    assert answers["empty.jpg"] == answers["broken.png"]
    assert "broken.png" in result.stderr and "empty.jpg" in result.stderr and "Traceback" not in result.stderr
    assert os.listdir(tmp_path / "new dir") == ["pred.csv"]


@pytest.mark.parametrize("mistake, message", [
    ("no folder", "nowhere"), ("empty folder", "no images"), ("output is a folder", "is a folder"),
    ("output below a file", "is a file"), ("damaged checkpoint", "damaged"), ("no arguments", "usage"),
])
def test_wrapper_tells_mistakes(tmp_path, checkpoint, mistake, message):
    images, output, flags = tmp_path / "some images", tmp_path / "pred.csv", ["--checkpoint", checkpoint]
    images.mkdir()
    save_image(images / "0.png")
    if mistake == "no folder":
        images = tmp_path / "nowhere"
    elif mistake == "empty folder":
        (images / "0.png").unlink()
    elif mistake == "output is a folder":
        output.mkdir()
    elif mistake == "output below a file":
        output.write_text("mine")
        output = output / "pred.csv"
    elif mistake == "damaged checkpoint":
        flags = ["--checkpoint", tmp_path / "damaged.pt"]
        flags[1].write_bytes(checkpoint.read_bytes()[:1000])
    result = wrapper(*([] if mistake == "no arguments" else [images, output, *flags]), cwd="/")
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not output.is_file()


@pytest.mark.parametrize("path, target", [
    ("/x/hw2_data/digits/svhn/test", "svhn"), ("/x/USPS/test", "usps"), ("/x/usps/old/SVHN", "svhn"),
    ("/x/svhn-28x28", "svhn"), ("/x/usps_test/", "usps"), ("/x/mnistm/data", "mnistm"),
    ("/x/mysvhns/uspstest", None), ("/x/test", None),
])
def test_target_from_path(path, target):
    assert inference.target_from_path(path) == target


def test_target_from_a_relative_path(monkeypatch, tmp_path):
    (tmp_path / "svhn" / "test").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "svhn")
    assert inference.target_from_path("test") == "svhn"


def test_target_from_images(tmp_path):
    colour = random_images(9)
    grey = colour[:, :1].expand(-1, 3, -1, -1)
    assert inference.target_from_images(colour) == "svhn"
    assert inference.target_from_images(grey) == "usps"
    assert inference.target_from_images(torch.cat([grey[:4], colour[:5]])) == "svhn"
    assert inference.target_from_images(colour[:0]) == "svhn"
    for seed, mode in enumerate(["L", "RGB"]):
        save_image(tmp_path / f"{mode}.jpg", seed, mode)
    images, readable = inference.read([tmp_path / "L.jpg", tmp_path / "RGB.jpg", tmp_path / "none.jpg"])
    assert readable.tolist() == [True, True, False]
    assert [inference.target_from_images(images[i:i + 1]) for i in range(2)] == ["usps", "svhn"]


@pytest.mark.parametrize("folder, mode, target", [("USPS", "RGB", "usps"), ("x", "L", "usps"), ("x", "RGB", "svhn")])
def test_the_target_picks_the_network(monkeypatch, tmp_path, capsys, checkpoint, folder, mode, target):
    monkeypatch.setattr(inference, "CHECKPOINTS", {target: checkpoint})  # any other choice is a KeyError
    (tmp_path / folder).mkdir()
    for seed in range(3):
        save_image(tmp_path / folder / f"{seed}.png", seed, mode)
    call(monkeypatch, inference, tmp_path / folder, tmp_path / "pred.csv")
    assert len(read_rows(tmp_path / "pred.csv")) == 4
    assert ("named by the path" if folder == "USPS" else "by its colours") in capsys.readouterr().out


def test_folder_of_unreadable_images_is_answered(monkeypatch, tmp_path, capsys, checkpoint):
    (tmp_path / "svhn").mkdir()
    (tmp_path / "svhn" / "a.png").write_bytes(b"no image")
    call(monkeypatch, inference, tmp_path / "svhn", tmp_path / "pred.csv", "--checkpoint", checkpoint)
    assert read_rows(tmp_path / "pred.csv") == [["image_name", "label"], ["a.png", "0"]]
    assert "a.png" in capsys.readouterr().err


def test_committed_checkpoints():
    """They are small, made for what inference.py takes them for, and read scikit-learn's digits, a domain of its own."""
    paths = list((ROOT / "p3_dann/checkpoints").glob("*.pt"))
    assert sum(path.stat().st_size for path in paths) <= 15e6
    for target, path in inference.CHECKPOINTS.items():
        assert path in paths
        model, recipe = load_model(path)
        assert recipe["source"] == "mnistm" and recipe["mode"] == ("source" if target == "mnistm" else "dann")
        assert target == "mnistm" or recipe["target"] == target
        digits = load_digits()
        images = np.zeros((200, 28, 28), np.uint8)
        for image, digit in zip(images, digits.images):
            image[4:24, 4:24] = Image.fromarray((digit * 15.9).astype(np.uint8)).resize((20, 20), Image.BICUBIC)
        answers = predict(model, torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1)).argmax(dim=1)
        assert (answers.numpy() == digits.target[:200]).mean() > 0.8


# --- Evaluation and t-SNE -----------------------------------------------------------------------

def test_compare_counts_faults_as_wrong_answers():
    names, labels = ["a", "b", "c", "d", "e"], torch.tensor([1, 2, 3, 4, 5])
    answers = [("a", "1"), ("b", " 3"), ("c", "3"), ("c", "3"), ("d", "four"), ("z", "0")]
    confusion, faults = compare(answers, names, labels)
    assert confusion.sum() == 5 and confusion.diagonal().sum() == 1
    assert confusion[2, 3] == 1 and confusion[[3, 4, 5], [10, 10, 10]].tolist() == [1, 1, 1]
    assert faults == {"missing": ["e"], "doubled": ["c"], "not in the true file": ["z"],
                      "answered with no digit": ["d"]}


def test_evaluate_script(tmp_path):
    write_csv(tmp_path / "pred.csv", [("image_name", "label"), ("a.png", 1), ("b.png", 2)])
    write_csv(tmp_path / "true.csv", [("image_name", "label"), ("b.png", 3), ("a.png", 1)])
    command = [sys.executable, ROOT / "p3_dann/evaluate.py", tmp_path / "pred.csv"]
    result = subprocess.run([*command, tmp_path / "true.csv"], capture_output=True, text=True)
    assert result.stdout.startswith("accuracy = 0.5000 (1/2)"), result.stderr
    result = subprocess.run([*command, tmp_path / "none.csv"], capture_output=True, text=True)
    assert result.returncode == 2 and "none.csv" in result.stderr and "Traceback" not in result.stderr


def test_proxy_a_distance():
    features = np.random.default_rng(0).normal(size=(800, 5))
    assert tsne.proxy_a_distance(features[:400], features[400:] + 10) == pytest.approx(2)
    assert tsne.proxy_a_distance(features[:400], features[400:]) < 0.3


def test_picture(monkeypatch, tmp_path, data_dir, checkpoint):
    call(monkeypatch, tsne, checkpoint, tmp_path / "new" / "figure.png", "--data_dir", data_dir, "--target", "usps")
    with Image.open(tmp_path / "new" / "figure.png") as image:
        assert image.width > image.height > 300
