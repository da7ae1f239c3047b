"""training.py: the schedule, the moving average, one update, Muon, what is logged, resuming, several processes."""

import argparse
import os
import shutil
from pathlib import Path

import utils
from utils import UserError

import pytest
import torch
from torch import nn

import training
from conftest import assert_same_training
from files import read_jsonl


def flags(output_dir, *more):
    """The parsed flags of a made-up train.py."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=utils.nonempty_path)
    parser.add_argument("--data_dir", type=utils.nonempty_path)
    parser.add_argument("--width", type=int, nargs=2, default=[3, 4])
    parser.add_argument("--plain", action="store_true")
    training.add_arguments(parser, epochs=3, batch_size=4, lr=0.1, warmup=2, weight_decay=0.03, ema=0.9, save_every=4)
    return parser.parse_args(["--output_dir", str(output_dir), "--device", "cpu", "--amp", "off", *more])


def network():
    training.seed_all(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.ReLU(),
                         nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(16, 1))


def train(output_dir, *more, stop=None, seed=1):
    """A training of three epochs of 5 steps on images of noise; interrupted after step `stop`. Returns its metrics."""
    args = flags(output_dir, *more)
    process, saved = training.start(args, "made_up")
    images = torch.randn(23, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    per_epoch = training.steps_per_epoch(len(images), args.batch_size)
    total = args.epochs * per_epoch
    model = network()
    parts = training.make_parts(model, training.make_optimizers(model, args), process, saved)
    metrics, means = saved["metrics"] if saved else [], training.Means()
    for step in training.steps(args, process, saved, total, images):
        x = images[training.batch_indices(step, len(images), args, process)]
        loss = (model(x + 0.1 * torch.randn_like(x)) - x.mean((1, 2, 3))[:, None]).square().flatten(1).mean(1)
        training.update(parts, loss.mean(), training.warmup_cosine(step, total, args.warmup),
                        training.ema_decay(args.ema, step))
        means.add(loss=loss)
        if training.due(args, step, total):
            training.log(metrics, means, step, per_epoch, args, parts, process)
            description = dict(kind="made_up", config={}, recipe=training.recipe(args), metrics=metrics)
            training.save(args.output_dir, parts, step, description)
        if step == stop:
            break
    return metrics


# --- The whole way ------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_training_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path, optimizer):
    train(tmp_path / "whole", "--optimizer", optimizer)
    train(tmp_path / "parts", "--optimizer", optimizer, stop=9)  # two steps after a checkpoint
    train(tmp_path / "parts", "--optimizer", optimizer, "--resume")
    whole = assert_same_training(tmp_path / "whole", tmp_path / "parts")
    rows = read_jsonl(tmp_path / "parts/metrics.jsonl")
    assert [(row["step"], row["epoch"]) for row in rows] == [(4, 0.8), (8, 1.6), (12, 2.4), (15, 3.0)]
    assert rows[0]["loss"] == whole["metrics"][0]["loss"] > rows[-1]["loss"] == whole["metrics"][-1]["loss"]
    slim = torch.load(tmp_path / "parts/model.pt", weights_only=True)
    assert slim["ema"]["0.weight"].dtype == torch.float16 and slim["ema"]["1.running_mean"].dtype == torch.float32
    assert torch.equal(slim["ema"]["1.running_var"], whole["ema"]["1.running_var"])
    assert set(slim) == {"format_version", "kind", "config", "recipe", "metrics", "ema"} and len(slim["metrics"]) == 1


def test_a_training_of_an_earlier_version_is_not_resumed(tmp_path):
    train(tmp_path, stop=5)
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    del content["recipe"]["optimizer"], content["recipe"]["ema"]
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match="which had no --optimizer, --ema; go on with that version, or move"):
        train(tmp_path, "--resume")


def test_dry_run_makes_two_steps_and_writes_nothing(tmp_path, capsys):
    assert train(tmp_path / "none", "--dry_run") == [] and not (tmp_path / "none").exists()
    assert "dry run: two steps of 4 images went well on cpu; nothing was written" in capsys.readouterr().out


def test_what_does_not_fit_the_training_that_is_there(tmp_path):
    with pytest.raises(UserError, match="no training to go on with, .*last.pt; start without --resume"):
        train(tmp_path, "--resume")
    train(tmp_path)
    with pytest.raises(UserError, match="holds a training already; add --resume or name another --output_dir"):
        train(tmp_path)
    with pytest.raises(UserError, match="with --lr 0.1") as error:
        train(tmp_path, "--resume", "--lr", "0.2", "--width", "1", "2", "--plain")
    assert "with --width 3 4" in str(error.value) and "without --plain" in str(error.value)
    (tmp_path / "kept").mkdir()
    shutil.copy(tmp_path / "model.pt", tmp_path / "kept")  # by someone who needs no last.pt
    with pytest.raises(UserError, match="kept holds a training already; move it away or name another"):
        train(tmp_path / "kept")
    with pytest.raises(UserError, match="move .*kept away and start without --resume"):
        train(tmp_path / "kept", "--resume")
    assert train(tmp_path, "--resume", "--epochs", "4")[-1]["step"] == 20  # a finished one may be prolonged
    with pytest.raises(UserError, match="was trained on other data than --data_dir holds"):
        train(tmp_path, "--resume", "--epochs", "5", seed=2)
    (tmp_path / "last.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged.*; or move .* away and start without --resume"):
        train(tmp_path, "--resume")


def test_two_trainings_do_not_share_a_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    training.start(flags(tmp_path / "one"), "made_up")
    handle = os.open(tmp_path / "one", os.O_RDONLY)  # one of its own, as another run's
    with pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    training.start(flags(tmp_path / "other"), "made_up")  # lets go of the first
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(UserError, match="another run writes into .*one"):
        training.start(flags(tmp_path / "one"), "made_up")
    os.close(handle)


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_its_checkpoint(tmp_path):
    train(tmp_path, stop=3)
    before = (tmp_path / "last.pt").read_bytes()
    args = flags(tmp_path, "--resume")
    process, saved = training.start(args, "made_up")
    means, metrics = training.Means(), saved["metrics"]
    means.add(loss=torch.tensor([1.0, float("nan")]))
    with pytest.raises(UserError, match="the loss is not finite before step 8; .* lower --lr"):
        training.log(metrics, means, 7, 5, args, None, process)
    means.add(loss=torch.ones(2))
    network = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(network.weight, 1e6)  # infinite in half precision
    with pytest.raises(UserError, match="the weights are not finite at step 8; .* lower --lr"):
        training.log(metrics, means, 7, 5, args, training.make_parts(network, [], process), process)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_batch_size_that_does_not_fit(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--batch_size 64 is larger than the 63 training images"):
        training.steps_per_epoch(63, 64)
    monkeypatch.setattr(training, "_join", lambda args: training.Process(torch.device("cpu"), None, 0, 3))
    with pytest.raises(UserError, match="--batch_size 4 is not a multiple of the 3 processes"):
        training.start(flags(tmp_path), "made_up")
    assert training.start(flags(tmp_path, "--batch_size", "6"), "made_up")[0].count == 3


@pytest.mark.parametrize("variables", [
    {}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "1"},
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}])
def test_without_torchrun_there_is_one_process(monkeypatch, tmp_path, variables):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():  # what a cluster leaves in the environment
        monkeypatch.setenv(name, value)
    process, saved = training.start(flags(tmp_path), "made_up")
    assert process == (torch.device("cpu"), None, 0, 1) and saved is None


def test_what_begins_is_announced_once(capsys):
    models = nn.Linear(1000, 2), nn.Linear(2, 1)
    for rank in range(2):
        training.announce("9 images", training.Process(torch.device("cpu"), torch.bfloat16, rank, 2), 30, *models)
    assert capsys.readouterr().out == "9 images, 2,002 and 3 parameters, cpu, torch.bfloat16, 2 process(es), 30 steps\n"


# --- At a step ----------------------------------------------------------------------------------

def test_seed_all_is_a_function_of_its_keys():
    def draw(*keys):
        training.seed_all(*keys)
        return torch.randn(4).tolist()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({tuple(draw(*keys)) for keys in ((0, 5, 1), (0, 5, 2), (0, 1, 5), (1, 5, 1), (0, 6, 1))}) == 5


def test_every_epoch_is_a_permutation_shared_by_the_processes(tmp_path):
    args = flags(tmp_path)
    for epoch in range(2):
        batches = [[training.batch_indices(5 * epoch + i, 20, args, training.Process("cpu", None, rank, 2)).tolist()
                    for rank in range(2)] for i in range(5)]
        assert sorted(index for batch in batches for part in batch for index in part) == list(range(20))
        assert all(len(part) == 2 for batch in batches for part in batch)
    whole = training.batch_indices(7, 20, args, training.Process("cpu", None, 0, 1)).tolist()
    assert whole == [index for pair in zip(*batches[2]) for index in pair]


TOGETHER = """
import argparse, sys
sys.path.insert(0, {root!r})
import utils, torch, training

def main():
    process = training._join(argparse.Namespace(device="cpu", amp="off"))
    model = torch.nn.Linear(2, 1)
    parallel = training.distribute(model, process)
    parallel(torch.tensor([[1.0, 2.0], [3.0, 6.0]][process.rank])).sum().backward()
    sys.stdout.write(f"gradient {{model.weight.grad.flatten().tolist()}}\\n")

utils.run(main)  # as every script: Python's own shutdown may abort in Gloo's threads
"""


def test_the_gradients_of_two_processes_are_averaged(tmp_path, torchrun):
    (tmp_path / "together.py").write_text(TOGETHER.format(root=str(Path(__file__).resolve().parents[1])))
    done = torchrun(tmp_path / "together.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gradient [2.0, 4.0]") == 2


def test_warmup_cosine_rises_then_falls_to_zero():
    rates = [training.warmup_cosine(step, 100, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and max(rates) == 1
    assert rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_ema_follows_its_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    parts = training.make_parts(model, [], training.Process(torch.device("cpu"), None, 0, 1))
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for step in range(200):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(5, 3).double())
        decay = min(0.9, (1 + step) / (10 + step))
        assert training.ema_decay(0.9, step) == decay
        training.average(parts.ema, model, decay)
        for key, value in model.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value
    expected["1.num_batches_tracked"] = torch.tensor(200)  # a counter is copied, not averaged
    for key, value in parts.ema.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=0)  # double precision, 200 rounded sums
        assert value.data_ptr() != model.state_dict()[key].data_ptr()
    assert not any(parameter.requires_grad for parameter in parts.ema.parameters())


def test_update_clips_scales_and_follows_the_rate(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    sgd.param_groups[0]["highest_lr"] = 0.5
    parts = training.make_parts(model, [sgd], training.Process(torch.device("cpu"), None, 0, 1))
    for clip, length in ((1.0, 1.0), (None, 8.0)):
        before = model.weight.item()
        training.update(parts, 8 * model.weight.sum(), lr_factor=0.25, decay=0.9, clip=clip)
        assert before - model.weight.item() == pytest.approx(0.5 * 0.25 * length, rel=1e-5)


class HalfScaler:
    """GradScaler, which asks each optimiser's gradients alone for overflow, and before they are clipped."""

    def __init__(self):
        self.overflow, self.updated = {}, 0

    def scale(self, loss):
        return loss

    def unscale_(self, optimizer):
        self.overflow[optimizer] = not all(weight.grad.isfinite().all() for group in optimizer.param_groups
                                           for weight in group["params"])

    def step(self, optimizer):
        if not self.overflow[optimizer]:
            optimizer.step()

    def update(self):
        self.updated += 1

    def is_enabled(self):
        return True


@pytest.mark.parametrize("clip", [1.0, None])
def test_an_overflow_in_one_optimisers_gradients_spares_the_others_weights(tmp_path, clip):
    model = network()
    parts = training.make_parts(model, training.make_optimizers(model, flags(tmp_path / "new", "--optimizer", "muon")),
                                training.Process(torch.device("cpu"), None, 0, 1))
    parts = parts._replace(scaler=HalfScaler())
    before = {name: value.clone() for name, value in model.named_parameters()}
    hook = model[0].weight.register_hook(lambda gradient: gradient * float("nan"))
    training.update(parts, model(torch.ones(2, 1, 4, 4)).mean(), lr_factor=1.0, decay=0.9, clip=clip)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    hook.remove()
    training.update(parts, model(torch.ones(2, 1, 4, 4)).square().mean(), lr_factor=1.0, decay=0.9, clip=clip)
    assert not torch.equal(model[0].weight, before["0.weight"]) and parts.scaler.updated == 2
    assert all(value.isfinite().all() for value in model.parameters())


# --- Muon ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("low, bound", [(None, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_muon_keeps_the_singular_vectors_and_evens_the_singular_values(monkeypatch, shape, low, bound):
    """Against the SVD: U S V^T becomes U f(S) V^T, f near 1 where five steps reach: from a tenth of the largest."""
    monkeypatch.setattr(training, "amp_dtype", lambda name, device: low)  # as a processor with or without such units
    u, s, vh = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)).double(),
                                full_matrices=False)
    matrix = u @ torch.linspace(10, 1, len(s)).double().diag() @ vh
    result = training.orthogonalise(matrix.float()).double()
    inner = u.T @ result @ vh.T
    # What the last of bfloat16's three digits or float32's seven leaves out, five steps multiply about tenfold.
    off_diagonal = inner - inner.diagonal().diag()
    assert off_diagonal.abs().max() < bound and (result - u @ inner @ vh).abs().max() < bound
    assert torch.equal(result, result.bfloat16().double()) == (low is torch.bfloat16)
    assert 0.5 < inner.diagonal().min() and inner.diagonal().max() < 1.4


def test_muon_step_against_its_formula(monkeypatch):
    """Two steps with the exact U V^T: Nesterov momentum, decoupled decay, the scale of a tall matrix."""
    def exact(matrix):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u @ vh

    monkeypatch.setattr(training, "orthogonalise", exact)
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 1, 2, 2, generator=generator).double())
    expected, momentum = weight.detach().clone(), torch.zeros(8, 1, 2, 2).double()
    muon = training.Muon([weight], lr=0.1, weight_decay=0.5, momentum=0.9)
    for _ in range(2):
        weight.grad = torch.randn(8, 1, 2, 2, generator=generator).double()
        muon.step()
        momentum = 0.9 * momentum + 0.1 * weight.grad
        direction = exact((0.1 * weight.grad + 0.9 * momentum).reshape(8, 4)).reshape(8, 1, 2, 2)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 2 ** 0.5 * direction
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-10)


def test_muon_takes_the_inner_convolutions_and_adamw_the_rest(tmp_path):
    model = network()
    muon, adamw = training.make_optimizers(model, flags(tmp_path, "--optimizer", "muon", "--muon_lr", "0.05"))
    assert [p.shape for p in muon.param_groups[0]["params"]] == [model[2].weight.shape]
    assert muon.param_groups[0]["highest_lr"] == 0.05 and adamw.param_groups[0]["highest_lr"] == 0.1
    assert sum(len(o.param_groups[0]["params"]) for o in (muon, adamw)) == len(list(model.parameters()))
    assert muon.param_groups[0]["weight_decay"] == adamw.param_groups[0]["weight_decay"] == 0.03
    [adamw] = training.make_optimizers(model, flags(tmp_path))
    assert adamw.param_groups[0]["weight_decay"] == 0.03
    assert len(adamw.param_groups[0]["params"]) == len(list(model.parameters()))


# --- What is logged -----------------------------------------------------------------------------

def test_means_and_quarters():
    means = training.Means()
    for part in ([0, 1, 2], [3, 4]):  # of different lengths: a mean over images, not over batches
        index = torch.tensor(part)
        loss, t = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])[index], torch.tensor([1, 250, 251, 1000, 999])[index]
        means.add(loss=loss, share=loss.mean() / 10)
        means.add_quarters("by_t", loss, t, 1000)
    values, seconds = means.pop()
    assert values == dict(loss=3.0, share=0.325, by_t=[1.5, 3.0, 0.0, 4.5]) and seconds >= 0
    means.add(loss=torch.tensor(7.0))
    assert means.pop()[0] == dict(loss=7.0)
