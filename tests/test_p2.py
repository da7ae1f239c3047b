"""Problem 2: the sampler, the network from a file, the scripts, training. Narrow networks, small images, no data."""

import functools
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from utils import UserError, image_generators, randn

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

import files
import training
from conftest import ENVIRONMENT, ROOT, assert_same_training, call, close
from dataset import read_image_source
from p2_ddim import ddim, evaluate, inference, studies, train
from p2_ddim.ddim import ddpm_loss, lerp, noise_schedule, sample, slerp, stretch, timesteps
from p2_ddim.model import load_model
from UNet import UNet

FACE64 = ROOT / "p2_ddim/checkpoints/face64.pt"
pytestmark = pytest.mark.usefixtures("one_thread")

# What `close` allows: the analytic loops below magnify the last digit of float32 at most a hundredfold (the first step
# divides by 0.0076), so a share of 1e-4 of the largest value is ten times what comes of it.
FLOAT32 = 1e-4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tanh_model(x, t):
    """A noise predictor with an analytic form: with random weights the loop would be chaotic."""
    return torch.tanh(x)


def narrow_weights(channel=8, std=0.05):
    """Weights of a narrow network that make images differ from their noise."""
    return {name: value if name.endswith("inv_freq") else std * normal(*value.shape, seed=i)
            for i, (name, value) in enumerate(UNet(channel=channel).state_dict().items())}


def face(model, noise, *arguments):
    """The image of one noise (1, 3, H, W) as inference.py writes it: int (H, W, 3)."""
    return stretch(sample(model, noise, *arguments))[0].permute(1, 2, 0).numpy().astype(int)


def equal(image, other):
    """Whether two images are one up to rounding: a value between two grey levels may fall to either side."""
    return image.shape == other.shape and np.abs(image - other).max() <= 1


# --- The sampler --------------------------------------------------------------------------------

def test_noise_schedule_and_timesteps():
    alphas_cumprod = noise_schedule()
    assert alphas_cumprod.dtype == torch.float64 and len(alphas_cumprod) == 1000
    for t, value in {0: 0.9999, 1: 0.999780092072, 21: 0.993220357296, 41: 0.978868755331,
                     961: 8.5730961e-5, 981: 5.7877932e-5}.items():
        assert alphas_cumprod[t].item() == pytest.approx(value, rel=1e-7)  # as many digits as they are given with
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
    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    x = START.numpy().ravel()
    for t in range(981, 0, -20):
        now = alphas_cumprod[t - shift]
        before = alphas_cumprod[t - shift - 20] if t > 1 else alphas_cumprod[0] if last is None else last
        eps = np.tanh(x)
        x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
        x0 = np.clip(x0, -1, 1) if clamp else x0
        x = np.sqrt(before) * x0 + np.sqrt(1 - before) * eps
    return x


def check_scalar_run(x):
    # All is double precision, but the values that were handed down agree with it to 5e-8 only.
    np.testing.assert_allclose(x, [-0.354347155, -0.176416470, 0.106246938, 0.358162483], rtol=1e-6)


def test_scalar_run_is_the_courses():
    check_scalar_run(sample(tanh_model, START).numpy().ravel())
    check_scalar_run(independent_loop())
    for wrong, values in ((dict(clamp=False), [-71.22, -0.1775, 0.1062, 133.1]),
                          (dict(last=1.0), [-0.350948, -0.174671, 0.105189, 0.354730]),
                          (dict(last=1.0, shift=1), [-0.351675, -0.174642, 0.105155, 0.355448])):
        np.testing.assert_allclose(independent_loop(**wrong), values, rtol=1e-3)  # given with four digits
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
    noise = normal(2, 3, 8, 8)
    theirs = diffusers_sample(tanh_model, noise, eta, image_generators(5, [0, 1]))
    ours = sample(tanh_model, noise, eta=eta, generators=image_generators(5, [0, 1]))
    assert close(ours, theirs)
    assert ours.std() > 0.2 and (stretch(ours).int() - stretch(theirs).int()).abs().max() <= 1


@torch.no_grad()
def test_committed_faces_equal_diffusers(tmp_path):
    assert FACE64.stat().st_size <= 20e6
    paths = sorted((ROOT / "p2_ddim/noise64").iterdir())
    assert [path.name for path in paths] == [f"{i:02d}.pt" for i in range(10)]
    model = load_model(FACE64)
    noise = torch.cat([inference.load_noise(path) for path in paths])
    assert noise.shape == (10, 3, 64, 64)
    # A trained network is no chaos: what float32 rounds differently stays far below half a grey level.
    faces = stretch(sample(model, noise)).permute(0, 2, 3, 1).numpy().astype(int)
    for ours, theirs in zip(faces, diffusers_sample(model, noise)):
        save_image(theirs, tmp_path / "a.png", normalize=True)
        theirs = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
        assert equal(ours, theirs) and ((ours - theirs) ** 2).mean() <= 0.01 and ours.std() > 30


def test_sampler_tells_the_network_raw_timesteps_and_the_caller_every_state():
    asked = []

    def model(x, t):
        assert t.shape == (2,) and t.dtype == torch.int64
        asked.append(t.tolist())
        return tanh_model(x, t)
    noise = normal(2, 3, 4, 4)
    states = list(ddim.ddim(model, noise, 5))
    assert asked == [[t, t] for t in (801, 601, 401, 201, 1)] and [t for t, _, _ in states] == [801, 601, 401, 201, 1]
    assert torch.equal(states[-1][1], sample(tanh_model, noise, 5)) and not torch.equal(states[0][1], states[1][1])
    assert all(x0.abs().max() <= 1 for _, _, x0 in states)
    next(iter(ddim.ddim(lambda x, t: x * torch.ones(1, requires_grad=True), noise)))
    assert torch.is_grad_enabled()  # outside of a step


def test_added_noise_is_not_the_noise_that_an_image_began_with():
    indices, shape = range(2), (3, 64, 64)
    added = randn(ddim.step_generators(0, indices), shape)
    began = [randn(image_generators(0, indices), shape),
             torch.cat([inference.load_noise(ROOT / f"p2_ddim/noise64/{i:02d}.pt") for i in indices])]
    for x in began:
        assert ((x * added).mean(dim=(1, 2, 3)).abs() < 6 / x[0].numel() ** 0.5).all()  # six sigma of independent ones


def test_added_noise_belongs_to_the_image_and_not_to_the_batch():
    noise = normal(3, 3, 4, 4)
    together = sample(tanh_model, noise, 10, 1.0, image_generators(0, [0, 1, 2]))
    for i in (2, 0, 1):
        assert close(sample(tanh_model, noise[i:i + 1], 10, 1.0, image_generators(0, [i])), together[i:i + 1])
    assert not close(sample(tanh_model, noise, 10, 1.0, image_generators(1, [0, 1, 2])), together, share=0.1)
    for generators in (None, image_generators(0, [0])):
        with pytest.raises(ValueError, match="one generator for each image"):
            sample(tanh_model, noise, 10, 1.0, generators)


def test_stretch_saves_what_torchvision_saves(tmp_path):
    images = torch.stack([normal(3, 8, 8), torch.full((3, 8, 8), 0.3), normal(3, 8, 8, seed=1) * 1e-7])
    for image, ours in zip(images, stretch(images)):
        save_image(image, tmp_path / "a.png", normalize=True)
        theirs = np.asarray(Image.open(tmp_path / "a.png"), int)
        assert np.abs(theirs - ours.permute(1, 2, 0).numpy()).max() <= 1  # a value just between two grey levels
    first, constant, _ = stretch(images)
    assert first.amin() == 0 and first.amax() == 255 and constant.amax() == 0


def test_loss_is_algorithm_1():
    x0, noise, t = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), torch.tensor([0, 981])
    seen = []

    def model(x, t):
        seen.append(x)
        return noise + torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
    assert close(ddpm_loss(model, x0, t, noise, noise_schedule()), torch.tensor([1.0, 4.0]))
    for i, alpha_bar in enumerate((0.9999, 5.7877932e-5)):
        assert close(seen[0][i], alpha_bar ** 0.5 * x0[i] + (1 - alpha_bar) ** 0.5 * noise[i])


# --- Interpolation and studies ------------------------------------------------------------------

def test_slerp_and_lerp():
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    s = 0.5 ** 0.5
    assert close(slerp(x, y, 0.5), torch.tensor([[s, 3 * s]])) and close(lerp(x, y, 0.25), torch.tensor([[0.75, 0.75]]))
    noise = normal(2, 1, 3, 64, 64)
    for path in (slerp, lerp):
        for alpha, end in ((0, noise[0]), (1, noise[1])):
            assert close(path(*noise, alpha), end)
    # The norm of n = 12,288 normals varies with a standard deviation of 1 / sqrt(2 n) = 0.0064 of it: five of these.
    for alpha, spherical, straight in studies.norm_table(*noise):
        assert spherical == pytest.approx(1, rel=0.032)
        assert straight == pytest.approx((alpha ** 2 + (1 - alpha) ** 2) ** 0.5, rel=0.032)
    assert close(slerp(noise[0], 2 * noise[0], 0.5), 1.5 * noise[0])  # parallel: no arc, a line
    with pytest.raises(ValueError, match="opposite"):
        slerp(x, -x, 0.5)


def test_studies_have_their_shapes_and_ends():
    noises = normal(4, 1, 3, 8, 8)
    alone = stretch(sample(tanh_model, noises[1], 5)).int()
    grid = studies.eta_grid(tanh_model, noises[:2], etas=(0, 1), steps=5).int()
    assert grid.shape == (4, 3, 8, 8)
    assert (grid[1:2] - alone).abs().max() <= 1 and (grid[3:4] - alone).abs().max() > 10
    strip = studies.interpolation_strip(tanh_model, noises[0], noises[1], slerp, steps=5).int()
    assert strip.shape == (11, 3, 8, 8) and (strip[-1:] - alone).abs().max() <= 1
    errors = dict(studies.steps_table(tanh_model, list(noises), (5, 50), reference=100))
    assert (errors[5] > errors[50]).all() and (errors[50] > 0).all()
    five, truth = (stretch(sample(tanh_model, noises[1], steps)).double() for steps in (5, 100))
    # Rounding moves a value by one grey level at most, and few.
    assert errors[5].shape == (4,) and errors[5][1].item() == pytest.approx((five - truth).square().mean().item(), 0.01)


def test_eps_of_the_clamped_x0_equals_diffusers():
    noise = normal(2, 3, 8, 8)
    ours = sample(studies.consistent(tanh_model), noise)
    assert close(ours, diffusers_sample(tanh_model, noise, use_clipped_model_output=True))
    assert not close(ours, sample(tanh_model, noise), share=0.01)


# --- The network from a file --------------------------------------------------------------------

WEIGHTS = narrow_weights(channel=4)
PARAMETERS = {name: value for name, value in WEIGHTS.items() if not name.endswith("inv_freq")}
OTHER = {name: torch.zeros_like(value) for name, value in WEIGHTS.items()}


def prefixed(prefix, weights=WEIGHTS):
    return {prefix + name: value for name, value in weights.items()}


WRAPPINGS = {
    "bare, with a number": {**WEIGHTS, "epoch": 3},
    "under a key": {"net": WEIGHTS, "optimizer": {"state": {0: {"exp_avg": WEIGHTS["out.2.weight"]}}}},
    "compiled, parallel": {"model_state_dict": prefixed("_orig_mod.module.")},
    "Lightning": {"state_dict": prefixed("model."), "hyper_parameters": {"lr": 1e-4}, "global_step": 5},
    "lucidrains": {"step": 5, "model": prefixed("model.", OTHER), "version": "2.0", "scaler": None,
                   "ema": {**prefixed("online_model.model.", OTHER), **prefixed("ema_model.model."),
                           "initted": torch.tensor(True), "step": torch.tensor(5)}},
    "average of the parameters": {"ema": {"decay": 0.999, "shadow": PARAMETERS}, "model": OTHER},
    "parameters alone": prefixed("module.", {name: torch.nn.Parameter(value) for name, value in PARAMETERS.items()}),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_load_from_the_ways_in_which_others_save_them(tmp_path, wrapping):
    torch.save(WRAPPINGS[wrapping], tmp_path / "foreign.pt", _use_new_zipfile_serialization="Lightning" not in wrapping)
    model = load_model(tmp_path / "foreign.pt")
    assert not model.training
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu" and torch.equal(value, WEIGHTS[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_load_and_the_frequencies_stay_exact(tmp_path, dtype):
    """At t = 981 the angles would be wrong by a quarter of a radian in float16, by two in bfloat16."""
    torch.save({name: value.to(dtype) for name, value in WEIGHTS.items()}, tmp_path / "foreign.pt")
    model = load_model(tmp_path / "foreign.pt")
    assert torch.equal(model.time[0].inv_freq, WEIGHTS["time.0.inv_freq"])
    assert torch.equal(model.out[2].weight, WEIGHTS["out.2.weight"].to(dtype).float())


def changed(**changes):
    """WEIGHTS with some of the values replaced; None leaves one out. In the names, __ stands for a dot."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in {**WEIGHTS, **changes}.items() if value is not None}


UNFIT_WEIGHTS = [
    (changed(extra=torch.zeros(1), down4__0__bias=torch.zeros(7), down1__bias=None, up23__resblocks__skip__bias=None),
     r"down1.bias is missing and should be \(4,\); down4.0.bias is \(7,\) and should be \(4,\).* and 1 more"),
    (changed(down1__weight=torch.tensor(1.0)), "do not fit UNet"),
    (changed(down1__weight=torch.zeros(2 ** 20, 1)), "do not fit UNet"),  # and no such network is made
    (changed(out__2__bias=torch.full((3,), torch.inf)), r"hold NaN or infinity \(out.2.bias\)"),
    (changed(out__2__bias=torch.zeros(3).to_sparse()), "a tensor of the layout torch.sparse_coo"),
    (changed(out__2__bias=torch.zeros(3, device="meta")), "without values|more than tensors"),  # PyTorch 2.0
    ({"fc1.weight": torch.zeros(3)}, "does not hold the weights .* whose top level holds fc1.weight"),
    ({"encoder": {0: torch.zeros(2)}, "lr": 0.1}, "whose top level holds encoder, lr"),
    ({0: torch.zeros(2)}, "whose top level holds 0"), ([1, 2], "holds a list"), (torch.zeros(3), "holds a Tensor"),
    ({"net": WEIGHTS, "loss": np.float64(1)}, "more than tensors and plain values .numpy"),
    ({"net": WEIGHTS, "data": Path("x")}, "more than tensors and plain values .pathlib"),
    (UNet(channel=4), "more than tensors and plain values .*model.state_dict"),
]


@pytest.mark.parametrize("content, message", UNFIT_WEIGHTS)
def test_weights_that_do_not_fit_are_refused_with_what_the_file_holds(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=f"other.pt.*{message}"):
        load_model(tmp_path / "other.pt")


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
        evaluate.mean_squared_errors(*map(evaluate.read_folder, folders))
    (tmp_path / "out/lost.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="lost.png cannot be read"):
        evaluate.read_folder(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/._a.png").write_bytes(b"what macOS leaves")
    for folder, message in (("nowhere", "there is no folder"), ("empty", "holds no images")):
        with pytest.raises(UserError, match=message):
            evaluate.read_folder(tmp_path / folder)


# --- inference.py and the wrapper ---------------------------------------------------------------

@pytest.fixture(scope="module")
def unet_pt(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "U Net.pt"
    torch.save(narrow_weights(), path)
    return path


@pytest.fixture
def noises(tmp_path):
    """A folder of four noises of several names, shapes and precisions, and other files among them."""
    folder = tmp_path / "noise dir"
    (folder / "more").mkdir(parents=True)
    torch.save(normal(1, 3, 32, 32, seed=1), folder / "00.pt")
    torch.save(normal(3, 32, 32, seed=2), folder / "01.pt")
    torch.save(normal(1, 3, 32, 32, seed=3).double(), folder / "b c.d.pt")
    torch.save(normal(1, 3, 32, 32, seed=4).half(), folder / "z.pt")
    (folder / "notes.txt").write_text("mine")
    (folder / "._00.pt").write_bytes(b"what macOS leaves behind")
    return folder


def wrapper(*arguments, cwd):
    """hw2_2.sh as a user runs it, from the folder `cwd`."""
    return subprocess.run(["bash", ROOT / "hw2_2.sh", *map(str, arguments)], cwd=cwd, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=300)


def read_pngs(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob("*.png")}


def test_wrapper_generates_one_image_for_each_noise(tmp_path, noises, unet_pt):
    shutil.copy(unet_pt, tmp_path / "U Net.pt")
    done = wrapper("noise dir", "out dir", "U Net.pt", "--steps", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("passed over in noise dir: more, notes.txt\n")
    images = read_pngs(tmp_path / "out dir")
    assert sorted(images) == ["00.png", "01.png", "b c.d.png", "z.png"]
    assert {path.name for path in (tmp_path / "out dir").iterdir()} == set(images)
    model = load_model(unet_pt)
    for name, image in images.items():
        noise = torch.load(noises / name.replace(".png", ".pt"), weights_only=True).float().reshape(1, 3, 32, 32)
        assert image.shape == (32, 32, 3) and image.std() > 10 and equal(image, face(model, noise, 2))
    done = wrapper(noises, "out dir", "gone.pt", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "no checkpoint gone.pt" in done.stderr and "Traceback" not in done.stderr


def test_noises_of_another_size_than_the_network_was_trained_on_are_told(tmp_path, noises, capsys):
    for size, told in ((32, False), (64, True)):
        files.save_checkpoint(tmp_path / f"{size}.pt", kind="p2_ddim", config=dict(channel=4, size=size),
                              ema=narrow_weights())
        call(inference, "--device", "cpu", noises, tmp_path / f"of {size}", tmp_path / f"{size}.pt", "--steps", 1)
        assert ("trained on images of 64x64; those of 32x32" in capsys.readouterr().err) == told
        assert len(read_pngs(tmp_path / f"of {size}")) == 4


def test_flags_set_an_image_but_batch_size_and_interruption_do_not(tmp_path, noises, unet_pt, monkeypatch):
    batches = []

    def counted(model, noise, *arguments):
        batches.append(len(noise))
        return ddim.ddim(model, noise, *arguments)
    monkeypatch.setattr(inference, "ddim", counted)
    flags = (unet_pt, "--steps", 3, "--eta", 1, "--seed", 4)
    call(inference, "--device", "cpu", noises, tmp_path / "four", *flags)
    call(inference, "--device", "cpu", noises, tmp_path / "three", *flags, "--batch_size", 3)
    monkeypatch.setitem(inference.PIXELS, "cpu", 2 * 32 * 32)
    call(inference, "--device", "cpu", noises, tmp_path / "two", *flags)
    assert batches == [4, 3, 1, 2, 2]
    four, three, two = (read_pngs(tmp_path / name) for name in ("four", "three", "two"))
    assert four.keys() == three.keys() == two.keys() and len(four) == 4
    assert all(equal(four[name], three[name]) and equal(four[name], two[name]) for name in four)

    model = load_model(unet_pt)
    for i, path in enumerate(inference.find_noises(noises)):
        for seed, same in ((4, True), (5, False)):
            expected = face(model, inference.load_noise(path), 3, 1.0, ddim.step_generators(seed, [i]))
            assert equal(four[f"{path.stem}.png"], expected) == same

    kept = tmp_path / "three/z.png"
    Image.new("RGB", (32, 32), "red").save(kept)
    (tmp_path / "three/00.png").write_bytes((tmp_path / "four/00.png").read_bytes()[:1500])  # as a crash leaves it
    (tmp_path / "three/01.png").unlink()
    (tmp_path / "three/b c.d.png").write_bytes(b"")
    call(inference, "--device", "cpu", noises, tmp_path / "three", *flags, "--skip_existing")
    assert batches[5:] == [2, 1] and (read_pngs(tmp_path / "three")["z.png"] == [255, 0, 0]).all()
    again = read_pngs(tmp_path / "three")
    assert all(equal(again[name], four[name]) for name in four if name != "z.png")


def test_out_of_memory_halves_the_batch(tmp_path, noises, unet_pt, monkeypatch, capsys):
    def two_at_most(model, noise, *arguments):
        if len(noise) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte")
        return ddim.ddim(model, noise, *arguments)
    monkeypatch.setattr(inference, "ddim", two_at_most)
    call(inference, "--device", "cpu", noises, tmp_path / "out", unet_pt, "--steps", 1, "--batch_size", 4)
    assert len(read_pngs(tmp_path / "out")) == 4 and "batches of 2" in capsys.readouterr().err


def test_amp_is_close_to_float32_and_nan_is_not_written(tmp_path, noises, unet_pt):
    call(inference, "--device", "cpu", noises, tmp_path / "float32", unet_pt, "--steps", 2)
    call(inference, "--device", "cpu", noises, tmp_path / "amp", unet_pt, "--steps", 2, "--amp", "bf16")
    errors = evaluate.mean_squared_errors(*(evaluate.read_folder(tmp_path / name) for name in ("float32", "amp")))
    # Bfloat16 moves one value in 70 to a neighbouring grey level.
    assert len(errors) == 4 and 0 < max(errors.values()) < 0.03
    torch.save(dict(narrow_weights(), **{"out.2.weight": torch.full((3, 8, 3, 3), 3e38)}), tmp_path / "huge.pt")
    with pytest.raises(UserError, match="00.png comes out as NaN"):
        call(inference, "--device", "cpu", noises, tmp_path / "out", tmp_path / "huge.pt", "--steps", 1)
    assert not list((tmp_path / "out").iterdir())


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


BAD_NOISES = [
    (lambda path, _: path.write_bytes(b"PK no tensor"), "is damaged"),
    (lambda path, witness: path.write_bytes(pickle.dumps(Malicious(witness))), "is damaged"),
    (lambda path, witness: torch.save(Malicious(witness), path), "more than tensors"),
    (lambda path, _: torch.save(np.zeros((1, 3, 32, 32)), path), "more than tensors and plain values (numpy"),
    (lambda path, _: torch.save({"noise": torch.zeros(1, 3, 32, 32)}, path), "does not hold a tensor of floats"),
    (lambda path, _: torch.save(torch.zeros(1, 3, 32, 32).long(), path), "does not hold a tensor of floats"),
    (lambda path, _: torch.save(torch.zeros(2, 3, 32, 32), path), "has the shape (2, 3, 32, 32)"),
    (lambda path, _: torch.save(torch.zeros(1, 32, 32), path), "has the shape (1, 1, 32, 32)"),
    (lambda path, _: torch.save(torch.zeros(3, 40, 32), path), "has the shape (1, 3, 40, 32)"),
    (lambda path, _: torch.save(torch.zeros(1, 3, 0, 0), path), "has the shape (1, 3, 0, 0)"),
    (lambda path, _: torch.save(torch.zeros(1, 3, 32, 32).to_sparse(), path), "of the layout torch.sparse_coo"),
    (lambda path, _: torch.save(torch.full((1, 3, 32, 32), float("nan")), path), "holds NaN or infinite"),
]


@pytest.mark.parametrize("write, message", BAD_NOISES)
def test_bad_noises_are_named(tmp_path, write, message):
    path, witness = tmp_path / "07.pt", tmp_path / "witness"
    write(path, witness)
    with pytest.raises(UserError) as error:
        inference.load_noise(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert not witness.exists()  # a file that holds code runs nothing


def test_a_noise_saved_on_a_gpu_or_with_a_gradient_loads_on_a_cpu(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(torch.ones(1, 3, 32, 32, requires_grad=True), tmp_path / "00.pt")
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, pickle.UnpicklingError), match="CUDA"):
            torch.load(tmp_path / "00.pt", weights_only=True)
    noise = inference.load_noise(tmp_path / "00.pt")
    assert torch.equal(noise, torch.ones(1, 3, 32, 32)) and not noise.requires_grad


def test_bad_input_is_refused_before_anything_is_written(tmp_path, noises, unet_pt, monkeypatch, capsys):
    for name, shapes in (("empty", []), ("bad", [(1, 3, 32, 33)]), ("several", [(1, 3, 32, 32), (1, 3, 64, 32)])):
        (tmp_path / name).mkdir()
        for i, shape in enumerate(shapes):
            torch.save(torch.zeros(shape), tmp_path / name / f"x {i}.pt")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "corrupt.pt").write_bytes(unet_pt.read_bytes()[:5000])
    monkeypatch.chdir(tmp_path)
    for arguments, message in [
            (["nowhere", "out", unet_pt], "no folder nowhere"),
            (["empty", "out", unet_pt], "no noise files (.pt) in empty"),
            (["bad", "out", unet_pt], "bad/x 0.pt has the shape (1, 3, 32, 33)"),
            (["several", "out", unet_pt], "several shapes"),
            ([noises, "file", unet_pt], "file is a file"),
            ([noises, "out", "nowhere.pt"], "no checkpoint nowhere.pt"),
            ([noises, "out", "corrupt.pt"], "corrupt.pt is damaged"),
            ([noises, "out", unet_pt, "--amp", "fp16"], "needs a GPU")]:
        with pytest.raises(UserError) as error:
            call(inference, "--device", "cpu", *arguments)
        assert message in str(error.value)
    for arguments, message in [([noises, "out"], "required: checkpoint"), ([noises, "", unet_pt], "path is empty"),
                               ([noises, "out", unet_pt, "--steps", 1001], "not an integer from 1 to 1000")]:
        with pytest.raises(SystemExit) as stop:
            call(inference, "--device", "cpu", *arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


# --- Training -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A zip of twelve 40x50 images with a bright disc of varying colour, a little left of the middle."""
    folder = tmp_path_factory.mktemp("my faces")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:50, :40]
    disc = ((y - 24.5) ** 2 + (x - 17.5) ** 2 < 200)[..., None]
    with zipfile.ZipFile(folder / "faces.zip", "w") as archive:
        for i in range(12):
            Image.fromarray((disc * rng.integers(100, 255, 3)).astype(np.uint8)).save(folder / "face.png")
            archive.write(folder / "face.png", f"faces/{i:06d}.png")
    return folder / "faces.zip"


def run_train(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    monkeypatch.setattr(train, "sample", functools.partial(ddim.sample, steps=1))
    train.main()


def tiny(data, out, *more):
    return ["--data_dir", data, "--output_dir", out, "--size", 32, "--channel", 4, "--epochs", 2, "--batch_size", 4,
            "--warmup", 2, "--save_every", 2, "--device", "cpu", "--amp", "off", *more]


def rows(out):
    return files.read_jsonl(out / "metrics.jsonl")


def test_training_resumes_bit_for_bit(faces, tmp_path, monkeypatch):
    run_train(monkeypatch, *tiny(faces, tmp_path / "whole"))

    def interrupt(path, image):
        if path.name == "samples_000004.png":  # amid the files of the second checkpoint
            raise KeyboardInterrupt
        files.save_png(path, image)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_png", interrupt)
        run_train(patch, *tiny(faces, tmp_path / "parts"))
    assert torch.load(tmp_path / "parts/last.pt", weights_only=True)["step"] == 2
    run_train(monkeypatch, *tiny(faces, tmp_path / "parts", "--resume"))

    whole = assert_same_training(tmp_path / "whole", tmp_path / "parts")
    assert (tmp_path / "whole/samples_000006.png").read_bytes() == (tmp_path / "parts/samples_000006.png").read_bytes()
    assert [(row["step"], row["epoch"]) for row in rows(tmp_path / "parts")] == [(2, 0.667), (4, 1.333), (6, 2)]

    # What it leaves for inference.py: the EMA weights in half precision.
    slim = files.load_checkpoint(tmp_path / "whole/model.pt", "p2_ddim", ["recipe", "metrics"])
    assert slim["config"] == dict(channel=4, size=32) and slim["recipe"]["batch_size"] == 4
    assert slim["ema"]["down1.weight"].dtype == torch.float16
    for name, value in load_model(tmp_path / "whole/model.pt").state_dict().items():
        # Half precision has eleven bits; what is below 2 ** -14 in size, fewer.
        torch.testing.assert_close(value, whole["ema"][name], rtol=2 ** -11, atol=2 ** -25)


def test_an_epoch_holds_every_image_once_and_a_batch_every_part_of_the_timesteps(faces, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "ddpm_loss", lambda model, x0, t, noise, alphas_cumprod: (
        seen.append((x0, t, noise)), ddpm_loss(model, x0, t, noise, alphas_cumprod))[1])
    run_train(monkeypatch, *tiny(faces, tmp_path / "out", "--ema", 0))
    images = read_image_source(faces, 32)[0].float() / 127.5 - 1
    mirrored = set()
    for epoch in (seen[:3], seen[3:]):
        which = [(i, flip) for one in torch.cat([x0 for x0, _, _ in epoch]) for i, image in enumerate(images)
                 for flip in (False, True) if torch.equal(one, image.flip(2) if flip else image)]
        assert sorted(i for i, _ in which) == list(range(12))
        mirrored.update(flip for _, flip in which)
    assert mirrored == {False, True}
    for x0, t, noise in seen:
        assert x0.dtype == torch.float32 and t.dtype == torch.int64 and (t >= 0).all() and (t < 1000).all()
        assert sorted((t // 250).tolist()) == [0, 1, 2, 3]  # a batch of four: one in each quarter
        assert noise.shape == x0.shape and 0.9 < noise.std() < 1.1
    assert len({t.sum().item() for _, t, _ in seen}) == len(seen) == 6
    last = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert all(torch.equal(value, last["ema"][name]) for name, value in last["model"].items())  # an average of one


def test_two_processes_train_together(faces, tmp_path, train_together):
    printed = train_together(("p2_ddim.train", tiny(faces, tmp_path / "out", "--dry_run")))  # a whole one: test_p1.py
    assert "12 images" in printed and "2 process(es)" in printed and printed.count("dry run: two") == 1


def test_training_lowers_the_loss_and_a_dry_run_writes_nothing(faces, tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, *tiny(faces, tmp_path / "out", "--epochs", 12, "--lr", 3e-3, "--save_every", 12))
    losses = [row["loss"] for row in rows(tmp_path / "out")]
    assert losses[-1] < 0.9 * losses[0]  # 0.77 to 0.82 with eight seeds
    run_train(monkeypatch, *tiny(faces, tmp_path / "dry", "--dry_run"))
    assert "dry run: two steps" in capsys.readouterr().out and not (tmp_path / "dry").exists()


@pytest.mark.parametrize("flags, message", [
    (["--data_dir", "nowhere"], "neither a folder nor a zip"), (["--data_dir", ROOT / "tests/data"], "holds no images"),
    (["--resume"], "no training to go on with"), (["--size", 40], "multiple of 32"), (["--channel", 6], "multiple of"),
    (["--batch_size", 13], "larger than the 12"), (["--amp", "fp16"], "needs a GPU"),
    (["--output_dir", __file__], "is a file")])
def test_bad_training_flags_get_a_sentence(faces, tmp_path, monkeypatch, flags, message):
    with pytest.raises(UserError, match=message):
        run_train(monkeypatch, *tiny(faces, tmp_path / "out", *flags))


def test_the_committed_checkpoint_is_what_train_py_writes(monkeypatch):
    content = files.load_checkpoint(FACE64, "p2_ddim", ["config", "recipe", "metrics", "ema"])
    lines = files.read_jsonl(FACE64.parent / "metrics.jsonl")
    assert content["config"] == dict(channel=32, size=64) and content["metrics"] == lines[-1:]
    monkeypatch.setattr(sys, "argv", ["train.py", "--data_dir", "faces"])
    assert content["recipe"] == dict(training.recipe(train.parse_args()), data=content["recipe"]["data"])
