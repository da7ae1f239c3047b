"""CLIP's tokenizer with its vocabulary cut to the words of the tiny world.

Byte pairs are merged as CLIP merges them, so these words are one token each, if they are so for CLIP; other words fall
into pieces down to single bytes, and no text is impossible. The full list of merges is the file
bpe_simple_vocab_16e6.txt.gz of the package open-clip-torch (MIT licence); the folder tokenizer beside this file is what
is made of it:

    python3 p6_personalize/tiny/tokenizer.py bpe_simple_vocab_16e6.txt.gz
"""

import gzip
import json
import re
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, nonempty_path, run

from files import make_output_dir, write_atomic
from p6_personalize.prompts import ENSEMBLE, TEMPLATES
from p6_personalize.tiny.scenes import TINTS
from p7_clevr.scenes import OBJECTS

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 48  # tokens of a text, START and END included; CLIP has 77
WORDS = sorted(set(re.findall("[a-z]+", " ".join(
    [*sum(TEMPLATES.values(), ()), *ENSEMBLE, *OBJECTS, *TINTS, "an and two with on behind beside image scene object "
     "thing ball block toy small big left right front floor white black orange pink dog cat cartoon"]).lower())))


def bytes_to_unicode():
    """The printable character that stands for each byte, as in GPT-2: 256 of them in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def read_merges(path):
    """CLIP's 48,894 merges, a list of pairs, from bpe_simple_vocab_16e6.txt.gz."""
    if not path.is_file():
        raise UserError(f"there is no list of CLIP's merges {path}; it is in the package open-clip-torch, "
                        "open_clip/bpe_simple_vocab_16e6.txt.gz")
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1:49152 - 256 - 2 + 1]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read CLIP's merges in {path} ({error}); take the file of open-clip-torch")
    merges = [tuple(line.split()) for line in lines]
    if len(merges) != 48894 or any(len(pair) != 2 for pair in merges):
        raise UserError(f"{path} does not hold CLIP's 48,894 merges; take the file of open-clip-torch")
    return merges


def merges_of(word, ranks):
    """The merges that byte pair encoding makes in a word, lowest rank first."""
    pieces, made = [*word[:-1], word[-1] + "</w>"], []
    while len(pieces) > 1:
        rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(pieces, pieces[1:])))
        if rank == len(ranks):
            break
        made.append((pieces[i], pieces[i + 1]))
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
    return made


def vocabulary(merges):
    """{token: number} in CLIP's order: bytes, bytes that end a word, merges, START and END."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    return {token: number for number, token in enumerate(tokens)}


def write_tokenizer(folder, merges, length):
    """Writes the files of transformers' CLIPTokenizer, which all its versions read, into `folder`."""
    make_output_dir(folder)
    special = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=END)
    texts = {"vocab.json": json.dumps(vocabulary(merges), ensure_ascii=False),
             "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n",
             "special_tokens_map.json": json.dumps(special),
             "tokenizer_config.json": json.dumps(dict(
                 special, tokenizer_class="CLIPTokenizer", model_max_length=length, do_lower_case=True,
                 errors="replace", add_prefix_space=False))}
    for name, text in texts.items():
        write_atomic(Path(folder) / name, text.encode())


def cut(merges, words=WORDS):
    """Those of CLIP's merges that make `words`, in CLIP's order."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    return sorted({pair for word in words for pair in merges_of(word, ranks)}, key=ranks.get)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("merges", type=nonempty_path, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--output_dir", type=nonempty_path, default=ROOT / "p6_personalize/tiny/tokenizer",
                        help="the cut one's folder")
    parser.add_argument("--sd_v1", type=nonempty_path, help="a folder for the whole one as well")
    args = parser.parse_args()
    merges = read_merges(args.merges)
    write_tokenizer(args.output_dir, cut(merges), LENGTH)
    if args.sd_v1:
        write_tokenizer(args.sd_v1, merges, 77)
    print(f"{len(vocabulary(cut(merges)))} of {len(vocabulary(merges)):,} tokens for {len(WORDS)} words")


if __name__ == "__main__":
    run(main)
