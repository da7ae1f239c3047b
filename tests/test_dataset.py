"""dataset.py and build_dataset.py on made-up images and on small public data sets in the real formats."""

import bz2
import gzip
import io
import os
import shutil
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.transforms import functional

import build_dataset
import dataset
from utils import UserError


# --- Reading images -----------------------------------------------------------------------------

def pattern(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def rgb(grey):
    return np.stack([grey] * 3)


def read(path):
    return dataset.read_images([path])[0].numpy()


def png16(values):
    """A PNG file's bytes of 16-bit channels, values (H, W, 2, 3 or 4), which Pillow cannot write."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_every_image_mode_becomes_rgb(tmp_path):
    colour, grey = pattern((28, 28, 3)), pattern((28, 28), 1)
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]], np.uint8)
    palette = Image.new("P", (28, 28))
    palette.putpalette(colours.ravel().tolist())
    palette.putdata((grey // 64).ravel().tolist())
    cases = {
        "rgb.png": (Image.fromarray(colour), colour.transpose(2, 0, 1)),
        "grey.png": (Image.fromarray(grey), rgb(grey)),
        "bits.png": (Image.fromarray(grey > 99), rgb((grey > 99) * 255)),
        "palette.png": (palette, colours[grey // 64].transpose(2, 0, 1)),
        "opaque.png": (Image.fromarray(np.dstack([colour, 0 * grey + 255])), colour.transpose(2, 0, 1)),
        "bitmap.bmp": (Image.fromarray(colour), colour.transpose(2, 0, 1)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        result = read(tmp_path / name)
        assert result.dtype == np.uint8 and np.array_equal(result, expected), name


def test_greys_of_any_depth_keep_what_they_show(tmp_path):
    """Nothing is cut off where nothing is above 255: a uint16 array of 8-bit values is what many programs save."""
    grey = pattern((28, 28))
    grey[0, :2] = 0, 255
    cases = {
        "8 in 16.png": grey.astype(np.uint16), "16.png": grey.astype(np.uint16) * 256 + 77,
        "8 in 32.tif": grey.astype(np.int32), "16 in 32.tif": grey.astype(np.int32) * 257,
        "24 in 32.tif": grey.astype(np.int32) << 16,
        "shares.tif": (grey / 255).astype(np.float32), "levels.tif": grey.astype(np.float32),
        "-1 to 1.tif": (grey / 127.5 - 1).astype(np.float32), "16.tif": grey.astype(np.float32) * 257,
    }
    for name, values in cases.items():
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(read(tmp_path / name), rgb(grey)), name
    colour = np.dstack([grey, pattern((28, 28, 2), 1)]).astype(int)
    opaque, three = np.full((28, 28), 65535), np.dstack([grey] * 3)
    for name, values, expected in (("16 colour", colour * 256 + 77, colour), ("8 in 16 colour", colour, colour),
                                   ("8 in 16 opaque", np.dstack([colour, opaque]), colour),
                                   ("8 in 16 with 8 of alpha", np.dstack([colour, opaque >> 8]), colour),
                                   ("8 in 16 opaque grey", np.dstack([grey, opaque]), three)):
        (tmp_path / f"{name}.png").write_bytes(png16(values))
        assert np.array_equal(read(tmp_path / f"{name}.png"), expected.transpose(2, 0, 1)), name
    Image.fromarray(np.full((28, 28), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(UserError, match="nan.tif cannot be read .it holds NaN"):
        read(tmp_path / "nan.tif")


def test_what_is_drawn_in_transparency_stays_visible(tmp_path):
    """White ink comes on black, dark ink on white; greys, colours and palettes alike."""
    alpha = pattern((28, 28))
    for name, ink, expected in (("white", 255, alpha), ("black", 0, 255 - alpha)):
        Image.fromarray(np.dstack([0 * alpha + ink, alpha])).save(tmp_path / f"{name} LA.png")
        Image.fromarray(np.dstack([0 * alpha + ink] * 3 + [alpha])).save(tmp_path / f"{name} RGBA.png")
        palette = Image.fromarray(alpha, "L").convert("P")
        palette.putpalette([ink] * 768)
        palette.save(tmp_path / f"{name} P.png", transparency=bytes(range(256)))
        for mode in ("LA", "RGBA", "P"):
            result = read(tmp_path / f"{name} {mode}.png")
            assert np.abs(result.astype(int) - expected).max() <= 1, (name, mode)
    Image.fromarray(255 * (alpha > 99).astype(np.uint8)).save(tmp_path / "tRNS.png", transparency=0)
    assert np.array_equal(read(tmp_path / "tRNS.png"), rgb(255 * (alpha > 99)))
    # Nothing of an image that is transparent throughout could be seen: its colours are what it shows.
    Image.fromarray(np.dstack([alpha] * 3 + [0 * alpha])).save(tmp_path / "unseen.png")
    assert np.array_equal(read(tmp_path / "unseen.png"), rgb(alpha))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_images_stand_upright_as_exif_says(tmp_path):
    grey = pattern((28, 28))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(np.rot90(grey)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png"), rgb(grey))
    Image.fromarray(grey).save(tmp_path / "damaged.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert np.array_equal(read(tmp_path / "damaged.png"), rgb(grey))


@pytest.mark.parametrize("height, width", [(32, 32), (16, 16), (90, 57)])
def test_other_sizes_are_resized_as_torchvision_does(tmp_path, height, width):
    smooth = np.asarray(Image.fromarray(pattern((6, 6, 3))).resize((width, height), Image.Resampling.BICUBIC))
    Image.fromarray(smooth).save(tmp_path / "a.png")
    reference = functional.resize(torch.from_numpy(smooth.copy()).permute(2, 0, 1).float(), [28, 28], antialias=True)
    # Both round to whole levels, Pillow after each of its two passes.
    assert np.abs(read(tmp_path / "a.png") - reference.numpy()).max() <= 1.01


def test_many_images_are_read_in_order(tmp_path):
    names = []
    for index in range(150):
        names.append(tmp_path / f"{(index * 37) % 150:03d}.png")
        Image.fromarray(pattern((28, 28, 3), index)).save(names[-1])
    images = dataset.read_images(names)
    assert images.shape == (150, 3, 28, 28) and images.dtype == torch.uint8 and images.is_contiguous()
    assert all(np.array_equal(images[k], pattern((28, 28, 3), k).transpose(2, 0, 1)) for k in range(150))


def test_unreadable_images_raise_or_are_reported(tmp_path):
    paths = [tmp_path / f"{k}.png" for k in range(100)]
    for path in paths:
        Image.fromarray(pattern((28, 28))).save(path)
    paths[70].write_bytes(paths[70].read_bytes()[:300])
    paths[90].unlink()
    os.mkfifo(paths[90])  # whoever opened it would wait for ever
    with pytest.raises(UserError, match="70.png cannot be read"):
        dataset.read_images(paths)
    reported = {}
    images = dataset.read_images(paths, on_error=lambda index, error: reported.update({index: str(error)}))
    assert list(reported) == [70, 90] and "70.png cannot be read" in reported[70] and "no image" in reported[90]
    assert images[70].sum() == 0 and images[90].sum() == 0 and torch.equal(images[89], images[0])
    with pytest.raises(UserError, match="none of the 2 images can be read; the first: the image .*70.png"):
        dataset.read_images([paths[70], paths[90]], on_error=lambda *_: None)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_a_file_that_is_no_image(tmp_path, content):
    (tmp_path / "a b.png").write_bytes(content)
    with pytest.raises(UserError, match="a b.png cannot be read"):
        read(tmp_path / "a b.png")


def test_list_images(tmp_path, capsys):
    for name in ("b.png", "a.JPG", "d.jfif", ".hidden.png", "10.png"):
        (tmp_path / name).touch()
    assert dataset.list_images(tmp_path) == ["10.png", "a.JPG", "b.png", "d.jfif"]
    assert capsys.readouterr().err == ""
    (tmp_path / "c.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("a", "b.png.bak", "z.txt"):
        (tmp_path / name).touch()
    assert dataset.list_images(tmp_path) == ["10.png", "a.JPG", "b.png", "d.jfif"]
    assert capsys.readouterr().err == f"passed over in {tmp_path}: a, b.png.bak, c.png/ and 2 more\n"
    with pytest.raises(UserError, match="no folder"):
        dataset.list_images(tmp_path / "b.png")
    with pytest.raises(UserError, match="c.png holds no images"):
        dataset.list_images(tmp_path / "c.png")


def test_a_folder_and_a_zip_are_image_sources(tmp_path, capsys):
    colours, folder = pattern((3, 40, 20, 3)), tmp_path / "faces"
    (folder / "sub").mkdir(parents=True)
    for name, colour in zip(("2.png", "sub/1.png", "10.PNG"), colours):
        Image.fromarray(colour).save(folder / name)
    (folder / ".thumbnails").mkdir()
    for name in ("list.txt", "sub/._1.png", ".thumbnails/1.png"):
        (folder / name).touch()
    shutil.make_archive(str(folder), "zip", folder)
    for source in (folder, tmp_path / "faces.zip"):
        capsys.readouterr()
        images, names = dataset.read_image_source(source, 20)
        assert images.shape == (3, 3, 20, 20) and names == ["10.PNG", "2.png", "1.png"]
        assert np.array_equal(images.permute(0, 2, 3, 1), colours[[2, 0, 1], 10:30])  # the centred square
        assert capsys.readouterr().err == f"passed over in {source}: list.txt\n"
        images, _ = dataset.read_image_source(source, 20, rows=(0, 40))  # stretched, not cut
        reference = Image.fromarray(colours[0]).resize((20, 20), Image.Resampling.LANCZOS)
        assert np.array_equal(images[1].permute(1, 2, 0), reference)
        with pytest.raises(UserError, match="have 40 rows, and 5 to 41 are asked for"):
            dataset.read_image_source(source, 9, rows=(5, 41))
    archive = (tmp_path / "faces.zip").read_bytes()
    (tmp_path / "faces.zip").write_bytes(archive.replace(b"IDAT", b"IDOT", 1))
    with pytest.raises(UserError, match=r"the image .*faces.zip/10.PNG cannot be read .Bad CRC"):
        dataset.read_image_source(tmp_path / "faces.zip", 20)
    (tmp_path / "faces.zip").write_bytes(archive.replace(b"PK\1\2", b"PK\1\3"))
    with pytest.raises(UserError, match="the zip file .*faces.zip is damaged"):
        dataset.read_image_source(tmp_path / "faces.zip", 20)
    (tmp_path / "empty").mkdir()
    for source, message in ((folder / "list.txt", "is neither a folder nor a zip"), (tmp_path / "empty", "no images")):
        with pytest.raises(UserError, match=message):
            dataset.read_image_source(source, 20)


# --- Reading CSV files --------------------------------------------------------------------------

@pytest.fixture
def digits(tmp_path):
    """A folder data/ of ten images, image k of grey level k, and a good CSV file with its rows shuffled."""
    (tmp_path / "data").mkdir()
    for k in range(10):
        Image.fromarray(np.full((28, 28), k, np.uint8)).save(tmp_path / "data" / f"{k}.png")
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    (tmp_path / "good.csv").write_text("image_name,label\n" + "".join(f"{k}.png,{9 - k}\n" for k in order))
    return tmp_path, order


def test_load_digits_keeps_the_order_of_the_csv(digits):
    folder, order = digits
    images, labels, names = dataset.load_digits(folder / "good.csv", folder / "data")
    assert names == [f"{k}.png" for k in order]
    assert labels.dtype == torch.int64 and labels.tolist() == [9 - k for k in order]
    assert images.dtype == torch.uint8 and images[:, :, 5, 5].tolist() == [[k] * 3 for k in order]


def test_columns_may_be_swapped_spaced_and_have_company(digits):
    folder, _ = digits
    (folder / "odd.csv").write_bytes(b"\xef\xbb\xbflabel, image_name, note\r\n 7, 3.png, x\r\n1, 1.png, y\r\n\r\n")
    images, labels, names = dataset.load_digits(folder / "odd.csv", folder / "data")
    assert names == ["3.png", "1.png"] and labels.tolist() == [7, 1]


def test_labels_are_not_read_when_unlabelled(digits):
    folder, order = digits
    images, labels, names = dataset.load_digits(folder / "good.csv", folder / "data", labelled=False)
    for text in ("image_name\n3.png\n1.png\n", "image_name,label\n3.png,secret\n1.png,\n"):
        (folder / "blind.csv").write_text(text)
        some, labels, some_names = dataset.load_digits(folder / "blind.csv", folder / "data", labelled=False)
        assert labels is None and some_names == names[:2] and torch.equal(some, images[:2])


@pytest.mark.parametrize("text, message", [
    ("image_name,label\n0.png,1\n1.png,10\n", r"row 2 of .*bad.csv has the label '10'"),
    ("image_name,label\n0.png,-1\n", r"row 1 of .*bad.csv has the label '-1'"),
    ("image_name,label\n0.png,3.5\n", r"row 1 of .*bad.csv has the label '3.5'"),
    ("image_name,label\n0.png,1\n1.png,cat\n", r"row 2 of .*bad.csv has the label 'cat'"),
    ("image_name,label\n0.png,1\n1.png\n", r"row 2 of .*bad.csv has the label ''"),
    ("image_name,label\n0.png,1\n1.png,2\n0.png,1\n", r"row 3 of .*bad.csv names 0.png a second time"),
    ("image_name,label\n0.png,1\nzebra.png,2\n", r"row 2 of .*bad.csv names 'zebra.png', which is not in .*data"),
    ("image_name,label\n,2\n", r"row 1 of .*bad.csv names '', which is not in"),
    ("name,label\n0.png,1\n", r"bad.csv has no column image_name"),
    ("image_name,digit\n0.png,1\n", r"bad.csv has no column label"),
    ("0.png,1\n1.png,2\n", r"bad.csv has no column image_name"),
    ("image_name,label\n", r"bad.csv has a header but no rows"),
    ("", r"bad.csv is empty"),
    ("\n\n", r"bad.csv is empty"),
    (b"image_name,label\n\xff\xfe\x80.png,1\n", r"row 1 of .*bad.csv names .*, which is not in"),
    ('image_name,label\n"0.png,1\n', r"cannot read .*bad.csv"),
    (None, r"cannot read .*bad.csv"),
])
def test_bad_csv(digits, text, message):
    folder, _ = digits
    if text is not None:
        (folder / "bad.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        dataset.load_digits(folder / "bad.csv", folder / "data")
    assert "\n" not in str(error.value)


def test_bad_image_is_named_with_its_row(digits):
    folder, order = digits
    path = folder / "data" / f"{order[2]}.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=rf"row 3 of .*good.csv: the image .*{order[2]}.png cannot be read"):
        dataset.load_digits(folder / "good.csv", folder / "data")
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        dataset.load_digits(folder / "good.csv", folder / "nowhere")


def test_the_layout_of_2020_and_its_fixed_fifth(digits, tmp_path):
    """No val.csv: every fifth name, whatever the rows' order and without their labels, is for validation alone."""
    folder = tmp_path / "digits" / "usps"
    shutil.copytree(digits[0] / "data", folder / "train")
    shutil.copytree(digits[0] / "data", folder / "test")
    for text in ((digits[0] / "good.csv").read_text(), "image_name\n" + "".join(f"{k}.png\n" for k in range(10))):
        labelled = "label" in text
        (folder / "train.csv").write_text(text)
        images, labels, names = dataset.load_split(tmp_path, "usps", "val", labelled)
        assert sorted(names) == ["0.png", "5.png"] and images[:, 0, 5, 5].tolist() == [int(name[0]) for name in names]
        assert not labelled or labels.tolist() == [9 - int(name[0]) for name in names]
        _, _, rest = dataset.load_split(tmp_path, "usps", "train", labelled)
        assert sorted(rest + names) == [f"{k}.png" for k in range(10)]
    (folder / "test.csv").write_text("image_name,label\n3.png,6\n")
    assert dataset.load_split(tmp_path, "usps", "test")[2] == ["3.png"]
    shutil.move(folder / "test", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="there is no .*test; run"):  # and not the training images of the same names
        dataset.load_split(tmp_path, "usps", "test")
    (folder / "val.csv").write_text("image_name,label\n7.png,2\n")
    assert dataset.load_split(tmp_path, "usps", "val")[2] == ["7.png"]
    assert len(dataset.load_split(tmp_path, "usps", "train", labelled=False)[2]) == 10
    (folder / "val.csv").unlink()
    (folder / "train.csv").write_text("image_name,label\n3.png,1\n4.png,2\n5.png,2\n")
    (folder / "train" / "4.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"row 2 of .*train.csv: the image .*4.png"):
        dataset.load_split(tmp_path, "usps", "train")


def test_missing_data_set_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"no .*usps.*train.csv; run 'bash get_dataset.sh'"):
        dataset.load_split(tmp_path, "usps", "train")


def test_domains_are_ten_classes_each_and_the_smaller_repeated(tmp_path):
    for domain, count in (("svhn", 7), ("usps", 3)):
        (tmp_path / f"digits/{domain}/data").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((28, 28, 3), 10 * i, dtype=np.uint8)).save(
                tmp_path / f"digits/{domain}/data/{i}.png")
        rows = "".join(f"{i}.png,{9 - i}\n" for i in range(count))
        for split in "train", "val":  # without the latter a fifth of the former would be for validation
            (tmp_path / f"digits/{domain}/{split}.csv").write_text("image_name,label\n" + rows)
    sets = dataset.load_domains(tmp_path, ["usps", "svhn"], "train")
    assert [classes.tolist() for _, classes in sets] == [[9, 8, 7], [19, 18, 17, 16, 15, 14, 13]]
    images, classes = dataset.balanced(sets)
    assert classes.tolist() == [9, 8, 7, 9, 8, 7, 19, 18, 17, 16, 15, 14, 13]
    assert torch.equal(images[:, 0, 0, 0], 10 * (9 - classes % 10))
    images, classes = dataset.balanced(sets[1:])  # one domain alone stays as it is
    assert torch.equal(images, sets[1][0]) and torch.equal(classes, sets[1][1])


# --- Building the course's layout from the public formats -------------------------------------------

def gz_idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(header + array.tobytes())


def libsvm_bz2(pixels, labels):
    """LIBSVM's sparse text: 'label index:value ...', indices from 1, zeros left out."""
    lines = [f"{label + 1} " + " ".join(f"{k}:{value:.6f}" for k, value in enumerate(row, 1) if value)
             for row, label in zip(pixels, labels)]
    return bz2.compress(("\n".join(lines) + "\n").encode())


USPS_GREYS = np.append(np.arange(40) * 6.0, 127.5)  # 127.5 is the value 0, which sparse text leaves out


def mnist_digits():
    """55 digits with strokes on a black background, and their labels."""
    rng = np.random.default_rng(1)
    images = rng.integers(1, 256, (55, 28, 28)) * (rng.random((55, 28, 28)) < 0.3)
    return images.astype(np.uint8), (np.arange(55) % 10).astype(np.uint8)


def make_sources(folder):
    """Small public data sets below `folder`: each in its real format, scattered over odd places."""
    images, labels = mnist_digits()
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(gz_idx(images[:40]))
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(gz_idx(labels[:40]))
    (raw / "t10k-images-idx3-ubyte").write_bytes(gzip.decompress(gz_idx(images[40:])))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(gzip.decompress(gz_idx(labels[40:])))

    # USPS and SVHN: image k is one flat grey level of its own, so that it can be told in the result.
    pixels = np.repeat(USPS_GREYS[:, None] / 127.5 - 1, 256, axis=1)
    (folder / "usps.bz2").write_bytes(libsvm_bz2(pixels[:30], np.arange(30) % 10))
    (folder / "usps.t.bz2").write_bytes(libsvm_bz2(pixels[30:], np.arange(30, 41) % 10))
    crops = np.broadcast_to(np.arange(33, dtype=np.uint8) * 7, (32, 32, 3, 33))
    labels = np.array([[k % 10 or 10] for k in range(33)])
    scipy.io.savemat(folder / "test_32x32_first33.mat", {"X": crops, "y": labels})

    photographs = folder / "photographs"
    for part, count in (("train", 2), ("val", 1), ("test", 1)):
        (photographs / "BSR/BSDS500/data/images" / part).mkdir(parents=True)
        for k in range(count):
            path = photographs / "BSR/BSDS500/data/images" / part / f"{len(part)}{k}.jpg"
            Image.fromarray(pattern((34 + k, 40, 3), len(part) * 10 + k)).save(path)
    with tarfile.open(folder / "BSR_bsds500.tgz", "w:gz") as tar:
        tar.add(photographs / "BSR", "BSR")
    return photographs


def build(source, data, domains=build_dataset.DOMAINS, seed=0):
    for domain in domains:
        target = Path(data) / "digits" / domain
        if not build_dataset.is_built(target):
            build_dataset.build(domain, source, target, seed)


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """(source folder, folder of the unpacked photographs, data folder built from them)."""
    folder = tmp_path_factory.mktemp("public data")
    photographs = make_sources(folder / "source")
    unpacked = folder / "unpacked"
    photographs.rename(unpacked)
    build(folder / "source", folder / "data")
    return folder / "source", unpacked, folder / "data"


def test_split_sizes_are_the_course_s():
    assert build_dataset.split_sizes(70000) == (44800, 11200, 14000)
    assert build_dataset.split_sizes(73257 + 26032) == (63544, 15887, 19858)
    assert build_dataset.split_sizes(7291 + 2007) == (5950, 1488, 1860)


def test_layout(public):
    for domain, count, mode in (("mnistm", 55, "RGB"), ("svhn", 33, "RGB"), ("usps", 41, "L")):
        folder = public[2] / "digits" / domain
        assert sorted(path.name for path in folder.iterdir()) == ["data", "test", "test.csv", "train.csv", "val.csv"]
        names = {split: dataset.read_names(folder / f"{split}.csv") for split in ("train", "val", "test")}
        assert tuple(map(len, names.values())) == build_dataset.split_sizes(count)
        assert sorted(names["train"] + names["val"]) == sorted(os.listdir(folder / "data"))
        assert sorted(names["test"]) == sorted(os.listdir(folder / "test"))
        for path in folder.rglob("*.png"):
            with Image.open(path) as image:
                assert image.mode == mode and image.size == (28, 28)
    assert (public[2] / "digits/usps/train.csv").read_bytes().startswith(b"image_name,label\n00000.png,")


@pytest.mark.parametrize("domain, levels", [("svhn", np.arange(33) * 7), ("usps", np.rint(USPS_GREYS))])
def test_every_digit_lands_in_exactly_one_split_with_its_label(public, domain, levels):
    found = {}
    for split in ("train", "val", "test"):
        images, labels, _ = dataset.load_split(public[2], domain, split)
        assert (images == images[:, :1, :1, :1]).all()
        for level, label in zip(images[:, 0, 0, 0].tolist(), labels.tolist()):
            assert level not in found
            found[level] = label
    assert found == {int(level): k % 10 for k, level in enumerate(levels)}


def test_mnistm_is_patch_minus_digit(public):
    """Every image is |patch - digit| for a patch of a *training* photograph and a digit of its label."""
    pool, pool_labels = mnist_digits()
    photographs = [np.asarray(Image.open(path)) for path in sorted((public[1]).rglob("train/*.jpg"))]
    patches = np.stack([photograph[y:y + 28, x:x + 28] for photograph in photographs
                        for y in range(photograph.shape[0] - 27) for x in range(photograph.shape[1] - 27)])
    used = []
    for split in ("train", "val", "test"):
        images, labels, _ = dataset.load_split(public[2], "mnistm", split)
        for image, label in zip(images.permute(0, 2, 3, 1).numpy(), labels.numpy()):
            for k in np.flatnonzero(pool_labels == label):
                background = pool[k] == 0  # there the photograph shows through
                match = np.flatnonzero((patches[:, background] == image[background]).all(axis=(1, 2)))
                if len(match):
                    difference = patches[match[0]].astype(int) - pool[k][:, :, None]
                    assert np.array_equal(np.abs(difference), image)
                    used.append((k, match[0]))
    assert sorted(k for k, _ in used) == list(range(55))
    assert len({patch for _, patch in used}) > 40  # patches are drawn anew for every digit


def test_same_bytes_wherever_the_files_lie(public, tmp_path):
    source, unpacked, data = public
    shutil.copytree(source, tmp_path / "x" / "deeper")
    (tmp_path / "x" / "deeper" / "BSR_bsds500.tgz").unlink()
    (tmp_path / "x" / "a").symlink_to(unpacked, target_is_directory=True)
    build(tmp_path / "x", tmp_path / "data")
    assert tree(tmp_path / "data") == tree(data)
    build(source, tmp_path / "other", seed=1, domains=["usps"])
    assert tree(tmp_path / "other")["digits/usps/train.csv"] != tree(data)["digits/usps/train.csv"]


def test_interrupted_build_starts_again_and_finished_one_stays(public, tmp_path, monkeypatch):
    source, _, data = public
    labels, image = build_dataset.usps(source, 0)

    def interrupted(index):
        if index == 20:
            raise KeyboardInterrupt
        return image(index)

    monkeypatch.setitem(build_dataset.DOMAINS, "usps", lambda *_: (labels, interrupted))
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path, domains=["usps"])
    monkeypatch.undo()
    assert any(tmp_path.rglob("*.png"))
    with pytest.raises(UserError, match="get_dataset.sh"):
        dataset.load_split(tmp_path, "usps", "train")
    build(source, tmp_path, domains=["usps"])
    assert os.listdir(tmp_path / "digits") == ["usps"]
    assert tree(tmp_path / "digits" / "usps") == tree(data / "digits" / "usps")

    (tmp_path / "digits/usps/val.csv").write_text("the user's own")
    build(source, tmp_path, domains=["usps"])
    assert (tmp_path / "digits/usps/val.csv").read_text() == "the user's own"
    (tmp_path / "digits/usps/val.csv").unlink()
    with pytest.raises(UserError, match="lacks data, train.csv or val.csv"):
        build(source, tmp_path, domains=["usps"])


@pytest.mark.parametrize("domain, file, what", [
    ("mnistm", "MNIST/raw/train-images-idx3-ubyte.gz", "MNIST"),
    ("mnistm", "BSR_bsds500.tgz", "BSDS500"),
    ("svhn", "test_32x32_first33.mat", "SVHN"),
    ("usps", "usps.bz2", "USPS"),
])
def test_missing_and_damaged_public_files(public, tmp_path, domain, file, what):
    source = tmp_path / "source"
    shutil.copytree(public[0], source)
    damaged = (source / file).read_bytes()
    (source / file).write_bytes(damaged[:len(damaged) // 2])
    with pytest.raises(UserError, match=f"{Path(file).name} cannot be read"):
        build(source, tmp_path, domains=[domain])
    for path in source.rglob("*"):
        if path.is_file() and (what != "BSDS500" or path.suffix == ".tgz"):
            path.unlink()
    with pytest.raises(UserError, match=f"source lacks {what}"):
        build(source, tmp_path, domains=[domain])
    assert not (tmp_path / "digits").exists()


@pytest.mark.parametrize("change, message", [
    (lambda raw: shutil.copytree(raw, raw.parent / "fashion"), "train-images-idx3-ubyte.gz lies in .* and in"),
    (lambda raw: (raw / "fashion").mkdir() or (raw / "fashion/train-images.idx3-ubyte").touch(),
     "train-images.idx3-ubyte lies in"),
    (lambda raw: (raw / "t10k-labels-idx1-ubyte").unlink(), "holds only one of t10k-images-idx3-ubyte and"),
    (lambda raw: shutil.copy(raw / "train-labels-idx1-ubyte.gz", raw / "t10k-labels-idx1-ubyte"), "but 40 labels")])
def test_files_of_another_data_set_are_not_taken_for_mnist(public, tmp_path, change, message):
    shutil.copytree(public[0], tmp_path / "source")
    change(tmp_path / "source/MNIST/raw")
    with pytest.raises(UserError, match=message):
        build(tmp_path / "source", tmp_path / "data", ["mnistm"])
    assert not (tmp_path / "data/digits/mnistm").exists()


def test_other_names_and_compressions_of_the_same_files(public, tmp_path):
    source = tmp_path / "Source"
    shutil.copytree(public[0], source)
    raw = source / "MNIST/raw"
    for path in raw.iterdir():  # as 7-Zip and Kaggle name them; curl keeps .gz content under a bare name
        path.rename(raw / path.name.replace("-idx", ".idx").removesuffix(".gz"))
    (source / "test_32x32_first33.mat").rename(source / "Test_32x32.MAT")
    (source / "usps.t.bz2").rename(source / "USPS.t.BZ2")
    (source / "usps").write_bytes(bz2.decompress((source / "usps.bz2").read_bytes()))
    (source / "usps.bz2").unlink()
    (source / "BSR_bsds500.tgz").rename(source / "BSDS500.tar.gz")
    build(source, tmp_path / "data")
    assert tree(tmp_path / "data") == tree(public[2])


def test_a_link_that_leads_back_is_not_followed_for_ever(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("content")
    for name in "up", "again":
        (tmp_path / "a" / name).symlink_to("..")
    assert build_dataset.find_all(tmp_path, "file") == [tmp_path / "a/file"]


def test_hidden_and_unfinished_files_are_left_out(public, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(public[0], source)
    for name in ("._BSR_bsds500.tgz", "A_BSDS500.tar.gz.crdownload", "A_bsds500.tgz.part", "test_32x32_a.mat.partial",
                 ".Trash/usps", "A_bsds500.tgz.download/A_bsds500.tgz"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("half a file")
    os.mkfifo(source / "usps")
    build(source, tmp_path / "data")
    assert tree(tmp_path / "data") == tree(public[2])
    (source / "usps.bz2").unlink()
    (source / "usps.t.bz2").rename(source / "usps.h5")
    with pytest.raises(UserError, match=r"source lacks USPS \(usps.bz2\) \(found, but not read: usps, usps.h5\)"):
        build(source, tmp_path / "other", ["usps"])


def mat(images, labels):
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"X": images, "y": labels})
    return buffer.getvalue()


@pytest.mark.parametrize("domain, file, content, message", [
    ("usps", "usps.bz2", libsvm_bz2(np.zeros((3, 256)), [4, -1, 2]), "holds the label 0, labels are 1 to 10"),
    ("usps", "usps.bz2", libsvm_bz2(np.zeros((3, 256)), [4, 10, 2]), "holds the label 11, labels are 1 to 10"),
    ("usps", "usps.bz2", libsvm_bz2(np.full((1, 256), 255), [4]), "pixels reach from 255 to 255 instead of -1 to 1"),
    ("svhn", "test_32x32_first33.mat", mat(np.zeros((32, 32, 3, 2), np.uint8), [17, 3]), "the label 17, labels are 1"),
    ("svhn", "test_32x32_first33.mat", mat(np.zeros((32, 32, 3, 2), np.uint8), [0, 3]), "the label 0, labels are 1"),
    ("svhn", "test_32x32_first33.mat", mat(np.zeros((32, 32, 3, 2)), [1, 3]), "its X is 32x32x3x2 float64 instead of"),
    ("svhn", "test_32x32_first33.mat", mat(np.zeros((2, 32, 32, 3), np.uint8), [1, 3]), "its X is 2x32x32x3 uint8"),
    ("svhn", "test_32x32_first33.mat", mat([1], [1]).replace(b"X", b"Z"), "holds no X and y"),
    ("mnistm", "train-labels-idx1-ubyte.gz", gz_idx(np.arange(40, dtype=np.uint8)), "holds the label 10, labels are 0"),
    ("mnistm", "train-labels-idx1-ubyte.gz", gz_idx(np.zeros((40, 28, 28), np.uint8)), "holds 40x28x28 numbers of"),
    ("mnistm", "train-images-idx3-ubyte.gz", gz_idx(np.zeros(40, np.uint8)), "40 numbers of type 8 instead of Nx28x28"),
])
def test_labels_and_images_that_are_not_the_data_set_s(public, tmp_path, domain, file, content, message):
    shutil.copytree(public[0], tmp_path / "source")
    next((tmp_path / "source").rglob(file)).write_bytes(content)
    with pytest.raises(UserError, match=f"{file} cannot be read .*{message}"):
        build(tmp_path / "source", tmp_path / "data", [domain])
    assert not (tmp_path / "data").exists()


def test_a_part_of_svhn_is_not_taken_twice(public, tmp_path):
    shutil.copytree(public[0], tmp_path / "source")
    shutil.copy(public[0] / "test_32x32_first33.mat", tmp_path / "source/test_32x32.mat")
    with pytest.raises(UserError, match="test_32x32.mat and test_32x32_first33.mat; leave one"):
        build(tmp_path / "source", tmp_path / "data", ["svhn"])


def test_command_line(public, tmp_path, monkeypatch, capsys):
    def command(*args):
        monkeypatch.setattr(sys, "argv", ["build_dataset.py", *map(str, args)])
        build_dataset.main()

    monkeypatch.chdir(tmp_path)
    command("--source_dir", public[0], "--data_dir", "my data", "--domains", "usps", "svhn")
    assert "usps: 25 training, 7 validation and 9 test digits" in capsys.readouterr().out
    assert tree(tmp_path / "my data") == {name: data for name, data in tree(public[2]).items() if "mnistm" not in name}
    Path("file").touch()
    for source_dir, data_dir, message in (("nowhere", "new", "no folder nowhere; name the one that holds the public"),
                                          (public[0], "file", "the output path file is a file"),
                                          ("my data", "new", "my data lacks MNIST")):
        with pytest.raises(UserError, match=message):
            command("--source_dir", source_dir, "--data_dir", data_dir)
    fcntl = pytest.importorskip("fcntl")
    handle = os.open(tmp_path / "my data", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as another run has it
    with pytest.raises(UserError, match="another run writes into my data"):
        command("--source_dir", public[0], "--data_dir", "my data")
    os.close(handle)
    with pytest.raises(SystemExit, match="2"):
        command("--source_dir", "", "--data_dir", "new")
    assert "--source_dir: the path is empty" in capsys.readouterr().err


def test_a_failing_download_says_what_to_do(public, tmp_path, monkeypatch):
    asked = []

    def fetch(name):
        def download(root, *args, **flags):
            asked.append(name)
            if name == "SVHN":
                raise OSError("no route to host")
        return download

    for name in ("MNIST", "USPS", "SVHN"):
        monkeypatch.setattr(f"torchvision.datasets.{name}", fetch(name))
    flags = ["--source_dir", str(tmp_path / "new"), "--data_dir", str(tmp_path / "no")]
    monkeypatch.setattr(sys, "argv", ["x", "--download", *flags])
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_: asked.append("BSDS500"))
    with pytest.raises(UserError, match=r"cannot download SVHN \(no route to host\); put its files into .*new by hand"):
        build_dataset.main()
    assert asked == ["MNIST", "BSDS500", "SVHN", "USPS", "USPS"]
    asked.clear()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--domains", "usps"])
    with pytest.raises(UserError, match="lacks USPS"):
        build_dataset.main()
    assert asked == ["USPS", "USPS"]
    asked.clear()
    for name in ("data", "train.csv", "val.csv"):
        (tmp_path / "no/digits/usps" / name).mkdir(parents=True)
    build_dataset.main()  # what is built needs no download
    assert not asked


def test_what_a_user_has_is_not_downloaded_again_and_one_domain_is_built_without_another(public, tmp_path, monkeypatch):
    """A second copy in another place would be refused."""
    def refuse(*args, **flags):
        raise AssertionError("downloaded again")

    for name in ("MNIST", "USPS", "SVHN"):
        monkeypatch.setattr(f"torchvision.datasets.{name}", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    mine = tmp_path / "mine"
    shutil.copytree(public[0], mine / "my own")
    flags = ["--download", "--source_dir", str(mine), "--data_dir"]
    monkeypatch.setattr(sys, "argv", ["x", *flags, str(tmp_path / "data")])
    build_dataset.main()
    assert {path.name for path in (tmp_path / "data/digits").iterdir()} == {"mnistm", "svhn", "usps"}
    (mine / "my own/BSR_bsds500.tgz").unlink()
    monkeypatch.setattr(sys, "argv", ["x", *flags, str(tmp_path / "less")])
    with pytest.raises(UserError, match="cannot download BSDS500"):
        build_dataset.main()
    assert {path.name for path in (tmp_path / "less/digits").iterdir()} == {"svhn", "usps"}
