"""A script's manners: the user's mistakes, argument types, devices and precision, randomness.

Nothing here knows about digits, faces or domains. Scripts import this before torch, see startup.py.
"""

import startup  # noqa: F401  what it sets has to be set before torch is imported

import argparse
import contextlib
import errno
import functools
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch

OUT_OF_MEMORY = re.compile("out of memory|not enough memory|allocate memory|ALLOC_FAILED")  # CUDA's word, or the CPU's


def beta_scheduler(n_timestep=1000, linear_start=1e-4, linear_end=2e-2):
    """Linear noise schedule beta_1 ... beta_T (Ho et al. 2020, section 4), as the course defines it.

    Returns a float64 tensor of shape (n_timestep,); cast it only where it is used.
    """
    return torch.linspace(linear_start, linear_end, n_timestep, dtype=torch.float64)


# --- A user's mistake ---------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend; the message is one sentence that names the path and the mend."""


class Output:
    """A text stream that outlives its reader: the work of a script is in its files, not in what it prints.

    Characters that the stream cannot encode are escaped; after an error nothing is printed. That a reader or a terminal
    is gone is forgiven; any other error, such as a full disk, is kept in `error`.
    """
    error = None

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None where the caller has closed it
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._try(self.stream.write, text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, function, *args):
        try:
            function(*args)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # for what Python writes at its end
            if error.errno not in (errno.EPIPE, errno.EIO):
                self.error = error


def run(main):
    """Calls `main()` as a script's body. A UserError, or an error of the file system such as a full disk, becomes one
    sentence on stderr and exit status 2; an interrupt (Ctrl-C, SIGTERM, a closed terminal) removes temporary files on
    its way out with exit status 130."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows knows no SIGHUP
        if number and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores it, and so it stays
            signal.signal(number, signal.default_int_handler)
    status = 0
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        try:
            try:
                main()
            except SystemExit as stop:  # argparse's, and what a script says by its status
                status = stop.code or 0
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
                    raise
                raise UserError(f"{(str(error) or 'out of memory').splitlines()[0]}; free some or lower --batch_size")
            sys.stdout.flush()
            if sys.stdout.error:
                raise sys.stdout.error
        except (UserError, OSError) as error:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
            status = 2
        except KeyboardInterrupt:
            print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
            status = 130
        sys.stdout.flush()
        sys.stderr.flush()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Gloo's threads may still let go of tensors, for which they need Python's lock. While Python shuts down that
        # aborts the process, and destroy_process_group can wait for such a thread for ever. So there is no shutdown.
        os._exit(status)
    sys.exit(status)


# --- Arguments ----------------------------------------------------------------------------------

def argument_parser(doc):
    """An ArgumentParser whose --help is the module docstring `doc` followed by the flags and their defaults."""
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass
    return argparse.ArgumentParser(description=doc, formatter_class=Formatter)


def nonempty_path(text):
    """An argparse type: a Path. An empty text, such as an unset variable gives, is refused: it would mean "here"."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; is a variable not set?")
    return Path(text)


def int_between(lowest, highest=float("inf")):
    """An argparse type: an integer in [lowest, highest]."""
    def integer(text):
        if not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"{text} is not an integer from {lowest} to {highest}")
        return int(text)
    return integer


def float_between(lowest, highest=float("inf")):
    """An argparse type: a finite number in [lowest, highest]."""
    def number(text):
        if not (lowest <= float(text) <= highest and np.isfinite(float(text))):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {lowest} to {highest}")
        return float(text)
    return number


# --- Devices and precision ----------------------------------------------------------------------

def pick_device(name="auto"):
    """torch.device for 'auto' (CUDA when there is one, else the CPU), 'cpu' or 'cuda', a UserError where there is none.

    Float32 means float32 on every GPU: TF32, which newer ones would take instead, is switched off.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for but PyTorch sees no CUDA device here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


@functools.cache
def cpu_has_bfloat16():
    """Whether this CPU multiplies bfloat16 in hardware (Linux says so); elsewhere bfloat16 is slower than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(f"{unit}_bf16" in cpuinfo.read_text() for unit in ("avx512", "amx"))


def amp_dtype(name, device):
    """The low precision for --amp: 'off' -> None, 'bf16', 'fp16', or 'auto': what `device` computes fast.

    UserError for fp16 on a CPU.
    """
    if name == "auto":
        if device.type == "cuda":  # bfloat16 came with compute capability 8; an RTX 2080 Ti has 7.5
            name = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
        else:
            name = "bf16" if cpu_has_bfloat16() else "off"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 or --amp off")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def add_amp_argument(parser, default="auto"):
    """The flag --amp, for amp_dtype."""
    parser.add_argument("--amp", nargs="?", const="auto", choices=["auto", "off", "bf16", "fp16"], default=default,
                        help="mixed precision; auto, or --amp alone, takes what the device does fast")


def autocast(device, dtype):
    """Mixed precision in `dtype` on `device`; a context that does nothing when `dtype` is None."""
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def in_batches(function, items, batch_size):
    """Yields (batch, function(batch)) over the list `items`; out of memory halves the batch and goes on."""
    start = 0
    while start < len(items):
        batch = items[start:start + batch_size]
        try:
            result = function(batch)
        except RuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            if len(batch) == 1:
                raise UserError(f"the memory does not hold a single image ({str(error).splitlines()[0]}); "
                                "free some, or take another --device")
        else:
            yield batch, result
            start += len(batch)
            continue
        batch_size = len(batch) // 2
        torch.cuda.empty_cache()  # only here, where the error and the tensors that it held on to are gone
        print(f"out of memory: going on with batches of {batch_size}", file=sys.stderr)


def require_finite(values, names):
    """`values` (B, ...) as they are; UserError with the first of the B `names` whose values hold NaN or infinity."""
    finite = values.flatten(1).isfinite().all(dim=1).tolist()
    if not all(finite):
        raise UserError(f"{names[finite.index(False)]} comes out as NaN: the weights are broken, or too large for a "
                        "low precision; try --amp off where there is --amp, or other weights")
    return values


# --- Randomness ---------------------------------------------------------------------------------

def image_generators(seed, indices, stream=0):
    """One CPU generator for each image, keyed by (seed, index, stream): an image does not depend on its batch."""
    return [np.random.default_rng([seed, int(index), stream]) for index in indices]


def randn(generators, shape, device="cpu"):
    """Standard normal float32 tensor of shape (len(generators), *shape), one generator per image."""
    noise = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
    return torch.from_numpy(noise).to(device)
