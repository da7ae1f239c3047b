"""The benchmark measures one command at a time, alone and beside a busy process that ends with it."""

import os
import re
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from report import benchmark
from utils import UserError


def test_time_and_memory_are_those_of_the_command(tmp_path):
    (tmp_path / "big.py").write_text("x = bytearray(300 << 20)")
    (tmp_path / "small.py").write_text("import time; time.sleep(1)")
    (tmp_path / "broken.py").write_text("import sys; sys.exit('no device')")
    (tmp_path / "out").mkdir()
    big, small = (benchmark.measure(f"python3 {name}.py", tmp_path) for name in ("big", "small"))
    assert big[1] > 300 > small[1] > 1
    assert small[0] >= 1 and big[0] not in (0, small[0])
    assert not (tmp_path / "out").exists()  # what the command before has left
    with pytest.raises(UserError, match="broken.py failed: no device"):
        benchmark.measure("python3 broken.py", tmp_path)


def test_a_training_is_timed_by_its_record(tmp_path):
    (tmp_path / "train.py").write_text("import os; os.mkdir('out'); open('out/metrics.jsonl', 'w').write("
                                       "'{\"seconds\": 600}\\n{\"seconds\": 30, \"loss\": 1}\\n{\"recipe\": 1}\\n')")
    assert benchmark.measure("python3 train.py", tmp_path)[0] == 630


def test_the_busy_process_computes_and_ends():
    with benchmark.busy_process() as process:
        time.sleep(1)
        assert process.poll() is None
        stat = Path(f"/proc/{process.pid}/stat")
        if stat.exists():
            user = int(stat.read_text().rsplit(")", 1)[1].split()[11]) / os.sysconf("SC_CLK_TCK")
            assert user > 0.1  # seconds of computing, on whatever share of a core it got
    assert process.poll() is not None


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The benchmark with two commands that do nothing, and the path of its results."""
    (tmp_path / "nothing.py").write_text("")
    monkeypatch.setattr(benchmark, "commands", lambda quick: [("p1", 5, f"python3 {tmp_path}/nothing.py"),
                                                              ("p3", 7, f"python3 {tmp_path}/nothing.py")])
    monkeypatch.setattr(benchmark, "make_inputs", lambda folder, quick: None)
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    return tmp_path / "results.csv"


def test_rows_of_the_same_commands_are_replaced(tiny, monkeypatch):
    old = [("p1", "cpu"), ("p2_64", "cpu"), ("p1", "cuda")]
    pd.DataFrame(old, columns=["name", "device"]).assign(images=-1).to_csv(tiny, index=False)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only", "p1", "--output", str(tiny)])
    benchmark.main()
    rows = pd.read_csv(tiny).set_index(["name", "device"])
    assert rows.images.to_dict() == {("p2_64", "cpu"): -1, ("p1", "cuda"): -1, ("p1", "cpu"): 5}
    row = rows.loc[("p1", "cpu")]
    assert row.alone_s >= 0 and row.peak_mib > 1 and row.threads >= 1 and row.torch == benchmark.torch.__version__


@pytest.mark.parametrize("content", ["", "name,count\n1,2\n"])
def test_a_foreign_file_of_results_is_told_before_anything_runs(tiny, monkeypatch, content):
    tiny.write_text(content)
    monkeypatch.setattr(benchmark, "make_inputs", None)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--output", str(tiny)])
    with pytest.raises(UserError, match="results.csv is no table with a column device"):
        benchmark.main()
    assert tiny.read_text() == content


def test_a_quick_run_prints_and_writes_nothing(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--quick", "--output", str(tiny)])
    benchmark.main()
    assert not tiny.exists()
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["name p1", "name p3"]


def test_inputs_are_what_the_commands_name(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "UNet", lambda: benchmark.torch.nn.Linear(1, 1))
    benchmark.make_inputs(tmp_path, quick=True)
    for _, _, command in benchmark.commands(quick=True):
        words = [word for word in command.split()[1:] if re.match("[a-zA-Z]", word)
                 and not word.startswith(("out", "off"))]
        assert [word for word in words if not (tmp_path / word).exists()] == [], command
    assert len(list((tmp_path / "svhn").iterdir())) == 500
