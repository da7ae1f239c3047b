"""The tiny world: scenes of one or two objects of i-CLEVR in several looks, with captions.

One object and one look are held out of every training, image and caption: textual inversion has to find them.
"""

import itertools
import random

from utils import UserError

import torch

from p6_personalize.prompts import TEMPLATES
from p7_clevr.scenes import OBJECTS, read_scenes

UNSEEN_OBJECT, UNSEEN_LOOK = "purple sphere", "sepia"
SEEN = tuple(name for name in OBJECTS if name != UNSEEN_OBJECT)
# A look is a linear map of a pixel: the tint takes over this share of its colour, by its luminance.
SHARE = 0.7
TINTS = {"monochrome": (1.0, 1.0, 1.0), "ice": (0.75, 1.0, 1.4), "forest": (0.8, 1.1, 0.75), "rose": (1.3, 0.88, 1.0),
         "lemon": (1.12, 1.05, 0.45), "night": (0.4, 0.5, 0.75), "amber": (1.4, 0.92, 0.35), "sand": (1.1, 1.0, 0.85),
         "peach": (1.4, 0.85, 0.7), "mint": (0.75, 1.15, 1.1), "lavender": (1.05, 0.9, 1.4), "rust": (0.95, 0.6, 0.4),
         "olive": (0.75, 0.75, 0.4), "sky": (0.85, 1.0, 1.2), "plum": (0.75, 0.5, 0.7), "sepia": (1.2, 0.97, 0.65)}
SEEN_LOOKS = tuple(name for name in TINTS if name != UNSEEN_LOOK)


def matrix(look):
    """(3, 3): pixels in RGB times its transpose are in the look `look`."""
    luminance = torch.tensor([0.299, 0.587, 0.114])
    return (1 - SHARE) * torch.eye(3) + SHARE * torch.outer(torch.tensor(TINTS[look]), luminance)


def apply(look, images):
    """uint8 images (..., 3, H, W) in a look, or as they are for None."""
    return images if look is None else _map(matrix(look), images)


def undo(look, images):
    """The images in their own colours: the inverse of `apply`, up to what it has clipped."""
    return images if look is None else _map(torch.linalg.inv(matrix(look)), images)


def _map(colors, images):
    return torch.einsum("ij,...jhw->...ihw", colors, images.float()).round().clamp(0, 255).to(torch.uint8)


def nearest_look(images, reference):
    """The look, None for none, of each of uint8 images (N, 3, H, W), a list: that whose mean colour is the nearest.

    Most of every image is the same floor; it is grey, so monochrome counts as none. reference: uint8 (M, 3, H, W),
    images in no look.
    """
    looks = [None, *(look for look in TINTS if look != "monochrome")]
    means = torch.stack([apply(look, reference).float().mean(dim=(0, 2, 3)) for look in looks])
    distances = torch.cdist(images.float().mean(dim=(2, 3)), means)
    return [looks[index] for index in distances.argmin(1).tolist()]


def caption(objects, look=None, stream=None):
    """A caption of a list of objects in a look: "a photo of a red cube and a gray cylinder in the style of rose".

    With a random.Random as `stream` it is said in one of many ways: in any order, in the contexts that textual
    inversion uses, of a look alone, of an object without its colour.
    """
    if stream is None:
        return TEMPLATES["object"][0].format(" and a ".join(objects)) + (f" in the style of {look}" if look else "")
    if look and stream.random() < 0.2:
        return stream.choice(TEMPLATES["style"]).format(look)
    names = stream.sample(objects, len(objects))
    names = [name.split()[1] if stream.random() < 0.1 else name for name in names]
    template = stream.choice(TEMPLATES["object"]) if stream.random() < 0.5 else "a photo of a {}"
    if stream.random() < 0.1:
        template = "a {}"
    return template.format(" and a ".join(names)) + (f" in the style of {look}" if look else "")


def all_sets():
    """Every list of one object, and of two in the order of OBJECTS."""
    return [[name] for name in OBJECTS] + [list(pair) for pair in itertools.combinations(OBJECTS, 2)]


def read_world(data_dir, part=None, unseen=False):
    """(images, sets): uint8 (N, 3, 64, 64) and lists of one or two objects of p7_clevr's `part` of the scenes.

    unseen: the images that show the held-out object instead of those that do not.
    """
    images, _, sets = read_scenes(data_dir, part)
    chosen = [i for i, names in enumerate(sets) if len(names) <= 2 and (UNSEEN_OBJECT in names) == unseen]
    if not chosen:
        raise UserError(f"{data_dir} holds no scene {'with' if unseen else 'without'} a {UNSEEN_OBJECT}; "
                        "name the whole data set")
    return images[chosen], [sets[i] for i in chosen]


def with_looks(images, sets, seed=0):
    """(images, sets, looks): all of them and, mirrored, all in random seen looks; twice as many."""
    stream = random.Random(seed)
    looks = [stream.choice(SEEN_LOOKS) for _ in sets]
    tinted = torch.stack([apply(look, image.flip(-1)) for look, image in zip(looks, images)])
    return torch.cat([images, tinted]), sets + sets, [None] * len(sets) + looks
