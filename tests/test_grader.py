"""digit_classifier.py: the grader of problem 1, and how its network is trained."""

import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import digit_classifier
from conftest import ENVIRONMENT, ROOT, call
from dataset import load_split
from files import save_png
from utils import UserError


def grade(*flags):
    call(digit_classifier, "--device", "cpu", *flags)


@pytest.fixture(scope="module")
def weights():
    """Of a network that answers 3 to every image."""
    model = digit_classifier.Classifier()
    torch.nn.init.zeros_(model.fc3.weight)
    torch.nn.init.zeros_(model.fc3.bias)
    model.fc3.bias.data[3] = 1
    return model.state_dict()


@pytest.fixture
def always_3(tmp_path, weights):
    torch.save({"state_dict": weights}, tmp_path / "Classifier.pth")
    return tmp_path / "Classifier.pth"


def test_classifier_is_the_courses_network(weights):
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    assert list(shapes) == [f"{layer}.{kind}" for layer in ("conv1", "conv2", "fc1", "fc2", "fc3")
                            for kind in ("weight", "bias")]
    assert shapes["conv2.weight"] == (16, 6, 5, 5) and shapes["fc1.weight"] == (128, 256)
    assert sum(math.prod(shape) for shape in shapes.values()) == 44674


def test_prints_the_courses_line_and_names_odd_files(tmp_path, always_3, capsys):
    black = torch.zeros(3, 28, 28, dtype=torch.uint8)
    folder = tmp_path / "generated digits"
    (folder / "more").mkdir(parents=True)
    for name in ("3_001.png", "3_002.png", "3_extra.png", "cat.png"):
        save_png(folder / name, black)
    save_png(folder / "5_001.png", torch.zeros(3, 32, 32, dtype=torch.uint8))
    (folder / "notes.txt").write_text("not an image")
    grade("--folder", folder, "--checkpoint", always_3)
    stdout, stderr = capsys.readouterr()
    assert stdout == "acc = 0.75 (correct/total = 3/4)\n"
    for part in (f"passed over in {folder}: more/, notes.txt\n", "begin with a digit: cat.png",
                 "graded, but not among 0_001.png ... 9_100.png: 3_extra.png", "997 file(s) missing: 0_001.png",
                 "1 file(s) resized, they are not 28x28: 5_001.png"):
        assert part in stderr


def test_is_silent_about_a_complete_folder(tmp_path, always_3, capsys):
    (tmp_path / "out").mkdir()
    save_png(tmp_path / "black.png", torch.zeros(3, 28, 28, dtype=torch.uint8))
    for name in digit_classifier.expected_names():
        shutil.copy(tmp_path / "black.png", tmp_path / "out" / name)
    grade("--folder", tmp_path / "out", "--checkpoint", always_3)
    assert capsys.readouterr() == ("acc = 0.1 (correct/total = 100/1000)\n", "")


def test_grades_two_domains_as_in_2024(tmp_path, weights, always_3, capsys, monkeypatch):
    black = torch.zeros(3, 28, 28, dtype=torch.uint8)
    out = tmp_path / "out"
    for domain, names in (("mnistm", ("3_001", "3_002", "5_001", "5_051")), ("svhn", ("3_001", "8_050"))):
        (out / domain).mkdir(parents=True)
        for name in names:
            save_png(out / domain / f"{name}.png", black)
    grade("--folder", out, "--checkpoint", always_3)  # one network for both
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines() == ["MNIST-M acc = 0.5000 (correct/total = 2/4)",
                                   "SVHN acc = 0.5000 (correct/total = 1/2)", "acc = 0.5000"]
    assert "graded, but not among 0_001.png ... 9_050.png: 5_051.png" in stderr and "498 file(s) missing" in stderr

    bias = torch.zeros(10)
    bias[8] = 1
    torch.save({"state_dict": {**weights, "fc3.bias": bias}}, tmp_path / "always_8.pth")
    monkeypatch.setattr(digit_classifier, "CHECKPOINTS", dict(mnistm=always_3, svhn=tmp_path / "always_8.pth"))
    (out / "svhn/3_001.png").unlink()
    (out / "usps").mkdir()
    grade("--folder", out)  # a judge for each
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines()[1:] == ["SVHN acc = 1.0000 (correct/total = 1/1)", "acc = 0.7500"]
    assert f"not graded: {out / 'usps'}," in stderr
    for more, rate in (([], 0.0), (["--domain", "svhn"], 1.0)):  # one folder does not tell its domain
        grade("--folder", out / "svhn", *more)
        assert capsys.readouterr().out.startswith(f"acc = {rate} ")
    save_png(out / "0_001.png", black)
    with pytest.raises(UserError, match="holds digits and .*mnistm as well"):
        grade("--folder", out)
    (out / "0_001.png").unlink()
    for flags, message in ((["--domain", "svhn"], "leave --domain out"), (["--epochs", 2], "are for --train")):
        with pytest.raises(UserError, match=message):
            grade("--folder", out, *flags)
    shutil.rmtree(out / "svhn")
    with pytest.raises(UserError, match="grade .*mnistm by itself, with --domain mnistm"):
        grade("--folder", out)
    (out / "usps").rmdir()
    capsys.readouterr()
    with pytest.raises(UserError, match="no folder .*svhn"):
        grade("--folder", out)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("wrap", [
    lambda weights: weights,
    lambda weights: {"format_version": 1, "state_dict": weights},
    lambda weights: {"epoch": 3, "model": {f"module._orig_mod.{name}": value for name, value in weights.items()}},
    lambda weights: {"state_dict": {name: value.half() for name, value in weights.items()}}])
def test_weights_are_found_in_any_wrapping(tmp_path, weights, wrap):
    torch.save(wrap(weights), tmp_path / "x.pth")
    found = digit_classifier.load_classifier(tmp_path / "x.pth").state_dict()
    assert all(torch.equal(found[name].half(), weights[name].half()) for name in weights)  # what half precision keeps


@pytest.mark.parametrize("folder, checkpoint, message", [
    ("gone", "Classifier.pth", "no folder .*gone"), ("empty", "Classifier.pth", "no images"),
    ("cats", "Classifier.pth", "no image in .*cats has a name that begins with its digit"),
    ("broken", "Classifier.pth", "1_001.png cannot be read"),
    ("broken", "gone.pth", "there is no classifier checkpoint .*gone.pth"),
    ("broken", "tensor.pth", "tensor.pth does not hold the weights that are looked for, which holds a Tensor"),
    ("broken", "foreign.pth", "foreign.pth does not hold .* whose top level holds weights"),
    ("broken", "nan.pth", "nan.pth hold NaN")])
def test_refuses_bad_input(tmp_path, weights, always_3, folder, checkpoint, message):
    for name, file in (("empty", "notes.txt"), ("broken", "1_001.png"), ("cats", "cat.png")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"\x89PNG")
    torch.save({"weights": 1}, tmp_path / "foreign.pth")
    torch.save(torch.zeros(1, 3), tmp_path / "tensor.pth")
    torch.save({"state_dict": {**weights, "fc3.bias": torch.full((10,), math.nan)}}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=message):
        grade("--folder", tmp_path / folder, "--checkpoint", tmp_path / checkpoint)


@pytest.fixture
def printed_digits(tmp_path):
    """The course's layout with four printed digits of each kind, in random greys on random greys, as MNIST-M and SVHN.
    """
    folder = tmp_path / "digits/mnistm"
    (folder / "data").mkdir(parents=True)
    (tmp_path / "digits/svhn").symlink_to(folder)
    rng = np.random.default_rng(0)
    for k in range(40):
        image = Image.new("L", (10, 11), int(rng.integers(0, 100)))
        ImageDraw.Draw(image).text((2, 0), str(k % 10), int(rng.integers(150, 256)), font=ImageFont.load_default())
        image.convert("RGB").resize((28, 28), Image.Resampling.BILINEAR).save(folder / f"data/{k}.png")
    rows = [f"{k}.png,{k % 10}\n" for k in range(40)]
    for split in ("train", "val"):
        (folder / f"{split}.csv").write_text("image_name,label\n" + "".join(rows))
    return tmp_path


def test_training_learns(tmp_path, printed_digits, capsys):
    grade("--train", printed_digits, "--epochs", 100, "--checkpoint", tmp_path / "new/Classifier.pth")
    accuracies = [float(x) for x in re.findall(r"validation accuracy ([\d.]+) %", capsys.readouterr().out)]
    assert len(accuracies) == 100
    assert accuracies[-1] > 80, accuracies[::10]  # by chance 10 %
    assert list(torch.load(tmp_path / "new/Classifier.pth", weights_only=True)) == ["state_dict"]  # as the course's
    images, labels, _ = load_split(printed_digits, "mnistm", "val")
    model = digit_classifier.load_classifier(tmp_path / "new/Classifier.pth")
    right = (digit_classifier.classify(model, images)[1] == labels).float().mean().item()
    assert 100 * right == pytest.approx(accuracies[-1], abs=0.01)  # two decimals are printed
    with pytest.raises(UserError, match="is a folder"):
        grade("--train", printed_digits, "--checkpoint", tmp_path / "new")


def test_a_panel_is_several_networks_of_half_precision_in_one_file(tmp_path, printed_digits, capsys):
    path = tmp_path / "panel.pth"
    grade("--train", printed_digits, "--panel", 2, "--epochs", 40, "--seed", 5, "--checkpoint", path)
    accuracies = [float(x) for x in re.findall(r"validation accuracy ([\d.]+) %", capsys.readouterr().out)]
    assert len(accuracies) == 80 and min(accuracies[39], accuracies[79]) > 50  # by chance 10 %
    content = torch.load(path, weights_only=True)["panel"]
    assert len(content) == 2 and all(value.dtype == torch.float16 for grader in content for value in grader.values())
    first, second = digit_classifier.load_panel(path)
    assert not torch.equal(first.fc3.weight, second.fc3.weight)  # seeds 5 and 6
    images, labels, _ = load_split(printed_digits, "mnistm", "val")
    right = (digit_classifier.classify(second, images)[1] == labels).float().mean().item()
    assert 100 * right == pytest.approx(accuracies[79], abs=2.6)  # one of 40 digits, for the rounding of its weights
    grade("--train", printed_digits, "--panel", 1, "--epochs", 40, "--seed", 6, "--checkpoint", path)
    assert all(torch.equal(value, content[1][name]) for name, value in
               torch.load(path, weights_only=True)["panel"][0].items())


def test_the_committed_panel_is_of_eight_plain_networks():
    panel = digit_classifier.load_panel()
    assert len(panel) >= 8 and {len(grader.conv1.weight) for grader in panel} == {6}
    assert len({grader.fc3.bias[0].item() for grader in panel}) == len(panel)


def test_the_judges_recognise_the_shipped_digits_of_two_domains(tmp_path, capsys):
    """A digit of each class and domain, by 2024's wrapper."""
    wrapper = ROOT / "assignments/dlcv2024_hw2/hw2_1.sh"
    subprocess.run(["bash", wrapper, "two words", "--per_class", "1", "--device", "cpu", "--amp", "off"], cwd=tmp_path,
                   env=ENVIRONMENT, check=True, timeout=200)
    grade("--folder", tmp_path / "two words")
    accuracies = re.findall(r"^(MNIST-M|SVHN) acc = ([\d.]+) \(correct/total = \d+/10\)$", capsys.readouterr().out,
                            re.MULTILINE)
    assert [domain for domain, _ in accuracies] == ["MNIST-M", "SVHN"]
    assert min(float(accuracy) for _, accuracy in accuracies) >= 0.7  # by chance 0.1


def test_the_judge_of_svhn_is_wider_and_its_weights_tell(tmp_path, printed_digits):
    path = tmp_path / "judge.pth"
    grade("--train", printed_digits, "--domain", "svhn", "--epochs", 1, "--checkpoint", path)
    for judge in (digit_classifier.load_classifier(path),
                  digit_classifier.load_classifier(digit_classifier.CHECKPOINTS["svhn"])):
        assert judge.conv1.weight.shape == (24, 3, 5, 5) and not judge.training
        assert judge.features(torch.zeros(2, 3, 28, 28)).shape == (2, 64)


@pytest.mark.parametrize("flags, message", [
    (["--panel", 2, "--domain", "svhn"], "one of MNIST-M"), (["--domain", "usps"], "invalid choice")])
def test_training_refuses_bad_flags(tmp_path, printed_digits, capsys, flags, message):
    with pytest.raises((UserError, SystemExit)) as error:
        grade("--train", printed_digits, "--checkpoint", tmp_path / "new.pth", *flags)
    assert message in f"{error.value} {capsys.readouterr().err}" and not (tmp_path / "new.pth").exists()
    with pytest.raises(UserError, match="does not hold a panel"):
        digit_classifier.load_panel(digit_classifier.CHECKPOINTS["mnistm"])
    with pytest.raises(UserError, match="Classifier_panel.pth holds a panel; .*evaluate.py --panel_checkpoint grades"):
        digit_classifier.load_classifier(digit_classifier.PANEL)


def test_training_leaves_the_graders_of_the_repository_alone(printed_digits):
    before = {path: path.read_bytes() for path in (*digit_classifier.CHECKPOINTS.values(), digit_classifier.PANEL)}
    for more in ([], ["--domain", "svhn"], ["--panel", 2]):
        with pytest.raises(UserError, match="is there already; name another file"):
            grade("--train", printed_digits, "--epochs", 1, *more)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_training_needs_digits_and_takes_any_number_of_steps(tmp_path, printed_digits):
    grade("--train", printed_digits, "--epochs", 10, "--checkpoint", tmp_path / "ten.pth")  # OneCycleLR's rise is one
    digit_classifier.load_classifier(tmp_path / "ten.pth")
    folder = printed_digits / "digits/mnistm"
    (folder / "val.csv").unlink()  # so a fifth is set aside, and of one image nothing is left
    (folder / "train.csv").write_text("\n".join((folder / "train.csv").read_text().splitlines()[:2]) + "\n")
    with pytest.raises(UserError, match="too few images to set a fifth of them aside"):
        grade("--train", printed_digits, "--checkpoint", tmp_path / "none.pth")


def test_augmentation_keeps_shape_and_range_and_differs_by_image():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 28, 28).expand(8, -1, -1, -1) * 2 - 1
    out = digit_classifier.augment(x)
    assert out.shape == x.shape and out.abs().max() <= 1
    assert min((a - b).abs().max() for i, a in enumerate(out) for b in out[:i]) > 0.1
