"""Problem 2: the sampler, its scripts and the training of UNet.py. Narrow networks, small images, no data set."""

import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

from p2_ddim import ddim, evaluate, inference, studies, train
from p2_ddim.ddim import alphas_cumprod, lerp, sample, slerp, stretch, timesteps
from UNet import UNet
from utils import UserError, image_generators, randn, save_png

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # for networks this small, a second thread costs more than it gives


def tanh_model(x, t):
    """A noise predictor with an analytic form: with random weights the loop would be chaotic."""
    return torch.tanh(x)


# --- The sampler --------------------------------------------------------------------------------

def test_noise_levels_and_visited_steps():
    ab = alphas_cumprod()
    assert ab.dtype == torch.float64 and len(ab) == 1000
    for t, value in {0: 0.9999, 1: 0.999780092072, 21: 0.993220357296, 41: 0.978868755331,
                     961: 8.5730961e-5, 981: 5.7877932e-5}.items():
        assert ab[t].item() == pytest.approx(value, rel=1e-7, abs=1e-12)
    assert timesteps() == list(range(981, 0, -20))
    assert timesteps(1) == [1] and timesteps(1000) == list(range(999, 0, -1))
    for steps in (3, 7, 30, 300, 600):  # numbers that do not divide 1000 start near the noisy end too
        visited = timesteps(steps)
        assert len(visited) == len(set(visited)) == steps and visited[-1] == 1
        assert 999 - 1000 / steps <= visited[0] <= 999 and visited == sorted(visited, reverse=True)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="from 1 to 1000"):
            timesteps(steps)


START = torch.tensor([-1.5, -0.3, 0.2, 2.0], dtype=torch.float64).reshape(1, 1, 1, 4)


def independent_loop(clamp=True, last=None, shift=0):
    """The whole loop once more with NumPy; the arguments make the usual wrong variants."""
    ab = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    x = START.numpy().ravel()
    for t in range(981, 0, -20):
        now = ab[t - shift]
        before = ab[t - shift - 20] if t > 1 else ab[0] if last is None else last
        eps = np.tanh(x)
        x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
        x0 = np.clip(x0, -1, 1) if clamp else x0
        x = np.sqrt(before) * x0 + np.sqrt(1 - before) * eps
    return x


def check_scalar_run(x):
    np.testing.assert_allclose(x, [-0.354347155, -0.176416470, 0.106246938, 0.358162483], rtol=0, atol=1e-8)


def test_scalar_run_is_the_courses():
    check_scalar_run(sample(tanh_model, START).numpy().ravel())
    check_scalar_run(independent_loop())
    for wrong, values in ((dict(clamp=False), [-71.22, -0.1775, 0.1062, 133.1]),
                          (dict(last=1.0), [-0.350948, -0.174671, 0.105189, 0.354730]),
                          (dict(last=1.0, shift=1), [-0.351675, -0.174642, 0.105155, 0.355448])):
        np.testing.assert_allclose(independent_loop(**wrong), values, rtol=1e-3)
        with pytest.raises(AssertionError):
            check_scalar_run(independent_loop(**wrong))


def diffusers_sample(model, noise, eta=0.0, generators=None, **more_flags):
    """The same conventions in an independent implementation."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=True,
                                        set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(50)
    x = noise
    for t in scheduler.timesteps:
        more = dict(variance_noise=randn(generators, noise.shape[1:])) if eta else {}
        x = scheduler.step(model(x, t.expand(len(x))), t, x, eta=eta, **more, **more_flags).prev_sample
    return x


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_equals_diffusers(eta):
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = diffusers_sample(tanh_model, noise, eta, image_generators(5, [0, 1]))
    ours = sample(tanh_model, noise, eta=eta, generators=image_generators(5, [0, 1]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.std() > 0.2 and (stretch(ours).int() - stretch(theirs).int()).abs().max() <= 1


FACE64 = ROOT / "p2_ddim/checkpoints/face64.pt"


@torch.no_grad()
def test_committed_faces_equal_diffusers(tmp_path):
    assert FACE64.stat().st_size <= 20e6
    paths = sorted((ROOT / "p2_ddim/noise64").iterdir())
    assert [path.name for path in paths] == [f"{i:02d}.pt" for i in range(10)]
    model = inference.load_unet(FACE64)
    noise = torch.cat([inference.load_noise(path) for path in paths])
    assert noise.shape == (10, 3, 64, 64)
    for ours, theirs in zip(stretch(sample(model, noise)), diffusers_sample(model, noise)):
        save_image(theirs, tmp_path / "a.png", normalize=True)
        difference = ours.permute(1, 2, 0).numpy() - np.asarray(Image.open(tmp_path / "a.png"), float)
        assert (difference ** 2).mean() <= 0.01 and np.abs(difference).max() <= 1


def test_sampler_tells_the_network_raw_steps_and_the_caller_every_state():
    asked, told = [], []

    def model(x, t):
        assert t.shape == (2,) and t.dtype == torch.int64
        asked.append(t.tolist())
        return tanh_model(x, t)
    out = sample(model, torch.randn(2, 3, 4, 4), 5, on_step=lambda t, x, x0: told.append((t, x, x0)))
    assert asked == [[t, t] for t in (801, 601, 401, 201, 1)] and [t for t, _, _ in told] == [801, 601, 401, 201, 1]
    assert torch.equal(told[-1][1], out) and all(x0.abs().max() <= 1 for _, _, x0 in told)


def test_added_noise_belongs_to_the_image_and_not_to_the_batch():
    noise = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    together = sample(tanh_model, noise, 10, 1.0, image_generators(0, [0, 1, 2]))
    alone = [sample(tanh_model, noise[i:i + 1], 10, 1.0, image_generators(0, [i])) for i in (2, 0, 1)]
    torch.testing.assert_close(torch.cat([alone[1], alone[2], alone[0]]), together, rtol=0, atol=1e-6)
    assert (sample(tanh_model, noise, 10, 1.0, image_generators(1, [0, 1, 2])) - together).abs().max() > 0.1
    for generators in (None, image_generators(0, [0])):
        with pytest.raises(ValueError, match="one generator for each image"):
            sample(tanh_model, noise, 10, 1.0, generators)


def test_stretch_saves_what_torchvision_saves(tmp_path):
    images = torch.stack([torch.randn(3, 8, 8), torch.full((3, 8, 8), 0.3), torch.rand(3, 8, 8) * 1e-7])
    for image, ours in zip(images, stretch(images)):
        save_image(image, tmp_path / "a.png", normalize=True)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), ours.permute(1, 2, 0).numpy())
    first, constant, _ = stretch(images)
    assert first.amin() == 0 and first.amax() == 255 and constant.amax() == 0


# --- Interpolation and studies ------------------------------------------------------------------

def test_slerp_and_lerp():
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    s = 0.5 ** 0.5
    torch.testing.assert_close(slerp(x, y, 0.5), torch.tensor([[s, 3 * s]]))
    torch.testing.assert_close(lerp(x, y, 0.25), torch.tensor([[0.75, 0.75]]))
    noise = torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for path in (slerp, lerp):
        for alpha, end in ((0, noise[0]), (1, noise[1])):
            torch.testing.assert_close(path(*noise, alpha), end, rtol=0, atol=1e-6)
    for alpha, spherical, straight in studies.norm_table(*noise):
        assert spherical == pytest.approx(1, abs=0.02)
        assert straight == pytest.approx((alpha ** 2 + (1 - alpha) ** 2) ** 0.5, abs=0.02)
    torch.testing.assert_close(slerp(noise[0], 2 * noise[0], 0.5), 1.5 * noise[0])  # parallel: no arc, a line
    with pytest.raises(ValueError, match="opposite"):
        slerp(x, -x, 0.5)


def test_studies_have_their_shapes_and_ends():
    noises = torch.randn(4, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    grid = studies.eta_grid(tanh_model, noises[:2], etas=(0, 1), steps=5)
    alone = stretch(sample(tanh_model, noises[1], 5))
    assert grid.shape == (4, 3, 8, 8) and torch.equal(grid[1:2], alone) and not torch.equal(grid[3:4], alone)
    strip = studies.interpolation_strip(tanh_model, noises[0], noises[1], slerp, steps=5)
    assert strip.shape == (11, 3, 8, 8) and (strip[-1:].int() - alone.int()).abs().max() <= 1
    errors = dict(studies.steps_table(tanh_model, noises[0], (5, 50), reference=100))
    assert errors[5] > errors[50] > 0


def test_eps_of_the_clamped_x0_equals_diffusers():
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = sample(studies.consistent(tanh_model), noise)
    torch.testing.assert_close(ours, diffusers_sample(tanh_model, noise, use_clipped_model_output=True), rtol=0, atol=1e-5)
    assert (ours - sample(tanh_model, noise)).abs().max() > 1e-3


# --- evaluate.py --------------------------------------------------------------------------------

def run_evaluate(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    return stop.value.code


def test_evaluate_compares_without_wrapping_round(tmp_path, monkeypatch, capsys):
    for folder, greys in (("out", {"a": 3, "b": 10}), ("GT", {"a": 5, "b": 10})):
        (tmp_path / folder).mkdir()
        for name, grey in greys.items():
            Image.new("RGB", (4, 2), (grey,) * 3).save(tmp_path / folder / f"{name}.png")
    folders = (tmp_path / "out", tmp_path / "GT")
    assert run_evaluate(monkeypatch, *folders) == 0
    assert "a.png  4.0000" in (text := capsys.readouterr().out) and "mean MSE = 2.0000 (2 images" in text
    assert run_evaluate(monkeypatch, *folders, "--baseline", 1.9) == 1
    shutil.copy(tmp_path / "out/a.png", tmp_path / "out/more.png")
    assert run_evaluate(monkeypatch, *folders) == 0
    assert f"missing in {tmp_path / 'GT'}: more.png" in capsys.readouterr().out
    shutil.copy(tmp_path / "out/a.png", tmp_path / "GT/lost.png")
    assert run_evaluate(monkeypatch, *folders) == 1
    assert f"missing in {tmp_path / 'out'}: lost.png" in capsys.readouterr().out
    Image.new("RGB", (2, 4)).save(tmp_path / "out/lost.png")
    with pytest.raises(UserError, match="one size"):
        evaluate.mean_squared_errors(*map(evaluate.read_images, folders))
    (tmp_path / "out/lost.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="lost.png is damaged"):
        evaluate.read_images(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/._a.png").write_bytes(b"what macOS leaves")
    for folder, message in (("nowhere", "there is no folder"), ("empty", "no PNG images")):
        with pytest.raises(UserError, match=message):
            evaluate.read_images(tmp_path / folder)


# --- inference.py and the wrapper ---------------------------------------------------------------

@pytest.fixture(scope="module")
def unet_pt(tmp_path_factory):
    """A narrow network in the slim format of train.py, with weights that make images differ from their noise."""
    torch.manual_seed(0)
    model = UNet(channel=8)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("weights") / "U Net.pt"
    train.save_slim(path, model.state_dict(), {"channel": 8})
    return path


@pytest.fixture
def noises(tmp_path):
    """A folder of four noises of several names, shapes and precisions, and other files among them."""
    folder = tmp_path / "noise dir"
    (folder / "more").mkdir(parents=True)
    torch.manual_seed(1)
    torch.save(torch.randn(1, 3, 32, 32), folder / "00.pt")
    torch.save(torch.randn(3, 32, 32), folder / "01.pt")
    torch.save(torch.randn(1, 3, 32, 32).double(), folder / "b c.d.pt")
    torch.save(torch.randn(1, 3, 32, 32).half(), folder / "z.pt")
    (folder / "notes.txt").write_text("mine")
    (folder / "._00.pt").write_bytes(b"what macOS leaves behind")
    return folder


def wrapper(*arguments, cwd):
    """hw2_2.sh as a user runs it, from the folder `cwd`."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", ROOT / "hw2_2.sh", *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True)


def run_inference(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, arguments), "--device", "cpu"])
    inference.main()


def read_pngs(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob("*.png")}


def test_wrapper_draws_one_image_for_each_noise(tmp_path, noises, unet_pt, monkeypatch):
    shutil.copy(unet_pt, tmp_path / "U Net.pt")
    done = wrapper("noise dir", "out dir", "U Net.pt", "--steps", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "passed over" in done.stderr and "._00.pt, more, notes.txt" in done.stderr
    images = read_pngs(tmp_path / "out dir")
    assert sorted(images) == ["00.png", "01.png", "b c.d.png", "z.png"]
    assert {path.name for path in (tmp_path / "out dir").iterdir()} == set(images)
    model = inference.load_unet(unet_pt)
    for name, image in images.items():
        noise = torch.load(noises / name.replace(".png", ".pt"), weights_only=True).float().reshape(1, 3, 32, 32)
        expected = stretch(sample(model, noise, 2))[0].permute(1, 2, 0).numpy()
        assert image.shape == (32, 32, 3) and np.abs(image - expected).max() <= 1 and image.std() > 10


def test_flags_set_an_image_but_batch_size_and_interruption_do_not(tmp_path, noises, unet_pt, monkeypatch):
    flags = (unet_pt, "--steps", 3, "--eta", 1, "--seed", 4)
    run_inference(monkeypatch, noises, tmp_path / "one", *flags)
    run_inference(monkeypatch, noises, tmp_path / "three", *flags, "--batch_size", 3, "--no-channels_last")
    one, three = read_pngs(tmp_path / "one"), read_pngs(tmp_path / "three")
    assert one.keys() == three.keys() and all(np.abs(one[name] - three[name]).max() <= 1 for name in one)

    model = inference.load_unet(unet_pt)
    for i, path in enumerate(inference.find_noises(noises)):
        for seed, same in ((4, True), (5, False)):
            face = stretch(sample(model, inference.load_noise(path), 3, 1.0, image_generators(seed, [i])))[0]
            assert (np.abs(one[f"{path.stem}.png"] - face.permute(1, 2, 0).numpy()).max() <= 1) == same

    (tmp_path / "three/01.png").unlink()
    (tmp_path / "three/z.png").write_bytes(b"kept")
    run_inference(monkeypatch, noises, tmp_path / "three", *flags, "--skip_existing")
    assert (tmp_path / "three/z.png").read_bytes() == b"kept"
    assert (tmp_path / "three/01.png").read_bytes() == (tmp_path / "one/01.png").read_bytes()


def test_out_of_memory_halves_the_batch(tmp_path, noises, unet_pt, monkeypatch, capsys):
    def sample_two_at_most(model, noise, *arguments, **more):
        if len(noise) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte")
        return sample(model, noise, *arguments, **more)
    monkeypatch.setattr(inference, "sample", sample_two_at_most)
    run_inference(monkeypatch, noises, tmp_path / "out", unet_pt, "--steps", 1, "--batch_size", 4)
    assert len(read_pngs(tmp_path / "out")) == 4 and "batches of 2" in capsys.readouterr().err


def test_amp_is_close_to_float32(tmp_path, noises, unet_pt, monkeypatch):
    run_inference(monkeypatch, noises, tmp_path / "float32", unet_pt, "--steps", 2)
    run_inference(monkeypatch, noises, tmp_path / "amp", unet_pt, "--steps", 2, "--amp", "bf16")
    errors = evaluate.mean_squared_errors(*(evaluate.read_images(tmp_path / name) for name in ("float32", "amp")))
    assert len(errors) == 4 and 0 < max(errors.values()) < 20


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


BAD_NOISES = {
    "is damaged": lambda path, _: path.write_bytes(b"PK no tensor"),
    "is damaged ": lambda path, witness: path.write_bytes(pickle.dumps(Malicious(witness))),
    "does not hold a tensor of floats": lambda path, _: torch.save({"noise": torch.zeros(1, 3, 32, 32)}, path),
    "does not hold a tensor of floats ": lambda path, _: torch.save(torch.zeros(1, 3, 32, 32, dtype=torch.int64), path),
    "has the shape (2, 3, 32, 32)": lambda path, _: torch.save(torch.zeros(2, 3, 32, 32), path),
    "has the shape (1, 1, 32, 32)": lambda path, _: torch.save(torch.zeros(1, 32, 32), path),
    "has the shape (1, 3, 40, 32)": lambda path, _: torch.save(torch.zeros(3, 40, 32), path),
    "holds NaN or infinite": lambda path, _: torch.save(torch.full((1, 3, 32, 32), float("nan")), path),
}


@pytest.mark.parametrize("message", BAD_NOISES)
def test_bad_noises_are_named(tmp_path, message):
    path, witness = tmp_path / "07.pt", tmp_path / "witness"
    BAD_NOISES[message](path, witness)
    with pytest.raises(UserError) as error:
        inference.load_noise(path)
    assert message.strip() in str(error.value) and str(path) in str(error.value)
    assert not witness.exists()  # a file that holds code runs nothing


def test_bad_input_through_the_wrapper(tmp_path, noises, unet_pt):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "corrupt.pt").write_bytes(unet_pt.read_bytes()[:5000])
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "witness")))
    torch.save({"fc1.weight": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "bad noise").mkdir()
    torch.save(torch.zeros(1, 3, 32, 33), tmp_path / "bad noise/x y.pt")
    cases = [
        ([noises, "out"], "arguments are required: checkpoint"),
        (["nowhere", "out", unet_pt], "no folder nowhere"),
        (["empty", "out", unet_pt], "no noise files (.pt) in empty"),
        (["bad noise", "out", unet_pt], "bad noise/x y.pt has the shape (1, 3, 32, 33)"),
        ([noises, "file", unet_pt], "file is a file"),
        ([noises, "out", "nowhere.pt"], "no checkpoint nowhere.pt"),
        ([noises, "out", "corrupt.pt"], "corrupt.pt is damaged"),
        ([noises, "out", "code.pt"], "code.pt is damaged"),
        ([noises, "out", "other.pt"], "time.0.inv_freq is missing and should be (64,)"),
        ([noises, "out", unet_pt, "--steps", 1001], "--steps 1001"),
    ]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda case: wrapper(*case[0], cwd=tmp_path), cases))
    for (arguments, message), done in zip(cases, results):
        assert done.returncode == 2, (arguments, done.stderr)
        assert message in done.stderr and "Traceback" not in done.stderr and done.stdout == "", (arguments, done.stderr)
    assert not (tmp_path / "witness").exists() and not list(tmp_path.glob("out/*"))


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

    def interrupt(path, image):
        if path.name == "samples_000004.png":  # amid the files of the second checkpoint
            raise KeyboardInterrupt
        save_png(path, image)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_png", interrupt)
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


def test_images_come_from_a_folder_or_a_zip_as_centred_squares(faces, tmp_path):
    images = train.load_images(faces, 32)
    assert images.shape == (12, 3, 32, 32) and images.dtype == torch.uint8
    with zipfile.ZipFile(faces) as archive:
        archive.extractall(tmp_path / "folder")
    assert torch.equal(train.load_images(tmp_path / "folder", 32), images)
    crop = Image.open(tmp_path / "folder/faces/000000.jpg").crop((0, 5, 40, 45)).resize((32, 32), Image.LANCZOS)
    assert np.abs(images[0].permute(1, 2, 0).numpy() - np.asarray(crop, float)).mean() < 0.5


def test_every_epoch_sees_every_image_once():
    images = torch.arange(12)
    for seed in (0, 1):
        epochs = torch.cat([train.batch_at(images, step, 4, seed) for step in range(6)]).split(12)
        assert all(sorted(epoch.tolist()) == list(range(12)) for epoch in epochs)
        assert not torch.equal(*epochs)


def test_loss_is_algorithm_1():
    torch.manual_seed(0)
    x0, noise, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0, 981])
    seen = []

    def model(x, t):
        seen.append(x)
        return noise + torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(train.loss_per_image(model, x0, t, noise, alphas_cumprod()), torch.tensor([1.0, 4.0]))
    for i, ab in enumerate((0.9999, 5.7877932e-5)):
        torch.testing.assert_close(seen[0][i], ab ** 0.5 * x0[i] + (1 - ab) ** 0.5 * noise[i], rtol=0, atol=1e-6)


def test_slim_file_draws_as_the_average_does(tmp_path):
    """Half precision must not touch the time frequencies: at t = 981 their error would be a quarter of a radian."""
    torch.manual_seed(0)
    model = UNet(channel=8).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    train.save_slim(tmp_path / "slim.pt", model.state_dict(), {"channel": 8})
    loaded = inference.load_unet(tmp_path / "slim.pt")
    assert torch.equal(loaded.time[0].inv_freq, model.time[0].inv_freq)
    content = torch.load(tmp_path / "slim.pt", weights_only=True)
    assert content["kind"] == "p2_ddim" and content["ema"]["down1.weight"].dtype == torch.float16
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_two_processes_train_together(faces, tmp_path, torchrun):
    done = torchrun("p2_ddim/train.py", *tiny(faces, tmp_path / "out", "--epochs", 1))
    assert done.returncode == 0, done.stderr
    assert "12 images" in done.stdout and "2 process(es)" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3] and all(np.isfinite(line["loss"]) for line in lines)
    assert torch.load(tmp_path / "out/last.pt", weights_only=True)["step"] == 3


def test_a_dry_run_writes_nothing(faces, tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, *tiny(faces, tmp_path / "out", "--dry_run"))
    assert "dry run: two steps" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_training_lowers_the_loss(faces, tmp_path, monkeypatch):
    run_train(monkeypatch, *tiny(faces, tmp_path / "out", "--epochs", 40, "--lr", 3e-3, "--save_every", 30))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("flags, message", [
    (["--data_dir", "nowhere"], "neither a folder nor a zip"), (["--data_dir", ROOT / "tests/data"], "no images"),
    (["--resume"], "there is no checkpoint"), (["--size", 40], "multiple of 32"), (["--channel", 6], "multiple of 4"),
    (["--batch_size", 13], "larger than the 12"), (["--amp", "fp16"], "needs a GPU"),
    (["--output_dir", __file__], "is a file")])
def test_bad_training_flags_get_a_sentence(faces, tmp_path, monkeypatch, flags, message):
    with pytest.raises(UserError, match=message):
        run_train(monkeypatch, *tiny(faces, tmp_path / "out", *flags))


def test_a_noise_saved_on_a_gpu_loads_on_a_cpu(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(torch.ones(1, 3, 32, 32), tmp_path / "00.pt")
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, pickle.UnpicklingError), match="CUDA"):
            torch.load(tmp_path / "00.pt", weights_only=True)
    assert torch.equal(inference.load_noise(tmp_path / "00.pt"), torch.ones(1, 3, 32, 32))


def test_weights_of_foreign_shapes_are_refused_and_nan_is_not_drawn(tmp_path, noises, unet_pt, monkeypatch):
    for content in ({0: torch.zeros(2)}, {"down1.weight": torch.tensor(1.0)}, {"down1.weight": torch.zeros(2 ** 20, 1)}):
        torch.save(content, tmp_path / "foreign.pt")
        with pytest.raises(UserError, match="are not those of UNet.py"):
            inference.load_unet(tmp_path / "foreign.pt")
    content = torch.load(unet_pt, weights_only=True)
    content["ema"]["out.2.bias"].fill_(float("nan"))
    torch.save(content, tmp_path / "nan.pt")
    with pytest.raises(UserError, match="ends in NaN"):
        run_inference(monkeypatch, noises, tmp_path / "out", tmp_path / "nan.pt", "--steps", 1)
    assert not list((tmp_path / "out").iterdir())


def test_a_damaged_image_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="a.jpg"):
        train.load_images(tmp_path, 32)
