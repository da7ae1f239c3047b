"""Figures in one style: palette, saving, image grids, curves with error bars, t-SNE pictures.

A figure is a matplotlib Figure until `save` writes it. All text has one font and one size, which belongs to matplotlib
and so is the same on every computer.
"""

import io
from pathlib import Path

from files import check_output_file, write_atomic
from utils import UserError

import matplotlib
import numpy as np
from torchvision.utils import make_grid

matplotlib.use("Agg")  # needs no screen
from matplotlib import pyplot as plt

# Ten colours that stay apart for colour-blind eyes: Okabe and Ito's eight, a grey and a wine red.
PALETTE = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999", "#882255")
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, GREY, WINE = PALETTE
FONT, FONT_SIZE, TEXT_WIDTH = "STIXGeneral", 8, 6.5  # points; inches: the width of a page's text
FONT_DIR = Path(matplotlib.get_data_path()) / "fonts/ttf"  # where a program that shows an SVG finds FONT

plt.rcParams.update({
    "font.family": FONT, "font.size": FONT_SIZE, "mathtext.fontset": "stix", "axes.titlesize": "medium",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "legend.frameon": False, "lines.linewidth": 1, "lines.markersize": 3.5,
    "savefig.bbox": "tight", "savefig.pad_inches": 0.02, "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "plots",  # the names of an SVG's parts are random without it
})
# What a file would say about the day and the version that made it is left out.
METADATA = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}


def check_figure(path):
    """UserError unless the file `path` can be written and is named as an SVG or a PNG; makes its folder if need be."""
    if Path(path).suffix not in METADATA:
        raise UserError(f"a figure is an .svg or a .png file; name {path} so")
    check_output_file(path)


def save(path, figure):
    """Writes a matplotlib figure as an SVG or PNG file, as its suffix says, and closes it; same figure, same bytes."""
    check_figure(path)
    suffix, buffer = Path(path).suffix, io.BytesIO()
    figure.set_layout_engine("constrained")
    figure.savefig(buffer, format=suffix[1:], metadata=METADATA[suffix])
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def image_grid(path, images, columns, row_names=(), column_names=(), width=TEXT_WIDTH):
    """Draws uint8 `images` (N, 3, H, W) in rows of `columns`, with names at the left and on top, `width` inches wide.

    An SVG file holds the images pixel by pixel, as a PNG.
    """
    rows, (height_of_one, width_of_one) = len(images) // columns, images.shape[-2:]
    height = width * rows * height_of_one / (columns * width_of_one)
    figure, axes = plt.subplots(figsize=(width, height + 0.2 * bool(column_names)))
    grid = make_grid(images, nrow=columns, padding=1, pad_value=255).permute(1, 2, 0).numpy()
    axes.imshow(grid, interpolation="none")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([(width_of_one + 1) * (i + 0.5) for i in range(len(column_names))], column_names)
    axes.set_yticks([(height_of_one + 1) * (i + 0.5) for i in range(len(row_names))], row_names)
    axes.tick_params(length=0, labelbottom=False, labeltop=True)
    save(path, figure)


def points_with_bars(axes, x, mean, std, color, marker="o", label=None):
    """Draws `mean` at `x` with bars of one standard deviation; arrays of one length.

    `std` is NaN where there is one seed alone: that point is hollow. A line joins the points when none is.
    """
    x, mean, std = (np.asarray(values, dtype=float) for values in (x, mean, std))
    alone = np.isnan(std)
    axes.errorbar(x[~alone], mean[~alone], std[~alone], color=color, marker=marker, label=label, capsize=2,
                  linestyle="none" if alone.any() else "-")
    axes.plot(x[alone], mean[alone], color=color, marker=marker, markerfacecolor="white", linestyle="none")


def embed(features, seed=0):
    """(N, 2): scikit-learn's t-SNE (van der Maaten and Hinton 2008) of the rows of `features` (N, D)."""
    from sklearn.manifold import TSNE  # here, because it takes seconds to load
    perplexity = min(30, (len(features) - 1) / 3)
    tsne = TSNE(init="pca", learning_rate="auto", perplexity=perplexity, random_state=seed % 2**32)
    return tsne.fit_transform(features)


def draw_digits(axes, points, digits):
    """Draws the points (N, 2) of an embedding in the colours of their digits (N,), 0..9."""
    _draw_groups(axes, points, [(digits == digit, PALETTE[digit], str(digit)) for digit in range(10)])


def draw_domains(axes, points, is_target, names):
    """Draws the points (N, 2) of an embedding in two colours; is_target: bool (N,); names: of source and target."""
    _draw_groups(axes, points, zip((~is_target, is_target), (BLUE, ORANGE), names))


def _draw_groups(axes, points, groups):
    for which, colour, name in groups:
        axes.scatter(*points[which].T, s=2, linewidths=0, color=colour, label=name)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)


def tsne_pictures(path, embeddings, digits, is_target, names):
    """Writes {title: embedding} as two rows of pictures, the embeddings side by side: draw_digits and draw_domains."""
    figure, panels = plt.subplots(2, len(embeddings), figsize=(TEXT_WIDTH, 5.2), squeeze=False)
    for (by_digit, by_domain), (title, points) in zip(panels.T, embeddings.items()):
        draw_digits(by_digit, points, digits)
        draw_domains(by_domain, points, is_target, names)
        by_digit.set_title(title)
    for axes, what in zip(panels[:, 0], ("by digit", "by domain")):
        axes.set_ylabel(what)
    for axes in panels[:, -1]:
        axes.legend(markerscale=3, handletextpad=0, loc="upper left", bbox_to_anchor=(1, 1))
    save(path, figure)
