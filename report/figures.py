"""What the three parts of the report draw alike."""

import io

import matplotlib
import torch
from torchvision.utils import make_grid

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from p3_dann.tsne import PALETTE  # noqa: E402
from utils import write_atomic  # noqa: E402

_, ORANGE, SKY, GREEN, _, BLUE, VERMILION, PURPLE, GREY, _ = PALETTE
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                     "axes.grid": True, "grid.alpha": 0.3})


def save(path, figure):
    """Writes a matplotlib figure as a PNG file and closes it."""
    buffer = io.BytesIO()
    figure.set_layout_engine("constrained")
    figure.savefig(buffer, format="png", dpi=200)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def image_grid(path, images, columns, row_names=(), column_names=(), scale=1.0):
    """Draws uint8 `images` (N, 3, H, W) in rows of `columns`, with names at the left and on top."""
    rows, size = len(images) // columns, images.shape[-1]
    grid = make_grid(images, nrow=columns, padding=1, pad_value=255).permute(1, 2, 0)
    room = 0.6 * bool(row_names), 0.3 * bool(column_names)
    figure, axes = plt.subplots(figsize=(columns * 0.6 * scale + room[0], rows * 0.6 * scale + room[1]))
    axes.imshow(grid)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    centres = torch.arange(max(rows, columns)) * (size + 1) + size / 2
    axes.set_xticks(centres[:len(column_names)].tolist(), column_names)
    axes.set_yticks(centres[:len(row_names)].tolist(), row_names)
    axes.tick_params(length=0, labelbottom=False, labeltop=True)
    save(path, figure)
