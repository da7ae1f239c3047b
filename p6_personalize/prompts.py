"""Texts: the templates that concepts are learnt and classes are named with, and the course's input.json."""

import sys
from typing import NamedTuple

from files import read_json
from utils import UserError

# Neutral contexts for a concept (Gal et al. 2022, appendix on training details, after CLIP's templates).
TEMPLATES = {
    "object": (
        "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}",
        "a photo of a clean {}", "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}",
        "a photo of the cool {}", "a close-up photo of a {}", "a bright photo of the {}", "a photo of one {}",
        "a good photo of a {}", "a photo of the nice {}", "a photo of the small {}", "a photo of the large {}"),
    "style": (
        "a painting in the style of {}", "a rendering in the style of {}", "a cropped painting in the style of {}",
        "the painting in the style of {}", "a dark painting in the style of {}", "a picture in the style of {}",
        "a cool painting in the style of {}", "a close-up painting in the style of {}",
        "a bright painting in the style of {}", "a good painting in the style of {}",
        "a nice painting in the style of {}", "a photo in the style of {}"),
}

IMAGES = 25  # that the scorer wants of every prompt

PROMPT = "A photo of a {}."
# The seven that Radford et al. chose for ImageNet, and the plain one.
ENSEMBLE = (PROMPT, "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
            "a {} in a video game.", "art of the {}.", "a photo of the small {}.")


class Request(NamedTuple):
    """One entry of input.json: a concept's token, its prompts, and by what the scorer judges them."""
    key: str
    token: str
    prompts: list
    clip_prompts: list  # the prompts as CLIP may read them, without the token
    baselines: list  # (image score, text score) that each prompt has to reach


def read_requests(path):
    """The Requests in the course's input.json; UserError tells which entry is not as it should be."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no table of concepts; it should look like "
                        '{"0": {"token_name": "<new1>", "prompt": ["a photo of a <new1>"], ...}}')
    return [_request(key, entry, f"entry \"{key}\" of {path}") for key, entry in content.items()]


def _request(key, entry, where):
    if key in ("", ".", "..") or not key.isprintable() or "/" in key or "\\" in key:
        raise UserError(f"{where} cannot name a folder; take a number")
    if not isinstance(entry, dict):
        raise UserError(f"{where} is no table; it needs token_name, prompt, prompt_4_clip_eval and baseline")
    token, prompts = entry.get("token_name"), entry.get("prompt")
    clip_prompts, baselines = entry.get("prompt_4_clip_eval", []), entry.get("baseline", [])
    if not isinstance(token, str) or token.split() != [token] or not is_unicode(token):
        raise UserError(f"{where} needs a token_name of one word, such as \"<new1>\"")
    if not _texts(prompts) or not prompts:
        raise UserError(f"{where} needs a prompt, a list of texts")
    if not _texts(clip_prompts) or len(clip_prompts) not in (0, len(prompts)):
        raise UserError(f"{where} needs as many texts in prompt_4_clip_eval as in prompt, {len(prompts)}")
    pairs = isinstance(baselines, list) and all(
        isinstance(pair, list) and len(pair) == 2
        and all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in pair) for pair in baselines)
    if not pairs or len(baselines) not in (0, len(prompts)):
        raise UserError(f"{where} needs a baseline of [image score, text score] for each of its {len(prompts)} prompts")
    return Request(key, token, prompts, clip_prompts, baselines)


def _texts(value):
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() and is_unicode(text)
                                           for text in value)


def is_unicode(text):
    """Whether tokenizers take it: JSON may hold half of a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
