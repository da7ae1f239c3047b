"""Reads the course's layout, folders of digit images and CSV files, into memory as uint8 tensors.

    hw2_data/digits/<mnistm | svhn | usps>/
        data/*.png               training and validation images in one folder
        train.csv  val.csv       header image_name,label; rows in any order
        test/*.png  test.csv     the held-out test images

A whole split fits into memory (45,000 digits are 100 MB), so trainers load it once, move it to their
device and never touch the disk again. Whatever is wrong with a file raises a utils.UserError.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from utils import UserError

DOMAINS = ("mnistm", "svhn", "usps")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


# --- Images -------------------------------------------------------------------------------------

def read_image(path, size=28):
    """One image file as a uint8 tensor of shape (3, size, size), RGB, values 0..255.

    Any mode becomes RGB (16-bit grey keeps its upper byte, transparency is dropped) and any other
    size is resized by antialiased bilinear interpolation. UserError when the file cannot be read.
    """
    return torch.from_numpy(_decode(path, size)).permute(2, 0, 1).contiguous()


def _decode(path, size):
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            if image.mode == "P" and "transparency" in image.info:  # Pillow warns about the direct way to RGB
                image = image.convert("RGBA")
            if image.mode != "RGB":
                image = image.convert("RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.array(image)
    except FileNotFoundError:
        raise UserError(f"there is no image {path}; check the path")
    except Exception as error:  # each of Pillow's decoders has its own ways to fail
        raise UserError(f"the image {path} cannot be read ({str(error) or type(error).__name__}); replace the file")


def read_images(paths, size=28, on_error=None):
    """Image files as a uint8 tensor of shape (len(paths), 3, size, size), decoded in parallel, in order.

    The first unreadable file raises its UserError; with `on_error`, a function (index, error), it is
    reported there instead and its image stays black.
    """
    images = np.zeros((len(paths), size, size, 3), dtype=np.uint8)

    def read(chunk):
        errors = []
        for index in chunk:
            try:
                images[index] = _decode(paths[index], size)
            except UserError as error:
                errors.append((index, error))
        return errors

    # One task for one image would cost half as much again as the decoding itself.
    chunks = [range(start, min(start + 64, len(paths))) for start in range(0, len(paths), 64)]
    with ThreadPoolExecutor() as pool, tqdm(desc="images", total=len(paths), unit="", disable=None) as bar:
        for chunk, errors in zip(chunks, pool.map(read, chunks)):
            bar.update(len(chunk))
            for index, error in errors:
                if on_error is None:
                    raise error
                on_error(index, error)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def list_images(folder):
    """Sorted names of the image files in `folder` (judged by suffix, hidden files left out)."""
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}; check the path")
    names = sorted(name for name in os.listdir(folder)
                   if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))
    if not names:
        raise UserError(f"the folder {folder} holds no images; name one that holds {', '.join(IMAGE_SUFFIXES)} files")
    return names


# --- Labels -------------------------------------------------------------------------------------

def read_names(csv_path):
    """The image names of a CSV file, in its order; its labels are not even parsed."""
    return _read_csv(csv_path, ["image_name"])["image_name"].tolist()


def read_labels(csv_path):
    """(names, labels) of a CSV file, in its order: a list of N strings, an int64 tensor of N digits 0..9."""
    table = _read_csv(csv_path, ["image_name", "label"])
    labels = table["label"].str.strip().map({str(digit): digit for digit in range(10)})
    for row in np.flatnonzero(labels.isna()):
        raise UserError(f"row {row + 1} of {csv_path} has the label {table['label'][row]!r}; "
                        "labels are the integers 0 to 9")
    return table["image_name"].tolist(), torch.tensor(labels.to_numpy(), dtype=torch.int64)


def _read_csv(csv_path, columns):
    """A DataFrame of strings with `columns` only; row numbers in messages start at 1 below the header."""
    try:
        table = pd.read_csv(csv_path, usecols=lambda name: name in columns, dtype=str, keep_default_na=False,
                            skipinitialspace=True, index_col=False)
    except pd.errors.EmptyDataError:
        raise UserError(f"{csv_path} is empty; its first line must be image_name,label")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {csv_path} ({error}); name a CSV file with the header image_name,label")
    for column in columns:
        if column not in table:
            raise UserError(f"{csv_path} has no column {column}; its first line must be image_name,label")
    if table.empty:
        raise UserError(f"{csv_path} has a header but no rows; nothing can be read from it")
    for row in np.flatnonzero(table["image_name"].duplicated()):
        raise UserError(f"row {row + 1} of {csv_path} names {table['image_name'][row]} a second time; "
                        "every image may have one row")
    return table


# --- Images with their labels -------------------------------------------------------------------

def load_digits(csv_path, image_dir, size=28, labelled=True):
    """(images, labels, names) of the images that a CSV file names in `image_dir`, in the CSV's order.

    images: uint8 (N, 3, size, size); labels: int64 (N,), or None when not `labelled`, where the label
    column is never read (an adaptation target's labels must not be); names: a list of N strings.
    """
    names, labels = read_labels(csv_path) if labelled else (read_names(csv_path), None)
    if not Path(image_dir).is_dir():
        raise UserError(f"there is no folder {image_dir}; it must hold the images that {csv_path} names")
    present = set(os.listdir(image_dir))
    for row, name in enumerate(names, start=1):
        if name not in present:
            raise UserError(f"row {row} of {csv_path} names {name!r}, which is not in {image_dir}; "
                            "add the image or remove the row")

    def stop(index, error):
        raise UserError(f"row {index + 1} of {csv_path}: {error}")

    return read_images([Path(image_dir) / name for name in names], size, stop), labels, names


def load_split(data_dir, domain, split, labelled=True):
    """load_digits for one of DOMAINS and 'train', 'val' or 'test' below `data_dir`, the folder hw2_data."""
    folder = Path(data_dir) / "digits" / domain
    csv_path, image_dir = folder / f"{split}.csv", folder / ("test" if split == "test" else "data")
    for path in (csv_path, image_dir):
        if not path.exists():
            raise UserError(f"there is no {path}; run 'bash get_dataset.sh', or point --data_dir to hw2_data")
    return load_digits(csv_path, image_dir, labelled=labelled)
