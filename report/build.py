"""Rebuilds the reports: every figure, every number and the PDFs, from the checkpoints and the data.

    python3 report/build.py --assignment dlcv2023_hw2      # its report.pdf, from hw2_data; half an hour on 2 CPU cores
    python3 report/build.py --faces FACES --attributes FILE --scenes DIR     # all four: 2020's needs CelebA's faces
                                                           # 8001 to 9000 and attributes as well, 2024's i-CLEVR and
                                                           # what p6_personalize/requirements.txt names
    python3 report/build.py --only p1                      # makes one part anew, takes the others as made last; where
                                                           # they never were, it writes report_p1.pdf
    python3 report/build.py --assignment dlcv2023_hw2 --student_id r12345678        # writes hw2_r12345678.pdf there
    python3 report/build.py --assignment dlcv2023_hw2 --quick     # a minute: to see that all is in place
    python3 report/build.py --only p2 --unet UNet.pt --noise NOISE_DIR --gt GT_DIR     # with the course's files

With the course's files problem 2's part asks for 15,000 passes of the large network: minutes on a GPU, hours on a CPU.
Figures and numbers (p1.json and so on) go to report/build, the text is in the .typ files beside this script. Where
trainings or studies of hours are behind a number, it is read from the record that they left in the chapter's
checkpoints/: metrics.jsonl and results.csv. Also draws report/strip.png, the README's picture.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, nonempty_path, pick_device, run

import importlib.util
import io
import json
import os
import tempfile
from typing import NamedTuple

from PIL import Image

from faces import face_source
from files import make_output_dir, write_atomic
from p6_personalize.model import require_libraries
from plots import FONT, FONT_DIR
from report import p1, p1_domains, p2, p3, p3_pairs, p4, p5, p6, p7


class Assignment(NamedTuple):
    """A report: its title, the course that asks for it, its parts in the order of the questions."""
    title: str
    course: str
    parts: tuple


ASSIGNMENTS = {
    "dlcv2020_hw3": Assignment("Faces by a VAE and a GAN, and digits across domains",
                               "Deep Learning for Computer Vision, NTU, Fall 2020, homework 3",
                               ("p4", "p5", "p3_pairs")),
    "dlcv2023_hw2": Assignment("Conditional diffusion, DDIM and domain-adversarial training",
                               "Deep Learning for Computer Vision, NTU, Fall 2023, homework 2", ("p1", "p2", "p3")),
    "dlcv2024_hw2": Assignment("Conditional diffusion, DDIM and personalization",
                               "Deep Learning for Computer Vision, NTU, Fall 2024, homework 2",
                               ("p1_domains", "p2", "p6")),
    "nycu2024_lab6": Assignment("Scenes of several objects by conditional diffusion",
                                "Deep Learning, NYCU, Spring 2024, lab 6", ("p7",)),
}
# Each draws its figures into a folder and returns its numbers; the text is in the .typ file of the same name.
PARTS = {
    "p1": lambda folder, device, args: p1.build(folder, args.chapters / "p1_ddpm/checkpoints", args.data_dir, device,
                                                args.quick),
    "p1_domains": lambda folder, device, args: p1_domains.build(folder, args.chapters / "p1_ddpm/checkpoints",
                                                                args.data_dir, device, args.quick),
    "p2": lambda folder, device, args: p2.build(folder, args.unet, args.noise, args.gt, device, args.quick),
    "p3": lambda folder, device, args: p3.build(folder, args.chapters / "p3_dann/checkpoints", args.data_dir, device,
                                                args.quick),
    "p3_pairs": lambda folder, device, args: p3_pairs.build(folder, args.chapters / "p3_dann/checkpoints",
                                                            args.data_dir, device, args.quick),
    "p4": lambda folder, device, args: p4.build(folder, args.chapters / "p4_vae/checkpoints", args.faces,
                                                args.attributes, device, args.quick),
    "p5": lambda folder, device, args: p5.build(folder, args.chapters, device, args.quick),
    "p6": lambda folder, device, args: p6.build(folder, args.chapters / "p6_personalize/checkpoints", args.scenes,
                                                device, args.quick),
    "p7": lambda folder, device, args: p7.build(folder, args.chapters / "p7_clevr/checkpoints", device, args.quick),
}


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--assignment", nargs="+", choices=ASSIGNMENTS, default=list(ASSIGNMENTS), help="which reports")
    parser.add_argument("--only", choices=PARTS, help="the part to make")
    parser.add_argument("--student_id", help="for the PDF's name and title")
    parser.add_argument("--output_dir", type=nonempty_path,
                        help="where assignments/ and report/ are written; if not given, the repository, and with "
                             "--quick its report/build/quick")
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "hw2_data", help="the data set's folder")
    parser.add_argument("--scenes", type=nonempty_path, default=ROOT / "iclevr", help="i-CLEVR, for p6")
    parser.add_argument("--faces", type=face_source, default=face_source(str(ROOT / "first9000.zip")),
                        help="the validation faces of p4")
    parser.add_argument("--attributes", type=nonempty_path, default=ROOT / "list_attr_celeba.txt",
                        help="the attributes of these faces")
    parser.add_argument("--chapters", type=nonempty_path, default=ROOT,
                        help="the folder that holds p1_ddpm/checkpoints, p3_dann/checkpoints and so on")
    parser.add_argument("--unet", type=nonempty_path, help="problem 2's weights, if not those in --chapters")
    parser.add_argument("--noise", type=nonempty_path, help="the noise files for --unet")
    parser.add_argument("--gt", type=nonempty_path, help="the ground truth of these noises, for the table of errors")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--quick", action="store_true",
                        help="few images and steps, to see that all is in place; the numbers mean nothing then")
    args = parser.parse_args()
    if bool(args.unet) != bool(args.noise) or args.gt and not args.unet:
        parser.error("--unet and --noise belong together, and --gt to both")
    asked, args.assignment = args.assignment, [name for name in args.assignment
                                               if args.only in (None, *ASSIGNMENTS[name].parts)]
    if not args.assignment:
        parser.error(f"--only {args.only} is in no report of {' '.join(asked)}")
    if args.student_id and not args.student_id.isalnum():
        parser.error(f"--student_id {args.student_id} must consist of letters and digits, it names the PDF")
    args.unet = args.unet or args.chapters / "p2_ddim/checkpoints/face64.pt"
    args.noise = args.noise or ROOT / "p2_ddim/noise64"
    args.output_dir = args.output_dir or (ROOT / "report/build/quick" if args.quick else ROOT)
    return args


def make_part(name, folder, device, args):
    """Makes the figures and the numbers of a part anew in `folder`; an interrupted run leaves them as they were."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as temporary:
        numbers = PARTS[name](Path(temporary), device, args)
        for figure in Path(temporary).iterdir():
            os.replace(figure, folder / figure.name)
    write_atomic(folder / f"{name}.json", json.dumps(dict(numbers, quick=args.quick), indent=1).encode())
    print(f"{name} is made", flush=True)


def typeset(folder, assignment, parts, output, student_id):
    """Compiles report.typ with the numbers and figures of `parts` in `folder` to the PDF file `output`."""
    import typst
    inputs = dict(build=str(folder.resolve()), parts=" ".join(parts), student=student_id or "", font=FONT,
                  title=assignment.title, course=assignment.course)
    try:
        pdf = typst.compile(str(ROOT / "report/report.typ"), root="/", sys_inputs=inputs, font_paths=[str(FONT_DIR)])
    except RuntimeError as error:
        raise UserError(f"the report cannot be typeset ({error}); where a part is of an older version, make all parts "
                        "anew")
    write_atomic(output, pdf)


def strip(folder, path, height=291):
    """The README's picture: digits, faces and a t-SNE embedding side by side."""
    pictures = [Image.open(folder / f"{part}_strip.png").convert("RGB") for part in ("p1", "p2", "p3")]
    pictures = [picture.resize((round(picture.width * height / picture.height), height)) for picture in pictures]
    canvas = Image.new("RGB", (sum(picture.width for picture in pictures), height), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (sum(p.width for p in pictures[:i]), 0))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def main():
    args = parse_args()
    if not importlib.util.find_spec("typst"):
        raise UserError("the package typst is missing; run: python3 -m pip install -r "
                        f"'{ROOT / 'requirements-dev.txt'}'")
    device = pick_device(args.device)
    folder = make_output_dir(args.output_dir / "report/build")
    wanted = {name: ASSIGNMENTS[name] for name in args.assignment}
    parts = [name for name in PARTS if args.only in (None, name)
             and any(name in assignment.parts for assignment in wanted.values())]
    for part, flag, path in (("p4", "faces", args.faces.path), ("p4", "attributes", args.attributes),
                             ("p6", "scenes", args.scenes)):
        if part in parts and not path.exists():  # said before the half hour of other parts
            raise UserError(f"there is no {path}, which {part} needs; name it with --{flag}, or another --assignment")
    if "p6" in parts:
        require_libraries()
    for name in parts:
        make_part(name, folder, device, args)
    for name, assignment in wanted.items():
        made = [part for part in assignment.parts if (folder / f"{part}.json").exists()]
        stem = f"{name.split('_')[1]}_{args.student_id}" if args.student_id else "report"
        stem = "_".join([stem, *(made if len(made) < len(assignment.parts) else [])])
        output = make_output_dir(args.output_dir / "assignments" / name) / f"{stem}.pdf"
        typeset(folder, assignment, made, output, args.student_id)
        print(f"wrote {output}")
    if all((folder / f"{part}_strip.png").exists() for part in ("p1", "p2", "p3")):
        strip(folder, args.output_dir / "report/strip.png")


if __name__ == "__main__":
    run(main)
