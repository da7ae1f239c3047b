"""Rebuilds the report: every figure, every number and the PDF, from the checkpoints and hw2_data.

    python3 report/build.py                             # report/report.pdf
    python3 report/build.py --only p1                   # makes one part anew, takes the others as they were made last;
                                                        # where they never were, it writes report_p1.pdf
    python3 report/build.py --student_id r12345678      # report/hw2_r12345678.pdf
    python3 report/build.py --only p2 --unet UNet.pt --noise NOISE_DIR --gt GT_DIR     # with the course's files

With the course's files problem 2's part asks for 12,000 passes of the large network: minutes on a GPU, hours on a CPU.
Figures and numbers (p1.json and so on) go to --output_dir/build, the text is in the .typ files beside this script.
Where trainings or studies of hours are behind a number, it is read from the record that they left beside the
checkpoint: p1_ddpm/checkpoints/study.csv and metrics.jsonl, p3_dann/checkpoints/results.csv.
"""

import importlib.util
import io
import json
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from report import p1, p2, p3  # noqa: E402
from utils import UserError, argument_parser, make_output_dir, pick_device, run, write_atomic  # noqa: E402

PARTS = {"p1": p1.build, "p2": p2.build, "p3": p3.build}


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--only", choices=PARTS, help="the part to make")
    parser.add_argument("--student_id", help="for the PDF's name and title")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "report", help="where the PDF goes")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--unet", type=Path, help="problem 2's weights; the faces of p2_ddim/checkpoints if not given")
    parser.add_argument("--noise", type=Path, help="the noise files for --unet")
    parser.add_argument("--gt", type=Path, help="the ground truth of these noises, for the table of errors")
    parser.add_argument("--p1_checkpoint", type=Path, default=ROOT / "p1_ddpm/checkpoints/ddpm.pt",
                        help="problem 1's model, with metrics.jsonl and study.csv beside it")
    parser.add_argument("--p3_checkpoints", type=Path, default=ROOT / "p3_dann/checkpoints",
                        help="what p3_dann/experiments.py --publish has written")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--quick", action="store_true",
                        help="few images and steps, to see that all is in place; the numbers mean nothing then")
    args = parser.parse_args()
    if bool(args.unet) != bool(args.noise) or args.gt and not args.unet:
        parser.error("--unet and --noise belong together, and --gt to both")
    if args.student_id and not args.student_id.isalnum():
        parser.error(f"--student_id {args.student_id} must consist of letters and digits, it names the PDF")
    args.unet = args.unet or ROOT / "p2_ddim/checkpoints/face64.pt"
    args.noise = args.noise or ROOT / "p2_ddim/noise64"
    return args


def strip(folder, path, height=260):
    """The README's picture: digits, faces and a t-SNE embedding side by side, from the report's figures."""
    pictures = [Image.open(folder / name).convert("RGB") for name in ("p1_grid.png", "p2_eta.png", "p3_tsne_svhn.png")]
    pictures = [picture.resize((round(picture.width * height / picture.height), height)) for picture in pictures]
    canvas = Image.new("RGB", (sum(picture.width for picture in pictures), height), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (sum(p.width for p in pictures[:i]), 0))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def typeset(folder, parts, output, student_id):
    """Compiles report.typ with the numbers and figures of `parts` in `folder` to the PDF file `output`."""
    import typst
    inputs = dict(build=str(folder.resolve()), parts=" ".join(parts), student=student_id or "")
    try:
        pdf = typst.compile(str(ROOT / "report/report.typ"), root="/", sys_inputs=inputs)
    except RuntimeError as error:
        raise UserError(f"the report cannot be typeset ({error}); where a part is of an older version, make all parts anew")
    write_atomic(output, pdf)


def main():
    args = parse_args()
    if not importlib.util.find_spec("typst"):
        raise UserError("the package typst is missing; run: python3 -m pip install -r requirements-dev.txt")
    device = pick_device(args.device)
    folder = make_output_dir(args.output_dir / "build")
    for name in [args.only] if args.only else PARTS:
        # Made aside and moved at the end: an interrupted run leaves the part as it was.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as temporary:
            numbers = PARTS[name](args, Path(temporary), device)
            for figure in Path(temporary).iterdir():
                os.replace(figure, folder / figure.name)
        write_atomic(folder / f"{name}.json", json.dumps(dict(numbers, quick=args.quick), indent=1).encode())
        print(f"{name} is made", flush=True)
    parts = [name for name in PARTS if (folder / f"{name}.json").exists()]
    name = f"hw2_{args.student_id}" if args.student_id else "report"
    output = args.output_dir / ("_".join([name, *(parts if len(parts) < len(PARTS) else [])]) + ".pdf")
    typeset(folder, parts, output, args.student_id)
    print(f"wrote {output}")
    if len(parts) == len(PARTS):
        strip(folder, args.output_dir / "strip.png")


if __name__ == "__main__":
    run(main)
