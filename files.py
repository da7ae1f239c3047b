"""Files: written whole or not at all; checkpoints, ours and those that others have wrapped in their own ways.

A checkpoint is one dict of tensors and plain types with the same keys in every chapter:

    kind, format_version    which chapter's, see CHECKPOINT_VERSION
    config                  what builds the network
    recipe                  the flags that it was trained with
    metrics                 a list of dicts, the rows of metrics.jsonl (in a model.pt the last one alone)
    ema                     the averaged weights, a state dict (in a model.pt in half precision)
    step, model, optimizer, scaler      in a last.pt: what a training needs to go on
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch
from PIL import Image

from utils import UserError

CHECKPOINT_VERSION = 2


# --- Writing ------------------------------------------------------------------------------------

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


def check_output_file(path):
    """UserError unless the file `path` can be written; makes its folder if need be."""
    if Path(path).is_dir():
        raise UserError(f"the output path {path} is a folder; name a file")
    if not is_stream(path):
        make_output_dir(Path(os.path.realpath(path)).parent)


def other_rows(path, key, values=(), dtype=None):
    """The rows of the CSV file `path` with none of `values` in the column `key`; none where there is no file.

    dtype: of all columns; else `key` and the digests `checkpoint` and `networks` are text, and what the others hold
    decides.
    """
    import pandas as pd  # here, because most scripts that use this file do without
    if is_stream(path) or not Path(path).exists():
        return pd.DataFrame()
    try:
        table = pd.read_csv(path, dtype=dtype or {key: str, "checkpoint": str, "networks": str})
        return table[~table[key].isin(values)]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no table with a column {key} ({error}); name another --output")


def markdown_table(header, rows):
    """A Markdown table as text, of the lists of cells `header` and `rows`."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (header, ["---"] * len(header), *rows))


def lock(folder):
    """UserError when another living run writes into `folder`; held until this process ends or locks another one."""
    try:
        import fcntl
        if hasattr(lock, "handle"):
            os.close(lock.handle)
        lock.handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run writes into {folder}; let it end, or name another folder")
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass


def is_stream(path):
    """Whether `path` is a device, a pipe or an open file such as /dev/stdout: written to, never replaced."""
    special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    return special or _descriptor(path) is not None


def _descriptor(path):
    """The number of this process's open file that `path` names, such as 1 for /dev/stdout, or None."""
    for _ in range(40):  # as many links as Linux follows
        folder, name = os.path.split(os.path.abspath(path))
        folder = os.path.realpath(folder)
        if folder in (f"/proc/{os.getpid()}/fd", "/dev/fd") and name.isdecimal():
            return int(name)
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            return None
        path = os.path.join(folder, os.readlink(path))


def read_json(path):
    """What the JSON file `path` (a Path or zipfile.Path) holds."""
    if not path.is_file():
        raise UserError(f"there is no {path}; check the path")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no JSON file ({error}); mend it, or fetch it again")


def read_jsonl(path):
    """The rows of a training's record, a list of dicts."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_atomic(path, data, durable=False):
    """Writes the bytes `data` to the file `path`, at the end of its links: whole or not at all, or UserError.

    durable: also after a power cut, which takes a moment. A stream is written to as it is: an open file goes on after
    what has been printed.
    """
    stream, descriptor = is_stream(path), _descriptor(path)
    target = Path(os.path.realpath(path))
    temporary = path if stream else target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}")
    try:
        if descriptor is not None:
            sys.stdout.flush()
            temporary = os.dup(descriptor)  # opened by its path, a file would be cut off
        with open(temporary, "wb") as file:
            file.write(data)
            if durable and not stream:
                file.flush()
                os.fsync(file.fileno())
        if not stream:
            os.replace(temporary, target)
    except BaseException as error:
        if not stream:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path} ({error.strerror}); make room, or name another place")
        raise


def write_jsonl(path, rows):
    """Writes one JSON object a line, whole or not at all."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def save_png(path, image):
    """Writes a uint8 tensor of shape (3, H, W) as an RGB PNG, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def save_checkpoint(path, **content):
    """Saves one dict of tensors and plain types with the format version, whole or not at all."""
    buffer = io.BytesIO()
    torch.save({"format_version": CHECKPOINT_VERSION, **content}, buffer)
    write_atomic(path, buffer.getvalue(), durable=True)


# --- Reading ------------------------------------------------------------------------------------

def digest_of(path):
    """The first eight hexadecimal digits of a file's SHA-256, which tell it from others; seconds for a large one."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            content.update(block)
    return content.hexdigest()[:8]


def load_torch(path, what="file"):
    """torch.load on the CPU without running code from the file.

    UserError when it cannot be read, or holds tensors that cannot be computed with, such as sparse ones.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no {what} {path}; check the path, or run 'bash hw2_download.sh' if it is one of "
                        "this repository's checkpoints")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about how it reads
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # zip, pickle and torch raise a dozen types on damaged or foreign files
        raise UserError(f"the {what} {path} {_unreadable(path, error)}")
    odd = _odd_tensor(content)
    if odd:
        raise UserError(f"the {what} {path} holds a tensor {odd}; save ordinary tensors in it")
    return content


def _odd_tensor(content):
    """How a tensor in the nested `content` is not one of plain values in memory; '' when all are."""
    if torch.is_tensor(content):
        odd = {"without values (on the meta device)": content.is_meta, "that is quantized": content.is_quantized,
               "that is nested": content.is_nested, f"of the layout {content.layout}": content.layout != torch.strided}
        return next((how for how, true in odd.items() if true), "")
    values = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return next(filter(None, map(_odd_tensor, values)), "")


def _unreadable(path, error):
    """Why torch.load has failed on `path`, and what to do: the rest of a sentence."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        return ("is in the safetensors format; read it with safetensors.torch.load_file and save the result with "
                "torch.save")
    foreign = re.search(r"(?:GLOBAL|[Gg]lobal|class) ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and foreign:
        return (f"holds more than tensors and plain values ({foreign[1]}), which is not loaded because it could run "
                "code; save tensors alone, as torch.save(model.state_dict(), path) does")
    return (f"is damaged or not made by torch.save ({type(error).__name__}); fetch it again, or save tensors alone, as "
            "torch.save(model.state_dict(), path) does")


def load_checkpoint(path, kind, keys):
    """Loads a dict written by save_checkpoint with kind=`kind` (such as 'p1_ddpm') and the given keys."""
    checkpoint = load_torch(path, "checkpoint")
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != kind:
        raise UserError(f"{path} is not a checkpoint of {kind}{_holds(checkpoint)}; name one of {kind}/train.py")
    if checkpoint.get("format_version") != CHECKPOINT_VERSION:
        raise UserError(f"the checkpoint {path} has format {checkpoint.get('format_version')}, this code reads format "
                        f"{CHECKPOINT_VERSION}; fetch both anew")
    missing = [key for key in keys if checkpoint.get(key) is None]
    if missing:
        raise UserError(f"the checkpoint {path} lacks {', '.join(missing)}; name a training's last.pt, which holds all")
    return checkpoint


@contextlib.contextmanager
def described_by(path):
    """For what is made in its block as the config of the checkpoint `path` says; UserError where that says nothing."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint {path} does not describe what it holds ({error}); fetch it again")


def load_weights(model, content, path):
    """Loads into `model` the weights in `content`, what torch.load read from `path`, in any wrapping (find_weights).

    UserError when they do not fit or hold NaN. A model on the meta device, made as shapes alone, gets its memory once
    they are known to fit.
    """
    state_dict = find_weights(content, model.state_dict(), path)
    found, expected = ({name: tuple(value.shape) for name, value in state.items()}
                       for state in (state_dict, model.state_dict()))
    wrong = [f"{name} is {found.get(name, 'missing')} and should be {expected.get(name, 'absent')}"
             for name in expected | found if found.get(name) != expected.get(name)]
    if wrong:
        raise UserError(f"the weights in {path} do not fit {type(model).__name__}: {'; '.join(wrong[:3])}"
                        f"{f'; and {len(wrong) - 3} more' * (len(wrong) > 3)}")
    for name, value in state_dict.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"the weights in {path} hold NaN or infinity ({name}): the training diverged; "
                            "name another checkpoint")
    if any(value.is_meta for value in model.state_dict().values()):
        model.to_empty(device="cpu")
    model.load_state_dict(state_dict)


def find_weights(content, names, path, optional=()):
    """The state dict in `content`, what torch.load read from `path`, whose names are `names`, however it is wrapped.

    Looks into dicts and lists within each other (state_dict, model, ema, net, ...) and behind any prefix of the names
    (module., _orig_mod., model., ...), for averaged weights first; the `optional` among the names, such as constants
    that an average of the parameters leaves out, may be missing. Where at least half of the names fit, the nearest is
    returned, for load_weights to say how it differs; else UserError tells what the file holds.
    """
    names, nearest = set(names), {}
    for where, weights in sorted(_state_dicts(content), key=lambda found: not _averaged(found[0])):
        prefixes = {key[:-len(name)] for key in weights for name in names if key.endswith(name)}
        for prefix in sorted(prefixes, key=lambda prefix: (not _averaged(prefix), prefix)):
            inside = {key[len(prefix):]: value for key, value in weights.items() if key.startswith(prefix)}
            if names.difference(optional) <= inside.keys() <= names:
                return inside
            if len(inside.keys() & names) > len(nearest.keys() & names):
                nearest = inside
    if len(nearest.keys() & names) < len(names) / 2:
        raise UserError(f"{path} does not hold the weights that are looked for{_holds(content)}; name another file")
    return nearest


def _state_dicts(content, where=""):
    """(where, {name: tensor}) of every dict in the nested `content` that holds tensors."""
    if isinstance(content, (list, tuple)):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and torch.is_tensor(value)}
    if tensors:
        yield where, tensors
    for key, value in content.items():
        yield from _state_dicts(value, f"{where}/{key}")


def _averaged(name):
    """Whether `name` is one that people give to averaged weights."""
    return bool(re.search("ema|shadow|average|swa", name.lower()))


def _holds(content):
    """', which holds ...': what was read from a file, for a message."""
    if not isinstance(content, dict):
        return f", which holds a {type(content).__name__}"
    keys = [str(key) for key in content]
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f", whose top level holds {', '.join(keys[:5]) or 'nothing'}{more}"
