"""Wall time and peak memory of wrappers and of trainings of 2023's problems, alone and beside a busy process.

    python3 report/benchmark.py                         # half an hour on 2 CPU cores; nothing else should run there
    python3 report/benchmark.py --quick                 # two minutes: fewer images and steps; prints, writes nothing
    python3 report/benchmark.py --only p1 p3 --output benchmark.csv     # some chapters, into another file
    GOMP_SPINCOUNT=300000 python3 report/benchmark.py --quick --only p1

The commands run as a user runs them, with what the user has exported: so the last line measures how long OpenMP's
threads should spin (300,000 rounds are its own default, startup.py sets fewer), and MALLOC_TRIM_THRESHOLD_=131072
switches off what startup.py does about memory.

Wrappers are timed from start to end, a training by its own record: its steps (and of problem 1 the loss on validation
digits), without start and sample grid. The busy process is a Python that computes endlessly in one thread. Problem 2's
network has the course's size and random weights, which cost what trained ones cost; it draws one face of 256x256 in 5
steps, while the assignment asks for ten faces in 50. Problem 3 and the trainings get random images. Memory is the
computer's, not the GPU's.
"""

import contextlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, nonempty_path, run

import numpy as np
import pandas as pd
import torch
from PIL import Image

from files import check_output_file, other_rows, read_jsonl, write_atomic
from UNet import UNet


CHAPTERS = ["p1", "p2", "p3", "p4", "p5"]


def commands(quick):
    """Rows (name, images that the command generates, classifies or trains on, command); a name begins with the chapter.

    The commands run in the folder that `make_inputs` fills, and write `out`.
    """
    per_class, steps, digits, batches = (4, 5, 500, 4) if quick else (100, 50, 20000, 50)
    smaller = dict(p2=" --size 32", p3=" --batch_size 16") if quick else dict(p2="", p3="")
    return [
        ("p1", 10 * per_class, f"bash hw2_1.sh out --per_class {per_class}"),
        ("p1_amp_off", 10 * per_class, f"bash hw2_1.sh out --per_class {per_class} --amp off"),
        ("p1_both", 10 * per_class, f"bash assignments/dlcv2024_hw2/hw2_1.sh out --per_class {per_class // 2}"),
        ("p1_train", 64 * batches, "python3 p1_ddpm/train.py --data_dir data --output_dir out --epochs 1"),
        ("p2_64", 10, f"bash hw2_2.sh p2_ddim/noise64 out p2_ddim/checkpoints/face64.pt --steps {steps}"),
        ("p2_256", 1, "bash hw2_2.sh noise256 out UNet.pt --steps 5"),
        ("p2_256_amp", 1, "bash hw2_2.sh noise256 out UNet.pt --steps 5 --amp"),
        ("p2_train", 32 * batches,
         "python3 p2_ddim/train.py --data_dir faces --output_dir out --epochs 1" + smaller["p2"]),
        ("p4", 32, "bash assignments/dlcv2020_hw3/hw3_p1.sh out/vae.png"),
        ("p5", 32, "bash assignments/dlcv2020_hw3/hw3_p2.sh out/gan.png"),
        ("p3", digits, "bash hw2_3.sh svhn out/pred.csv"),
        ("p3_train", 100 * (16 if quick else 128),  # its epoch is 100 steps
         "python3 p3_dann/train.py --data_dir data --output_dir out --epochs 1" + smaller["p3"]),
    ]


def make_inputs(folder, quick):
    """Fills `folder` with what the commands name: links to the repository, random images, noise and weights."""
    for path in [*ROOT.glob("hw2_?.sh"), *ROOT.glob("p?_*"), ROOT / "assignments"]:
        (folder / path.name).symlink_to(path)
    images = {name: count for name, count, _ in commands(quick)}
    digits = folder / "data/digits"
    rng = np.random.default_rng(0)
    for place, count, side in ((digits / "mnistm/data", images["p1_train"], 28), (digits / "svhn/data", 200, 28),
                               (digits / "usps/data", 200, 28), (folder / "faces", images["p2_train"], 64),
                               (folder / "svhn", images["p3"], 28)):
        place.mkdir(parents=True)
        names = [f"{i:05d}.png" for i in range(count)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(place / name)
        if place.name == "data":
            table = pd.DataFrame(dict(image_name=names, label=np.arange(count) % 10))
            for split in ("train.csv", "val.csv"):
                table.to_csv(place.parent / split, index=False)
    torch.manual_seed(0)
    torch.save(UNet().state_dict(), folder / "UNet.pt")
    (folder / "noise256").mkdir()
    torch.save(torch.randn(1, 3, 256, 256), folder / "noise256/00.pt")


# A process begins with the memory of the one that forked it, so a small one stands between this and the command.
LAUNCHER = """
import resource, subprocess, sys, time
start = time.time()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
sys.stderr.buffer.write(done.stderr)
print(time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def measure(command, folder):
    """(seconds, peak resident memory in MiB) of a command that runs in `folder` and writes `out` there.

    UserError with the last line that it prints when it fails.
    """
    shutil.rmtree(folder / "out", ignore_errors=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the wrappers' python3 is this one
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, *shlex.split(command)], cwd=folder, text=True,
                               env={**os.environ, "PATH": path}, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output, errors = process.communicate()
    except BaseException:  # an interrupt ends the command, too
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode:
        raise UserError(f"{command} failed: {''.join(errors.strip().splitlines()[-1:])}")
    seconds, memory = map(float, output.split())
    record = folder / "out/metrics.jsonl"
    if record.exists():
        seconds = sum(row.get("seconds", 0) for row in read_jsonl(record))
    return seconds, memory / 1024 / (1024 if sys.platform == "darwin" else 1)  # macOS counts in bytes, Linux in KiB


@contextlib.contextmanager
def busy_process():
    """A process that keeps one core busy inside the `with` block; it ends by itself should this one be killed."""
    endless = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))"
    process = subprocess.Popen([sys.executable, "-c", endless])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def machine(device):
    """What a row has to say about the computer and the versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall("model name\\s*: (.+)", cpuinfo)
    processor = torch.cuda.get_device_name() if device == "cuda" else names[0] if names else platform.machine()
    spinning = os.environ.get("OMP_WAIT_POLICY") or os.environ.get("GOMP_SPINCOUNT", "default")
    instructions = next((name for name in ("avx512f", "avx2") if name in cpuinfo), "").upper()
    return dict(processor=processor, instructions=instructions, threads=torch.get_num_threads(),
                spinning=spinning, python=platform.python_version(), torch=torch.__version__)


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images and steps, to see that all is in place")
    parser.add_argument("--only", nargs="+", choices=CHAPTERS, default=CHAPTERS,
                        help="which chapters")
    parser.add_argument("--output", type=nonempty_path, default=ROOT / "report/benchmark.csv",
                        help="CSV file in which the rows of these commands are replaced")
    return parser.parse_args()


def main():
    args = parse_args()
    rows = []
    if not args.quick:
        check_output_file(args.output)
        rows = other_rows(args.output, "device").to_dict("records")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    runs = [(*row, device) for row in commands(args.quick) if row[0][:2] in args.only for device in devices]
    with tempfile.TemporaryDirectory() as temporary:
        make_inputs(Path(temporary), args.quick)
        for name, images, command, device in runs:
            alone, memory = measure(f"{command} --device {device}", Path(temporary))
            with busy_process():
                beside, _ = measure(f"{command} --device {device}", Path(temporary))
            row = dict(name=name, command=command, images=images, device=device, alone_s=round(alone, 1),
                       beside_s=round(beside, 1), ratio=round(beside / alone, 2),
                       images_per_second=float(f"{images / alone:.3g}"), peak_mib=round(memory), **machine(device))
            print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
            rows = [old for old in rows if (old["name"], old["device"]) != (name, device)] + [row]
            if not args.quick:
                write_atomic(args.output, pd.DataFrame(rows).to_csv(index=False).encode())


if __name__ == "__main__":
    run(main)
