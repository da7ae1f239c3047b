"""Random changes of batches: one affine map an image, of the size that was asked for, whatever the image's shape."""

import pytest
import torch

from conftest import close
from transforms import random_affine, random_mirror, uniform


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_uniform_gives_each_image_its_number():
    numbers = uniform(-2.0, 3.0, 1000, "cpu")
    assert numbers.shape == (1000, 1, 1, 1) and numbers.dtype == torch.float32
    assert -2 <= numbers.min() < -1.9 and 2.9 < numbers.max() <= 3
    assert torch.equal(uniform(0.5, 0.5, 3, "cpu").flatten(), torch.full((3,), 0.5))


def test_half_of_the_images_are_mirrored():
    images = torch.rand(1000, 2, 3, 4)
    mirrored = random_mirror(images)
    turned = (mirrored != images).flatten(1).any(dim=1)
    assert torch.equal(mirrored[turned], images[turned].flip(3)) and torch.equal(mirrored[~turned], images[~turned])
    assert 420 < turned.sum() < 580  # five standard deviations, of 16


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (2, 3, 17, 30), (1, 4, 64, 48)])
def test_no_change_is_the_identity(shape):
    images = torch.rand(shape)
    assert close(random_affine(images), images)


def test_views_show_the_middle():
    images = torch.rand(2, 3, 28, 60)
    assert close(random_affine(images, size=(28, 28)), images[..., 16:44])
    assert close(random_affine(images, size=(20, 60)), images[:, :, 4:24])
    larger = random_affine(images, size=(30, 60))  # what lies outside is mirrored
    assert close(larger, torch.cat([images[:, :, :1], images, images[:, :, -1:]], dim=2))


def test_zoom_stretch_and_shift():
    square = torch.zeros(1, 1, 28, 28)
    square[..., 9:19, 9:19] = 1  # 100 pixels
    assert random_affine(square, zoom=(2, 2)).sum().item() == pytest.approx(400, rel=0.02)
    many = square.expand(200, -1, -1, -1)
    area = random_affine(many, zoom=(0.8, 1.25)).sum(dim=(1, 2, 3)) / 100
    assert 0.6 < area.min() < 0.7 and 1.45 < area.max() < 1.6  # 0.8^2 = 0.64, 1.25^2 = 1.56
    stretched = random_affine(many, stretch=0.5)
    width, height = (stretched.amax(dim=(1, axis)).sum(dim=1) for axis in (2, 3))
    assert stretched.sum(dim=(1, 2, 3)).sub(100).abs().max() < 5 and (width / height).max() > 1.3
    place = torch.arange(28.0) - 13.5
    moved = random_affine(many, shift=0.2).sum(dim=1) / 100
    right, down = ((moved.sum(dim=axis) * place).sum(dim=1) for axis in (1, 2))
    for pixels in right, down:  # 0.2 half images are 2.8 pixels
        assert 2.5 < pixels.abs().max() < 2.9 and abs(pixels.mean()) < 0.5


def test_a_map_does_not_depend_on_the_shape_of_the_image():
    """A rotation stays one on a wide image: it is that of the square image around it."""
    wide = torch.rand(5, 2, 30, 50)
    around = torch.zeros(5, 2, 50, 50)
    around[:, :, 10:40] = wide
    change = dict(zoom=(2.0, 2.4), stretch=0.3, degrees=15, shear=0.2)
    torch.manual_seed(1)
    expected = random_affine(around, **change)[:, :, 10:40]
    torch.manual_seed(1)
    assert close(random_affine(wide, **change), expected, share=1e-3)


def test_rotation_and_slant_keep_the_area():
    bar = torch.zeros(100, 1, 28, 40)
    bar[..., 8:20, 17:23] = 1
    for change in (dict(degrees=40), dict(shear=0.4)):
        changed = random_affine(bar, **change)
        assert changed.sum(dim=(1, 2, 3)).sub(72).abs().max() < 0.05 * 72
        assert (changed - bar).abs().amax(dim=(1, 2, 3)).max() > 0.9


def test_every_image_has_its_map_and_all_its_channels_the_same():
    images = torch.rand(1, 1, 16, 16).expand(4, 3, 16, 16)
    changed = random_affine(images, zoom=(0.8, 1.2), degrees=20)
    assert torch.equal(changed[:, 0], changed[:, 1]) and torch.equal(changed[:, 0], changed[:, 2])
    assert (changed[1:] - changed[:1]).abs().amax(dim=(1, 2, 3)).min() > 0.1
