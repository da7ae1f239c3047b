"""The report from tiny checkpoints: every figure is there, the PDF is whole, the numbers are the records' own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from dataset import load_split
from p1_ddpm import study
from p1_ddpm.model import UNet as DigitUNet
from p2_ddim.train import save_slim
from p3_dann import experiments
from p3_dann.model import Dann, load_model, predict
from report import benchmark, p1
from UNet import UNet as FaceUNet
from utils import UserError, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def random_weights(model, seed):
    """The model with weights that let every input matter (untrained ones are zero at the end)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="session")
def p1_checkpoint(tmp_path_factory, data_dir):
    """A tiny network of problem 1 with 50 noise steps, and beside it the records of its training and its study."""
    folder = tmp_path_factory.mktemp("p1")
    config = dict(channels=[8, 16], blocks=1, dropout=0.0)
    metrics = [dict(epoch=i, loss=1 / i, loss_quarters=[1 / i, 0.5, 0.4, 0.3], lr=1e-3, seconds=60.0)
               for i in (1, 2, 3, 4)]
    save_checkpoint(folder / "ddpm.pt", kind="p1_ddpm", model_config=config, schedule=["cosine", 50],
                    recipe=dict(batch_size=64, lr=0.001, weight_decay=0.01, warmup=500, ema=0.999, label_drop=0.1),
                    metrics=metrics[-1:], ema=random_weights(DigitUNet(**config), 0).state_dict(),
                    model=random_weights(DigitUNet(**config), 1).state_dict())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(2):  # the second call finds everything done
            patch.setattr(sys, "argv", ["study.py", "--tables", *study.TABLES, "--per_class", "2",
                                        "--checkpoint", str(folder / "ddpm.pt"), "--output", str(folder / "study.csv"),
                                        "--data_dir", str(data_dir), "--device", "cpu"])
            study.main()
    return folder / "ddpm.pt"


@pytest.fixture(scope="session")
def p3_results(tmp_path_factory, data_dir):
    """What experiments.py leaves: its output folder, with trainings replaced by untrained networks, and checkpoints.

    The ablation is published after the main tables, into the same file of results.
    """
    root = tmp_path_factory.mktemp("p3")
    (root / "p3_dann/checkpoints").mkdir(parents=True)
    trained = []

    def train(folder, flags, data_dir, jobs):
        if (folder / "model.pt").exists():
            return
        trained.append(folder.name)
        folder.mkdir(parents=True)
        words = flags.split()
        given = {name[2:]: value for name, value in zip(words[::2], words[1::2])}
        recipe = dict(source="mnistm", target=given.get("target", "svhn"), mode=given["mode"], seed=int(given.get("seed", 0)),
                      lambda_max=0.1, epochs=2, batch_size=128, lr=0.003, ema=0.995)
        model = random_weights(Dann(widths=(4, 4, 4), num_features=8), recipe["seed"])
        save_checkpoint(folder / "model.pt", kind="p3_dann", config=model.config, recipe=recipe, ema=model.state_dict())
        epochs = [dict(epoch=i, lambda_=0.1, source=0.5, domain=0.6, domain_loss=0.6, confident=0.2, seconds=30)
                  for i in (1, 2)]
        accuracy = {"mnistm": 90.0, "svhn": 70.0 + recipe["seed"], "usps": 95.0}
        (folder / "metrics.jsonl").write_text("".join(
            json.dumps(line) + "\n" for line in [*epochs, dict(recipe, validation_accuracy=accuracy)]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "train", train)
        patch.setattr(experiments, "ROOT", root)
        for output, tables in ("output", ["main", "lambda"]), ("ablation", ["ablation"]):
            patch.setattr(sys, "argv", ["experiments.py", "--data_dir", str(data_dir), "--output_dir", str(root / output),
                                        "--tables", *tables, "--publish"])
            experiments.main()
    assert len(trained) == len(set(trained)) == 15 + 6 + len(experiments.ABLATION)
    return root


def test_table_of_experiments_is_mean_and_deviation_over_seeds():
    rows = [dict(run=f"{run}_s{seed}", target="svhn", mode="dann", statistics="target", seed=seed, accuracy=value,
                 one_view=value - 2)
            for run, values in (("mnistm_svhn_dann", (70, 71, 72)),)
            for seed, value in enumerate(values)]
    rows.append(dict(rows[0], run="ablation_x", accuracy=50, one_view=49))
    one, three = experiments.means(pd.DataFrame(rows)).to_dict("records")
    assert three == dict(experiment="mnistm_svhn_dann", target="svhn", statistics="target", mean=71, std=1, one_view=69,
                         seeds=3)
    assert (one["experiment"], one["mean"], one["seeds"]) == ("ablation_x", 50, 1)


def test_results_are_measured_on_the_published_networks(p3_results, data_dir):
    table = pd.read_csv(p3_results / "p3_dann/checkpoints/results.csv")
    # The source-only network appears with its own statistics and with each target's.
    source = table[table["mode"] == "source"]
    assert sorted(source[source.seed == 0][["target", "statistics"]].values.tolist()) == [
        ["svhn", "source"], ["svhn", "target"], ["usps", "source"], ["usps", "target"]]
    assert set(table[table.run == "svhn_target_s1"].target) == {"svhn"}
    model, _ = load_model(p3_results / "output/mnistm_svhn_dann_s1/model.pt")
    images, labels, _ = load_split(data_dir, "svhn", "val")
    right = (predict(model, images).argmax(dim=1) == labels).float().mean().item()
    assert table[table.run == "mnistm_svhn_dann_s1"].accuracy.item() == pytest.approx(100 * right, abs=0.01)
    shipped = p3_results / "p3_dann/checkpoints"
    assert table.run.nunique() == 15 + 6 + len(experiments.ABLATION)  # of both output folders
    for name in experiments.MODELS:
        assert (shipped / f"{name}.pt").read_bytes() == (p3_results / f"output/{name}_s0/model.pt").read_bytes()


def test_study_measures_each_setting_once(p1_checkpoint):
    table = pd.read_csv(p1_checkpoint.parent / "study.csv")
    assert table.groupby("table").size().to_dict() == {name: len(settings) for name, settings in study.TABLES.items()}
    ema = table[table.table == "ema"]
    assert ema.weights.tolist() == ["ema", "model"] and ema.frechet.nunique() == 2


def test_drawing_of_the_architecture_follows_the_module():
    blocks = p1.trace(random_weights(DigitUNet(channels=(8, 16), blocks=2), 0))
    names = [block["name"] for block in blocks]
    assert names == ["first", "down_high.0", "down_high.1", "downsample", "down_low.0", "down_low.1", "middle.0",
                     "middle.1", "middle.2", "up_low.0", "up_low.1", "upsample", "up_high.0", "up_high.1", "last"]
    assert {block["name"]: block["skip"] for block in blocks if block["skip"]} == {
        "up_low.0": "down_low.1", "up_low.1": "down_low.0", "up_high.0": "down_high.1", "up_high.1": "down_high.0"}
    assert all(block["conditioned"] == (block["kind"] == "residual block") for block in blocks)
    assert blocks[0]["channels"] == (12, 8) and blocks[-1]["channels"] == (8, 12) and blocks[6]["side"] == 7


def build(tmp_path, *flags):
    tmp_path.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, ROOT / "report/build.py", "--device", "cpu", "--output_dir",
                           tmp_path / "the report", *map(str, flags)], capture_output=True, text=True, cwd=tmp_path)


def test_report_builds_from_tiny_checkpoints(tmp_path, data_dir, p1_checkpoint, p3_results):
    torch.manual_seed(0)
    save_slim(tmp_path / "face.pt", random_weights(FaceUNet(channel=8), 0).state_dict(), dict(channel=8, size=32))
    (tmp_path / "noise").mkdir()
    for i in range(4):
        torch.save(torch.randn(1, 3, 32, 32), tmp_path / f"noise/{i:02d}.pt")
    (tmp_path / "truth").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "truth/02.png")
    done = build(tmp_path, "--quick", "--student_id", "r12345678", "--data_dir", data_dir, "--unet",
                 tmp_path / "face.pt", "--noise", tmp_path / "noise", "--gt", tmp_path / "truth", "--p1_checkpoint", p1_checkpoint,
                 "--p3_checkpoints", p3_results / "p3_dann/checkpoints")
    assert done.returncode == 0, done.stderr
    pdf = (tmp_path / "the report/hw2_r12345678.pdf").read_bytes()
    assert Image.open(tmp_path / "the report/strip.png").height == 260
    figures = set(re.findall(r'drawing\("(\w+)"', "".join(p.read_text() for p in ROOT.glob("report/p?.typ"))))
    figures |= {f"p3_tsne_{target}{when}" for target in ("svhn", "usps") for when in ("", "_before")}
    figures.discard("p3_tsne_")
    made = {path.stem for path in (tmp_path / "the report/build").glob("*.png")}
    assert figures == made and len(figures) == 18
    assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF")
    assert len(re.findall(rb"/Subtype\s*/Image", pdf)) >= len(figures)
    numbers = json.loads((tmp_path / "the report/build/p1.json").read_text())
    assert numbers["epochs"] == 4 and numbers["minutes"] == 4 and numbers["loss"] == 0.25
    numbers = json.loads((tmp_path / "the report/build/p2.json").read_text())
    assert list(numbers["errors"]) == ["02.png"] and numbers["errors"]["02.png"] > 100 and not numbers["course"]
    assert numbers["drift"][0] == 0 and min(numbers["drift"][1:]) > 1

    # One part alone: the others stay as they were.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "the report/build").iterdir()}
    done = build(tmp_path, "--quick", "--only", "p1", "--data_dir", data_dir, "--p1_checkpoint", p1_checkpoint)
    assert done.returncode == 0, done.stderr
    changed = {path.name[:2] for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"p1"} and (tmp_path / "the report/report.pdf").stat().st_size > 0.9 * len(pdf)

    # In a fresh folder the others are missing. Weights without a configuration are the course's.
    torch.save(random_weights(FaceUNet(channel=8), 0).state_dict(), tmp_path / "UNet.pt")
    done = build(tmp_path / "fresh", "--quick", "--only", "p2", "--unet", tmp_path / "UNet.pt", "--noise", tmp_path / "noise")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "fresh/the report/build/p2.json").read_text())["course"]
    assert [path.name for path in (tmp_path / "fresh/the report").glob("*.p[dn][fg]")] == ["report_p2.pdf"]


def test_benchmark_measures_one_command_at_a_time(tmp_path):
    (tmp_path / "big.py").write_text("x = bytearray(300 << 20)")
    (tmp_path / "small.py").write_text("")
    (tmp_path / "broken.py").write_text("import sys; sys.exit('no device')")
    big, small = (benchmark.measure([sys.executable, tmp_path / f"{name}.py"]) for name in ("big", "small"))
    assert big[1] > 300 > small[1] > 1 and big[0] > 0
    with pytest.raises(UserError, match="broken.py failed: .*no device"):
        benchmark.measure([sys.executable, tmp_path / "broken.py"])


def test_a_study_of_another_checkpoint_is_not_taken(tmp_path, p1_checkpoint):
    (tmp_path / "other.pt").write_bytes(b"other")
    with pytest.raises(UserError, match="lacks choice, confirm, guidance, interval, seeds, spacing, steps for"):
        p1.read_study(p1_checkpoint.parent / "study.csv", tmp_path / "other.pt", 50)


def test_the_report_takes_what_was_drawn_with_the_shipped_setting(tmp_path, p1_checkpoint):
    rows = pd.read_csv(p1_checkpoint.parent / "study.csv")
    other = rows[rows.table == "steps"].assign(guidance=9.0, accuracy=-1)
    pd.concat([rows, other]).to_csv(tmp_path / "study.csv", index=False)
    study = p1.read_study(tmp_path / "study.csv", p1_checkpoint, 50)
    assert len(study) == len(rows) and study.accuracy.min() >= 0
    pd.concat([rows[rows.table != "steps"], other]).to_csv(tmp_path / "study.csv", index=False)
    with pytest.raises(UserError, match="lacks steps for"):
        p1.read_study(tmp_path / "study.csv", p1_checkpoint, 50)


def test_means_are_over_the_seeds_alone():
    rows = pd.DataFrame([dict(dict.fromkeys(study.FLAGS, "x"), guidance=guidance, seed=seed,
                              **dict.fromkeys(study.MEASURES, value))
                         for guidance, seed, value in (("1", "0", 97.0), ("1", "1", 99.0), ("2", "0", 50.0))])
    assert study.means(rows)[["guidance", "accuracy", "accuracy_deviation", "seeds"]].fillna(0).values.tolist() == [
        ["1", 98.0, pytest.approx(2**0.5), 2], ["2", 50.0, 0.0, 1]]
    lines = study.markdown(rows).splitlines()
    assert lines[0].startswith("| guidance | accuracy |") and lines[2].startswith("| 1 | 98.00 ± 1.41 |")


def test_the_shipped_setting_is_the_one_that_the_rule_picks():
    checkpoint = ROOT / "p1_ddpm/checkpoints/ddpm.pt"
    rows = p1.read_study(checkpoint.parent / "study.csv", checkpoint, 1000)
    flags = ["sampler", "steps", "guidance", "interval"]
    good = rows[rows.table == "choice"].groupby(flags).filter(  # on every seed
        lambda seeds: seeds.accuracy.min() >= 99.8 and seeds.worst_digit.min() >= 99)
    confirmed = study.means(rows[rows.table == "confirm"]).set_index(flags).accuracy.round(2)
    by_ratio = [tuple(row) for row in study.means(good).sort_values("frechet_ratio")[flags].values]
    shipped = p1.sampling_arguments()
    assert next(setting for setting in by_ratio if confirmed[setting] >= 99.8) == (
        shipped.sampler, shipped.steps, shipped.guidance, "{:g} to {:g}".format(*shipped.interval))


def test_benchmark_runs_the_wrappers(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--quick", "--only", "p1", "p3", "--output", str(tmp_path / "b.csv")])
    pd.DataFrame([dict(problem=problem, what="kept or replaced") for problem in ("p2", "p3")]).to_csv(tmp_path / "b.csv")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benchmark.main()
    kept, first, third = pd.read_csv(tmp_path / "b.csv").to_dict("records")
    assert kept["problem"] == "p2" and kept["what"] == "kept or replaced"
    assert first["what"] == "hw2_1.sh" and first["images"] == 50
    assert first["within"] == (first["seconds"] <= first["limit_s_on_2080ti"] == 900)
    assert third["what"] == "hw2_3.sh" and third["images"] == 1000 and third["images_per_second"] > 0 and third["peak_mib"] > 50
    assert "hw2_3.sh" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--only", "p1", "--p1_checkpoint", "nowhere/ddpm.pt"], "there is no nowhere/metrics.jsonl"),
    (["--only", "p3", "--p3_checkpoints", "nowhere"], "there is no nowhere/results.csv"),
    (["--only", "p2", "--unet", "UNet.pt"], "--unet and --noise belong together"),
    (["--student_id", "../x"], "letters and digits")])
def test_mistakes_in_building_are_told(tmp_path, flags, message):
    done = build(tmp_path, *flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pdf"))
