"""Builds hw2_data/digits/{mnistm,svhn,usps} in the course's layout from public data sets.

    python3 build_dataset.py --source_dir DIR    from public files that are in DIR already
    python3 build_dataset.py --download          fetches them into public_data/ first (about 350 MB)

Takes about a minute on two CPU cores. The public files may lie anywhere below --source_dir:

    MNIST    {train,t10k}-{images-idx3,labels-idx1}-ubyte, with or without .gz
    USPS     usps.bz2, usps.t.bz2 (LIBSVM's text format)
    SVHN     {train,test,extra}_32x32.mat (format 2) as far as they are there, whole or in part (test_32x32_first8000.mat)
    BSDS500  BSR_bsds500.tgz, or unpacked: .../images/train/*.jpg

The official parts, whichever are there, are pooled (of SVHN the extra digits too) and split 64/16/20 into train,
val and test. Same files and same --seed give the same images, and with one version of Pillow the same bytes. A
finished domain is left alone; one that was interrupted starts again.
"""

import bz2
import gzip
import io
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat
from sklearn.datasets import load_svmlight_file
from tqdm import tqdm

from utils import UserError, argument_parser, int_at_least, make_output_dir, run

ROOT = Path(__file__).resolve().parent
BSDS500_URL = "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz"


# --- Formats of the public files ----------------------------------------------------------------

def read_idx(path):
    """MNIST's format: two zero bytes, a type code, the number of axes, big-endian sizes, then the bytes."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        data = file.read()
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def read_libsvm(path):
    """USPS's format, pixels -1..1 and labels 1..10, as uint8 (N, 16, 16) and N digits."""
    with bz2.open(path) as file:
        pixels, labels = load_svmlight_file(io.BytesIO(file.read()), n_features=256, zero_based=False)
    pixels = np.rint((pixels.toarray() + 1) / 2 * 255).astype(np.uint8)
    return pixels.reshape(-1, 16, 16), labels.astype(np.int64) - 1


def read_mat(path):
    """SVHN's format, in which the digit 0 is labelled 10, as uint8 (N, 32, 32, 3) and N digits."""
    content = loadmat(path)
    return content["X"].transpose(3, 0, 1, 2), content["y"].ravel().astype(np.int64) % 10


def read_tar(path):
    """BSDS500's training photographs in an archive, {file name: uint8 (H, W, 3)}."""
    with tarfile.open(path) as tar:
        return {Path(member.name).name: np.asarray(Image.open(tar.extractfile(member)).convert("RGB"))
                for member in tar if Path(member.name).match("images/train/[0-9]*.jpg")}


def read(path, reader):
    """reader(path), with a UserError for whatever a damaged file makes it raise."""
    try:
        return reader(path)
    except Exception as error:  # gzip, bz2, tar, MATLAB and JPEG each fail in their own ways
        raise UserError(f"the file {path} cannot be read ({str(error) or type(error).__name__}); if it is damaged, delete it "
                        "and fetch it again")


def find_all(source_dir, *patterns):
    """The files below `source_dir`, linked folders too, that match a pattern; those of the first pattern come first.

    UserError when such files lie in several folders: other data sets (Fashion-MNIST) use MNIST's file names.
    """
    paths = sorted(Path(folder, name) for folder, _, names in os.walk(source_dir, followlinks=True) for name in names)
    files = [path for pattern in patterns for path in paths if path.match(pattern)]
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1:
        raise UserError(f"{patterns[0]} lies in {' and in '.join(folders)}; leave it in one of them, or name that one")
    return files


def find(source_dir, *patterns):
    """The first of `find_all`, or None."""
    return next(iter(find_all(source_dir, *patterns)), None)


# --- The public data sets, official training digits first -----------------------------------------

def read_mnist(source_dir):
    """(images, labels): uint8 (N, 28, 28), white on black, and N digits."""
    parts = []
    for part in ("train", "t10k"):
        names = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
        files = [find(source_dir, name, f"{name}.gz") for name in names]
        if any(files) and not all(files):
            raise UserError(f"{source_dir} holds only one of {' and '.join(names)}; put the other one beside it")
        if any(files):
            parts.append([read(file, read_idx) for file in files])
    return pool(parts, source_dir, "MNIST (train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz)")


def read_usps(source_dir):
    """(images, labels): uint8 (N, 16, 16), white on black, and N digits."""
    files = [find(source_dir, name) for name in ("usps.bz2", "usps.t.bz2")]
    return pool([read(file, read_libsvm) for file in files if file], source_dir, "USPS (usps.bz2)")


def read_svhn(source_dir):
    """(images, labels): uint8 (N, 32, 32, 3) and N digits."""
    parts = []
    for part in ("train", "test", "extra"):
        files = find_all(source_dir, f"{part}_32x32*.mat")
        if len(files) > 1:  # a whole part and a piece of it would bring the same digits twice
            raise UserError(f"{source_dir} holds {' and '.join(file.name for file in files)}; leave one of them")
        parts += [read(file, read_mat) for file in files]
    return pool(parts, source_dir, "SVHN (train_32x32.mat)")


def read_photographs(source_dir):
    """BSDS500's training photographs, a list of uint8 (H, W, 3) sorted by file name."""
    archive = find(source_dir, "*[Bb][Ss][Dd][Ss]500*.t[ag][rz]*")
    if archive:
        photographs = read(archive, read_tar)
    else:
        photographs = {file.name: read(file, lambda path: np.asarray(Image.open(path).convert("RGB")))
                       for file in find_all(source_dir, "images/train/[0-9]*.jpg")}
    if not photographs:
        raise missing(source_dir, f"BSDS500's training photographs ({BSDS500_URL})")
    return [photographs[name] for name in sorted(photographs)]


def pool(parts, source_dir, what):
    """Joins the (images, labels) of the splits that were found."""
    if not parts:
        raise missing(source_dir, what)
    for images, labels in parts:
        if len(images) != len(labels):
            raise UserError(f"{source_dir} holds {len(images)} images but {len(labels)} labels of {what}; fetch both anew")
    return [np.concatenate(arrays) for arrays in zip(*parts)]


def missing(source_dir, what):
    return UserError(f"{source_dir} lacks {what}; put it there or fetch it with --download")


def download(source_dir):
    """Fetches the four data sets from their public addresses, as far as they are not there yet."""
    from torch.hub import download_url_to_file
    from torchvision import datasets
    photographs = Path(source_dir) / "BSR_bsds500.tgz"
    steps = {
        "MNIST": lambda: datasets.MNIST(source_dir, download=True),
        "USPS": lambda: [datasets.USPS(source_dir, train, download=True) for train in (True, False)],
        "SVHN": lambda: [datasets.SVHN(source_dir, split, download=True) for split in ("train", "test")],
        "BSDS500": lambda: photographs.exists() or download_url_to_file(BSDS500_URL, photographs),
    }
    for name, step in steps.items():
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


def build(domain, source_dir, data_dir, seed):
    """Writes data_dir/digits/<domain>, whole or not at all."""
    target = Path(data_dir) / "digits" / domain
    if all((target / name).exists() for name in ("data", "train.csv", "val.csv")):
        print(f"{target} is there already and is left alone")
        return
    if target.exists():
        raise UserError(f"{target} is there but lacks data, train.csv or val.csv; move it away to have it built")
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
    parser.add_argument("--source_dir", default=ROOT / "public_data", help="holds the public files, at any depth")
    parser.add_argument("--data_dir", default=ROOT / "hw2_data", help="folder to build digits/ in")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="which ones to build")
    parser.add_argument("--download", action="store_true", help="first fetch the public files that are missing")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of the splits and of MNIST-M's patches")
    args = parser.parse_args()
    if args.download:
        download(make_output_dir(args.source_dir))
    if not Path(args.source_dir).is_dir():
        raise UserError(f"there is no folder {args.source_dir}; name the one that holds the public files")
    make_output_dir(args.data_dir)
    for domain in args.domains:
        build(domain, args.source_dir, args.data_dir, args.seed)


if __name__ == "__main__":
    run(main)
