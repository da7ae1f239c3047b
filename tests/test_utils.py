"""utils.py: the schedule's values, keyed noise, atomic files, safe loading, weight averaging, a user's mistakes."""

import argparse
import os
import signal
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import utils
from utils import UserError


def test_beta_scheduler_values():
    betas = utils.beta_scheduler()
    assert betas.dtype == torch.float64 and betas.shape == (1000,)
    assert betas[0].item() == 1e-4 and betas[-1].item() == pytest.approx(2e-2, rel=1e-12)
    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    assert np.allclose(torch.cumprod(1 - betas, 0).numpy(), alphas_cumprod, rtol=1e-12, atol=0)
    for t, value in ((0, 0.999900000000), (1, 0.999780092072), (21, 0.993220357296), (41, 0.978868755331),
                     (961, 8.5730961e-5), (981, 5.7877932e-5)):
        assert torch.cumprod(1 - betas, 0)[t].item() == pytest.approx(value, rel=1e-7)
    assert torch.equal(utils.beta_scheduler(3, 0.1, 0.3), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))


# --- Randomness and devices ---------------------------------------------------------------------

def test_noise_of_an_image_depends_on_seed_and_index_alone():
    together = utils.randn(utils.image_generators(7, range(5)), (3, 4, 4))
    assert together.shape == (5, 3, 4, 4) and together.dtype == torch.float32
    apart = utils.randn(utils.image_generators(7, [3]), (3, 4, 4))
    assert torch.equal(together[3:4], apart)
    assert not torch.equal(apart, utils.randn(utils.image_generators(8, [3]), (3, 4, 4)))
    generators = utils.image_generators(7, [3])
    assert torch.equal(utils.randn(generators, (3, 4, 4)), apart)
    assert not torch.equal(utils.randn(generators, (3, 4, 4)), apart)  # a generator goes on


def test_noise_is_standard_normal():
    noise = utils.randn(utils.image_generators(0, range(64)), (3, 28, 28)).double()
    assert abs(noise.mean()) < 0.01 and abs(noise.var() - 1) < 0.02
    assert (noise.flatten(1) @ noise.flatten(1).T / 2352 - torch.eye(64)).abs().max() < 0.1  # images are independent


def test_seed_all_is_a_function_of_its_keys():
    def draw(*keys):
        utils.seed_all(*keys)
        return torch.randn(4).tolist()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({tuple(draw(*keys)) for keys in ((0, 5, 1), (0, 5, 2), (0, 1, 5), (1, 5, 1), (0, 6, 1))}) == 5


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utils.pick_device("auto").type == utils.pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="--device cuda .* use --device cpu"):
        utils.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert utils.pick_device("auto").type == utils.pick_device("cuda").type == "cuda"


def test_autocast_only_with_a_low_precision():
    weights = torch.randn(4, 4)
    with utils.autocast(torch.device("cpu"), torch.bfloat16):
        assert (weights @ weights).dtype == torch.bfloat16
    with utils.autocast(torch.device("cpu"), None):
        assert (weights @ weights).dtype == torch.float32


def test_amp_dtype(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert utils.amp_dtype("off", cuda) is None and utils.amp_dtype("bf16", cpu) == torch.bfloat16
    for fast, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(utils, "cpu_has_bfloat16", lambda: fast)
        assert utils.amp_dtype("auto", cpu) == dtype
    for capability, dtype in (((7, 5), torch.float16), ((8, 6), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert utils.amp_dtype("auto", cuda) == dtype
    assert utils.amp_dtype("fp16", cuda) == torch.float16
    with pytest.raises(UserError, match="--amp fp16 needs a GPU"):
        utils.amp_dtype("fp16", cpu)


def test_grad_scaler_passes_all_through_without_float16():
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for dtype in (None, torch.bfloat16):
        scaler = utils.grad_scaler(dtype)
        assert not scaler.is_enabled() and scaler.scale(torch.tensor(3.0)) == 3
        weight.grad = torch.ones(1)
        scaler.step(optimizer)
        scaler.update()
    assert weight.item() == 0


def test_in_batches_halves_a_batch_that_does_not_fit(capsys):
    def square(batch):
        if len(batch) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [item ** 2 for item in batch]

    batches = list(utils.in_batches(square, list(range(20)), 8))
    assert [item for batch, _ in batches for item in batch] == list(range(20))
    assert [item for _, result in batches for item in result] == [k ** 2 for k in range(20)]
    assert {len(batch) for batch, _ in batches} == {2}
    assert "going on with batches of 2" in capsys.readouterr().err


@pytest.mark.parametrize("message, error", [("CUDA out of memory", utils.UserError),
                                            ("an illegal memory access was encountered", RuntimeError)])
def test_in_batches_gives_up_when_one_item_does_not_fit_and_hides_no_other_error(message, error):
    sizes = []

    def fail(batch):
        sizes.append(len(batch))
        raise RuntimeError(message)

    with pytest.raises(error, match=message):
        list(utils.in_batches(fail, list(range(8)), 4))
    assert sizes == ([4, 2, 1] if error is utils.UserError else [4])


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert utils.init_distributed("cpu") == (torch.device("cpu"), 0, 1)


# --- Files --------------------------------------------------------------------------------------

def test_write_atomic_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    utils.write_atomic(path, b"old")
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # as an ordinary new file, not a private one

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    def interrupted(*args):
        raise KeyboardInterrupt

    for failure, error, message in ((disk_full, utils.UserError, "file.bin .No space left on device.; make room"),
                                    (interrupted, KeyboardInterrupt, None)):
        monkeypatch.setattr(os, "replace", failure)
        with pytest.raises(error, match=message):
            utils.write_atomic(path, b"new content")
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.bin"]
    monkeypatch.undo()
    utils.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file.bin"]


def test_png_holds_what_torchvision_would_save(tmp_path):
    image = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    utils.save_png(tmp_path / "ours.png", utils.to_uint8(image))
    torchvision.utils.save_image(image, tmp_path / "theirs.png")
    with Image.open(tmp_path / "ours.png") as ours, Image.open(tmp_path / "theirs.png") as theirs:
        assert ours.mode == "RGB" and np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_make_output_dir(tmp_path):
    assert utils.make_output_dir(tmp_path / "a" / "b c").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        utils.make_output_dir(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write to the output folder"):
        utils.make_output_dir(tmp_path / "file" / "below")
    assert os.listdir(tmp_path / "a" / "b c") == []


# --- Training -----------------------------------------------------------------------------------

def test_warmup_cosine_rises_then_falls_to_zero():
    rates = [utils.warmup_cosine(step, 100, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and max(rates) == 1
    assert rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


# --- Checkpoints --------------------------------------------------------------------------------

def test_checkpoint_comes_back(tmp_path):
    path = tmp_path / "last.pt"
    ema = {"weight": torch.randn(3, 2), "half": torch.randn(4).half()}
    utils.save_checkpoint(path, kind="p1_ddpm", config={"widths": [32, 64], "lr": 1e-3}, ema=ema, step=7)
    content = utils.load_checkpoint(path, "p1_ddpm", ["config", "ema"])
    assert content["format_version"] == utils.CHECKPOINT_VERSION and content["step"] == 7
    assert content["config"] == {"widths": [32, 64], "lr": 1e-3}
    assert all(torch.equal(content["ema"][key], ema[key]) for key in ema)
    with pytest.raises(UserError, match="not a checkpoint of p3_dann"):
        utils.load_checkpoint(path, "p3_dann", ["ema"])
    with pytest.raises(UserError, match="lacks optimizer, scheduler"):
        utils.load_checkpoint(path, "p1_ddpm", ["config", "optimizer", "scheduler"])


class Malicious:
    """Unpickling it would create the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    torch.save({"kind": "p1_ddpm", "ema": Malicious(str(tmp_path / "ran"))}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt is damaged or not made by torch.save"):
        utils.load_checkpoint(tmp_path / "evil.pt", "p1_ddpm", ["ema"])
    assert not (tmp_path / "ran").exists()
    kwargs = {} if torch.__version__.startswith("2.0") else {"weights_only": False}
    torch.load(tmp_path / "evil.pt", **kwargs)  # the file is dangerous indeed
    assert (tmp_path / "ran").exists()


def test_missing_damaged_and_foreign_checkpoints(tmp_path):
    utils.save_checkpoint(tmp_path / "good.pt", kind="p1_ddpm", config={}, ema={"weight": torch.randn(500)})
    whole = (tmp_path / "good.pt").read_bytes()
    for content in (b"", b"text", whole[:len(whole) // 2]):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(UserError, match="bad.pt is damaged"):
            utils.load_torch(tmp_path / "bad.pt")
    with pytest.raises(UserError, match="there is no checkpoint .*gone.pt"):
        utils.load_checkpoint(tmp_path / "gone.pt", "p1_ddpm", ["ema"])
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(UserError, match="not a checkpoint of p1_ddpm"):
        utils.load_checkpoint(tmp_path / "tensor.pt", "p1_ddpm", ["ema"])


def test_ema_follows_its_formula_and_resumes():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ema, restored = utils.EMA(model, 0.9), utils.EMA(model, 0.9)
    expected = {key: value.double().clone() for key, value in model.state_dict().items()}
    for update in range(200):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(5, 3))
        ema.update(model)
        if update == 99:
            restored.load_state_dict(ema.state_dict())
        elif update > 99:
            restored.update(model)
        decay = min(0.9, (1 + update) / (10 + update))
        for key, value in model.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value.double()
    expected["1.num_batches_tracked"] = 200  # a counter is copied, not averaged
    for key, value in ema.shadow.items():
        torch.testing.assert_close(value.double(), torch.as_tensor(expected[key]).double(), rtol=1e-4, atol=1e-5)
        assert torch.equal(restored.shadow[key], value), key
        assert value.data_ptr() != model.state_dict()[key].data_ptr()


# --- A user's mistake ---------------------------------------------------------------------------

@pytest.mark.parametrize("action, status, message", [
    ("raise utils.UserError('the file x is odd; mend it')", 2, "script.py: error: the file x is odd; mend it\n"),
    ("raise OSError(28, 'No space left on device', 'x')", 2,
     "script.py: error: [Errno 28] No space left on device: 'x'\n"),
    ("os.kill(os.getpid(), signal.SIGTERM)", 130, "\nscript.py: interrupted\n"),
    ("os.kill(os.getpid(), signal.SIGINT)", 130, "\nscript.py: interrupted\n"),
    ("print('fine')", 0, ""),
])
def test_exit_status_and_message(tmp_path, monkeypatch, capsys, action, status, message):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    returned = 0
    try:
        utils.run(lambda: exec(action, {"utils": utils, "os": os, "signal": signal}))
    except SystemExit as stopped:
        returned = stopped.code
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    assert (returned, capsys.readouterr().err) == (status, message)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        utils.run(lambda: 1 / 0)


def test_argument_types(capsys):
    parser = utils.argument_parser("What it does.\n\n    python3 x.py")
    parser.add_argument("--steps", type=utils.int_at_least(1), default=20, help="number of steps")
    parser.add_argument("--eta", type=utils.float_between(0, 1), default=0.0, help="noise")
    assert parser.parse_args(["--steps", "1", "--eta", "1"]) == argparse.Namespace(steps=1, eta=1.0)
    for bad in (["--steps", "0"], ["--steps", "2.5"], ["--eta", "1.01"], ["--eta", "nan"], ["--eta", "x"]):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(bad)
        assert stopped.value.code == 2
    assert "What it does.\n\n    python3 x.py" in parser.format_help() and "(default: 20)" in parser.format_help()
