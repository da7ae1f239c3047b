"""Reads face sets from folders and zip files: crops, numbers, attributes, and the split that every chapter trains on.

    SOURCE          each image's largest centred square: aligned CelebA (178x218, or 89x109 at half size) gives the
                    usual crop, and what is square already, such as the course's face/train, stays as it is
    SOURCE:6-58     rows 6 to 58 of each image, stretched to a square: the same crop of a frame squashed to 64x64

An image's number is the one in its name: 000001.jpg in CelebA, 00000.png in the course's set. A number that occurs
again, in the same source or a later one, is the same face and is dropped.
"""

import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from dataset import IMAGE_SUFFIXES, read_image_source
from files import check_output_file, is_stream, make_output_dir, save_png, write_atomic
from utils import UserError, nonempty_path

SIZE = 64
PADDING = 2  # black pixels around each face of a grid
JPEG, JPEG_SIDE = (".jpg", ".jpeg"), 65_500  # their suffixes, and libjpeg's JPEG_MAX_DIMENSION
VALIDATION = range(8001, 9001)  # the faces that no train.py uses; numbers for which CelebA's attributes are known


class Faces(NamedTuple):
    """images: uint8 (N, 3, SIZE, SIZE); numbers: int64 (N,), all different."""
    images: torch.Tensor
    numbers: torch.Tensor

    def take(self, chosen):
        """The Faces that the bool (N,) or the indices `chosen` tell."""
        return Faces(self.images[chosen], self.numbers[chosen])

    def draw(self, count, seed):
        """`count` of the Faces at random, in their order; the same ones for the same seed."""
        order = np.random.default_rng(seed).permutation(len(self.images))
        return self.take(np.sort(order[:count]))


class FaceSource(NamedTuple):
    """A folder or zip file and the rows (top, bottom) of its images that are stretched to a square, or None."""
    path: Path
    rows: tuple = None

    def __str__(self):
        return str(self.path) + (f":{self.rows[0]}-{self.rows[1]}" if self.rows else "")


def face_source(text):
    """An argparse type: the FaceSource that `text` names, PATH or PATH:TOP-BOTTOM."""
    rows = re.fullmatch(r"(.+):(\d+)-(\d+)", text)
    if rows and not Path(text).exists():
        return FaceSource(Path(rows[1]), (int(rows[2]), int(rows[3])))
    return FaceSource(nonempty_path(text))


def add_arguments(parser):
    """The flag --data_dir of every script that reads faces."""
    parser.add_argument("--data_dir", type=face_source, nargs="+", required=True, metavar="SOURCE",
                        help="folders and zip files of faces, each PATH, or PATH:6-58 for squashed frames")


def read_faces(sources, size=SIZE):
    """The Faces of a list of FaceSources, in the order of the sources and of the names in each, of side `size`.

    UserError when a source cannot be read, an image's name holds no number, or rows exceed an image.
    """
    parts = [(source, *read_image_source(source.path, size, source.rows)) for source in sources]
    numbers = np.array([_number(name, source.path) for source, _, names in parts for name in names], dtype=np.int64)
    _, first = np.unique(numbers, return_index=True)
    first.sort()
    if len(first) < len(numbers):
        print(f"passed over: {len(numbers) - len(first)} faces whose number occurs again", file=sys.stderr)
    return Faces(torch.cat([images for _, images, _ in parts])[first], torch.from_numpy(numbers[first]))


def split_faces(faces):
    """(training, validation): Faces whose numbers are not, or are, in VALIDATION."""
    held_out = torch.isin(faces.numbers, torch.tensor(VALIDATION))
    return faces.take(~held_out), faces.take(held_out)


def training_faces(sources, size=SIZE):
    """The training part of split_faces; UserError when nothing is left of it."""
    training, _ = split_faces(read_faces(sources, size))
    if not len(training.images):
        raise UserError(f"{sources[0].path} holds no face to train on: the numbers {VALIDATION[0]} to {VALIDATION[-1]} "
                        "are kept for validation; name more faces")
    return training


def faces_to_test(sources):
    """The validation part of split_faces, or all faces where there is none, as in the course's face/test."""
    faces = read_faces(sources)
    _, validation = split_faces(faces)
    return validation if len(validation.images) else faces


def read_attributes(path):
    """The attributes in CelebA's list_attr_celeba.txt or the course's train.csv: a DataFrame of bools, a column for
    each attribute, indexed by the images' numbers."""
    try:
        with open(path, encoding="utf-8") as file:
            table = (pd.read_csv(file, index_col=0) if Path(path).suffix == ".csv" else
                     pd.read_csv(file, sep=r"\s+", skiprows=1))
        values = table.to_numpy(dtype=float)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the attributes in {path} ({error}); name list_attr_celeba.txt or train.csv")
    if not np.isin(values, (-1, 0, 1)).all():
        raise UserError(f"{path} holds attributes other than -1, 0 and 1; name list_attr_celeba.txt or train.csv")
    table = pd.DataFrame(values > 0, columns=table.columns, index=[_number(str(name), path) for name in table.index])
    if not table.index.is_unique:
        raise UserError(f"{path} tells of face {table.index[table.index.duplicated()][0]} twice; leave one line of it")
    return table


def attributes_of(faces, table, names):
    """The columns `names` of read_attributes' `table` for the Faces, a row each; UserError when one is not in it."""
    missing = [*sorted(set(names) - set(table.columns)), *sorted(set(faces.numbers.tolist()) - set(table.index))]
    if missing:
        raise UserError(f"the attributes hold no {missing[0]}; name list_attr_celeba.txt, or faces that they know")
    return table.loc[faces.numbers.tolist(), names]


def _number(name, source):
    digits = re.findall(r"\d+", Path(name).stem)
    if not digits or int(digits[-1]) >= 2**63:
        raise UserError(f"the name {name} in {source} holds no number; name faces as CelebA does, such as 000001.jpg")
    return int(digits[-1])


# --- Pictures of many faces ---------------------------------------------------------------------

def add_output_arguments(parser):
    """The flags that say where faces go, for save_faces."""
    parser.add_argument("output_dir", type=nonempty_path, nargs="?",
                        help="folder for faces one by one; made if need be, other files in it stay")
    parser.add_argument("--grid", type=nonempty_path, metavar="FILE", help="a picture, .png or .jpg, for all together")


def check_outputs(args, longest):
    """UserError unless the flags of add_output_arguments name a place, and as a picture one that can be written: a PNG,
    or a JPEG that has room for as many images as `longest` in a row or a column; makes its folder if need be."""
    path = args.grid
    if not (args.output_dir or path):
        raise UserError("nothing would be written; name a folder for faces one by one, or --grid FILE")
    if path is None:
        return
    if path.suffix.lower() not in (".png", *JPEG) and not is_stream(path):
        raise UserError(f"the picture {path} must end in .png or .jpg; name another file")
    if path.suffix.lower() in JPEG and longest * (SIZE + PADDING) + PADDING > JPEG_SIDE:
        raise UserError(f"a JPEG has no room for {longest} images side by side; name a .png, or lower --count")
    check_output_file(path)


def as_grid(images, columns=8):
    """uint8 (3, H', W'): uint8 images (N, 3, H, W) in rows of `columns` with black between and around them, as
    torchvision's make_grid lays them, whose import takes as long as drawing 32 faces."""
    height, width = (side + PADDING for side in images.shape[2:])
    columns = min(columns, len(images))
    grid = images.new_zeros(3, height * -(-len(images) // columns) + PADDING, width * columns + PADDING)
    for i, image in enumerate(images):
        y, x = height * (i // columns) + PADDING, width * (i % columns) + PADDING
        grid[:, y:y + image.shape[1], x:x + image.shape[2]] = image
    return grid


def save_grid(path, images, columns=8):
    """Writes uint8 images (N, 3, H, W) in rows of `columns` as one picture, a JPEG or else a PNG by the suffix."""
    grid = as_grid(images, columns)
    if path.suffix.lower() not in JPEG:
        return save_png(path, grid)
    buffer = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(buffer, format="JPEG", quality=95, subsampling=0)
    write_atomic(path, buffer.getvalue())


def save_faces(images, output_dir, grid, columns=8):
    """Writes uint8 images (N, 3, H, W) as 0000.png ... into a folder and as one picture, where not None; says so, and
    on stderr that the folder holds other images."""
    if grid:
        save_grid(grid, images, columns)
    if output_dir:
        folder = make_output_dir(output_dir)
        paths = [folder / f"{i:04d}.png" for i in range(len(images))]
        for path, image in zip(paths, images):
            save_png(path, image)
        others = {path for path in folder.glob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES}.difference(paths)
        if others:
            print(f"other images in {folder} stay: {len(others)}, the first {min(others).name}", file=sys.stderr)
    print(f"{len(images)} images in {' and '.join(str(path) for path in (output_dir, grid) if path)}")
