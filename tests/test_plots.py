"""Figures: SVG and PNG by suffix, the same bytes every time, and every image and point where it belongs."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import plots
from utils import UserError


def bars(path):
    figure, axes = plots.plt.subplots()
    plots.points_with_bars(axes, [1, 2, 3], [4, 5, 6], [1, np.nan, 1], color=plots.BLUE, label="a series")
    axes.legend()
    plots.save(path, figure)


@pytest.mark.parametrize("suffix, start", [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_suffix_is_the_format_and_the_bytes_are_the_same_every_time(tmp_path, suffix, start):
    first, second = (tmp_path / f"{name}.{suffix}" for name in "ab")
    bars(first)
    bars(second)
    assert first.read_bytes() == second.read_bytes() and first.read_bytes().startswith(start)
    assert plots.plt.get_fignums() == []  # closed


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(UserError, match="figure.pdf"):
        bars(tmp_path / "figure.pdf")
    plots.plt.close("all")


def test_text_in_an_svg_is_text_of_one_font_and_size(tmp_path):
    bars(tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert re.search(r"<text[^>]*>a series</text>", text) and "dc:date" not in text
    assert set(re.findall(r"font(?:-size)?: [^;]*?([\d.]+)px", text)) == {str(plots.FONT_SIZE)}
    assert set(re.findall(r"'([^']+)'", "".join(re.findall("<text[^>]*>", text)))) == {plots.FONT}
    assert list(plots.FONT_DIR.glob(f"{plots.FONT}.ttf"))


def test_a_line_joins_points_only_where_all_have_several_seeds():
    figure, axes = plots.plt.subplots()
    for std in ([1, 1, 1], [1, np.nan, 1]):
        plots.points_with_bars(axes, [1, 2, 3], [4, 5, 6], std, color=plots.BLUE)
    lines = [line for line in axes.lines if len(line.get_xdata()) and line.get_marker() == "o"]
    assert [(line.get_linestyle(), list(line.get_xdata()), line.get_markerfacecolor()) for line in lines] == [
        ("-", [1, 2, 3], plots.BLUE), ("None", [1, 3], plots.BLUE), ("None", [2], "white")]
    plots.plt.close(figure)


def test_an_svg_grid_holds_the_images_pixel_by_pixel(tmp_path):
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plots.image_grid(tmp_path / "grid.svg", images, 3, row_names="ab", column_names=range(3))
    [data] = re.findall(r"base64,\s*([A-Za-z0-9+/=\s]+)", (tmp_path / "grid.svg").read_text())
    grid = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    upright = [grid, grid[::-1]]  # the SVG may turn it over
    assert grid.shape == (19, 28, 3)
    assert any(np.array_equal(view[10:18, 19:27], images[5].permute(1, 2, 0)) for view in upright)


def test_tsne_pictures_show_every_point_once_in_each(tmp_path):
    rng = np.random.default_rng(0)
    points, digits, is_target = rng.normal(size=(30, 2)), np.arange(30) % 10, np.arange(30) >= 20
    plots.tsne_pictures(tmp_path / "tsne.svg", {"before": points, "after": points + 1}, digits, is_target,
                        ("MNIST-M", "SVHN"))
    text = (tmp_path / "tsne.svg").read_text()
    assert all(f">{name}</text>" in text for name in ("before", "after", "MNIST-M", "SVHN", "by digit",
                                                    "by domain", *map(str, range(10))))
    uses = re.findall(r"<use [^>]*?fill: (#\w+)", text)
    for colour, count in (plots.ORANGE, 2 * 13 + 2), (plots.BLUE, 2 * 23 + 2):  # points of each picture, legends
        assert uses.count(colour) == count
    assert len(set(plots.PALETTE)) == 10
