"""Judges the faces of problem 2's generator: 1,000 samples, as face_grader.py does, which needs its packages.

    python3 p5_gan/evaluate.py --data_dir first9000.zip squashed.zip:6-58
    python3 p5_gan/evaluate.py --data_dir ... --checkpoint p5_gan/output/model.pt
    python3 p5_gan/evaluate.py --data_dir ... --others vae ddpm --others_checkpoints vae.pt unet.pt --output faces.csv

--others judges the faces in these folders as well. --output records each set as soon as it is judged: a row for the
generator ("gan"), one for each folder by its name, and one for as many real faces; rows of other names stay. A row's
`checkpoint` is the digest of the weights, of a folder's those that --others_checkpoints names in its place.
That of README and report is p5_gan/checkpoints/faces.csv.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, int_between, nonempty_path, pick_device, run

from face_grader import Judge, read_generated, record, report
from faces import add_arguments
from files import check_output_file, digest_of, other_rows
from p5_gan.inference import generate
from p5_gan.model import CHECKPOINT, load_model


def judge_all(judge, sets, checkpoints):
    """Yields (text for people, rows of the record so far) for each of {name: uint8 images (N, 3, 64, 64)}; the rows of
    real faces, one for each N, come last. checkpoints: {name: path of the weights} where they are known."""
    rows, real_rows = [], {}
    for name, images in sets.items():
        measures, real = judge(images)
        checkpoint = digest_of(checkpoints[name]) if name in checkpoints else ""
        rows.append(dict(name=name, checkpoint=checkpoint, count=len(images), **measures))
        real_rows[len(images)] = dict(name="real", count=len(images), **real)
        yield f"{name}, {len(images)} images\n{report(measures, real)}", [*rows, *real_rows.values()]


def main():
    parser = argument_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--checkpoint", type=nonempty_path, default=CHECKPOINT, help="a training's model.pt or last.pt")
    parser.add_argument("--count", type=int_between(2), default=1000,
                        help="faces to generate, and to judge of each folder of --others at most")
    parser.add_argument("--seed", type=int_between(0), default=0, help="seed of the latents")
    parser.add_argument("--others", type=nonempty_path, nargs="+", default=[], help="folders of other models' faces")
    parser.add_argument("--others_checkpoints", type=nonempty_path, nargs="+", default=[],
                        help="the weights that made these faces, one for each folder")
    parser.add_argument("--output", type=nonempty_path, help="a CSV file for the measures; none when not given")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to generate")
    parser.add_argument("--no_identity", action="store_true", help="leave out Frechet distance and diversity")
    args = parser.parse_args()
    if args.output:
        check_output_file(args.output)
        other_rows(args.output, "name")  # a foreign file is told before minutes of judging
    if args.others_checkpoints and len(args.others_checkpoints) != len(args.others):
        raise UserError(f"--others names {len(args.others)} folders and --others_checkpoints "
                        f"{len(args.others_checkpoints)} files; name one for each folder")
    for path in args.others_checkpoints:
        if not path.is_file():
            raise UserError(f"there is no checkpoint {path}; check the path")
    model = load_model(args.checkpoint, pick_device(args.device))
    sets = {}
    for path in map(Path, map(os.path.abspath, args.others)):  # so that "." has a name
        if path.name in ("gan", "real", *sets):
            raise UserError(f"{path} is named as another set of faces is, {path.name}; rename the folder")
        sets[path.name] = read_generated(path)[:args.count]
        if len(sets[path.name]) < 2:
            raise UserError(f"{path} holds a single image; name a folder of more")
    judge = Judge(args.data_dir, not args.no_identity)
    sets = {"gan": generate(model, range(args.count), args.seed), **sets}
    checkpoints = {"gan": args.checkpoint, **dict(zip(list(sets)[1:], args.others_checkpoints))}
    for text, rows in judge_all(judge, sets, checkpoints):
        print(text, flush=True)
        if args.output:
            record(args.output, "name", rows)


if __name__ == "__main__":
    run(main)
