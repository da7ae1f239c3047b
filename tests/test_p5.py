"""Faces by a generative adversarial network. Tiny networks, made-up faces, no data set."""

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import face_grader
import training
from conftest import ENVIRONMENT, ROOT, assert_same_training, call, interrupted
from faces import face_source, read_faces
from files import digest_of, read_jsonl
from p5_gan import evaluate, inference, studies, train
from p5_gan.augment import DiffAugment, colour, cutout, translation
from p5_gan.losses import LOSSES
from p5_gan.model import CHECKPOINT, Discriminator, Generator, load_model
from transforms import as_input
from utils import UserError, image_generators, randn

pytestmark = pytest.mark.usefixtures("one_thread")


# --- Losses and networks ------------------------------------------------------------------------

def test_hinge_is_flat_beyond_the_margin():
    discriminator, generator = LOSSES["hinge"]
    real, generated = torch.tensor([3.0, 1, 0, -2]), torch.tensor([-3.0, -1, 0, 2])
    assert discriminator(real, generated).item() == 2 * (0 + 0 + 1 + 3) / 4
    real.requires_grad_()
    discriminator(real, generated).backward()
    assert real.grad.tolist() == [0, 0, -0.25, -0.25]
    assert generator(generated).item() == 0.5


def test_cross_entropy_is_that_of_probabilities():
    discriminator, generator = LOSSES["cross_entropy"]
    real, generated = torch.tensor([2.0, -1]), torch.tensor([0.5, -3])
    p, q = real.sigmoid(), generated.sigmoid()
    torch.testing.assert_close(discriminator(real, generated), -p.log().mean() - (1 - q).log().mean())
    torch.testing.assert_close(generator(generated), -q.log().mean())


def test_spectral_norm_makes_the_largest_singular_value_one():
    torch.manual_seed(0)
    discriminator = Discriminator(4).train()
    for module in (*discriminator.layers, discriminator.last):
        with torch.no_grad():
            module.parametrizations.weight.original.mul_(5)  # whatever an optimiser does to it
        for _ in range(50):
            weight = module.weight
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("modulated", [True, False])
def test_shapes_and_ranges(modulated):
    torch.manual_seed(0)
    images = Generator(8, 2, modulated)(torch.randn(3, 8))
    assert images.shape == (3, 3, 64, 64) and images.abs().max() <= 1
    assert Discriminator(2)(images).shape == (3,)


@torch.no_grad()
def test_modulation_is_an_affine_map_of_each_image_that_follows_its_latents():
    torch.manual_seed(0)
    ours, plain = Generator(8, 2), Generator(8, 2, modulated=False)
    for modulation in ours.modulations:
        modulation.weight.zero_()
        modulation.bias.normal_()
    ours.modulations[-1].weight.normal_()
    plain.load_state_dict(ours.state_dict(), strict=False)  # all but the affine maps
    z = torch.randn(5, 8)
    images = ours(z)
    for i, image in enumerate(images):
        for modulation, norm in zip(ours.modulations, plain.norms, strict=True):
            scale, shift = modulation(z[i]).chunk(2)
            norm.weight.copy_(1 + scale)
            norm.bias.copy_(shift)
        torch.testing.assert_close(plain(z)[i], image)
    assert torch.unique(images, dim=0).shape == images.shape


# --- Augmentation -------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [colour, translation, cutout])
def test_each_change_keeps_gradients_and_differs_among_images(change):
    torch.manual_seed(0)
    images = (torch.rand(1, 3, 32, 32) - 0.5).repeat(8, 1, 1, 1).requires_grad_()
    changed = change(images)
    assert changed.shape == images.shape and len(torch.unique(changed.detach(), dim=0)) > 4
    changed.sum().backward()
    assert (images.grad.flatten(1).abs().sum(dim=1) > 0).all() and images.grad.isfinite().all()


def test_translation_moves_by_whole_pixels_and_cutout_removes_a_square():
    torch.manual_seed(0)
    images = torch.rand(16, 1, 32, 32) + 1
    for image, moved in zip(images, translation(images)):
        shifts = [(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5)
                  if torch.equal(torch.nn.functional.pad(image, [4] * 4)[:, 4 + dy:36 + dy, 4 + dx:36 + dx], moved)]
        assert len(shifts) == 1
    removed = (cutout(images.repeat(20, 1, 1, 1)) == 0).flatten(1).sum(dim=1)
    assert removed.max() == 16 * 16 and 8 * 8 <= removed.min() < 16 * 8  # its centre is inside


def test_the_share_of_the_images_is_changed_by_one_law_for_the_whole_batch():
    """The same images in both halves of a batch come out with the same mean and spread, over many draws."""
    torch.manual_seed(0)
    augment = DiffAugment()
    images = (torch.rand(1, 3, 16, 16) - 0.5).repeat(2000, 1, 1, 1)
    assert torch.equal(augment(images), images)  # it begins with none
    augment.share.fill_(0.6)
    sides = augment(images).flatten(2).mean(dim=2).chunk(2)
    for statistic in (torch.mean, torch.std):
        first, second = (statistic(side, dim=0) for side in sides)
        # The standard error of a mean of 1,000 is a thirtieth of the spread.
        torch.testing.assert_close(first, second, rtol=0, atol=0.15 * sides[0].std().item())
    kept = (augment(images) == images).flatten(1).all(dim=1).float().mean()
    assert kept.item() == pytest.approx(0.4, abs=0.05)


def test_the_share_follows_the_discriminator():
    augment = DiffAugment()
    for _ in range(50):
        augment.adapt(torch.ones(100), images=10_000)
    assert augment.share.item() == pytest.approx(0.5)
    for _ in range(100):
        augment.adapt(torch.ones(100), images=10_000)
    assert augment.share.item() == pytest.approx(0.8)  # no more than that
    augment.adapt(torch.tensor([1.0, -1] * 50), images=10_000)
    assert augment.share.item() == pytest.approx(0.79)


# --- Training and what comes of it --------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 20 faces: discs of many colours."""
    folder = tmp_path_factory.mktemp("my faces")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    disc = ((y - 32) ** 2 + (x - 32) ** 2 < 600)[..., None]
    for number in range(1, 21):
        Image.fromarray((disc * rng.integers(100, 255, 3)).astype(np.uint8)).save(folder / f"{number:06d}.png")
    return folder


def tiny(data, output_dir, *more):
    return ["--data_dir", data, "--output_dir", output_dir, "--latents", 4, "--channels", 2, "--epochs", 2,
            "--batch_size", 8, "--warmup", 2, "--save_every", 2, "--device", "cpu", "--amp", "off", *more]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan") / "out"
    call(train, *tiny(data, folder))
    return folder


def test_training_resumes_bit_for_bit(data, trained, tmp_path):
    with interrupted():
        call(train, *tiny(data, tmp_path / "out"))
    call(train, *tiny(data, tmp_path / "out", "--resume"))
    assert assert_same_training(trained, tmp_path / "out")["step"] == 4
    assert (trained / "samples_000004.png").read_bytes() == (tmp_path / "out/samples_000004.png").read_bytes()


def test_real_and_generated_faces_are_augmented_together(data, tmp_path, monkeypatch):
    seen, forward = [], DiffAugment.forward

    def look(augment, images):
        seen.append(images.detach())
        return forward(augment, images)
    monkeypatch.setattr(DiffAugment, "forward", look)
    call(train, *tiny(data, tmp_path / "out", "--dry_run"))
    assert [len(images) for images in seen] == [16, 8] * 2  # the discriminator's step, then the generator's
    faces = read_faces([face_source(str(data))]).images
    known = as_input(torch.cat([faces, faces.flip(3)]))
    places = []
    for together, alone in zip(seen[::2], seen[1::2]):
        places += [(known == image).flatten(1).all(dim=1).nonzero().item() for image in together[:8]]
        assert torch.equal(together[8:], alone)
    assert {place // 20 for place in places} == {0, 1}  # some are mirrored


@pytest.mark.parametrize("flags, share", [([], 16e-5), (["--no_augment"], 0)])
def test_each_player_minimises_its_own_loss(data, tmp_path, monkeypatch, flags, share):
    """That the first half of the logits is the real faces' shows above. It is above 0 here, so more is augmented."""
    logits, losses, updates, forward, update = [], [], [], Discriminator.forward, training.update

    def look(discriminator, images):
        logits.append(forward(discriminator, images) + torch.where(torch.arange(len(images)) < 8, 10, -10))
        return logits[-1]

    def remember(loss):
        def remembered(*of):
            losses.append((of, loss(*of)))
            return losses[-1][1]
        return remembered

    def see(parts, loss, *args, **kwargs):
        updates.append((parts, loss))
        update(parts, loss, *args, **kwargs)
    monkeypatch.setattr(Discriminator, "forward", look)
    monkeypatch.setitem(LOSSES, "cross_entropy", tuple(map(remember, LOSSES["cross_entropy"])))
    monkeypatch.setattr(training, "update", see)
    call(train, *tiny(data, tmp_path / "out", "--dry_run", *flags))
    assert len(logits) == len(losses) == len(updates) == 4
    for i in 0, 2:
        (real, generated), (alone,) = losses[i][0], losses[i + 1][0]
        assert torch.equal(real, logits[i][:8]) and torch.equal(generated, logits[i][8:])
        assert torch.equal(alone, logits[i + 1])
    for (parts, loss), (_, returned), player in zip(updates, losses, [Discriminator, Generator] * 2):
        assert loss is returned and isinstance(parts.model, player)
        assert [group["betas"] for optimizer in parts.optimizers for group in optimizer.param_groups] == [(0.5, 0.99)]
    assert updates[0][0].model.augment.share.item() == pytest.approx(share)


def test_the_log_shows_whether_the_players_match(trained):
    lines = read_jsonl(trained / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert {"real_logit", "generated_logit", "accuracy", "discriminator_loss", "generator_loss", "augmented",
                "discriminator_gradient", "generator_gradient"} <= line.keys()
        assert 0 <= line["accuracy"] <= 1 and line["discriminator_gradient"] > 0 and line["generator_gradient"] > 0


def test_a_step_that_overflows_float16_leaves_the_mean_of_the_gradients_finite():
    network, means = torch.nn.Linear(2, 1), training.Means()
    for scale in (1.0, float("inf"), 3.0):
        network.weight.grad, network.bias.grad = scale * torch.ones(1, 2), torch.zeros(1)
        means.add(gradient=train.gradient_norm(network))
    assert means.pop()[0]["gradient"] == pytest.approx(2 * 2**0.5, rel=1e-4)  # of 1 and 3


def test_two_processes_train_together(data, tmp_path, train_together):
    assert "2 process(es), 2 steps" in train_together(("p5_gan.train", tiny(data, tmp_path / "out", "--epochs", 1)))


TOGETHER = """
import argparse, sys
sys.path.insert(0, {root!r})
import utils, torch, training
from p5_gan.augment import DiffAugment

def main():
    process = training._join(argparse.Namespace(device="cpu", amp="off"))
    augment = DiffAugment()
    augment.share.fill_(0.5)
    augment.adapt(torch.tensor([[3.0, 3.0, 3.0, -3.0], [3.0] * 4][process.rank]))  # mean signs 0.5 and 1
    sys.stdout.write(f"share {{augment.share:.5f}}\\n")

utils.run(main)  # as every script: Python's own shutdown may abort in Gloo's threads
"""


def test_two_processes_agree_on_the_share(tmp_path, torchrun):
    (tmp_path / "together.py").write_text(TOGETHER.format(root=str(ROOT)))
    done = torchrun(tmp_path / "together.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("share 0.50008") == 2  # alone, the first would go down; 8 images of 100,000 count


def test_the_study_trains_each_recipe_with_its_flags_and_keeps_other_rows(data, trained, tmp_path, monkeypatch,
                                                                                capsys):
    commands = []

    def run(command):
        commands.append(command[2:])
        shutil.copytree(trained, command[command.index("--output_dir") + 1], dirs_exist_ok=True)
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(subprocess, "run", run)
    flags = ["--data_dir", data, "--output_dir", tmp_path / "out", "--count", 2]
    with monkeypatch.context() as patch, pytest.raises(UserError, match="must hold training faces and validation"):
        patch.setattr(face_grader, "require_judges", lambda identity: None)
        call(studies, *flags)
    assert not commands
    monkeypatch.setattr(studies, "Judge", lambda sources: lambda images: (dict.fromkeys(studies.MEASURES, 0.5), {}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.csv").write_text("recipe,checkpoint,count\nmine,,7\n")
    call(studies, *flags, "--recipes", "public", "hinge")
    call(studies, *flags)
    assert "\n| mine |  | 7 |" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out/results.csv")
    assert table.recipe.tolist() == ["mine", *studies.RECIPES]
    seconds = round(sum(row["seconds"] for row in read_jsonl(trained / "metrics.jsonl")))
    assert table.iloc[1][["count", "seconds", "steps", "images"]].tolist() == [2, seconds, 4, 4 * 8]
    resumed = [command[:-1] for command in commands[2:] if command[-1] == "--resume"]
    assert resumed == commands[:2]  # with the same flags, or train.py would refuse


def test_an_interrupted_study_keeps_the_rows_it_has(data, trained, tmp_path, monkeypatch):
    def run(command):
        if "--ema" in command:
            raise KeyboardInterrupt
        shutil.copytree(trained, command[command.index("--output_dir") + 1])
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(studies, "Judge", lambda sources: lambda images: (dict.fromkeys(studies.MEASURES, 0.5), {}))
    with pytest.raises(KeyboardInterrupt):
        call(studies, "--data_dir", data, "--output_dir", tmp_path, "--output", tmp_path / "new/rows.csv", "--count", 2,
             "--recipes", "ours", "short", "public")
    assert pd.read_csv(tmp_path / "new/rows.csv").recipe.tolist() == ["ours", "short"]


def test_a_part_is_studied_by_one_change(monkeypatch):
    def flags(name):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data_dir", "faces", *studies.RECIPES[name]])
        return training.recipe(train.parse_args())
    changed = {name: {flag for flag, value in flags(name).items() if value != flags("ours")[flag]}
               for name in studies.RECIPES}
    assert changed["ours"] == set() and changed["short"] == {"epochs"}
    assert changed["short_no_modulation"] == {"epochs", "no_modulation"}
    assert changed["short_hinge"] == {"epochs", "loss"}
    public = {"no_modulation", "no_augment", "ema", "channels", "batch_size", "epochs"}
    assert changed["public"] == changed["public_as_long"] == public
    assert changed["hinge"] == {"no_modulation", "loss", "channels", "batch_size", "lr", "epochs"}


def test_both_players_learn_and_the_average_follows(data, trained, tmp_path):
    saved = torch.load(trained / "last.pt", weights_only=True)
    torch.manual_seed(0)
    training.seed_all(0)
    start = Generator(4, 2).state_dict(), Discriminator(2).state_dict()
    for before, after in zip(start, (saved["model"], saved["discriminator"]["model"])):
        assert before.keys() == after.keys()
        weights = [name for name in before if name.endswith(("weight", "original"))]
        assert weights and all(not torch.equal(before[name], after[name]) for name in weights)
    assert any(not torch.equal(saved["model"][name], value) for name, value in saved["ema"].items())
    model = load_model(trained / "model.pt")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, saved["ema"][name], rtol=1e-3, atol=1e-4)  # half precision


def test_other_recipes_and_a_dry_run(data, tmp_path, capsys):
    flags = ["--loss", "hinge", "--no_augment", "--no_modulation", "--ema", 0, "--epochs", 1]
    call(train, *tiny(data, tmp_path / "out", *flags))
    saved = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert all(torch.equal(saved["model"][name], value) for name, value in saved["ema"].items())
    assert saved["discriminator"]["model"]["augment.share"] == 0
    call(train, *tiny(data, tmp_path / "dry", "--dry_run"))
    assert "dry run: two steps" in capsys.readouterr().out and not (tmp_path / "dry").exists()


@pytest.mark.parametrize("flags, message", [
    (["--data_dir", "nowhere"], "neither a folder nor a zip"), (["--batch_size", 21], "larger than the 20"),
    (["--resume"], "start without --resume"), (["--output_dir", __file__], "is a file"),
    (["--optimizer", "muon"], "no matrix to train here")])
def test_bad_training_flags_get_a_sentence(data, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        call(train, *tiny(data, tmp_path / "out", *flags))


def test_same_seed_same_bytes_and_a_face_is_its_own(trained, tmp_path, capsys):
    for name, flags in {"a": [], "b": [], "c": ["--seed", 1]}.items():
        call(inference, tmp_path / name, "--count", 6, "--grid", tmp_path / f"new/{name}.png",
             "--checkpoint", trained / "model.pt", "--device", "cpu", *flags)
    bytes_of = {name: [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "abc"}
    assert len(bytes_of["a"]) == 6 and bytes_of["a"] == bytes_of["b"]
    assert (tmp_path / "new/a.png").read_bytes() == (tmp_path / "new/b.png").read_bytes()
    assert all(x != y for x, y in zip(bytes_of["a"], bytes_of["c"]))
    assert "other images" not in capsys.readouterr().err
    call(inference, tmp_path / "b", "--count", 4, "--checkpoint", trained / "model.pt", "--device", "cpu")
    assert "stay: 2, the first 0004.png" in capsys.readouterr().err
    model = load_model(trained / "model.pt")
    with torch.no_grad():
        alone = (model(randn(image_generators(0, [4]), (4,)))[0] + 1) * 127.5
    assert np.abs(alone.permute(1, 2, 0).numpy() - np.asarray(Image.open(tmp_path / "a/0004.png"))).max() <= 1


def test_other_models_faces_are_judged_and_recorded(data, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "Judge", lambda sources, identity: lambda images: (
        dict(face_rate=images.float().mean().item() / 255, kid=0.1, nearest=9.0),
        dict(face_rate=len(images) / 100, kid=0.0, nearest=1.0)))
    flags = ["--data_dir", data, "--checkpoint", trained / "model.pt", "--device", "cpu", "--count", 30]
    call(evaluate, *flags, "--others", data, "--others_checkpoints", trained / "last.pt", "--output",
         tmp_path / "new/faces.csv")
    table = pd.read_csv(tmp_path / "new/faces.csv", dtype=dict(checkpoint=str))
    assert table.name.tolist() == ["gan", data.name, "real", "real"] and table["count"].tolist() == [30, 20, 30, 20]
    assert table.checkpoint.fillna("").tolist() == [digest_of(trained / "model.pt"),
                                                      digest_of(trained / "last.pt"), "", ""]
    pictures = np.stack([np.asarray(Image.open(path)) for path in data.iterdir()])
    assert table.face_rate[1] == pytest.approx(pictures.mean() / 255, abs=1e-3) and table.face_rate[3] == 0.2
    assert f"{data.name}, 20 images" in capsys.readouterr().out
    call(evaluate, *flags, "--output", tmp_path / "new/faces.csv")
    assert pd.read_csv(tmp_path / "new/faces.csv").name.tolist() == [data.name, "gan", "real"]
    (tmp_path / "real").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "real" / name).write_bytes((data / "000001.png").read_bytes())
    with pytest.raises(UserError, match="named as another set of faces is, real"):
        call(evaluate, *flags, "--others", tmp_path / "real")
    monkeypatch.chdir(data)
    call(evaluate, *flags, "--others", ".", "--output", tmp_path / "new/faces.csv")  # is named as well
    assert pd.read_csv(tmp_path / "new/faces.csv").name.tolist()[1] == data.name
    for paths, message in (["a.pt", "b.pt"], "1 folders and --others_checkpoints 2"), (["a.pt"], "no checkpoint a.pt"):
        with pytest.raises(UserError, match=message):
            call(evaluate, *flags, "--others", data, "--others_checkpoints", *paths)


def test_the_committed_results_are_those_of_the_committed_checkpoint():
    folder = ROOT / "p5_gan/checkpoints"
    for name, key, shipped in ("results.csv", "recipe", "ours"), ("faces.csv", "name", "gan"):
        rows = pd.read_csv(folder / name, dtype=dict(checkpoint=str)).set_index(key)
        assert rows.checkpoint[shipped] == digest_of(folder / "gan.pt")
    others = {name: digest_of(ROOT / checkpoint) for name, checkpoint in dict(
        vae_normal="p4_vae/checkpoints/vae.pt", vae_fitted="p4_vae/checkpoints/vae.pt",
        ddim="p2_ddim/checkpoints/face64.pt", ddpm="p2_ddim/checkpoints/face64.pt").items()}
    assert rows.checkpoint.drop(["gan", "real"]).to_dict() == others and "real" in rows.index


def test_the_committed_checkpoint_draws_a_face():
    image = inference.generate(load_model(CHECKPOINT), [0], seed=0)
    assert image.shape == (1, 3, 64, 64) and image.float().std() > 20


def test_memory_that_runs_out_halves_the_batch_and_nan_is_told(trained, monkeypatch, capsys):
    model = load_model(trained / "model.pt")
    whole, forward = inference.generate(model, range(9), seed=0), model.forward

    def in_little_memory(z):
        if len(z) > 4:
            raise RuntimeError("CUDA out of memory.")
        return forward(z)
    monkeypatch.setattr(model, "forward", in_little_memory)
    # Rounded to grey levels, batches of other sizes may differ by one.
    assert (inference.generate(model, range(9), seed=0).int() - whole.int()).abs().max() <= 1
    assert capsys.readouterr().err.count("out of memory: going on with batches of 4") == 1
    monkeypatch.setattr(model, "forward", lambda z: torch.full((len(z), 3, 64, 64), float("nan")))
    with pytest.raises(UserError, match="face 7 comes out as NaN"):
        inference.generate(model, [7], seed=0)


def test_weights_with_nan_are_refused(trained, tmp_path):
    content = torch.load(trained / "model.pt", weights_only=True)
    content["ema"]["first.0.weight"].fill_(float("nan"))
    torch.save(content, tmp_path / "nan.pt")
    with pytest.raises(UserError, match="hold NaN"):
        load_model(tmp_path / "nan.pt")


def test_the_wrapper_writes_a_grid(trained, tmp_path):
    wrapper = ROOT / "assignments/dlcv2020_hw3/hw3_p2.sh"
    done = subprocess.run(["bash", wrapper, "a dir/out.jpg", "--checkpoint", trained / "model.pt"], cwd=tmp_path,
                          env=ENVIRONMENT, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0 and done.stdout == "32 images in a dir/out.jpg\n", done.stderr
    with Image.open(tmp_path / "a dir/out.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (8 * 66 + 2, 4 * 66 + 2)
    for name, count, message in (("out.txt", 32, "must end in .png or .jpg"), ("out.jpg", 9000, "no room for 1125")):
        with pytest.raises(UserError, match=message):
            call(inference, "--grid", name, "--count", count)
