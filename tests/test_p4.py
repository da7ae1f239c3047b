"""Faces by a variational autoencoder, and the reading of face sets. Tiny networks, made-up faces, no data set."""

import json
import re
import shutil
import subprocess
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import faces
from conftest import ENVIRONMENT, ROOT, assert_same_training, call, interrupted
from face_grader import cut_grid
from faces import face_source, read_attributes, read_faces, split_faces
from files import digest_of, read_jsonl
from p4_vae import evaluate, inference, studies, train
from p4_vae.elbo import D, automatic_beta, kl_divergence, squared_errors
from p4_vae.latents import attribute_directions, encode_all, fit_mixture, sample_prior
from p4_vae.model import CHECKPOINT, VAE, load_model
from utils import UserError, image_generators

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- Reading ------------------------------------------------------------------------------------

def test_sets_have_their_crops_numbers_and_split(tmp_path):
    tall = np.zeros((109, 89, 3), np.uint8)
    tall[10:99] = 200  # the 89 rows that stay
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in (7, 8001, 9000):
            Image.fromarray(tall).save(tmp_path / "face.png")
            archive.write(tmp_path / "face.png", f"img/{number:06d}.png")
    squashed = np.full((64, 64, 3), 9, np.uint8)
    squashed[6:58] = np.arange(64)[:, None] * 3  # a grey level for each column
    (tmp_path / "b").mkdir()
    for number in (7, 9001):
        Image.fromarray(squashed).save(tmp_path / f"b/{number:06d}.png")
    sources = [face_source(str(tmp_path / "a.zip")), face_source(f"{tmp_path}/b:6-58")]
    assert str(sources[1]) == f"{tmp_path}/b:6-58"
    all_faces = read_faces(sources)
    assert all_faces.numbers.tolist() == [7, 8001, 9000, 9001]  # the 7 of the first source
    # But for the margin, where the filter sees a little of what is cut off.
    assert (all_faces.images[:3, :, 4:-4] == 200).all() and (all_faces.images[:3] > 180).all()
    expected = torch.arange(64, dtype=torch.uint8).expand(3, 56, 64) * 3
    assert torch.equal(all_faces.images[3, :, 4:-4], expected)
    for part, numbers in zip(split_faces(all_faces), ([7, 9001], [8001, 9000])):
        assert part.numbers.tolist() == numbers and len(part.images) == 2
    draws = [all_faces.draw(3, seed) for seed in (*range(9), 0)]
    assert torch.equal(draws[0].images, draws[-1].images) and len({tuple(d.numbers.tolist()) for d in draws}) > 2
    for drawn in draws:  # all different, in their order, each with its number
        places = [all_faces.numbers.tolist().index(number) for number in drawn.numbers.tolist()]
        assert places == sorted(set(places)) and torch.equal(drawn.images, all_faces.images[places])
    assert faces.faces_to_test(sources).numbers.tolist() == [8001, 9000]
    assert faces.faces_to_test(sources[1:]).numbers.tolist() == [7, 9001]  # no validation faces: all of them
    with pytest.raises(UserError, match="64 rows"):
        read_faces([face_source(f"{tmp_path}/b:6-65")])
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        read_faces([face_source("nowhere:6-58")])
    (tmp_path / "b/me.png").write_bytes((tmp_path / "b/000007.png").read_bytes())
    with pytest.raises(UserError, match="me.png .* no number"):
        read_faces(sources)


def test_attributes_of_celeba_and_of_the_course(tmp_path):
    (tmp_path / "list.txt").write_text("2\nMale Smiling\n000001.jpg -1  1\n000002.jpg  1 -1\n")
    (tmp_path / "train.csv").write_text("image_name,Male,Smiling\n00001.png,0.0,1.0\n00002.png,1.0,0.0\n")
    for name in ("list.txt", "train.csv"):
        table = read_attributes(tmp_path / name)
        assert table.loc[1].to_dict() == dict(Male=False, Smiling=True)
        assert table.loc[2].to_dict() == dict(Male=True, Smiling=False)
    (tmp_path / "bad.csv").write_text("image_name,Male\n00001.png,7\n")
    for name, message in (("bad.csv", "other than"), ("absent.csv", "cannot read the attributes")):
        with pytest.raises(UserError, match=message):
            read_attributes(tmp_path / name)


# --- The loss -----------------------------------------------------------------------------------

def test_kl_is_that_of_torch_distributions_and_its_closed_form():
    mean, log_variance = torch.randn(2, 5, 8, generator=generator())
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(dim=1)
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)
    assert kl_divergence(torch.zeros(1, 8), torch.zeros(1, 8)).item() == 0
    assert kl_divergence(torch.full((1, 8), 2.0), torch.zeros(1, 8)).item() == pytest.approx(8 * 2)  # mu^2 / 2


def test_automatic_beta_gives_the_gradient_of_sigma_vae():
    """Rybkin et al. 2021: D / 2 log MSE + KL, the negative ELBO at the best variance, up to a factor 2 MSE / D."""
    x, shift = torch.rand(2, 4, 3, 64, 64, generator=generator())
    scale = torch.tensor(0.1, requires_grad=True)

    def parts():
        mse = squared_errors(x + scale * shift, x)
        return mse, kl_divergence(scale * shift[:, 0, 0], scale * shift[:, 1, 0])
    mse, kl = parts()
    beta = automatic_beta(mse)
    assert beta.item() == pytest.approx(2 * mse.mean().item() / D) and not beta.requires_grad
    ours, = torch.autograd.grad((mse + beta * kl).mean(), scale)
    mse, kl = parts()
    theirs, = torch.autograd.grad(D / 2 * mse.mean().log() + kl.mean(), scale)
    torch.testing.assert_close(ours, theirs * beta, rtol=1e-4, atol=0)  # float32 sums of 12,288 numbers


def test_the_gradient_passes_through_the_sample():
    """d/dmean f(mean + std noise) = f', d/dlog_variance = f' std noise / 2 (Kingma & Welling 2014)."""
    torch.manual_seed(0)
    model = VAE(4, 2)
    statistics = torch.randn(2, 3, 4, requires_grad=True)
    model.encode = lambda x: statistics
    model.decode = lambda z: z ** 3
    noise = torch.randn(3, 4)
    gradient, = torch.autograd.grad(model(None, noise)[0].sum(), statistics)
    std = (statistics[1] / 2).exp()
    slope = 3 * (statistics[0] + std * noise) ** 2
    torch.testing.assert_close(gradient, torch.stack([slope, slope * std * noise / 2]))


# --- The network --------------------------------------------------------------------------------

def face_like(count, seed=0):
    """uint8 (count, 3, 64, 64): mixtures of six smooth patterns, so that six latents hold them."""
    patterns = torch.nn.functional.interpolate(torch.rand(6, 3, 8, 8, generator=generator(1)), size=(64, 64),
                                               mode="bilinear", align_corners=False)
    weights = torch.rand(count, 6, generator=generator(seed)) / 3
    return (torch.einsum("nk,kchw->nchw", weights, patterns) * 255).to(torch.uint8)


def fitted():
    """(a small VAE that starts from the eigenfaces of face-like images, these images in [0, 1])."""
    torch.manual_seed(0)
    images = face_like(200)
    model = VAE(5, 2)
    model.set_eigenfaces(images)
    return model, images.float() / 255


@torch.no_grad()
def test_a_network_starts_as_probabilistic_pca():
    model, x = fitted()
    mean, log_variance = model.encode(x)
    torch.testing.assert_close(mean.mean(dim=0), torch.zeros(5), rtol=0, atol=1e-3)
    torch.testing.assert_close(mean.T @ mean / len(x), torch.eye(5), rtol=0, atol=1e-2)  # N - 1 or N, and rounding
    flat = torch.nn.functional.avg_pool2d(x, 2).flatten(1)
    left = (flat - flat.mean(dim=0)).svd().S[5:].square().sum() / flat.numel()
    low = torch.nn.functional.avg_pool2d(model.decode(mean), 2).flatten(1)
    assert (low - flat).square().mean().item() == pytest.approx(left.item(), rel=0.5)  # and what the resizing smooths
    assert (log_variance == log_variance[0]).all() and (log_variance < 0).all()
    assert (model.decode(mean) - x).square().mean() < 0.1 * x.var(dim=0).mean()
    assert model.decode(torch.zeros(2, 5)).shape == (2, 3, 64, 64)


@torch.no_grad()
def test_bfloat16_moves_a_mean_by_less_than_its_posteriors_deviation():
    """The surest latents' deviations are a few thousandths, and bfloat16 has eight bits."""
    model, x = fitted()
    mean, log_variance = model.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, _ = model.encode(x)
        decoded = model.decode(mean)
    assert ((low - mean).abs() < 0.01 * (log_variance / 2).exp()).all()
    torch.testing.assert_close(decoded, model.decode(mean), rtol=0, atol=1e-5)


def test_no_encoder_makes_the_variance_larger_than_the_priors():
    """Nor stops it from coming back: a bound that cuts off would pass no gradient beyond it."""
    torch.manual_seed(0)
    model = VAE(4, 2)
    with torch.no_grad():
        model.encoder[-1].bias.copy_(torch.tensor([0.0] * 4 + [-20, -1, 1, 1000]))
    _, log_variance = model.encode(torch.rand(1, 3, 64, 64))
    assert (log_variance <= 0).all() and log_variance.isfinite().all() and log_variance[0, 3] == -1000
    log_variance[0, 1:].sum().backward()
    assert (model.encoder[-1].bias.grad[5:] < -0.2).all()


def test_a_wild_batch_is_clipped_and_a_usual_one_is_not():
    """Muon and Adam move by the same amount along small and large gradients, so one wild batch among the others steers
    them for dozens of steps unless it is clipped to about the others' size."""
    torch.manual_seed(0)
    images = face_like(200)
    model = VAE(5, 2)
    model.set_eigenfaces(images)

    def gradient_norm(x):
        decoded, mean, log_variance = model(x, torch.randn(len(x), 5))
        mse = squared_errors(decoded, x)
        loss = (mse + automatic_beta(mse) * kl_divergence(mean, log_variance)).mean()
        return torch.stack([g.norm() for g in torch.autograd.grad(loss, list(model.parameters()))
                            ]).norm().item()
    usual = images[:32].float() / 255
    assert gradient_norm(usual) < train.CLIP < gradient_norm(10 * usual)


def test_the_fitted_prior_has_the_latents_means_and_covariances():
    rng = np.random.default_rng(0)
    mix = np.array([[2.0, 0], [1, 0.5]])
    z = torch.tensor(np.where(rng.random((4000, 1)) < 0.25, 5, -5) + rng.standard_normal((4000, 2)) @ mix.T)
    mixture = fit_mixture(z, components=2)
    same = fit_mixture(z, components=2, seed=2**32)  # scikit-learn's seeds end below
    assert all(torch.equal(value, same[name]) for name, value in mixture.items())
    order = mixture["means"][:, 0].argsort()
    # Standard errors of 1,000 samples are about a thirtieth of what is estimated.
    np.testing.assert_allclose(mixture["weights"][order], [0.75, 0.25], atol=0.03)
    np.testing.assert_allclose(mixture["means"][order], [[-5, -5], [5, 5]], atol=0.3)
    for factor in mixture["factors"]:
        np.testing.assert_allclose(factor @ factor.T, mix @ mix.T, atol=0.6)
    samples = sample_prior(2, image_generators(0, range(2000)), mixture)
    np.testing.assert_allclose(samples.mean(dim=0), z.mean(dim=0), atol=0.4)
    np.testing.assert_allclose(np.cov(samples.T), np.cov(z.T), rtol=0.1, atol=0.5)
    again = sample_prior(2, image_generators(0, [7]), mixture)
    assert torch.equal(again, samples[7:8])  # an image's latent is its own
    normal = sample_prior(3, image_generators(0, range(2000)))
    assert normal.shape == (2000, 3) and abs(normal.std() - 1) < 0.05


def test_attribute_directions_are_differences_of_means(tmp_path):
    (tmp_path / "list.txt").write_text("2\nA B\n000001.jpg 1 1\n000002.jpg 1 1\n000003.jpg -1 1\n")
    means = torch.tensor([[1.0, 0], [3, 0], [0, 1], [9, 9]])  # nothing is known of the last
    directions = attribute_directions(means, torch.tensor([1, 2, 3, 4]), read_attributes(tmp_path / "list.txt"))
    assert directions.keys() == {"A"}  # all have B: that tells no direction
    assert directions["A"].tolist() == [2, -1]


# --- Training and what comes of it --------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 20 training and 4 validation faces, and their attributes."""
    folder = tmp_path_factory.mktemp("my faces")
    numbers = [*range(1, 21), *range(8001, 8005)]
    for number, image in zip(numbers, face_like(24)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:06d}.png")
    lines = [f"{number:06d}.jpg {1 if number % 2 else -1} {1 if number % 3 else -1}" for number in numbers]
    (folder.parent / "list.txt").write_text("\n".join(["24", "Smiling Male", *lines]))
    return folder


def tiny(data, output_dir, *more):
    return ["--data_dir", data, "--output_dir", output_dir, "--attributes", data.parent / "list.txt", "--latents", 4,
            "--channels", 2, "--epochs", 2, "--batch_size", 8, "--warmup", 2, "--save_every", 2, "--device", "cpu",
            "--amp", "off", *more]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "out"
    call(train, *tiny(data, folder))
    return folder


def test_faces_that_are_all_the_same_are_refused():
    with pytest.raises(UserError, match="--latents 4 are too many: too few of the training faces differ"):
        VAE(latents=4, channels=2).set_eigenfaces(face_like(3).repeat(5, 1, 1, 1))


def test_training_resumes_bit_for_bit(data, trained, tmp_path):
    with interrupted():
        call(train, *tiny(data, tmp_path / "out"))
    with pytest.raises(UserError, match="same flags"):
        call(train, *tiny(data, tmp_path / "out", "--resume", "--beta", "1e-5"))
    named = tiny(data, tmp_path / "out", "--resume")
    with pytest.raises(UserError, match="was trained with --attributes"):
        call(train, *[flag for flag in named if flag not in ("--attributes", data.parent / "list.txt")])
    call(train, *named)
    assert_same_training(trained, tmp_path / "out")
    assert (trained / "samples_000004.png").read_bytes() == (tmp_path / "out/samples_000004.png").read_bytes()
    lines = read_jsonl(trained / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["sigma2"] == pytest.approx(line["mse"], rel=0.01) for line in lines)


def test_training_sees_faces_and_their_mirror_images(data, tmp_path, monkeypatch):
    seen, forward = [], VAE.forward
    monkeypatch.setattr(VAE, "forward", lambda model, x, noise: seen.extend(x) or forward(model, x, noise))
    call(train, *tiny(data, tmp_path / "out", "--dry_run"))
    known = read_faces([face_source(str(data))]).images / 255
    known = torch.cat([known[:20], known[:20].flip(3)])
    places = [(known == image).flatten(1).all(dim=1).nonzero().item() for image in seen]
    assert len({place % 20 for place in places}) == 16 and {place // 20 for place in places} == {0, 1}


def test_two_processes_train_together(data, tmp_path, train_together):
    assert "2 process(es), 2 steps" in train_together(("p4_vae.train", tiny(data, tmp_path / "out", "--epochs", 1)),
                                                      tensors="state_dict().values")


def test_a_fixed_beta_and_a_dry_run(data, tmp_path, capsys):
    call(train, *tiny(data, tmp_path / "out", "--beta", "1e-5", "--epochs", 1))
    line = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert line["sigma2"] == pytest.approx(0.0614, rel=0.01)  # the course's weight: a variance of 1e-5 D / 2
    kl = []
    for weight in 0, 1:
        call(train, *tiny(data, tmp_path / f"{weight}", "--beta", weight, "--epochs", 5, "--lr", 0.02))
        kl.append(read_jsonl(tmp_path / f"{weight}/metrics.jsonl")[-1]["kl"])
    assert kl[1] < kl[0] / 2
    call(train, *tiny(data, tmp_path / "dry", "--dry_run"))
    assert "dry run: two steps" in capsys.readouterr().out and not (tmp_path / "dry").exists()


@pytest.mark.parametrize("flags, message", [
    (["--data_dir", "nowhere"], "neither a folder nor a zip"),
    (["--latents", 19], "19 are too many for 20 training faces"),
    (["--attributes", "nowhere"], "cannot read the attributes"), (["--batch_size", 21], "larger than the 20"),
    (["--attributes", "others.txt"], "others.txt knows none of the training faces"),
    (["--attributes", "twice.txt"], "twice.txt tells of face 1 twice")])
def test_bad_training_flags_get_a_sentence(data, tmp_path, monkeypatch, flags, message):
    (tmp_path / "others.txt").write_text("1\nMale\n7777.jpg 1\n")
    (tmp_path / "twice.txt").write_text("2\nMale\n0001.jpg 1\n1.png -1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call(train, *tiny(data, tmp_path / "out", *flags))


def test_the_study_keeps_rows_of_other_betas_and_tells_mistakes_before_it_trains(data, trained, tmp_path, monkeypatch,
                                                                               capsys):
    def run(command):
        shutil.copytree(trained, command[command.index("--output_dir") + 1], dirs_exist_ok=True)
        return subprocess.CompletedProcess(command, 0)

    def judge(images):
        return dict(face_rate=0.5, kid=images.float().mean().item() / 255), {}
    judge.validation = faces.faces_to_test([face_source(str(data))])
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(studies, "Judge", lambda sources, identity: judge)
    flags = ["--data_dir", data, "--attributes", data.parent / "list.txt", "--output", tmp_path / "results.csv",
             "--output_dir", tmp_path / "out", "--count", 3]
    call(studies, *flags, "--betas", "1e-5", "auto")
    call(studies, *flags, "--betas", "auto", "1e-7", "--figures", tmp_path / "figures")
    table = pd.read_csv(tmp_path / "results.csv", dtype=dict(beta=str))
    assert table.beta.tolist() == ["1e-5"] * 2 + ["auto"] * 2 + ["1e-7"] * 2
    model, latents = load_model(trained / "model.pt")
    mse, kl = evaluate.evaluate(model, judge.validation.images)
    for (_, row), mixture in zip(table[:2].iterrows(), (None, latents["mixture"])):
        mean = inference.generate(model, range(3), 0, mixture).float().mean().item() / 255
        assert row.prior == ("fitted" if mixture else "normal")
        assert row[["mse", "kid", "kl"]].tolist() == [round(mse, 4), round(mean, 5), round(kl, 1)]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"curves.svg", "tsne.svg"}
    assert "not Male" in (tmp_path / "figures/tsne.svg").read_text()
    (tmp_path / "few.txt").write_text("1\nSmiling Male\n008001.jpg 1 1\n")
    monkeypatch.setattr(subprocess, "run", None)
    for more, message in ((["--attributes", tmp_path / "few.txt"], "the attributes hold no 8002"),
                          (["--output", tmp_path / "few.txt"], "is no table with a column beta"),
                          (["--betas", "foo"], "foo is neither auto nor a number")):
        with pytest.raises((UserError, SystemExit)) as error:
            call(studies, *flags, *more)
        assert message in f"{error.value} {capsys.readouterr().err}"


def test_checkpoint_holds_the_average_and_what_it_belongs_to(trained):
    model, latents = load_model(trained / "model.pt")
    ema = torch.load(trained / "last.pt", weights_only=True)["ema"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, ema[name], rtol=1e-3, atol=1e-4)  # half precision
    assert torch.equal(model.basis, ema["basis"]) and latents["attributes"].keys() == {"Smiling", "Male"}


def test_same_seed_same_bytes_and_a_face_is_its_own(trained, tmp_path):
    checkpoint = ("--checkpoint", trained / "model.pt", "--device", "cpu")
    for name, flags in {"a": [], "b": [], "c": ["--seed", 1], "d": ["--prior", "fitted"]}.items():
        call(inference, tmp_path / name, "--count", 6, "--grid", tmp_path / f"new/{name}.png", *checkpoint, *flags)
    bytes_of = {name: [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "abcd"}
    assert len(bytes_of["a"]) == 6 and bytes_of["a"] == bytes_of["b"]
    assert (tmp_path / "new/a.png").read_bytes() == (tmp_path / "new/b.png").read_bytes()
    assert all(x != y for other in "cd" for x, y in zip(bytes_of["a"], bytes_of[other]))
    model, _ = load_model(trained / "model.pt")
    alone = inference.generate(model, [4], seed=0)[0].permute(1, 2, 0).numpy()
    together = np.asarray(Image.open(tmp_path / "a/0004.png"))
    assert np.abs(alone.astype(int) - together).max() <= 1


def test_faces_are_reconstructed_changed_and_walked_between(data, trained, tmp_path, capsys):
    checkpoint = ("--checkpoint", trained / "model.pt", "--device", "cpu")
    call(inference, "--grid", tmp_path / "r.png", "--reconstruct", data, "--count", 3, "--attribute", "Smiling",
         *checkpoint)
    printed = capsys.readouterr().out
    assert printed.count("mse = ") == 3 and "face 008001: mse = 0." in printed  # of four, by seed 0
    picture = np.asarray(Image.open(tmp_path / "r.png"))
    assert picture.shape == (3 * 66 + 2, 3 * 66 + 2, 3)  # rows: faces, reconstructions, smiles
    assert np.array_equal(picture[2:66, 2:66], np.asarray(Image.open(data / "008001.png")))
    model, latents = load_model(trained / "model.pt")
    drawn = faces.faces_to_test([face_source(str(data))]).draw(3, seed=0).images
    with torch.no_grad():
        mean, _ = model.encode(drawn.float() / 255)
        for row, shift in ((1, 0), (2, 1.5 * latents["attributes"]["Smiling"])):
            shown = cut_grid(Image.fromarray(picture))[3 * row:3 * row + 3]
            assert (shown - model.decode(mean + shift).clamp(0, 1) * 255).abs().max() <= 1
    call(inference, "--grid", tmp_path / "s.png", "--reconstruct", data, "--count", 3, "--seed", 2, *checkpoint)
    assert re.findall("face .+:", capsys.readouterr().out) != re.findall("face .+:", printed)
    call(inference, tmp_path / "walk", "--walk", data, *checkpoint)
    images = read_faces([face_source(str(data))]).take([20, 21]).images
    (ends,), errors = inference.reconstruct(model, images)
    for name, end in (("0000.png", ends[0]), ("0007.png", ends[1])):
        image = np.asarray(Image.open(tmp_path / "walk" / name)).astype(int)
        assert np.abs(image - end.permute(1, 2, 0).numpy()).max() <= 1
    expected = ((ends.float() - images.float()) / 255).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(errors, expected, rtol=0.02, atol=1e-5)  # the images are rounded to grey levels


def test_evaluation_prints_the_error_of_validation_faces(data, trained, capsys):
    with pytest.raises(SystemExit) as end:
        call(evaluate, data, "--checkpoint", trained / "model.pt", "--device", "cpu")
    assert end.value.code == 0
    model, _ = load_model(trained / "model.pt")
    _, errors = inference.reconstruct(model, faces.faces_to_test([face_source(str(data))]).images)
    with torch.no_grad():
        kl = kl_divergence(*model.encode(faces.faces_to_test([face_source(str(data))]).images.float() / 255)).mean()
    assert len(errors) == 4
    assert capsys.readouterr().out == f"mse = {errors.mean():.4f} (4 faces; KL {kl:.1f} nats)\n"
    with pytest.raises(SystemExit) as end:
        call(evaluate, data, "--checkpoint", trained / "model.pt", "--baseline", "1e-9")
    assert end.value.code == 1


def test_memory_that_runs_out_halves_the_batch_and_nan_is_told(monkeypatch, capsys):
    model, x = fitted()
    images = (x * 255).to(torch.uint8)[:9]
    whole = inference.reconstruct(model, images, [torch.ones(5)]), encode_all(model, images)
    encode = model.encode

    def in_little_memory(x):
        if len(x) > 4:
            raise RuntimeError("CUDA out of memory.")
        return encode(x)
    monkeypatch.setattr(model, "encode", in_little_memory)
    again = inference.reconstruct(model, images, [torch.ones(5)]), encode_all(model, images)
    assert capsys.readouterr().err.count("out of memory: going on with batches of 4") == 2
    for ours, theirs in zip(whole[0] + whole[1], again[0] + again[1]):
        torch.testing.assert_close(ours, theirs)
    monkeypatch.setattr(model, "decode", lambda z: torch.full((len(z), 3, 64, 64), float("nan")))
    for call_it in (lambda: inference.reconstruct(model, images), lambda: inference.walk(model, images[:2]),
                    lambda: inference.generate(model, [7], seed=0)):
        with pytest.raises(UserError, match="comes out as NaN"):
            call_it()


# --- The wrapper --------------------------------------------------------------------------------

def test_the_wrapper_writes_a_grid(trained, tmp_path):
    (tmp_path / "link.sh").symlink_to(ROOT / "assignments/dlcv2020_hw3/hw3_p1.sh")
    done = subprocess.run(["bash", "link.sh", "a dir/out.png", "--checkpoint", trained / "model.pt"], cwd=tmp_path,
                          env=ENVIRONMENT, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0 and done.stdout == "32 images in a dir/out.png\n", done.stderr
    assert Image.open(tmp_path / "a dir/out.png").size == (8 * 66 + 2, 4 * 66 + 2)


def test_a_grid_is_what_its_suffix_says(trained, tmp_path):
    call(inference, "--grid", tmp_path / "a.JPG", "--checkpoint", trained / "model.pt", "--count", 9)
    with Image.open(tmp_path / "a.JPG") as picture:
        assert picture.format == "JPEG" and picture.size == (8 * 66 + 2, 2 * 66 + 2)


def test_the_committed_results_are_those_of_the_committed_checkpoint():
    folder = ROOT / "p4_vae/checkpoints"
    rows = pd.read_csv(folder / "results.csv", dtype=str)
    assert set(rows[rows.beta == "auto"].checkpoint) == {digest_of(folder / "vae.pt")}


def test_the_committed_checkpoint_draws_faces_and_knows_them_again():
    model, latents = load_model(CHECKPOINT)
    assert latents.keys() == {"mixture", "attributes"}
    for mixture in None, latents["mixture"]:
        images = inference.generate(model, [0], 0, mixture)
        _, errors = inference.reconstruct(model, images)
        assert images.float().std() > 20 and errors.item() < 0.01


@pytest.mark.parametrize("flags, message", [
    ([], "nothing would be written"), (["out", "--attribute", "Smiling"], "--attribute means nothing to sampling"),
    (["out", "--walk", "DATA", "--count", "7"], "--count means nothing to --walk"),
    (["out", "--reconstruct", "DATA", "--prior", "fitted"], "--prior means nothing to --reconstruct"),
    (["--grid", "out.jpg", "--count", "7937"], "no room for 993 images side by side"),
    (["--grid", "out.txt"], "must end in .png or .jpg"), (["--grid", "."], "must end in"),
    (["out", "--checkpoint", "nowhere.pt"], "no checkpoint nowhere.pt"),
    (["out", "--reconstruct", "DATA", "--count", "2", "--attribute", "Hairy"], "no attribute Hairy; it knows Smiling"),
    (["out", "--reconstruct", "DATA", "--strength", "2"], "--strength means nothing without --attribute"),
    (["out", "--walk", "ONE"], "holds 1 faces, and 2 are needed; name others$"),
    (["out", "--reconstruct", "DATA", "--count", "5"], "holds 4 faces, and 5 are needed; .*lower --count")])
def test_bad_inference_flags_get_a_sentence(data, trained, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    shutil.copy(data / "000001.png", tmp_path / "one")
    flags = [dict(DATA=data, ONE="one").get(flag, flag) for flag in flags]
    with pytest.raises(UserError, match=message):
        call(inference, "--checkpoint", trained / "model.pt", *flags)
    assert not list(tmp_path.glob("out/*"))
