"""Judges the faces of problem 2's generator: 1,000 samples, as face_grader.py does, which needs its packages.

    python3 p5_gan/evaluate.py --data_dir first9000.zip squashed.zip:6-58
    python3 p5_gan/evaluate.py --data_dir ... --checkpoint p5_gan/output/model.pt
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import argument_parser, int_at_least, nonempty_path, pick_device, run

from face_grader import Judge, report
from faces import add_arguments
from p5_gan.inference import generate
from p5_gan.model import CHECKPOINT, load_model


def main():
    parser = argument_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--checkpoint", type=nonempty_path, default=CHECKPOINT, help="a training's model.pt or last.pt")
    parser.add_argument("--count", type=int_at_least(2), default=1000, help="faces to generate")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of the latents")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to generate")
    parser.add_argument("--no_identity", action="store_true", help="leave out Frechet distance and diversity")
    args = parser.parse_args()
    images = generate(load_model(args.checkpoint, pick_device(args.device)), range(args.count), args.seed)
    print(report(*Judge(args.data_dir, not args.no_identity)(images)))


if __name__ == "__main__":
    run(main)
