"""The report from tiny checkpoints: every figure is there, the PDF is whole, the numbers are the records' own."""

import json
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import ROOT, call, randomised
from dataset import load_split
from files import digest_of, save_checkpoint
from p1_ddpm import studies as p1_studies
from p1_ddpm.diffusion import noise_schedule
from p1_ddpm.inference import SHIPPED, SHIPPED_2024
from p1_ddpm.model import UNet as DigitUNet
from p3_dann import studies as p3_studies
from p3_dann.methods import predicted_domain
from p3_dann.model import Dann, load_model
from p3_dann.prediction import adapt_statistics, predict
from report import build, p1, p2
from UNet import UNet as FaceUNet
from utils import UserError

TIMESTEPS = 50


# --- What the chapters leave, with random networks and made-up results --------------------------

def make_p1(folder):
    """Both networks with few timesteps, and beside them the records of their trainings and studies."""
    folder.mkdir(parents=True)
    config = dict(channels=[8, 16])
    recipe = dict(batch_size=64, lr=0.001, weight_decay=0.01, warmup=500, ema=0.999, label_drop=0.1)
    metrics = [dict(epoch=i, loss=1 / i, loss_quarters=[1 / i, 0.5, 0.4, 0.3], lr=1e-3, seconds=60.0)
               for i in (1, 2, 3, 4)]
    save_checkpoint(folder / "ddpm.pt", kind="p1_ddpm", metrics=metrics[-1:],
                    config=dict(network=config, schedule=dict(name="cosine", timesteps=TIMESTEPS)),
                    recipe=recipe, ema=randomised(DigitUNet(**config), 0).state_dict())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    both = dict(network=dict(config, num_classes=20), schedule=dict(name="cosine", timesteps=TIMESTEPS),
                domains=["mnistm", "svhn"])
    save_checkpoint(folder / "mnistm_svhn.pt", kind="p1_ddpm", config=both, metrics=metrics[-1:],
                    recipe=dict(recipe, epochs=4, muon_lr=0.02, dropout=0.1),
                    ema=randomised(DigitUNet(**both["network"]), 0).state_dict())
    (folder / "mnistm_svhn.jsonl").write_text("".join(
        json.dumps(dict(line, step=9 * line["epoch"], val_loss_mnistm=0.2, val_loss_svhn=0.1)) + "\n"
        for line in metrics))
    rng = np.random.default_rng(0)
    measures = dict(accuracy=(90, 100), worst_digit=(80, 90), panel=(90, 100), panel_least=(80, 90), frechet=(5, 50),
                    frechet_ratio=(1, 10), diversity=(0.8, 1.2), seconds=(10, 50))
    pd.DataFrame([dict(table=table, domain="mnistm", checkpoint=digest_of(folder / "ddpm.pt"), epochs=4,
                       **p1_studies.as_text(setting), **{name: rng.uniform(*ends) for name, ends in measures.items()})
                  for table in p1_studies.TABLES if table != "domains"
                  for setting in p1_studies.settings(table, TIMESTEPS)]
                 ).to_csv(folder / "results.csv", index=False)


def make_p3(root, data_dir):
    """What p3_dann/studies.py leaves, its trainings replaced by random networks: in root/output, root/ablation and
    root/p3_dann/checkpoints. The ablation is published after the main tables, into the same file of results."""
    (root / "p3_dann/checkpoints").mkdir(parents=True)
    trained, (images, _, _) = [], load_split(data_dir, "svhn", "train")

    def train(folder, settings, data_dir, jobs):
        trained.append(folder.name)
        folder.mkdir(parents=True)
        recipe = dict(seed=0, lambda_max=0.1, epochs=2, batch_size=128, lr=0.003, ema=0.995,
                      weight_decay=0.001) | settings
        model = randomised(Dann(widths=(4, 4, 4), num_features=8), recipe["seed"])
        adapt_statistics(model, images)  # otherwise all answers are the same
        save_checkpoint(folder / "model.pt", kind="p3_dann", config=model.config, recipe=recipe, ema=model.state_dict())
        (folder / "metrics.jsonl").write_text("".join(
            json.dumps(dict(epoch=i, lambda_=0.1, accuracy=0.5, domain_accuracy=0.6, domain_loss=0.6, confident=0.2,
                            seconds=30)) + "\n" for i in (1, 2)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p3_studies, "train", train)
        patch.setattr(p3_studies, "ROOT", root)
        for output, table, runs in (("output", "main", "*"), ("output", "choice", "mnistm_*_lambda_0.[13]_s0"),
                                    ("ablation", "ablation", "*")):
            call(p3_studies, "--data_dir", data_dir, "--output_dir", root / output, "--tables", table,
                 "--runs", runs, "--publish")
    assert len(trained) == len(set(trained)) == 15 + 4 + 5


def make_p2(root):
    """A small UNet of train.py's and four noises with one ground truth."""
    (root / "p2_ddim/checkpoints").mkdir(parents=True)
    save_checkpoint(root / "p2_ddim/checkpoints/face64.pt", kind="p2_ddim", config=dict(channel=8, size=32),
                    recipe=dict(epochs=7), ema=randomised(FaceUNet(channel=8), 0).state_dict())
    generator = torch.Generator().manual_seed(0)
    for name in "noise", "truth":
        (root / name).mkdir()
    for i in range(4):
        torch.save(torch.randn(1, 3, 32, 32, generator=generator), root / f"noise/{i:02d}.pt")
    Image.new("RGB", (32, 32)).save(root / "truth/02.png")


@pytest.fixture(scope="module")
def chapters(tmp_path_factory, data_dir):
    root = tmp_path_factory.mktemp("chapters")
    make_p1(root / "p1_ddpm/checkpoints")
    make_p2(root)
    make_p3(root, data_dir)
    return root


@pytest.fixture(scope="module")
def report(tmp_path_factory, data_dir, chapters):
    """The folder into which a --quick build of 2023's report has written, and of 2024's problem 1."""
    folder = tmp_path_factory.mktemp("the report")
    for assignment, *part in ("dlcv2023_hw2",), ("dlcv2024_hw2", "--only", "p1_domains"):
        call(build, "--assignment", assignment, *part, "--quick", "--student_id", "r12345678", "--data_dir", data_dir,
             "--chapters", chapters, "--noise", chapters / "noise", "--unet",
             chapters / "p2_ddim/checkpoints/face64.pt", "--gt", chapters / "truth", "--device", "cpu",
             "--output_dir", folder)
    return folder


# --- The report ---------------------------------------------------------------------------------

def test_every_figure_of_the_text_is_made_and_every_one_made_is_shown(report):
    texts = [ROOT / f"report/{part}.typ" for part in ("p1", "p1_domains", "p2", "p3")]
    named = re.findall(r'drawing\("(\w+)"', "".join(path.read_text() for path in texts))
    made = [path.stem for path in (report / "report/build").glob("*.svg")]
    assert sorted(named) == sorted(made) and len(made) == 20


def test_the_pdf_is_whole_and_light(report):
    pdf = (report / "assignments/dlcv2023_hw2/hw2_r12345678.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF")
    assert 8 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
    assert len(pdf) < 2e6 and b"STIXGeneral" in pdf


def test_the_strip_shows_all_three_problems(report):
    strip = np.asarray(Image.open(report / "report/strip.png"))
    assert strip.shape[0] == 291 and strip.shape[1] > 3 * 291 - 3
    assert all(part.std() > 10 for part in (strip[:, :291], strip[:, 300:600], strip[:, -280:]))


def test_numbers_are_those_of_the_records(report, chapters):
    numbers = {part: json.loads((report / f"report/build/{part}.json").read_text())
               for part in ("p1", "p1_domains", "p2", "p3")}
    assert numbers["p1"]["epochs"] == 4 and numbers["p1"]["minutes"] == 4 and numbers["p1"]["loss"] == 0.25
    rows = pd.read_csv(chapters / "p1_ddpm/checkpoints/results.csv")
    assert numbers["p1"]["seeds"][0]["accuracy"] == pytest.approx(rows[rows.table == "seeds"].accuracy.mean())
    assert numbers["p1"]["seeds"][0]["seeds"] == 5
    assert {row["seeds"] for row in numbers["p1"]["candidates"]} == {3}
    assert numbers["p1_domains"]["seconds"] == 240 and set(numbers["p1_domains"]["quality"]) == {"mnistm", "svhn"}
    assert numbers["p2"]["recipe"]["epochs"] == 7 and not numbers["p2"]["course"]
    assert list(numbers["p2"]["errors"]) == ["02.png"] and numbers["p2"]["errors"]["02.png"] > 100
    assert numbers["p2"]["drift"][0] == 0 < numbers["p2"]["drift"][1]
    assert numbers["p2"]["drift"] == sorted(numbers["p2"]["drift"])
    accuracy = pd.read_csv(chapters / "p3_dann/checkpoints/results.csv").set_index("run").accuracy
    [dann] = [row for row in numbers["p3"]["means"] if row["experiment"] == "mnistm_svhn_dann"]
    assert dann["mean"] == pytest.approx(np.mean([accuracy[f"mnistm_svhn_dann_s{seed}"] for seed in range(3)]),
                                         abs=0.01)  # rounded
    assert numbers["p3"]["validation"] == dict(svhn=40, usps=40) and len(numbers["p3"]["ablation"]) == 8


class Convolution(torch.nn.Conv2d):
    """A stand-in for the UNet that takes no time."""
    def __init__(self):
        super().__init__(3, 3, 1)

    def forward(self, x, t):
        return super().forward(x)


def build_p2(patch, chapters, output_dir, *flags):
    patch.setattr(p2, "load_model", lambda path, device: Convolution())
    call(build, "--quick", "--assignment", "dlcv2023_hw2", "--only", "p2", "--noise",
         chapters / "noise", "--output_dir", output_dir, "--device", "cpu", *flags)


def test_one_part_alone_leaves_the_others(report, chapters, tmp_path, monkeypatch):
    copy = tmp_path / "copy"  # other tests read the report
    shutil.copytree(report, copy)
    before = {path: path.stat().st_mtime_ns for path in (copy / "report/build").iterdir()}
    build_p2(monkeypatch, chapters, copy, "--unet", chapters / "p2_ddim/checkpoints/face64.pt")
    assert {path.name[:2] for path, time in before.items() if path.stat().st_mtime_ns != time} == {"p2"}
    assert (copy / "assignments/dlcv2023_hw2/report.pdf").exists()


def test_one_part_where_the_others_were_never_made(tmp_path, chapters, monkeypatch):
    """Weights without a configuration are the course's."""
    torch.save(Convolution().state_dict(), tmp_path / "UNet.pt")
    build_p2(monkeypatch, chapters, tmp_path, "--unet", tmp_path / "UNet.pt")
    assert json.loads((tmp_path / "report/build/p2.json").read_text())["course"]
    assert [path.name for path in tmp_path.rglob("*.pdf")] == ["report_p2.pdf"]
    assert not (tmp_path / "report/strip.png").exists()


@pytest.mark.parametrize("flags, message", [
    (["--only", "p1", "--chapters", "nowhere"], "there is no nowhere/p1_ddpm/checkpoints/metrics.jsonl"),
    (["--only", "p3", "--chapters", "nowhere"], "there is no nowhere/p3_dann/checkpoints/results.csv"),
    (["--only", "p2", "--unet", "UNet.pt"], "--unet and --noise belong together"),
    (["--only", "p7", "--assignment", "dlcv2023_hw2"], "--only p7 is in no report of dlcv2023_hw2"),
    (["--student_id", "../x"], "letters and digits")])
def test_mistakes_are_told(tmp_path, capsys, flags, message):
    with pytest.raises((UserError, SystemExit)) as error:
        call(build, "--output_dir", tmp_path, *flags)
    assert message in str(error.value) + capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pdf"))


def test_a_quick_build_leaves_the_committed_report_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["build.py", "--quick"])
    assert build.parse_args().output_dir.is_relative_to(ROOT / "report/build")  # which git ignores
    monkeypatch.setattr(sys, "argv", ["build.py"])
    assert build.parse_args().output_dir == ROOT


# --- Problem 1 ----------------------------------------------------------------------------------

def test_drawing_of_the_architecture_follows_the_module():
    blocks = p1.trace(randomised(DigitUNet(channels=(8, 16), blocks=2), 0))
    names = [block["name"] for block in blocks]
    assert names == ["first", "down_high.0", "down_high.1", "downsample", "down_low.0", "down_low.1", "middle.0",
                     "middle.1", "middle.2", "up_low.0", "up_low.1", "upsample", "up_high.0", "up_high.1", "last"]
    assert {block["name"]: block["skip"] for block in blocks if block["skip"]} == {
        "up_low.0": "down_low.1", "up_low.1": "down_low.0", "up_high.0": "down_high.1", "up_high.1": "down_high.0"}
    assert all(block["conditioned"] == (block["kind"] == "residual block") for block in blocks)
    assert blocks[0]["channels"] == (12, 8) and blocks[-1]["channels"] == (8, 12) and blocks[6]["side"] == 7


def test_the_reverse_process_ends_at_the_first_digit_of_the_grid(tmp_path, chapters):
    model, alphas_cumprod = p1.load_model(chapters / "p1_ddpm/checkpoints/ddpm.pt")
    grid, states = p1.digits_of_same_noise(model, alphas_cumprod, torch.device("cpu"))
    assert torch.equal(states[0], grid) and list(states)[0] == TIMESTEPS and len(states) == SHIPPED.steps + 1
    [(_, images, _)] = p1.generate(model, alphas_cumprod, *p1.digits(1, 1), SHIPPED, 0, torch.device("cpu"))
    assert (grid[0].int() - images[0].int()).abs().max() <= 1  # 0_001.png, but for the batch's rounding
    few = dict(zip((1000, 900, 790, 520, 230, 80, 0), grid))  # 520 is the nearest to 600 and to 400
    shares = p1.reverse_process(tmp_path / "states.svg", {t: x[None] for t, x in few.items()}, noise_schedule("cosine"))
    assert [t for t, _ in shares] == [1000, 790, 520, 230, 80, 0]


def test_results_of_another_checkpoint_are_not_taken(tmp_path, chapters):
    (tmp_path / "other.pt").write_bytes(b"other")
    with pytest.raises(UserError, match="lacks candidates, ddim, guidance, interval, seeds, "
                                        "shipped, spacing, steps for"):
        p1.read_results(chapters / "p1_ddpm/checkpoints/results.csv", tmp_path / "other.pt", TIMESTEPS)


def test_results_with_the_shipped_setting_are_taken(tmp_path, chapters):
    folder = chapters / "p1_ddpm/checkpoints"
    rows = pd.read_csv(folder / "results.csv")
    other = rows[rows.table == "steps"].assign(eta=0.5, accuracy=-1)
    pd.concat([rows, other]).to_csv(tmp_path / "results.csv", index=False)
    taken = p1.read_results(tmp_path / "results.csv", folder / "ddpm.pt", TIMESTEPS)
    assert len(taken) == len(rows) and taken.accuracy.min() >= 0
    pd.concat([rows[rows.table != "steps"], other]).to_csv(tmp_path / "results.csv", index=False)
    with pytest.raises(UserError, match="lacks steps for"):
        p1.read_results(tmp_path / "results.csv", folder / "ddpm.pt", TIMESTEPS)


def test_the_shipped_setting_is_the_one_that_the_rule_picks():
    """The rule that the report's appendix tells."""
    checkpoint = ROOT / "p1_ddpm/checkpoints/ddpm.pt"
    alphas_cumprod = noise_schedule("cosine")
    rows = p1.read_results(checkpoint.parent / "results.csv", checkpoint, 1000)
    flags = ["sampler", "steps", "spacing", "guidance", "interval"]
    shipped = tuple(p1_studies.as_text(p1_studies.DEFAULTS)[flag] for flag in flags)
    candidates = p1_studies.means(rows[rows.table == "candidates"])
    cheap = candidates[[p1.passes(row, alphas_cumprod) <= 10 for row in candidates.to_dict("records")]]
    assert tuple(cheap[cheap.frechet_ratio <= 4].sort_values("panel").iloc[-1][flags]) == shipped


def test_a_training_is_told_by_its_means():
    checkpoint = ROOT / "p1_ddpm/checkpoints/ddpm.pt"
    rows = p1.read_results(checkpoint.parent / "results.csv", checkpoint, 1000).query("table == 'trainings'")
    shipped, *others = p1.trainings(rows)
    assert shipped["checkpoint"] == digest_of(checkpoint) and len(others) == rows.checkpoint.nunique() - 1
    own = rows[rows.checkpoint == shipped["checkpoint"]]
    assert shipped["ddpm"] == pytest.approx(own[own.sampler == "ddpm"].accuracy.mean())
    assert shipped["panel"] == pytest.approx(own[own.sampler == SHIPPED.sampler].panel.mean())
    assert p1.trainings(rows.iloc[:0]) == []


def test_the_setting_of_two_domains_is_the_one_that_the_rule_picks():
    """The rule that the appendix of 2024's report tells."""
    rows = pd.read_csv(ROOT / "p1_ddpm/checkpoints/results.csv").query("table == 'domains'")
    cheap = rows[[p1.passes(row, noise_schedule("cosine")) <= 10 for row in rows.to_dict("records")]]
    flags = list(SHIPPED_2024._fields)
    mnistm, svhn = (p1_studies.means(cheap[cheap.domain == domain]).set_index(flags) for domain in ("mnistm", "svhn"))
    assert set(mnistm.seeds) == set(svhn.seeds) == {3}
    varied = mnistm.diversity.between(0.85, 1.1) & svhn.diversity.between(0.85, 1.1)
    picked = (mnistm.panel + svhn.accuracy)[varied].idxmax()
    assert list(map(str, picked)) == list(p1_studies.as_text(SHIPPED_2024._asdict(), flags).values())


# --- Problem 3 ----------------------------------------------------------------------------------

def test_results_of_problem_3_are_measured_on_the_published_networks(chapters, data_dir):
    checkpoints = chapters / "p3_dann/checkpoints"
    table = pd.read_csv(checkpoints / "results.csv")
    # The source-only network appears with its own statistics and with each target's.
    source = table[table.run == "mnistm_source_only_s0"]
    assert sorted(source[["target", "statistics"]].values.tolist()) == [
        ["svhn", "source"], ["svhn", "target"], ["usps", "source"], ["usps", "target"]]
    assert {*p3_studies.TABLES["main"], *p3_studies.TABLES["ablation"]} < set(table.run)
    model, recipe = load_model(chapters / "output/mnistm_svhn_dann_s1/model.pt")
    images, labels, _ = load_split(data_dir, predicted_domain(recipe), "val")
    for column, average in ("accuracy", True), ("one_view", False):
        right = (predict(model, images, average=average).argmax(dim=1) == labels).float().mean().item()
        assert table[table.run == "mnistm_svhn_dann_s1"][column].item() == pytest.approx(100 * right, abs=0.01)
    shipped = p3_studies.shipped(table)
    for name in p3_studies.FIRST:
        trained = chapters / f"output/{shipped[name]}_s0/model.pt"
        assert (checkpoints / f"{name}.pt").read_bytes() == trained.read_bytes()


def test_means_of_problem_3_are_over_the_seeds():
    rows = [dict(run=f"mnistm_svhn_dann_s{seed}", target="svhn", statistics="target", seed=seed, accuracy=value,
                 one_view=value - 2) for seed, value in enumerate((70, 71, 72))]
    rows.append(dict(rows[0], run="ablation_x", accuracy=50, one_view=49))
    one, three = p3_studies.means(pd.DataFrame(rows)).to_dict("records")
    assert three == dict(experiment="mnistm_svhn_dann", target="svhn", statistics="target", mean=71, std=1, one_view=69,
                         seeds=3)
    assert (one["experiment"], one["mean"], one["seeds"]) == ("ablation_x", 50, 1)
