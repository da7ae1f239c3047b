"""The 24 objects of i-CLEVR, sets of them as conditions, and the images that show them.

    --data_dir/
        train.json                    {"CLEVR_train_002066_1.png": ["cyan cube", "cyan sphere"], ...}
        *.png                         anywhere below it, or in a zip file beside train.json

Images ..._0, ..._1 and ..._2 show one, two and three objects of one scene, so what is told apart is told apart by
scene: the generator trains on 15 of 20, graders on 4, and the last serves to measure both. In the stand-in
images of one object repeat among scenes, byte for byte; those of two and three do not.
"""

import difflib
import itertools
import json
import random
import re
import threading
import zipfile
from pathlib import Path

import numpy as np
import torch

from dataset import IMAGE_SUFFIXES, read_images, some
from files import read_json
from utils import UserError

COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
SHAPES = ("cube", "sphere", "cylinder")
OBJECTS = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)  # the order of the course's objects.json
NUMBERS = {name: number for number, name in enumerate(OBJECTS)}
SIZE = 64  # the side of an image

CONDITIONS = Path(__file__).parent / "conditions"  # the course's test.json and new_test.json
PARTS = {"generator": range(15), "grader": range(15, 19), "held_out": range(19, 20)}  # scene numbers modulo 20


# --- Conditions ---------------------------------------------------------------------------------

def check_objects(names, where):
    """`names`, a list of different objects among OBJECTS, as it is; else UserError, which begins with `where`."""
    if not isinstance(names, list) or not names:
        raise UserError(f"{where} is no list of objects ({json.dumps(names)}); name at least one, such as \"red cube\"")
    for name in names:
        if name not in OBJECTS:
            nearest = difflib.get_close_matches(str(name).lower(), OBJECTS, n=1, cutoff=0)[0]
            raise UserError(f"{where} names {json.dumps(name)}, which is none of the 24 objects; the nearest is "
                            f"\"{nearest}\"")
        if names.count(name) > 1:
            raise UserError(f"{where} names \"{name}\" twice; an object occurs once in a scene")
    return names


def read_conditions(path):
    """The lists of objects in a file such as test.json, in its order."""
    lists = read_json(path)
    if not isinstance(lists, list) or not lists:
        raise UserError(f"{path} holds no list of lists of objects; it should look like "
                        "[[\"red cube\"], [\"gray sphere\", \"cyan cylinder\"]]")
    return [check_objects(names, f"entry {number} of {path}") for number, names in enumerate(lists)]


def multi_hot(sets):
    """Sets of objects, an iterable of lists of names, as float32 (N, 24) of zeros and ones."""
    rows = torch.zeros(len(sets), len(OBJECTS))
    for row, names in zip(rows, sets):
        row[[NUMBERS[name] for name in names]] = 1
    return rows


def random_sets(count, sizes, seed, without=()):
    """`count` different lists of objects whose lengths go through `sizes` in turn, none as a set in `without`."""
    stream, seen = random.Random(seed), {frozenset(names) for names in without}
    sets = []
    while len(sets) < count:
        names = stream.sample(OBJECTS, sizes[len(sets) % len(sizes)])
        if frozenset(names) not in seen:
            seen.add(frozenset(names))
            sets.append(names)
    return sets


def official_sets():
    """The course's conditions: {"test": 32 lists, "new_test": 32 lists}."""
    return {name: read_conditions(CONDITIONS / f"{name}.json") for name in ("test", "new_test")}


def held_out_sets():
    """100 sets of three objects that the generator never trains on: to name them all it has to combine."""
    return random_sets(100, [3], seed=0, without=itertools.chain(*official_sets().values()))


# --- Images -------------------------------------------------------------------------------------

def read_scenes(data_dir, part=None, first=None):
    """(images, conditions, sets) of the images that train.json names: uint8 (N, 3, 64, 64), float32 (N, 24), lists.

    data_dir: the folder that holds train.json and the images, or a zip file that holds both or lies beside it.
    part: one of PARTS, or None for all scenes; "generator" leaves out the images that show one of held_out_sets.
    first: read so many of these alone; None is all.
    Images of another size are squeezed to 64x64, as the course's transforms.Resize((64, 64)) does.
    """
    table, files = _find(Path(data_dir))
    names = sorted(name for name in table if part is None or scene_number(name) % 20 in PARTS[part])
    if part == "generator":
        held_out = {frozenset(objects) for objects in held_out_sets()}
        names = [name for name in names if frozenset(table[name]) not in held_out]
    names = names[:first]
    if not names:
        raise UserError(f"train.json in {data_dir} names no scene of the part {part}; take more scenes")
    missing = [name for name in names if name not in files]
    if missing:
        raise UserError(f"{data_dir} lacks {len(missing)} of the {len(names)} images that its train.json names: "
                        f"{some(missing)}; add them")
    sets = [table[name] for name in names]
    images = read_images([files[name] for name in names], SIZE, lock=threading.Lock())  # archives read one by one
    return images, multi_hot(sets), sets


def scene_number(name):
    """The number of the scene that the image CLEVR_train_<number>_<objects>.png shows."""
    match = re.fullmatch(r".*?(\d+)_\d\.\w+", name)
    if not match:
        raise UserError(f"train.json names {name!r}, which is not like CLEVR_train_000000_0.png; the number tells "
                        "which images show the same scene")
    return int(match[1])


def _find(data_dir):
    """(what train.json holds, {name of an image: its Path or zipfile.Path})."""
    if data_dir.is_dir():
        files = [path for path in sorted(data_dir.rglob("*")) if not path.name.startswith(".")]
        archives, folder = [path for path in files if path.suffix.lower() == ".zip"], data_dir
    else:
        files, archives, folder = [], [data_dir], data_dir.parent
    for archive in archives:
        try:
            opened = zipfile.ZipFile(archive)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{archive} is neither a folder nor a whole zip file ({error}); name what holds images")
        files += [zipfile.Path(opened, name) for name in sorted(opened.namelist())]
    by_name = {path.name: path for path in files}
    path = data_dir / "train.json"
    if not path.is_file():  # deeper, in a zip file, or beside it
        path = by_name.get("train.json", folder / "train.json")
    table = read_json(path)
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path} holds no table of images; it should look like "
                        "{\"CLEVR_train_000000_0.png\": [\"red cube\"]}")
    for name, objects in table.items():
        check_objects(objects, f"{name} in {path}")
    return table, {name: path for name, path in by_name.items() if name.lower().endswith(IMAGE_SUFFIXES)}



def empty_background(images):
    """The image without objects behind uint8 `images` (N, 3, 64, 64) of the same camera: float32, 0 ... 255.

    The median, except where an object stands in more than a quarter of the images, as in the centre, where the first
    of every scene does: there each row runs straight from what is left to what is right of it.
    """
    pixels = images.cpu().numpy()
    background = np.median(pixels, axis=0).astype(np.float32)
    hidden = (np.abs(pixels - background).max(axis=1) > 6).mean(axis=0) > 0.25
    columns = np.arange(SIZE)
    for row, behind in enumerate(hidden):
        if behind.any() and not behind.all():
            for channel in background:
                channel[row, behind] = np.interp(columns[behind], columns[~behind], channel[row, ~behind])
    return torch.from_numpy(background).to(images.device)
