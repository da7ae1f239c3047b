"""What at least two of the three problems share: the noise schedule, randomness, devices,
checkpoints, weight averaging, several processes, image files and the handling of a user's mistake.

Pure functions and small classes; nothing here knows about digits, faces or domains.
"""

import argparse
import contextlib
import io
import math
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

CHECKPOINT_VERSION = 1


def beta_scheduler(n_timestep=1000, linear_start=1e-4, linear_end=2e-2):
    """Linear noise schedule beta_1 ... beta_T (Ho et al. 2020, section 4), as the course defines it.

    Returns a float64 tensor of shape (n_timestep,); cast it only where it is used.
    """
    return torch.linspace(linear_start, linear_end, n_timestep, dtype=torch.float64)


# --- A user's mistake ---------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend; the message is one sentence that names the path and the mend."""


def run(main):
    """Calls `main()` as a script's body.

    A UserError, and an error of the file system such as a full disk, becomes one sentence on stderr and exit
    status 2; an interrupt (Ctrl-C, SIGTERM, a closed terminal) removes temporary files on its way out with exit
    status 130.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows knows no SIGHUP
        if number and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores it, and so it stays
            signal.signal(number, signal.default_int_handler)
    status = 0
    try:
        main()
    except (UserError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        status = 130
    if dist.is_available() and dist.is_initialized():
        # Gloo's threads may still let go of tensors, for which they need Python's lock. While Python shuts down that
        # aborts the process, and destroy_process_group can wait for such a thread for ever. So Python does not shut down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def argument_parser(doc):
    """An ArgumentParser whose --help is the module docstring `doc` followed by the flags and their defaults."""
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass
    return argparse.ArgumentParser(description=doc, formatter_class=Formatter)


def int_at_least(lowest):
    """An argparse type: an integer that is not below `lowest`."""
    def integer(text):
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is below {lowest}")
        return int(text)
    return integer


def float_between(lowest, highest=float("inf")):
    """An argparse type: a finite number in [lowest, highest]."""
    def number(text):
        if not (lowest <= float(text) <= highest and np.isfinite(float(text))):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {lowest} to {highest}")
        return float(text)
    return number


def make_output_dir(path):
    """Creates the folder `path` if need be and returns it as a Path; UserError when it cannot be written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        raise UserError(f"the output path {path} is a file; name a folder")
    except OSError as error:
        raise UserError(f"cannot write to the output folder {path} ({error.strerror}); name another one")
    return path


# --- Devices and randomness ---------------------------------------------------------------------

def pick_device(name="auto"):
    """torch.device for 'auto' (CUDA when there is one, else the CPU), 'cpu' or 'cuda'.

    Float32 means float32 on every GPU: TF32, which newer ones would take instead, is switched off.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for but PyTorch sees no CUDA device here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def seed_all(*keys):
    """Seeds PyTorch's generators on every device from the non-negative integers `keys`.

    Training calls it with (seed, step, rank) before every step. Randomness is then a function of the
    step and not of history, so a resumed run needs no saved generator state to go on bit for bit.
    """
    torch.manual_seed(int(np.random.SeedSequence(keys).generate_state(1)[0]))


def image_generators(seed, indices):
    """One CPU generator for each image, keyed by (seed, index): an image does not depend on its batch."""
    return [np.random.default_rng([seed, int(index)]) for index in indices]


def randn(generators, shape, device="cpu"):
    """Standard normal float32 tensor of shape (len(generators), *shape), one generator per image."""
    noise = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
    return torch.from_numpy(noise).to(device)


def cpu_has_bfloat16():
    """Whether this CPU multiplies bfloat16 in hardware (Linux says so); elsewhere bfloat16 is slower than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(f"{unit}_bf16" in cpuinfo.read_text() for unit in ("avx512", "amx"))


def amp_dtype(name, device):
    """The low precision for --amp: 'off' -> None, 'bf16', 'fp16', or 'auto': what `device` computes fast."""
    if name == "auto":
        if device.type == "cuda":  # bfloat16 came with compute capability 8; an RTX 2080 Ti has 7.5
            name = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
        else:
            name = "bf16" if cpu_has_bfloat16() else "off"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 or --amp off")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device, dtype):
    """Mixed precision in `dtype` on `device`; a context that does nothing when `dtype` is None."""
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def grad_scaler(dtype):
    """Loss scaling for float16, whose small gradients would vanish; for other precisions it passes all through."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    return torch.cuda.amp.GradScaler(enabled=dtype == torch.float16)  # before PyTorch 2.3


def in_batches(function, items, batch_size):
    """Yields (batch, function(batch)) over the list `items`; out of memory halves the batch and goes on."""
    start = 0
    while start < len(items):
        batch = items[start:start + batch_size]
        try:
            result = function(batch)
        except RuntimeError as error:  # torch.cuda.OutOfMemoryError, or the CPU allocator's RuntimeError
            if not re.search("out of memory|not enough memory|allocate memory|ALLOC_FAILED", str(error)):
                raise
            if len(batch) == 1:
                raise UserError(f"the memory does not hold a single image ({str(error).splitlines()[0]}); free some, or "
                                "take another --device")
        else:
            yield batch, result
            start += len(batch)
            continue
        batch_size = len(batch) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # only here, where the error and the tensors that it held on to are gone
        print(f"out of memory: going on with batches of {batch_size}", file=sys.stderr)


def warmup_cosine(step, total, warmup):
    """The learning rate's factor at a step: linear warm-up, then half a cosine down to 0 at step `total`.

    A function of the step, so there is no scheduler whose state would have to be saved.
    """
    progress = max(0, step - warmup) / max(1, total - warmup)
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


# --- Several processes (torchrun) ---------------------------------------------------------------

def init_distributed(device_name="auto"):
    """Joins torchrun's processes, if there are any; returns (device, rank, world_size)."""
    device = pick_device(device_name)
    if "WORLD_SIZE" not in os.environ:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"torchrun starts more processes than the {torch.cuda.device_count()} GPUs here; "
                            "lower --nproc_per_node")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def sum_over_processes(tensor):
    """The sum of a tensor over all processes; each of them has to call this."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# --- Checkpoints --------------------------------------------------------------------------------

def write_atomic(path, data):
    """Writes the bytes `data` to `path` through a temporary file beside it: whole or not at all, or UserError."""
    path, temporary = Path(path), None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path} ({error.strerror}); make room, or name another place")
        raise


def save_checkpoint(path, **content):
    """Saves one dict of tensors and plain types with the format version, atomically."""
    buffer = io.BytesIO()
    torch.save({"format_version": CHECKPOINT_VERSION, **content}, buffer)
    write_atomic(path, buffer.getvalue())


def load_torch(path, what="file"):
    """torch.load on the CPU without running code from the file; UserError when it cannot be read."""
    if not Path(path).is_file():
        raise UserError(f"there is no {what} {path}; check the path, or run 'bash hw2_download.sh' if it is one of "
                        "this repository's checkpoints")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # zip, pickle and torch raise a dozen types on damaged or foreign files
        raise UserError(f"the {what} {path} is damaged or not made by torch.save ({type(error).__name__}); "
                        "fetch it again")


def load_checkpoint(path, kind, keys):
    """Loads a dict written by save_checkpoint with kind=`kind` (such as 'p1_ddpm') and the given keys."""
    checkpoint = load_torch(path, "checkpoint")
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != kind:
        raise UserError(f"{path} is not a checkpoint of {kind}; name one that {kind}/train.py wrote")
    if checkpoint.get("format_version") != CHECKPOINT_VERSION:
        raise UserError(f"the checkpoint {path} has format {checkpoint.get('format_version')}, this code reads format "
                        f"{CHECKPOINT_VERSION}; fetch both anew")
    missing = [key for key in keys if key not in checkpoint]
    if missing:
        raise UserError(f"the checkpoint {path} lacks {', '.join(missing)}; name a training's last.pt, which holds all")
    return checkpoint


def check_recipe(path, trained_with, recipe):
    """UserError when the training whose checkpoint is `path` is to go on with other settings than it began with."""
    other = {name: trained_with.get(name) for name in recipe if trained_with.get(name) != recipe[name]}
    if other:
        flags = (f"--{name} {' '.join(map(str, v)) or 'nothing' if isinstance(v, list) else v}" for name, v in other.items())
        raise UserError(f"{path} was trained with {' '.join(flags)}; resume it with the same flags")


def restore(parts, state):
    """Loads every part of the dict `parts` (model, ema, optimizer, scaler) from its entry in the checkpoint `state`.

    A loss scaler's state is empty where the training did not need one so far; then it starts anew.
    """
    for name, part in parts.items():
        if state[name]:
            part.load_state_dict(state[name])


class EMA:
    """Exponential moving average of a module's floating-point parameters and buffers.

    shadow <- decay * shadow + (1 - decay) * weights, where decay grows as (1 + n) / (10 + n) over the
    first updates so that the random initialisation is soon forgotten.
    """

    def __init__(self, model, decay):
        self.decay, self.updates = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.shadow[name].lerp_(value, 1 - decay)
            else:
                self.shadow[name].copy_(value)

    def state_dict(self):
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)


# --- Image files --------------------------------------------------------------------------------

def to_uint8(images):
    """Float images in [0, 1] to uint8 0..255, rounded to nearest as torchvision's save_image does."""
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def save_png(path, image):
    """Writes a uint8 tensor of shape (3, H, W) as an RGB PNG, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())
