"""Wall time and peak memory of the three wrappers, run as a user runs them, beside the assignment's limits.

    python3 report/benchmark.py               # on every device there is; half an hour or more on 2 CPU cores
    python3 report/benchmark.py --quick       # a minute: fewer images and steps, as the table says

Problem 2 runs on random weights of the course's network at 256x256, which cost what trained ones cost, unless --unet
and --noise name its files. Problem 3 gets images of random noise. Memory is the computer's, not the GPU's. Replaces
the rows of these problems in --output, a CSV file, line by line, and prints it as a table. Let nothing else run
beside it.
"""

import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from p2_ddim.inference import find_noises  # noqa: E402
from UNet import UNet  # noqa: E402
from utils import UserError, argument_parser, make_output_dir, run, write_atomic  # noqa: E402


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute's run")
    parser.add_argument("--only", nargs="+", choices=["p1", "p2", "p3"], default=["p1", "p2", "p3"], help="which problems")
    parser.add_argument("--unet", type=Path, help="problem 2's weights; random ones if not given")
    parser.add_argument("--noise", type=Path, help="problem 2's folder of noise files; random ones if not given")
    parser.add_argument("--output", type=Path, default=ROOT / "report/benchmark.csv", help="the file of results")
    return parser.parse_args()


# A process begins with the memory of the one that forked it, so a small one stands between this and the command.
LAUNCHER = """
import resource, subprocess, sys, time
start = time.time()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
sys.stderr.buffer.write(done.stderr)
print(time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def measure(command):
    """(seconds, peak resident memory in MiB) of a command; UserError with its last line when it fails."""
    done = subprocess.run([sys.executable, "-c", LAUNCHER, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{Path(command[1]).name} failed: {''.join(done.stderr.strip().splitlines()[-1:])}")
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory / 1024 / (1024 if sys.platform == "darwin" else 1)  # macOS counts in bytes, Linux in KiB


def cpu_name():
    """The processor's name where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall("model name\\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.machine()


def make_inputs(folder, args):
    """Writes random weights, noises and images where none were named: (unet, noise folder, image folder)."""
    torch.manual_seed(0)
    unet, noise = args.unet, args.noise
    if "p2" in args.only and not unet:
        unet = folder / "UNet.pt"
        torch.save(UNet().state_dict(), unet)
    if "p2" in args.only and not noise:
        noise = make_output_dir(folder / "noise")
        for i in range(1 if args.quick else 10):
            torch.save(torch.randn(1, 3, 256, 256), noise / f"{i:02d}.pt")
    images = make_output_dir(folder / "svhn")
    rng = np.random.default_rng(0)
    for i in range((1000 if args.quick else 20000) if "p3" in args.only else 0):
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8)).save(images / f"{i:05d}.png")
    return unet, noise, images


def commands(folder, args, unet, noise, images):
    """Rows of (problem, what is run, images, limit of the assignment in seconds, command)."""
    per_class, steps = (5, 3) if args.quick else (100, 50)
    rows = []
    if "p1" in args.only:
        rows.append(("p1", "hw2_1.sh", 10 * per_class, 900,
                     ["bash", ROOT / "hw2_1.sh", folder / "p1", "--per_class", per_class]))
    if "p2" in args.only:
        count = len(find_noises(noise))
        for amp in ([], ["--amp"]):
            rows.append(("p2", f"hw2_2.sh, {steps} steps {' '.join(amp)}".strip(), count, 300,
                         ["bash", ROOT / "hw2_2.sh", noise, folder / "p2", unet, "--steps", steps, *amp]))
    if "p3" in args.only:
        rows.append(("p3", "hw2_3.sh", len(list(images.iterdir())), 600,
                     ["bash", ROOT / "hw2_3.sh", images, folder / "pred.csv"]))
    return rows


def main():
    args = parse_args()
    if args.unet and not args.noise:
        raise UserError("--unet needs --noise, the folder of its noise files")
    make_output_dir(args.output.parent)
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    names = {"cpu": f"{torch.get_num_threads()} threads of {cpu_name()}",
             "cuda": torch.cuda.get_device_name() if len(devices) > 1 else ""}
    rows = pd.read_csv(args.output).query("problem not in @args.only").to_dict("records") if args.output.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        for problem, what, images, limit, command in commands(Path(temporary), args, *make_inputs(Path(temporary), args)):
            for device in devices:
                seconds, memory = measure([*command, "--device", device])
                rows.append(dict(problem=problem, what=what, images=images, device=names[device],
                                 seconds=round(seconds, 1), images_per_second=float(f"{images / seconds:.3g}"),
                                 peak_mib=round(memory), limit_s_on_2080ti=limit, within=seconds <= limit,
                                 python=platform.python_version(),
                                 torch=torch.__version__))
                print(rows[-1], flush=True)
                write_atomic(args.output, pd.DataFrame(rows).to_csv(index=False).encode())
    print("\n" + pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    run(main)
