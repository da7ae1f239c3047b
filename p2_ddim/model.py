"""The network of problem 2 from a file: UNet.py with its weights, in whatever way these were saved."""

import torch

from files import find_weights, load_torch, load_weights
from UNet import UNet, channel_of

FREQUENCIES = "time.0.inv_freq"


def load_model(path, device="cpu"):
    """The UNet whose weights `path` holds, in evaluation mode; its width follows from the weights.

    Its attribute `size` is the side of the images it was trained on, where the file says so, else None.

    Takes the course's UNet.pt, files of train.py, and what others have wrapped in their own ways (files.find_weights).
    UserError for anything else.
    """
    content = load_torch(path, "checkpoint")
    with torch.device("meta"):  # shapes alone: a foreign file's could fill the memory
        model = UNet()
        weights = find_weights(content, model.state_dict(), path, optional=[FREQUENCIES])
        try:
            model = UNet(channel=channel_of(weights))
        except (KeyError, IndexError, ValueError):
            pass  # load_weights says how they differ from the course's
    # An average of the parameters alone lacks this constant; rounded to half precision it would put the angles of the
    # time embedding wrong by a quarter of a radian.
    if FREQUENCIES not in weights or weights[FREQUENCIES].dtype in (torch.float16, torch.bfloat16):
        weights[FREQUENCIES] = model.time[0].inv_freq
    load_weights(model, weights, path)
    ours = isinstance(content, dict) and content.get("kind") == "p2_ddim"
    model.size = content.get("config", {}).get("size") if ours else None
    # With channels last a CPU is faster.
    layout = torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format
    return model.to(device, memory_format=layout).eval()
