"""Drawings of networks that are a chain of layers: what one forward pass shows, a box for each layer."""

from plots import GREY, ORANGE, SKY, TEXT_WIDTH, plt, save

import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

NAMES = {"Conv2d": "conv", "ConvTranspose2d": "conv\ntransp.", "ParametrizedConv2d": "conv,\nspectral\nnorm",
         "ResidualBlock": "residual\nblock", "PixelShuffle": "pixels\nshuffled", "PixelUnshuffle": "2×2\npatches",
         "Linear": "linear"}
SILENT = ("ReLU", "Flatten", "Unflatten", "BatchNorm2d", "Tanh", "DiffAugment")  # what the caption can say


@torch.no_grad()
def trace(layers, call):
    """[(name, kernel and stride or "", shape of the output without the batch)] of the modules in `layers` as `call()`
    runs them."""
    seen = []

    def record(module, inputs, output):
        kind = type(module).__name__
        if kind not in SILENT:
            kernel = f"{module.kernel_size[0]}×{module.kernel_size[0]}" if hasattr(module, "kernel_size") else ""
            stride = f", /{module.stride[0]}" if kernel and module.stride[0] > 1 else ""
            seen.append((NAMES.get(kind, kind), kernel + stride, tuple(output.shape[1:])))
    handles = [layer.register_forward_hook(record) for layer in layers]
    call()
    for handle in handles:
        handle.remove()
    return seen


def draw_chains(path, chains):
    """Draws {title: (input shape, trace)}: a row of boxes for each, with the shapes between them."""
    figure, rows = plt.subplots(len(chains), 1, figsize=(TEXT_WIDTH, 1.25 * len(chains)), squeeze=False)
    longest = max(len(blocks) for _, blocks in chains.values())
    for axes, (title, (shape, blocks)) in zip(rows[:, 0], chains.items()):
        axes.text(-0.55, 0, f"{title}\n{'×'.join(map(str, shape))}", ha="right", va="center")
        for i, (name, kernel, shape) in enumerate(blocks):
            colour = ORANGE if "residual" in name else SKY if "conv" in name else GREY
            axes.add_patch(FancyBboxPatch((i - 0.36, -0.4), 0.72, 0.8, boxstyle="round,pad=0.03", fc=colour, alpha=0.7))
            axes.text(i, 0, f"{name}\n{kernel}".strip(), ha="center", va="center", fontsize=6)
            axes.text(i, -0.52, "×".join(map(str, shape)), ha="center", va="top", fontsize=6)
            axes.add_patch(FancyArrowPatch((i - 0.62, 0), (i - 0.38, 0), shrinkA=0, shrinkB=0, arrowstyle="-|>",
                                           mutation_scale=5))
        axes.set(xlim=(-1.6, longest - 0.5), ylim=(-0.75, 0.5))
        axes.axis("off")
    save(path, figure)
