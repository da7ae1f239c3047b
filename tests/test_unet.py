"""UNet.py against the course's network: names and shapes of the weights, golden outputs, training's start."""

import re
from pathlib import Path

from utils import image_generators, randn

import numpy as np
import pytest
import torch

from conftest import close
from p2_ddim.model import load_model
from UNet import Layer, ResBlock, SelfAttention, UNet, channel_of, groups

DATA = Path(__file__).parent / "data"

# Float32 carries 7 digits, and processors differ in the last of them. Forty layers with the weights below, which are
# ill conditioned on purpose, magnify that a thousandfold; 1e-3 of the largest value is ten times what comes of it.
# Double precision has nine digits more, and finds whatever is wrong.
FLOAT32, FLOAT64 = 1e-3, 1e-9


def normal(*shape, seed=0):
    return randn(image_generators(seed, range(shape[0])), shape[1:])


def ruled_weights(state_dict):
    """Weights made by a rule without random numbers, the rule that the golden values were made with."""
    weights = {}
    for i, (name, value) in enumerate(state_dict.items()):
        s = np.sin(0.7 * np.arange(value.numel(), dtype=np.float64) + 1.3 * i)
        if name.endswith("inv_freq"):
            weights[name] = value
            continue
        if value.dim() >= 2:
            s = s * np.sqrt(2 / np.prod(value.shape[1:]))
        else:
            s = 1 + 0.1 * s if name.endswith("weight") else 0.05 * s
        weights[name] = torch.from_numpy(s.astype(np.float32)).reshape(value.shape)
    return weights


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The full-size network, loaded as the course's file is: a bare state dict on the disk."""
    path = tmp_path_factory.mktemp("weights") / "UNet.pt"
    with torch.device("meta"):
        shapes = UNet().state_dict()
    torch.save(ruled_weights(shapes), path)
    model = load_model(path)
    path.unlink()
    return model


@pytest.fixture(scope="module")
def narrow():
    """A network of width 32, with weights large enough for every part to show in the output."""
    model = UNet(channel=32).eval()
    model.load_state_dict(ruled_weights(model.state_dict()))
    return model


def test_weights_have_the_courses_names_shapes_and_order(full):
    lines = [line.split("\t") for line in (DATA / "unet_state_dict_keys.txt").read_text().splitlines()
             if not line.startswith("#")]
    expected = [(name, shape, dtype) for name, shape, dtype in lines]
    assert [(name, str(tuple(value.shape)), str(value.dtype)) for name, value in full.state_dict().items()] == expected
    assert len(expected) == 427 and sum(p.numel() for p in full.parameters()) == 113_673_219
    # numbers of the description: exp(-2k ln(10000) / 128)
    assert close(full.time[0].inv_freq, torch.exp(-torch.arange(64) * (2 * np.log(10000) / 128)), share=1e-6)


@torch.no_grad()
def test_forward_equals_the_golden_values(full):
    golden = {name: torch.from_numpy(value) for name, value in np.load(DATA / "unet_golden.npz").items()}
    out = full(golden["x"], golden["t"])
    assert close(out, golden["out_f64"], FLOAT32)
    assert close(full(golden["x"], golden["t"].float()), out, share=1e-6)  # integer and float times are one
    assert close(full.double()(golden["x"].double(), golden["t"]), golden["out_f64"], FLOAT64)
    full.float()


def test_channel_scales_every_width(full, narrow):
    weights = narrow.state_dict()
    for name, value in full.state_dict().items():  # kernels are 1 or 3 wide, images have 3 channels
        assert weights[name].shape == tuple(n // 4 if n > 3 else n for n in value.shape), name
    assert channel_of(weights) == 32 and channel_of(full.state_dict()) == 128
    assert groups(128) == 32 and groups(256) == 32


@torch.no_grad()
def test_a_narrow_network_still_knows_the_time(narrow):
    """With one channel a group, GroupNorm would remove the time vector again: rounding, 1e-6, would be left of it."""
    early, late = narrow.time(torch.tensor([1, 900]))[:, None]
    for module in narrow.modules():
        if isinstance(module, ResBlock):
            x = normal(1, module.norm1.num_channels, 8, 8)
            assert (module(x, early) - module(x, late)).std() > 1e-4 * module(x, early).std()


@torch.no_grad()
def test_any_batch_and_any_size_divisible_by_32(narrow):
    x, t = normal(3, 3, 32, 96), torch.tensor([3, 500, 999])
    out = narrow(x, t)
    assert out.shape == x.shape and not close(out[:1], out[1:2], share=0.1)
    for i in range(3):
        assert close(narrow(x[i:i + 1], t[i:i + 1]), out[i:i + 1], FLOAT32)


@pytest.mark.parametrize("shape, times", [((1, 3, 40, 32), 1), ((1, 4, 32, 32), 1), ((3, 32, 32), 3),
                                          ((0, 3, 32, 32), 0), ((2, 3, 32, 32), 1), ((1, 3, 0, 32), 1)])
def test_other_inputs_are_refused_with_a_sentence(narrow, shape, times):
    with pytest.raises(ValueError, match="must h"):
        narrow(torch.zeros(shape), torch.zeros(times))


@pytest.mark.parametrize("arguments", [dict(channel=6), dict(channel=0), dict(channel=132), dict(attn_heads=3),
                                       dict(attn_heads=0)])
def test_impossible_widths_are_refused(arguments):
    with pytest.raises(ValueError, match="multiple of 4"):
        UNet(**arguments)


def test_initialisation():
    """Uniform with fan_avg; the last layer of every branch starts at practically zero, and so does the output."""
    torch.manual_seed(0)
    model = UNet(channel=16)
    for name, value in model.named_parameters():
        if value.dim() < 2:
            assert torch.equal(value, torch.full_like(value, float("norm" in name or name == "out.0.weight")
                                                      if name.endswith("weight") else 0.0)), name
            continue
        scale = 1e-10 if re.search(r"conv2\.|attention\.out\.|^out\.2\.", name) else 1
        field = value[0, 0].numel()
        bound = (3 * scale / ((value.shape[0] + value.shape[1]) * field / 2)) ** 0.5
        assert value.abs().max() <= bound * 1.0001, name
        # The standard deviation of n uniform numbers varies by sqrt(0.2 / n) of it, at most 2.2 % here: seven of these.
        assert value.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.15), name
    x = normal(1, 3, 32, 32)
    assert model(x, torch.tensor([7])).abs().max() < 1e-3 * x.abs().max()


def test_every_weight_learns(narrow):
    loss = narrow(normal(2, 3, 32, 32), torch.tensor([10, 700])).square().mean()
    for (name, parameter), gradient in zip(narrow.named_parameters(), torch.autograd.grad(loss, narrow.parameters())):
        assert gradient.abs().max() > 0, name


@torch.no_grad()
def test_affine_time_scales_and_shifts():
    torch.manual_seed(0)
    model = UNet(channel=8, use_affine_time=True)
    assert model.state_dict()["down2.resblocks.time.1.weight"].shape == (16, 32)
    assert "down2.resblocks.norm2.weight" not in model.state_dict()
    block, x, time = model.down2.resblocks.double(), normal(2, 8, 4, 4).double(), normal(2, 32, seed=1).double()
    torch.nn.init.normal_(block.conv2.weight)
    gamma, beta = block.time(time).reshape(2, 2, 8, 1, 1).unbind(1)
    h = (1 + gamma) * block.norm2(block.conv1(torch.nn.functional.silu(block.norm1(x)))) + beta
    assert close(block(x, time), x + block.conv2(torch.nn.functional.silu(h)), FLOAT64)


@torch.no_grad()
def test_attention_with_two_heads():
    """Against loops: each head has its own query, key and value channels; scores are scaled by the full width."""
    torch.manual_seed(0)
    attention = SelfAttention(8, heads=2, norm_groups=2).double()
    torch.nn.init.normal_(attention.out.weight)
    x = normal(1, 8, 2, 3).double()
    qkv = attention.qkv(attention.norm(x)).reshape(2, 3, 4, 6)
    result = torch.zeros(2, 4, 6, dtype=torch.float64)
    for head, (q, k, v) in enumerate(qkv):
        for i in range(6):
            weight = torch.stack([(q[:, i] * k[:, j]).sum() / 8 ** 0.5 for j in range(6)]).softmax(0)
            result[head, :, i] = sum(weight[j] * v[:, j] for j in range(6))
    assert close(attention(x), x + attention.out(result.reshape(1, 8, 2, 3)), FLOAT64)
    assert [name for name, module in UNet(channel=4).named_children()
            if isinstance(module, Layer) and isinstance(module.attention, SelfAttention)] == [
                "down14", "down15", "mid1", "up5", "up6", "up7"]
