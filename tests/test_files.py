"""files.py: writing whole or not at all, links and streams, checkpoints of ours and of others."""

import collections
import hashlib
import os
import threading

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import files
from transforms import to_uint8
from utils import UserError


# --- Writing ------------------------------------------------------------------------------------

def test_write_atomic_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    files.write_atomic(path, b"old")
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # as an ordinary new file, not a private one

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    def interrupted(*args):
        raise KeyboardInterrupt

    for failure, error, message in ((disk_full, UserError, "file.bin .No space left on device.; make room"),
                                    (interrupted, KeyboardInterrupt, None)):
        monkeypatch.setattr(os, "replace", failure)
        with pytest.raises(error, match=message):
            files.write_atomic(path, b"new content")
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.bin"]
    monkeypatch.undo()
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file.bin"]


def test_no_mode_is_changed(tmp_path, monkeypatch):
    """Some file systems refuse chmod."""
    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, lambda *args, **kwargs: pytest.fail("chmod was called"))
    files.write_atomic(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "end")
    for content in (b"first", b"second"):
        files.check_output_file(tmp_path / "link")
        files.write_atomic(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "end").read_bytes() == content
    assert os.listdir(tmp_path / "folder") == ["end"]


def test_streams_are_written_to_and_never_replaced(tmp_path):
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    files.check_output_file(pipe)
    files.write_atomic(pipe, b"content")
    reader.join(timeout=30)
    assert received == [b"content"] and pipe.is_fifo()

    with open(tmp_path / "open", "wb", buffering=0) as file:  # what /dev/stdout is in a shell with > open
        (tmp_path / "stdout").symlink_to(f"/dev/fd/{file.fileno()}")
        inode = os.fstat(file.fileno()).st_ino
        file.write(b"printed before, ")
        files.write_atomic(tmp_path / "stdout", b"content")
        files.write_atomic(f"/dev/fd/{file.fileno()}", b" twice")
        file.write(b", and after")
    assert (tmp_path / "stdout").is_symlink() and (tmp_path / "open").stat().st_ino == inode
    assert (tmp_path / "open").read_bytes() == b"printed before, content twice, and after"
    assert files.is_stream("/dev/null") and not files.is_stream(tmp_path) and not files.is_stream(tmp_path / "new")


def test_png_holds_what_torchvision_would_save(tmp_path):
    image = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    files.save_png(tmp_path / "ours.png", to_uint8(image))
    torchvision.utils.save_image(image, tmp_path / "theirs.png")
    with Image.open(tmp_path / "ours.png") as ours, Image.open(tmp_path / "theirs.png") as theirs:
        assert ours.mode == "RGB" and np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_output_paths(tmp_path):
    assert files.make_output_dir(tmp_path / "a" / "b c").is_dir()
    assert os.listdir(tmp_path / "a" / "b c") == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        files.make_output_dir(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write to the output folder"):
        files.make_output_dir(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="is a folder; name a file"):
        files.check_output_file(tmp_path)
    files.check_output_file(tmp_path / "new" / "pred.csv")
    assert (tmp_path / "new").is_dir()


def test_a_digest_is_the_start_of_the_whole_files_sha256(tmp_path):
    content = bytes(range(256)) * 4097  # more than is read at once
    (tmp_path / "file").write_bytes(content)
    assert files.digest_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()[:8]


# --- Checkpoints --------------------------------------------------------------------------------

def test_checkpoint_comes_back(tmp_path):
    path = tmp_path / "last.pt"
    ema = {"weight": torch.arange(6.0).reshape(3, 2), "half": torch.arange(4.0).half()}
    files.save_checkpoint(path, kind="p1_ddpm", config={"widths": [32, 64], "lr": 1e-3}, ema=ema, step=7)
    content = files.load_checkpoint(path, "p1_ddpm", ["config", "ema"])
    assert content["format_version"] == files.CHECKPOINT_VERSION and content["step"] == 7
    assert content["config"] == {"widths": [32, 64], "lr": 1e-3}
    assert all(torch.equal(content["ema"][key], ema[key]) for key in ema)
    with pytest.raises(UserError, match="not a checkpoint of p3_dann, whose top level holds format_version, kind"):
        files.load_checkpoint(path, "p3_dann", ["ema"])
    with pytest.raises(UserError, match="lacks optimizer, scaler"):
        files.load_checkpoint(path, "p1_ddpm", ["config", "optimizer", "scaler"])
    files.save_checkpoint(path, kind="p1_ddpm", config={}, recipe=None, ema=ema)
    with pytest.raises(UserError, match="lacks recipe"):
        files.load_checkpoint(path, "p1_ddpm", ["config", "recipe"])
    torch.save({"format_version": 1, "kind": "p1_ddpm"}, path)
    with pytest.raises(UserError, match="has format 1, this code reads format 2"):
        files.load_checkpoint(path, "p1_ddpm", [])


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "last.pt", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_size, path.exists())))
    files.save_checkpoint(path, kind="p1_ddpm", ema={"weight": torch.zeros(500)})
    assert synced == [(path.stat().st_size, False)]


class Malicious:
    """Unpickling it would create the folder `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    torch.save({"kind": "p1_ddpm", "ema": Malicious(str(tmp_path / "ran"))}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil.pt holds more than tensors and plain values \(posix.mkdir\)"):
        files.load_checkpoint(tmp_path / "evil.pt", "p1_ddpm", ["ema"])
    assert not (tmp_path / "ran").exists()
    kwargs = {} if torch.__version__.startswith("2.0") else {"weights_only": False}
    torch.load(tmp_path / "evil.pt", **kwargs)  # the file is dangerous indeed
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("foreign, name", [(np.zeros(3), "numpy"), (np.float64(1), "numpy"),
                                           (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear")])
def test_what_is_more_than_tensors_is_named(tmp_path, foreign, name):
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "other": foreign}, tmp_path / "file.pt")
    with pytest.raises(UserError, match=rf"holds more than tensors and plain values \({name}.*save tensors alone"):
        files.load_torch(tmp_path / "file.pt")


@pytest.mark.filterwarnings("ignore")  # PyTorch's own about such tensors
@pytest.mark.parametrize("change, how", [
    (lambda x: x.to_sparse(), "of the layout torch.sparse_coo"), (lambda x: x.to("meta"), "without values"),
    (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "that is quantized"),
    (lambda x: torch.nested.nested_tensor([x, x]), "that is nested")])
def test_tensors_that_cannot_be_computed_with_are_refused(tmp_path, monkeypatch, change, how):
    content = {"net": [change(torch.ones(2, 3))]}
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: content)  # PyTorch 2.0 cannot load all of them
    (tmp_path / "file.pt").touch()
    with pytest.raises(UserError, match=f"file.pt holds a tensor {how}"):
        files.load_torch(tmp_path / "file.pt")


def test_missing_damaged_and_foreign_files(tmp_path):
    files.save_checkpoint(tmp_path / "good.pt", kind="p1_ddpm", config={}, ema={"weight": torch.zeros(500)})
    whole = (tmp_path / "good.pt").read_bytes()
    for content in (b"", b"text", whole[:len(whole) // 2]):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(UserError, match="bad.pt is damaged"):
            files.load_torch(tmp_path / "bad.pt")
    header = b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "bad.pt").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="safetensors"):
        files.load_torch(tmp_path / "bad.pt")
    with pytest.raises(UserError, match="there is no checkpoint .*gone.pt"):
        files.load_checkpoint(tmp_path / "gone.pt", "p1_ddpm", ["ema"])
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(UserError, match="not a checkpoint of p1_ddpm, which holds a Tensor"):
        files.load_checkpoint(tmp_path / "tensor.pt", "p1_ddpm", ["ema"])


# --- Weights in whatever wrapping ---------------------------------------------------------------

WEIGHTS = {"first.weight": torch.ones(2, 3), "first.bias": torch.ones(2), "last.weight": torch.ones(1, 2)}
OTHER = {name: torch.zeros_like(value) for name, value in WEIGHTS.items()}


def prefixed(prefix, weights=WEIGHTS):
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize("content", [
    WEIGHTS, collections.OrderedDict(WEIGHTS), {**WEIGHTS, "epoch": 3},
    *({key: WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 3} for key in
      ("state_dict", "model_state_dict", "model", "net", "unet", "generator", "weights", "params_ema", "Parameters")),
    *(prefixed(prefix) for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.",
                                      "module.module.", "model.", "net.model.")),
    {"state_dict": prefixed("model.module.")},
    {"ema": {"shadow": WEIGHTS, "updates": 3}, "model": OTHER}, {"model": OTHER, "ema_model": WEIGHTS},
    {"model": OTHER, "shadow": prefixed("module.")},
    {"model": OTHER, "swa": {"n_averaged": torch.tensor(3), **prefixed("module.")}}, {"model": OTHER, "ema": [WEIGHTS]},
    [WEIGHTS], (WEIGHTS, {"epoch": 3}), {"networks": {"unet": [prefixed("module.")]}},
    {"step": 3, "model": prefixed("model.", OTHER),  # lucidrains
     "ema": {**prefixed("ema_model."), **prefixed("online_model.", OTHER), "initted": torch.tensor(True)}},
])
def test_weights_are_found_in_any_wrapping(content):
    found = files.find_weights(content, WEIGHTS, "file.pt")
    assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("content, message", [
    ({"net": {"conv.weight": torch.ones(1)}, "lr": 1.0}, "file.pt does not hold .*whose top level holds net, lr"),
    ([1, 2], "which holds a list"), ({}, "whose top level holds nothing"),
    ({str(i): i for i in range(9)}, "0, 1, 2, 3, 4 and 4 more"),
])
def test_what_a_file_without_the_weights_holds_is_said(content, message):
    with pytest.raises(UserError, match=message):
        files.find_weights(content, WEIGHTS, "file.pt")


def test_weights_that_do_not_fit_are_named():
    layers = dict(first=torch.nn.Linear(3, 2), last=torch.nn.Linear(2, 1, bias=False))
    model = torch.nn.Sequential(collections.OrderedDict(layers))
    files.load_weights(model, {"net": prefixed("module.")}, "file.pt")
    assert torch.equal(model.last.weight, WEIGHTS["last.weight"])
    wrong = {"first.weight": torch.ones(2, 4), "first.bias": torch.ones(2), "odd": torch.ones(1)}
    with pytest.raises(UserError, match=r"first.weight is \(2, 4\) and should be \(2, 3\); last.weight is missing .*; "
                                        r"odd is \(1,\) and should be absent"):
        files.load_weights(model, wrong, "file.pt")
    with pytest.raises(UserError, match="file.pt does not hold the weights .* which holds a NoneType"):
        files.load_weights(model, None, "file.pt")
    with pytest.raises(UserError, match=r"first.bias is missing and should be \(2,\)"):
        files.load_weights(model, {**WEIGHTS, "first.bias": None}, "file.pt")
    with pytest.raises(UserError, match=r"file.pt hold NaN or infinity \(first.bias\)"):
        files.load_weights(model, {**WEIGHTS, "first.bias": torch.tensor([1.0, float("nan")])}, "file.pt")
