"""startup.py and utils.py: threads, the schedule's values, keyed noise, a user's mistakes, streams that fail."""

import argparse
import errno
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import utils
from utils import UserError

import numpy as np
import pytest
import torch


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


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utils.pick_device("auto").type == utils.pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="--device cuda .* use --device cpu"):
        utils.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    assert utils.pick_device("auto").type == utils.pick_device("cuda").type == "cuda"
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_autocast_only_with_a_low_precision():
    weights = torch.ones(4, 4)
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


# --- A user's mistake ---------------------------------------------------------------------------

@pytest.mark.parametrize("action, status, message", [
    ("raise utils.UserError('the file x is odd; mend it')", 2, "script.py: error: the file x is odd; mend it\n"),
    ("raise OSError(28, 'No space left on device', 'x')", 2,
     "script.py: error: [Errno 28] No space left on device: 'x'\n"),
    ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB.\\nSee more')", 2,
     "script.py: error: CUDA out of memory. Tried to allocate 2 GiB.; free some or lower --batch_size\n"),
    ("kill(signal.SIGTERM)", 130, "\nscript.py: interrupted\n"),
    ("kill(signal.SIGINT)", 130, "\nscript.py: interrupted\n"),
    ("kill(signal.SIGHUP)", 130, "\nscript.py: interrupted\n"),
    ("print('fine')", 0, ""),
])
def test_exit_status_and_message(tmp_path, monkeypatch, capsys, action, status, message):
    def kill(number):
        assert callable(signal.getsignal(number))  # or the tests themselves would end here
        os.kill(os.getpid(), number)

    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup's SIGHUP
    returned = 0
    try:
        utils.run(lambda: exec(action, {"utils": utils, "kill": kill, "signal": signal}))
    except SystemExit as stopped:
        returned = stopped.code
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    assert (returned, capsys.readouterr().err) == (status, message)


def test_a_bug_keeps_its_traceback():
    for bug, error in (("1 / 0", ZeroDivisionError), ("torch.ones(2) + torch.ones(3)", RuntimeError)):
        with pytest.raises(error):
            utils.run(lambda: eval(bug, {"torch": torch}))


def test_argument_types(capsys):
    parser = utils.argument_parser("What it does.\n\n    python3 x.py")
    parser.add_argument("--steps", type=utils.int_between(1), default=20, help="number of steps")
    parser.add_argument("--eta", type=utils.float_between(0, 1), default=0.0, help="noise")
    parser.add_argument("--output_dir", type=utils.nonempty_path, help="a folder")
    assert parser.parse_args(["--steps", "1", "--eta", "1"]) == argparse.Namespace(
        steps=1, eta=1.0, output_dir=None)
    for bad in (["--steps", "0"], ["--steps", "2.5"], ["--eta", "1.01"], ["--eta", "nan"], ["--eta", "x"],
                ["--output_dir", ""]):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(bad)
        assert stopped.value.code == 2
    assert "What it does.\n\n    python3 x.py" in parser.format_help() and "(default: 20)" in parser.format_help()


# --- Streams and the start ----------------------------------------------------------------------

def script(tmp_path, body):
    """Writes `body` as a script that can import from this repository; returns its path."""
    path = tmp_path / "script.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(Path(utils.__file__).parent)!r})\n{body}\n")
    return path


def test_a_script_outlives_the_reader_of_what_it_prints_and_a_stream_that_cannot_encode(tmp_path):
    path = script(tmp_path, "import utils\n"
                            "def main():\n"
                            "    print('\\u76ee' * 3, flush=True)\n"
                            "    for _ in range(20000): print('x' * 20)\n"
                            f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
                            "utils.run(main)")
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(path))} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.stdout, done.stderr) == ("\\u76ee\\u76ee\\u76ee\n0\n", "")
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("body, status", [("pass", 0), ("sys.exit(1)", 1), ("sys.exit()", 0)])
def test_a_script_s_own_status_counts_unless_what_it_printed_is_lost(tmp_path, body, status):
    path = script(tmp_path, f"import utils\ndef main():\n    print('text')\n    {body}\nutils.run(main)")
    assert subprocess.run([sys.executable, path], stdout=subprocess.DEVNULL, timeout=300).returncode == status
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, path], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
        assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_stream_whose_reader_is_gone_is_forgiven_and_a_full_disk_is_not(tmp_path, number):
    with open(tmp_path / "stream", "w") as stream:
        def fail(text):
            raise OSError(number, "")
        output = utils.Output(SimpleNamespace(write=fail, fileno=stream.fileno))
        output.write("text")
        assert (output.error is None) == (number != errno.ENOSPC)
        os.write(stream.fileno(), b"more")
    assert (tmp_path / "stream").read_bytes() == b""
    utils.Output(None).write("what Python has for a stream that is closed from the start")


def test_threads_sleep_soon_unless_the_user_says_otherwise(tmp_path):
    body = ("import startup, os\nprint(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'),"
            " 'torch' in sys.modules)")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "KMP", "OMP"))}
    path = script(tmp_path, body)
    for mine, printed in (({}, "1000 1 False"), ({"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "3"}, "7 3 False"),
                          ({"OMP_WAIT_POLICY": "ACTIVE"}, "None None False")):
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300,
                              env={**clean, **mine})
        assert done.stdout.strip() == printed


def test_a_python_without_the_packages_says_which_one_it_is(tmp_path):
    path = script(tmp_path, "print('first')\nimport utils\nprint('never')")
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which may hold packages
    done = subprocess.run([sys.executable, "-S", path], env=own, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "first\n")
    assert f"python3 is {sys.executable}, which lacks torch, torchvision" in done.stderr
    assert "pip install -r" in done.stderr and "Traceback" not in done.stderr


def test_nan_is_said_with_the_name_of_the_image():
    values = torch.zeros(3, 2, 2)
    assert utils.require_finite(values, "abc") is values
    values[1, 0, 1] = float("inf")
    with pytest.raises(UserError, match="b.png comes out as NaN: the weights are broken"):
        utils.require_finite(values, ["a.png", "b.png", "c.png"])
