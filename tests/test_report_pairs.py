"""The report of 2020's problems 3 and 4, from random networks, random digits and made-up records."""

import json
import re

import pandas as pd
import pytest
import torch

import training
from conftest import call
from dataset import load_split
from files import save_checkpoint
from p3_dann.methods import ALL_PAIRS, PAIRS_2020, run_name
from p3_dann.model import Dann, load_model
from p3_dann.prediction import adapt_statistics, predict
from p3_dann.studies import ADAMATCH_ABLATION, ADAMATCH_ABLATION_PAIRS
from report import build, p3_pairs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, data_dir):
    """The folder of p3_dann/checkpoints with the networks that the report shows, and the records of their trainings."""
    folder = tmp_path_factory.mktemp("chapters") / "p3_dann/checkpoints"
    folder.mkdir(parents=True)
    names = [run_name(method, *pair) for method in ("source_only", "target_only", "dann", "adamatch")
             for pair in PAIRS_2020]
    for seed, name in enumerate([*names, run_name("adamatch", *p3_pairs.HARDEST)]):
        torch.manual_seed(seed)
        model = Dann(widths=(4, 4, 4), num_features=8)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        adapt_statistics(model, load_split(data_dir, "svhn", "train")[0])  # otherwise all answers are the same
        recipe = dict(lr=0.003, epochs=60 + seed, batch_size=64, lambda_max=0.3, threshold=0.9, warmup=240,
                      weight_decay=0.001, ema=0.995)
        save_checkpoint(folder / f"{name}.pt", kind="p3_dann", config=model.config, recipe=recipe,
                        ema=model.state_dict())
    for place, pair in enumerate(ALL_PAIRS):
        for method in "dann", "adamatch":
            training.write_jsonl(folder / f"{run_name(method, *pair)}.jsonl", [
                dict(step=step, domain_accuracy=place / step, counted=place / step) for step in (100, 400)])
    rows = [(f"{run_name(method, *pair)}_s{seed}", method, pair[0], pair[1], statistics, seed, 10 * place + 2 * seed)
            for place, pair in enumerate(ALL_PAIRS)
            for method, statistics in (("source_only", "source"), ("source_only", "target"), ("dann", "target"))
            for seed in range(3)]
    rows += [(f"{run_name('adamatch', *pair)}_s0", "adamatch", pair[0], pair[1], "target", 0, 90 + place)
             for place, pair in enumerate(PAIRS_2020)]
    rows += [(f"usps_mnistm_dann_lambda_{end}_s0", "dann", "usps", "mnistm", "target", 0, 70) for end in (0.1, 0.3)]
    rows.append(("ablation_mnistm_svhn_adamatch_no_ramp", "adamatch", "mnistm", "svhn", "target", 0, 33.0))
    table = pd.DataFrame(rows, columns=["run", "method", "source", "target", "statistics", "seed", "accuracy"])
    scores = table.run.map({"usps_mnistm_dann_s0": 1.2, "usps_mnistm_dann_lambda_0.1_s0": 1.1,
                            "usps_mnistm_dann_lambda_0.3_s0": 1.0})
    table.assign(one_view=0.0, infomax=scores, density=scores, confident=scores, source_validation=scores).to_csv(
        folder / "results.csv", index=False)
    return folder


def test_the_report_on_pairs_shows_the_records_and_the_networks_answers(checkpoints, data_dir, tmp_path, monkeypatch):
    latent_space, shown = p3_pairs.latent_space, []
    monkeypatch.setattr(p3_pairs, "latent_space", lambda *words: shown.append(words) or latent_space(*words))
    call(build, "--quick", "--assignment", "dlcv2020_hw3", "--only", "p3_pairs", "--chapters", checkpoints.parents[1],
         "--data_dir", data_dir, "--device", "cpu", "--output_dir", tmp_path)
    pdf = (tmp_path / "assignments/dlcv2020_hw3/report_p3_pairs.pdf").read_bytes()  # typeset: no figure is missing
    assert pdf.rstrip().endswith(b"%%EOF") and 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 10
    figures = {path.stem: path.read_text() for path in (tmp_path / "report/build").glob("*.svg")}
    assert figures.keys() == {f"p3_pairs_{name}" for name in ("dann", "adamatch", "confusion")}
    assert "SVHN → MNIST-M" in figures["p3_pairs_confusion"]

    numbers = json.loads((tmp_path / "report/build/p3_pairs.json").read_text())
    assert [row["pair"] for row in numbers["accuracies"]] == [p3_pairs.scenario(pair) for pair in ALL_PAIRS]
    row = next(row for row in numbers["accuracies"] if row["pair"] == "USPS → MNIST-M")
    assert row["dann"] == dict(mean=10 * ALL_PAIRS.index(("usps", "mnistm")) + 2, std=2, seeds=3)
    assert row["adamatch"] == dict(mean=90, std=None, seeds=1) and row["target"] is None
    over_training = (100 / 100 + 300 / 400) / 400  # a line is the mean over the steps since the one before
    assert numbers["record"]["dann"]["SVHN → USPS"]["domain_accuracy"] == pytest.approx(
        ALL_PAIRS.index(("svhn", "usps")) * over_training)
    assert [(row["pair"], row["setting"], row["picked"]) for row in numbers["choices"]] == [
        ("USPS → MNIST-M", "1", True), ("USPS → MNIST-M", "0.1", False), ("USPS → MNIST-M", "0.3", False)]
    assert numbers["recipes"]["adamatch"]["epochs"] == 60 + 11  # the last of the pairs
    assert [own_statistics for *_, own_statistics in shown] == [True, False]  # AdaMatch's domains share theirs
    for method, (before, after, *_) in zip(("dann", "adamatch"), shown):
        assert numbers["distances"][method].keys() == {p3_pairs.scenario(pair) for pair in PAIRS_2020}
        for pair in PAIRS_2020:
            for name, model in ("source_only", before[pair]), (method, after[pair]):
                weights = load_model(checkpoints / f"{run_name(name, *pair)}.pt")[0].state_dict()
                assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())

    for method in "source_only", "dann", "adamatch", "target_only":
        for pair in PAIRS_2020:
            model, _ = load_model(checkpoints / f"{run_name(method, *pair)}.pt")
            images, labels, _ = load_split(data_dir, pair[1], "test")
            assert numbers["tests"][method][p3_pairs.scenario(pair)] == pytest.approx(
                100 * (predict(model, images).argmax(dim=1) == labels).float().mean().item())

    assert numbers["mistakes"].keys() == {"MNIST-M → SVHN", "SVHN → MNIST-M"}
    for source, target in (("mnistm", "svhn"), ("svhn", "mnistm")):
        model, _ = load_model(checkpoints / f"{source}_{target}_adamatch.pt")
        images, labels, _ = load_split(data_dir, target, "val")
        answers = predict(model, images).argmax(dim=1)
        told = numbers["mistakes"][p3_pairs.scenario((source, target))]
        right = [100 * (answers[labels == digit] == digit).float().mean().item() for digit in range(10)]
        assert [share for _, share in told["worst"]] == sorted(right)[:3]
        assert all(share == right[digit] for digit, share in told["worst"])
        for digit, answer, count in told["pairs"]:
            assert digit != answer and count == ((labels == digit) & (answers == answer)).sum() > 0


def test_the_ablation_tells_what_was_left_out_and_what_is_not_measured():
    results = pd.DataFrame([("ablation_mnistm_svhn_adamatch_complete", 92.0), ("mnistm_svhn_adamatch_s0", 1.0),
                            ("ablation_usps_mnistm_adamatch_complete", 94.0),
                            ("ablation_usps_mnistm_adamatch_no_ramp", 33.0)],
                           columns=["run", "accuracy"])
    assert ADAMATCH_ABLATION_PAIRS == (("mnistm", "svhn"), ("usps", "mnistm"))
    assert p3_pairs.ablation(results) == [("nothing", 92, 94), (ADAMATCH_ABLATION["no_ramp"][0], None, 33)]
    assert p3_pairs.ablation(results[:0]) == []


def test_longer_trainings_stand_beside_those_of_the_same_seed_and_statistics():
    rows = [("mnistm_source_only_s0", "svhn", "source", 70.0), ("mnistm_source_only_s0", "usps", "source", 98.0),
            ("mnistm_source_only_s0", "svhn", "target", 74.0), ("mnistm_svhn_dann_s0", "svhn", "target", 81.0),
            ("mnistm_svhn_dann_s1", "svhn", "target", 80.0), ("long_mnistm_source_only_s0", "svhn", "target", 75.0),
            ("long_svhn_target_only_s0", "svhn", "target", 95.0), ("mnistm_svhn_adamatch_s0", "svhn", "target", 92.0)]
    results = pd.DataFrame(rows, columns=["run", "target", "statistics", "accuracy"])
    assert p3_pairs.longer(results) == dict(statistics=[74, 75], adamatch=[92, 92], target=[None, 95])
