"""Reads images and the courses' layouts, folders of digits and CSV files, into memory as uint8 tensors.

    hw2_data/digits/<mnistm | svhn | usps>/
        data/*.png               training and validation images in one folder; 2020's course: train/*.png
        train.csv  val.csv       header image_name,label; rows in any order
        test/*.png  test.csv     the held-out test images

2020's course has no val.csv; then a fixed fifth of train.csv is for validation, and training takes the rest.

A whole split fits into memory (45,000 digits are 100 MB), so trainers load it once, move it to their
device and never touch the disk again. Whatever is wrong with a file raises a utils.UserError.
"""

import contextlib
import io
import os
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from utils import UserError

DOMAIN_NAMES = {"mnistm": "MNIST-M", "svhn": "SVHN", "usps": "USPS"}
DOMAINS = tuple(DOMAIN_NAMES)
IMAGE_SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp",
                  ".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx")


# --- One image ----------------------------------------------------------------------------------

def read_rgb(path, lock=contextlib.nullcontext()):
    """The image file `path` (a Path or zipfile.Path) as a PIL image in RGB, 8 bits a channel, upright as EXIF says.

    Greys of more bits: see eight_bits; transparency: see on_contrast. `lock` is held while the file is read. UserError
    when there is no such file or it cannot be decoded.
    """
    if not path.is_file():  # a pipe of that name would be waited for without end
        raise UserError(f"there is no image {path}; check the path")
    try:
        with lock:
            data = path.read_bytes()
        image = _decode(data)
        with contextlib.suppress(Exception):  # damaged EXIF data beside whole pixels
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # Pillow's own conversion would clip at 255
            image = Image.fromarray(eight_bits(np.asarray(image)))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = on_contrast(image.convert("RGBA"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError:
        raise UserError(f"the image {path} cannot be read (Pillow knows no such format); replace the file")
    except Exception as error:  # each of Pillow's decoders has its own ways to fail
        raise UserError(f"the image {path} cannot be read ({str(error) or type(error).__name__}); replace the file")


def _decode(data):
    """The PIL image in a file's bytes. Pillow keeps the upper byte of 16-bit colours; when all are 0, the lower."""
    image = Image.open(io.BytesIO(data))
    layouts = [tile[3] for tile in image.tile]
    image.load()
    lower = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L", "LA;16B": "RGBA"}.get(str(*layouts[:1]))
    if lower and not any(highest for _, highest in image.getextrema()[:3]):  # opaque or not
        image = Image.open(io.BytesIO(data))
        image.tile = [(*image.tile[0][:3], lower)]
        image.load()
        if lower == "RGBA":  # grey's two bytes and alpha's two
            image = Image.merge("LA", image.split()[1::2])
    return image


def eight_bits(values):
    """Numbers of any kind and range, an array (H, W), as grey levels: uint8.

    Integers lose whole bytes from below until none exceeds 255: 16 bits that hold 8 stay what they are. Floats are
    taken as they are within 0..255, times 255 within 0..1, and stretched from the lowest to the highest otherwise.
    """
    low, high = values.min(), values.max()
    if values.dtype.kind != "f":
        shift = max(0, int(high).bit_length() - 1) // 8 * 8
        return (values.astype(np.int64) >> shift).clip(0).astype(np.uint8)
    if not np.isfinite([low, high]).all():
        raise ValueError("it holds NaN or infinity")
    if low < 0 or high > 255:
        values = (values - low) / max(high - low, 1e-12) * 255
    elif high <= 1:
        values = values * 255
    return np.rint(values).astype(np.uint8)


def on_contrast(image):
    """A PIL image in RGBA laid on black, or on white when its ink is dark: what is drawn in transparency stays visible.

    The ink's brightness is the mean over the pixels, weighted by opacity. An image without ink keeps its colours.
    """
    pixels = np.asarray(image)
    if not pixels[..., 3].any():
        return image
    ink = np.average(pixels[..., :3].mean(axis=2), weights=pixels[..., 3])
    background = Image.new("RGB", image.size, "black" if ink > 127 else "white")
    background.paste(image, mask=image.getchannel("A"))
    return background


# --- Many images --------------------------------------------------------------------------------

def _images_among(source, files):
    """The image files among the Paths `files` of `source`, judged by suffix; says on stderr which others there are.

    Hidden files, such as macOS' ._a.png, are passed over without a word.
    """
    images, others = [], []
    for file in files:
        if not file.name.startswith("."):
            (images if file.name.lower().endswith(IMAGE_SUFFIXES) and file.is_file() else others).append(file)
    if others:
        print(f"passed over in {source}: {some([file.name + '/' * file.is_dir() for file in others])}", file=sys.stderr)
    if not images:
        raise UserError(f"{source} holds no images; name a folder that holds {', '.join(IMAGE_SUFFIXES)} files")
    return images


def some(names):
    """The first three of the list `names` and how many more there are, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def list_images(folder):
    """Sorted names of the image files in `folder`, judged by suffix; says on stderr what else there is."""
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}; check the path")
    return [path.name for path in _images_among(folder, sorted(Path(folder).iterdir()))]


def read_images(paths, size=28, on_error=None, lock=contextlib.nullcontext()):
    """Image files (Paths) as uint8 (len(paths), 3, size, size), values 0..255, in order.

    Other sizes are resized by antialiased bilinear interpolation. The first unreadable file raises its UserError; with
    `on_error`, a function (index, error), it is reported there after the last file and its image is black, unless none
    can be read. lock: a threading.Lock for files in an archive, which counts its readers without one.
    """
    def prepare(image):
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)

    return _read_all(paths, prepare, size, on_error, lock)


def read_image_source(source, size, rows=None):
    """(images, names) of a folder, searched through, or of a zip file: uint8 (N, 3, size, size), N file names.

    Sorted by path, without what lies in hidden folders. Of each image the largest centred square, or the `rows` (top,
    bottom), which are stretched to a square; resized by Lanczos' filter. 100,000 images of 64x64 take 1.2 GB. UserError
    when there are no images, one cannot be read, or rows exceed one.
    """
    source = Path(source)
    if source.is_dir():
        files = {file.relative_to(source): file for file in sorted(source.rglob("*"))}
    elif source.is_file() and zipfile.is_zipfile(source):
        try:
            archive = zipfile.ZipFile(source)
        except zipfile.BadZipFile as error:
            raise UserError(f"the zip file {source} is damaged ({error}); fetch it again")
        files = {Path(name): zipfile.Path(archive, name) for name in sorted(archive.namelist())}
    else:
        raise UserError(f"{source} is neither a folder nor a zip file; name one that holds images")
    paths = _images_among(source, [file for place, file in files.items() if not file.is_dir()
                                   and not any(part.startswith(".") for part in place.parts)])

    def prepare(image):
        if rows is None:
            return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        if not rows[0] < rows[1] <= image.height:
            raise UserError(f"the images in {source} have {image.height} rows, and {rows[0]} to {rows[1]} are asked "
                            "for")
        return image.resize((size, size), Image.Resampling.LANCZOS, box=(0, rows[0], image.width, rows[1]))

    return _read_all(paths, prepare, size, None, threading.Lock()), [path.name for path in paths]


def _read_all(paths, prepare, size, on_error, lock):
    """prepare(image), a PIL image of side `size`, for every file, in parallel: see read_images."""
    images = np.zeros((len(paths), 3, size, size), dtype=np.uint8)

    def read(chunk):
        errors = []
        for index in chunk:
            try:
                images[index] = np.moveaxis(np.asarray(prepare(read_rgb(paths[index], lock))), 2, 0)
            except UserError as error:
                errors.append((index, error))
        return errors

    # One task for one image would cost half as much again as the decoding itself.
    chunks = [range(start, min(start + 64, len(paths))) for start in range(0, len(paths), 64)]
    failed = []
    with ThreadPoolExecutor() as pool, tqdm(desc="images", total=len(paths), unit="", disable=None) as bar:
        for chunk, errors in zip(chunks, pool.map(read, chunks)):
            bar.update(len(chunk))
            failed += errors
            if failed and on_error is None:
                raise failed[0][1]
    if failed and len(failed) == len(paths):
        raise UserError(f"none of the {len(paths)} images can be read; the first: {failed[0][1]}")
    for index, error in failed:
        on_error(index, error)
    return torch.from_numpy(images)


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


def string_columns(csv_path, columns):
    """A DataFrame of strings with those of `columns` that the CSV file has; OSError or ValueError for no such file."""
    return pd.read_csv(csv_path, usecols=lambda name: name in columns, dtype=str, keep_default_na=False,
                       skipinitialspace=True, index_col=False, encoding_errors="surrogateescape")


def _read_csv(csv_path, columns):
    """A DataFrame of strings with `columns` only; row numbers in messages start at 1 below the header."""
    try:
        table = string_columns(csv_path, columns)
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

def load_digits(csv_path, image_dir, labelled=True, choose=None):
    """(images, labels, names) of the images that a CSV file names in `image_dir`, in the CSV's order.

    images: uint8 (N, 3, 28, 28); labels: int64 (N,), or None when not `labelled`, where the label
    column is never read (an adaptation target's labels must not be); names: a list of N strings. choose: a function
    of all names that returns those that are wanted.
    """
    names, labels = read_labels(csv_path) if labelled else (read_names(csv_path), None)
    if not Path(image_dir).is_dir():
        raise UserError(f"there is no folder {image_dir}; it must hold the images that {csv_path} names")
    present = set(os.listdir(image_dir))
    for row, name in enumerate(names, start=1):
        if name not in present:
            raise UserError(f"row {row} of {csv_path} names {name!r}, which is not in {image_dir}; "
                            "add the image or remove the row")
    wanted = set(choose(names) if choose else names)
    rows = [row for row, name in enumerate(names) if name in wanted]
    if not rows:
        raise UserError(f"{csv_path} holds too few images to set a fifth of them aside; name another folder")
    names, labels = [names[row] for row in rows], labels[rows] if labelled else None

    def stop(index, error):
        raise UserError(f"row {rows[index] + 1} of {csv_path}: {error}")

    return read_images([Path(image_dir) / name for name in names], on_error=stop), labels, names


def load_split(data_dir, domain, split, labelled=True):
    """load_digits for one of DOMAINS and 'train', 'val' or 'test' below `data_dir`, the folder hw2_data."""
    folder, choose = Path(data_dir) / "digits" / domain, None
    csv_path, image_dir = folder / f"{split}.csv", folder / ("test" if split == "test" else "data")
    if split != "test" and not image_dir.exists() and (folder / "train").exists():
        image_dir = folder / "train"
    if split != "test" and not (folder / "val.csv").exists():
        csv_path, choose = folder / "train.csv", FIFTHS[split]
    for path in (csv_path, image_dir):
        if not path.exists():
            raise UserError(f"there is no {path}; run 'bash get_dataset.sh', or point --data_dir to hw2_data")
    return load_digits(csv_path, image_dir, labelled=labelled, choose=choose)


# Of all names, whatever their order in the file and whatever their labels, every fifth is for validation.
FIFTHS = {"val": lambda names: sorted(names)[::5],
          "train": lambda names: set(names).difference(sorted(names)[::5])}


def load_domains(data_dir, domains, split):
    """[(images, classes)] for each of the `domains`, see load_split; the digit d of domains[i] is of class 10 i + d."""
    return [(images, labels + 10 * i) for i, (images, labels, _) in
            enumerate(load_split(data_dir, domain, split) for domain in domains)]


def balanced(sets):
    """(images, classes) of several such pairs in one; the smaller ones are repeated, as often as the largest has room
    for, so that none is met less than half as often as another."""
    most = max(len(classes) for _, classes in sets)
    return [torch.cat([part for part in parts for _ in range(most // len(part))]) for parts in zip(*sets)]
