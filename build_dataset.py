"""Builds hw2_data/digits/{mnistm,svhn,usps} in the course's layout from public data sets.

    python3 build_dataset.py --source_dir DIR    from public files that are in DIR already
    python3 build_dataset.py --download          fetches them into public_data/ first (about 350 MB)

Takes about a minute on two CPU cores. The public files may lie anywhere below --source_dir, compressed or not, their
names in capitals or not:

    MNIST    {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz], or with a dot before idx
    USPS     usps[.bz2], usps.t[.bz2] (LIBSVM's text format, labels 1..10)
    SVHN     {train,test,extra}_32x32.mat (format 2) or parts of them (test_32x32_first8000.mat)
    BSDS500  BSR_bsds500.tgz, or unpacked: .../images/train/*.jpg

The official parts, whichever are there, are pooled (of SVHN the extra digits too) and split 64/16/20 into train,
val and test. Same files and same --seed give the same images, and with one version of Pillow the same bytes. A
finished domain is left alone; one that was interrupted starts again.

The committed networks saw the training parts of MNIST and USPS, BSDS500 and the first 8,000 of SVHN's test digits. For
their split leave all else out of --source_dir, and cut SVHN's test_32x32.mat:

    from scipy.io import loadmat, savemat
    svhn = loadmat("test_32x32.mat")
    savemat("DIR/test_32x32_first8000.mat", dict(X=svhn["X"][..., :8000], y=svhn["y"][:8000]))
"""

import bz2
import gzip
import io
import os
import re
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, int_between, nonempty_path, run

import numpy as np
from PIL import Image
from scipy.io import loadmat
from sklearn.datasets import load_svmlight_file
from tqdm import tqdm

from dataset import read_rgb, some
from files import lock, make_output_dir

BSDS500_URL = "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz"
PHOTOGRAPH_ARCHIVES, PHOTOGRAPHS = ("*bsds500*.tgz", "*bsds500*.tar.gz", "*bsds500*.tar"), "images/train/[0-9]*.jpg"


# --- Formats of the public files ----------------------------------------------------------------

def unpacked(path):
    """A file's content; whether it is compressed is in its first bytes, a browser may have unpacked x.gz by itself."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        return gzip.decompress(data)
    return bz2.decompress(data) if data.startswith(b"BZh") else data


def read_idx(path, item):
    """MNIST's format, N arrays of bytes: two zero bytes, a type code, the number of axes, big-endian sizes, the bytes.

    ValueError when the arrays are not of the shape `item`, () for labels.
    """
    data = unpacked(path)
    shape = tuple(np.frombuffer(data, ">i4", count=data[3], offset=4))
    if data[2] != 8 or shape[1:] != item:
        found, expected = ("x".join(map(str, sizes)) for sizes in (shape, ("N", *item)))
        raise ValueError(f"it holds {found} numbers of type {data[2]} instead of {expected} of type 8")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def read_libsvm(path):
    """USPS's format, pixels -1..1 and labels 1..10, as uint8 (N, 16, 16) and N digits."""
    pixels, labels = load_svmlight_file(io.BytesIO(unpacked(path)), n_features=256, zero_based=False)
    pixels = pixels.toarray()
    if not -1 <= pixels.min() <= pixels.max() <= 1:
        raise ValueError(f"its pixels reach from {pixels.min():g} to {pixels.max():g} instead of -1 to 1")
    return np.rint((pixels + 1) / 2 * 255).astype(np.uint8).reshape(-1, 16, 16), as_digits(labels, 1) - 1


def read_mat(path):
    """SVHN's format, in which the digit 0 is labelled 10, as uint8 (N, 32, 32, 3) and N digits."""
    content = loadmat(path)
    if not {"X", "y"} <= content.keys():
        raise ValueError("it holds no X and y")
    images, labels = content["X"], content["y"].ravel()
    if images.dtype != np.uint8 or images.shape[:3] != (32, 32, 3):
        raise ValueError(f"its X is {'x'.join(map(str, images.shape))} {images.dtype} instead of 32x32x3xN uint8")
    return images.transpose(3, 0, 1, 2), as_digits(labels, 1) % 10


def as_digits(labels, first):
    """N labels as int64; ValueError when one is not among `first` ... `first` + 9."""
    odd = labels[~np.isin(labels, range(first, first + 10))]
    if len(odd):
        raise ValueError(f"it holds the label {odd[0]:g}, labels are {first} to {first + 9}")
    return labels.astype(np.int64)


def read_tar(path):
    """BSDS500's training photographs in an archive, {file name: uint8 (H, W, 3)}."""
    with tarfile.open(path) as tar:
        return {Path(member.name).name: np.asarray(Image.open(tar.extractfile(member)).convert("RGB"))
                for member in tar if Path(member.name).match(PHOTOGRAPHS)}


def read(path, reader):
    """reader(path), with a UserError for whatever a damaged file makes it raise."""
    try:
        return reader(path)
    except Exception as error:  # gzip, bz2, tar, MATLAB and JPEG each fail in their own ways
        raise UserError(f"the file {path} cannot be read ({str(error) or type(error).__name__}); if it is damaged, "
                        "delete it and fetch it again")


# --- Finding them -------------------------------------------------------------------------------

def walk(source_dir):
    """Yields (folder, names of files) of every folder below `source_dir`, linked ones too, each once.

    Hidden files and unfinished downloads are left out, with all that lies in a folder of such a name.
    """
    def fit(names):
        return [name for name in names if not re.search(r"^\.|\.(crdownload|download|part|partial)$", name.lower())]

    seen = set()
    for folder, folders, names in os.walk(source_dir, followlinks=True):
        if os.path.realpath(folder) in seen:  # a link leads back here
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = fit(folders)
        yield folder, fit(names)


def find_all(source_dir, *patterns):
    """The files below `source_dir`, see `walk`, that match a pattern in lower case; the first pattern's first.

    UserError when they lie in several folders: other data sets (Fashion-MNIST) use MNIST's file names.
    """
    paths = [Path(folder, name) for folder, names in walk(source_dir) for name in names]
    files = [path for pattern in patterns for path in sorted(paths)
             if PurePosixPath(path.as_posix().lower()).match(pattern) and path.is_file()]
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1:
        raise UserError(f"{files[0].name} lies in {' and in '.join(folders)}; leave it in one of them, or name that")
    return files


def find(source_dir, *patterns):
    """The first of `find_all`, or None."""
    return next(iter(find_all(source_dir, *patterns)), None)


def missing(source_dir, what, word):
    """The UserError for a data set that is not there; it names the files whose names hold `word` and are not read."""
    names = {name for _, names in walk(source_dir) for name in names if word in name.lower()}
    others = f" (found, but not read: {some(sorted(names))})" if names else ""
    return UserError(f"{source_dir} lacks {what}{others}; put it there or fetch it with --download")


# --- The public data sets, official training digits first -----------------------------------------

def read_mnist(source_dir):
    """(images, labels): uint8 (N, 28, 28), white on black, and N digits."""
    parts = []
    for part in ("train", "t10k"):
        names = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
        patterns = [name.replace("-idx", "[-.]idx") for name in names]
        files = [find(source_dir, pattern, f"{pattern}.gz") for pattern in patterns]
        if any(files) and not all(files):
            raise UserError(f"{source_dir} holds only one of {' and '.join(names)}; put the other one beside it")
        if any(files):
            parts.append((read(files[0], lambda path: read_idx(path, (28, 28))),
                          read(files[1], lambda path: as_digits(read_idx(path, ()), 0))))
    return pool(parts, source_dir, "MNIST (train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz)", "mnist")


def read_usps(source_dir):
    """(images, labels): uint8 (N, 16, 16), white on black, and N digits."""
    files = [find(source_dir, name, f"{name}.bz2") for name in ("usps", "usps.t")]
    return pool([read(file, read_libsvm) for file in files if file], source_dir, "USPS (usps.bz2)", "usps")


def read_svhn(source_dir):
    """(images, labels): uint8 (N, 32, 32, 3) and N digits."""
    parts = []
    for part in ("train", "test", "extra"):
        files = find_all(source_dir, f"{part}_32x32*.mat")
        if len(files) > 1:  # a whole part and a piece of it would bring the same digits twice
            raise UserError(f"{source_dir} holds {' and '.join(file.name for file in files)}; leave one of them")
        parts += [read(file, read_mat) for file in files]
    return pool(parts, source_dir, "SVHN (train_32x32.mat)", "32x32")


def read_photographs(source_dir):
    """BSDS500's training photographs, a list of uint8 (H, W, 3) sorted by file name."""
    archive = find(source_dir, *PHOTOGRAPH_ARCHIVES)
    if archive:
        photographs = read(archive, read_tar)
    else:
        files = find_all(source_dir, PHOTOGRAPHS)
        photographs = {file.name: np.asarray(read_rgb(file)) for file in files}
    if not photographs:
        raise missing(source_dir, f"BSDS500's training photographs ({BSDS500_URL})", "bsds")
    return [photographs[name] for name in sorted(photographs)]


def pool(parts, source_dir, what, word):
    """Joins the (images, labels) of the splits that were found; `what` and `word` as in missing()."""
    if not parts:
        raise missing(source_dir, what, word)
    for images, labels in parts:
        if len(images) != len(labels):
            raise UserError(f"{source_dir} holds {len(images)} images but {len(labels)} labels of {what}; fetch both "
                            "anew")
    return [np.concatenate(arrays) for arrays in zip(*parts)]


def download(source_dir, domain):
    """Fetches the public files of `domain` that are not there, be it in a folder or form of their user's."""
    from torch.hub import download_url_to_file
    from torchvision import datasets

    theirs = {"MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/train-images-idx3-ubyte.gz", "usps.bz2",
              "train_32x32.mat", "test_32x32.mat"}  # where torchvision looks for its own, and fetches what is missing

    def by_hand(*patterns):
        return any(file.relative_to(source_dir).as_posix() not in theirs for file in find_all(source_dir, *patterns))

    steps = {
        "mnistm": {
            "MNIST": lambda: (by_hand("train-images[-.]idx3-ubyte", "train-images[-.]idx3-ubyte.gz")
                              or datasets.MNIST(source_dir, download=True)),
            "BSDS500": lambda: (by_hand(*PHOTOGRAPH_ARCHIVES, PHOTOGRAPHS)
                                or download_url_to_file(BSDS500_URL, Path(source_dir) / "BSR_bsds500.tgz"))},
        "svhn": {"SVHN": lambda: (by_hand("*_32x32*.mat")
                                  or [datasets.SVHN(source_dir, split, download=True) for split in ("train", "test")])},
        "usps": {"USPS": lambda: (by_hand("usps", "usps.bz2")
                                  or [datasets.USPS(source_dir, train, download=True) for train in (True, False)])}}
    for name, step in steps[domain].items():
        try:
            step()
        except Exception as error:  # no network, a dead address, a damaged download
            raise UserError(f"cannot download {name} ({error}); put its files into {source_dir} by hand "
                            "(the names are in --help) and run 'bash get_dataset.sh' with that folder")


# --- The three domains: (labels, a function from the pool's index to a 28x28 image) ---------------

def mnistm(source_dir, seed):
    """|photograph - digit| per channel on a random patch (Ganin et al., JMLR 2016, section 5.2.4)."""
    digits, labels = read_mnist(source_dir)
    photographs = read_photographs(source_dir)

    def image(index):
        rng = np.random.default_rng([seed, 0, index])  # an image depends on its own index alone
        photograph = photographs[rng.integers(len(photographs))]
        top, left = rng.integers(photograph.shape[0] - 27), rng.integers(photograph.shape[1] - 27)
        patch = photograph[top:top + 28, left:left + 28].astype(np.int16)
        return np.abs(patch - digits[index][:, :, None]).astype(np.uint8)

    return labels, image


def svhn(source_dir, seed):
    """SVHN's colour crops."""
    crops, labels = read_svhn(source_dir)
    return labels, lambda index: resize(crops[index])


def usps(source_dir, seed):
    """USPS's digits; their files have one channel, as the course's have."""
    digits, labels = read_usps(source_dir)
    return labels, lambda index: resize(digits[index])


def resize(pixels):
    return np.asarray(Image.fromarray(pixels).resize((28, 28), Image.Resampling.BILINEAR))


DOMAINS = {"mnistm": mnistm, "svhn": svhn, "usps": usps}


# --- The course's layout ------------------------------------------------------------------------

def split_sizes(count):
    """(train, val, test): a fifth is test and a fifth of the rest is val, rounded up as the course's are."""
    test = -(-count // 5)
    val = -(-(count - test) // 5)
    return count - test - val, val, test


def is_built(target):
    """Whether the folder `target` of a domain is there; UserError when it is but not whole."""
    whole = all((target / name).exists() for name in ("data", "train.csv", "val.csv"))
    if target.exists() and not whole:
        raise UserError(f"{target} is there but lacks data, train.csv or val.csv; move it away to have it built")
    return whole


def build(domain, source_dir, target, seed):
    """Writes the folder `target` of a domain, whole or not at all."""
    labels, image = DOMAINS[domain](source_dir, seed)

    # Numbered in a random order, so that a file's name tells nothing about its digit.
    order = np.random.default_rng([seed, list(DOMAINS).index(domain)]).permutation(len(labels))
    n_train, n_val, n_test = split_sizes(len(labels))
    files = [f"data/{k:05d}.png" for k in range(n_train + n_val)] + [f"test/{k:05d}.png" for k in range(n_test)]

    partial = target.with_name(f".{domain}.partial")
    if partial.exists():  # an interrupted run left it
        shutil.rmtree(partial)
    for folder in ("data", "test"):
        (partial / folder).mkdir(parents=True)

    def write(k):
        Image.fromarray(image(order[k])).save(partial / files[k])

    with ThreadPoolExecutor() as threads:
        list(tqdm(threads.map(write, range(len(files))), domain, len(files), unit="", disable=None))
    start = 0
    for split, size in (("train", n_train), ("val", n_val), ("test", n_test)):
        rows = [f"{Path(files[k]).name},{labels[order[k]]}\n" for k in range(start, start + size)]
        (partial / f"{split}.csv").write_text("image_name,label\n" + "".join(rows), newline="\n")
        start += size
    os.replace(partial, target)
    print(f"{target}: {n_train} training, {n_val} validation and {n_test} test digits")


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--source_dir", type=nonempty_path, default=ROOT / "public_data",
                        help="holds the public files, at any depth")
    parser.add_argument("--data_dir", type=nonempty_path, default=ROOT / "hw2_data", help="folder to build digits/ in")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="which ones to build")
    parser.add_argument("--download", action="store_true", help="first fetch the public files that are missing")
    parser.add_argument("--seed", type=int_between(0), default=0, help="seed of the splits and of MNIST-M's patches")
    args = parser.parse_args()
    if not args.download and not args.source_dir.is_dir():
        raise UserError(f"there is no folder {args.source_dir}; name the one that holds the public files")
    make_output_dir(args.data_dir)
    errors = []
    for domain in args.domains:
        try:
            target = args.data_dir / "digits" / domain
            if is_built(target):
                print(f"{target} is there already and is left alone")
                continue
            if args.download:
                lock(make_output_dir(args.source_dir))
                download(args.source_dir, domain)
            lock(args.data_dir)  # so that a partial domain there is a dead run's
            build(domain, args.source_dir, target, args.seed)
        except UserError as error:  # the other domains can be had all the same
            errors.append(str(error))
    if errors:
        raise UserError("; ".join(errors))


if __name__ == "__main__":
    run(main)
