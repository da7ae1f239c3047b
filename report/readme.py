"""Writes the measured numbers into README.md and assignments/*/README.md.

    python3 report/readme.py             # after a study, a training of problem 3's tables, or a benchmark
    python3 report/readme.py --check     # writes nothing; exit status 2 when a number is stale

A number stands between two comments, which Markdown does not show: <!-- p1.accuracy -->99.8<!-- -->. It comes from
the results.csv (of p5_gan: faces.csv) and the records *.jsonl in the chapters' checkpoints/, or from
report/benchmark.csv.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, run

import pandas as pd

from files import digest_of, markdown_table, read_jsonl, write_atomic
from p1_ddpm.inference import CHECKPOINT, SHIPPED, SHIPPED_2024
from p1_ddpm.studies import DDIM, FLAGS, as_text
from p3_dann.methods import ALL_PAIRS, PAIRS, run_name
from p3_dann.studies import shipped
from p7_clevr import studies as scenes
from report.benchmark import commands
from report.p7 import read_results

FIELD = re.compile(r"<!-- ([\w.]+) -->((?:(?!<!--).)*)<!-- -->", re.DOTALL)


def mean_and_std(values, decimals):
    return f"{values.mean():.{decimals}f}" + (f" ± {values.std():.{decimals}f}" if len(values) > 1 else "")


def as_name(text):
    """A row's text as a part of a field's name."""
    return re.sub(r"[^a-z0-9]+", "_", text).strip("_")


def p1_numbers():
    """Problem 1 with the shipped setting: seed 0 in float32 and in bfloat16 and, in the latter, the seeds 30 to 34; by
    2024's network the same of each domain, and the mean of both. p1.unguided: DDIM without guidance."""
    path = ROOT / "p1_ddpm/checkpoints/results.csv"
    rows = pd.read_csv(path, dtype=dict.fromkeys(["checkpoint", *FLAGS], str))

    def measured(checkpoint, table, sampling, precision, domain="mnistm", per_class="100"):
        wanted = pd.Series(dict(sampling, checkpoint=digest_of(checkpoint), table=table, domain=domain,
                                precision=precision, per_class=per_class))
        found = rows[(rows[wanted.index] == wanted).all(axis=1)]
        if found.empty:
            raise UserError(f"{path} lacks {table} of {checkpoint.name} and {domain} in {precision}; run "
                            f"p1_ddpm/studies.py --output {path}")
        return found

    shipped, shipped_2024 = (as_text(setting._asdict(), setting._fields) for setting in (SHIPPED, SHIPPED_2024))
    decimals = dict(accuracy=1, worst_digit=0, panel=2, panel_least=1, frechet_ratio=2, diversity=2)
    unguided = measured(CHECKPOINT, "guidance", as_text(dict(DDIM, guidance=0.0), SHIPPED._fields), "bfloat16")
    numbers = {"p1.unguided.accuracy": f"{unguided.accuracy.iloc[0]:.1f}"}
    for place, table, precision in (("", "shipped", "float32"), ("bfloat16.", "shipped", "bfloat16"),
                                    ("seeds.", "seeds", "bfloat16")):
        rows_of = dict(p1=measured(CHECKPOINT, table, shipped, precision))
        for domain in "mnistm", "svhn":
            rows_of[f"p1.both.{domain}"] = measured(CHECKPOINT.with_name("mnistm_svhn.pt"), table, shipped_2024,
                                                    precision, domain, "50")
        numbers |= {f"{name}.{place}{column}": mean_and_std(found[column], 2 if len(found) > 1 else digits)
                    for name, found in rows_of.items() for column, digits in decimals.items()}
        means = (rows_of["p1.both.mnistm"].panel.values + rows_of["p1.both.svhn"].panel.values) / 2
        numbers[f"p1.both.{place}mean"] = mean_and_std(pd.Series(means), 2 if len(means) > 1 else 1)
    return numbers


def p3_numbers():
    """Problem 3: accuracy on the target's validation digits, mean and standard deviation over the seeds.

    A field such as p3.mnistm_svhn.dann for each pair and method, of the setting that is shipped, `open` where nothing
    was trained; those of 2023's pairs are named by the target as well."""
    path = ROOT / "p3_dann/checkpoints/results.csv"
    rows = pd.read_csv(path)
    rows["name"] = rows.run.str.replace(r"_s\d+$", "", regex=True)
    numbers, picked = {}, shipped(rows)
    for source, target in ALL_PAIRS:
        for name, method, statistics in (("source_only", "source_only", "source"), ("dann", "dann", "target"),
                                         ("source_only_adapted", "source_only", "target"),
                                         ("adamatch", "adamatch", "target"), ("target_only", "target_only", "target")):
            run_of = picked[run_name(method, source, target)]
            chosen = (rows["name"] == run_of) & (rows.target == target) & (rows.statistics == statistics)
            if not chosen.any() and (source, target) in PAIRS and method != "adamatch":
                raise UserError(f"{path} lacks {run_of} on {target}; run p3_dann/studies.py --publish")
            value = mean_and_std(rows.accuracy[chosen], 2) if chosen.any() else "open"
            numbers[f"p3.{source}_{target}.{name}"] = value
            if (source, target) in PAIRS:
                numbers[f"p3.{target}.{name}"] = value
    return numbers


def p3_run_numbers():
    """Each training of problem 3 by itself, such as p3.run.mnistm_svhn_dann_s0.svhn.target, named by the domain and by
    whose statistics predict: its accuracy, and its InfoMax score."""
    rows = pd.read_csv(ROOT / "p3_dann/checkpoints/results.csv")
    names = "p3.run." + rows.run.str.replace(".", "_") + "." + rows.target + "." + rows.statistics
    return dict(zip(names, rows.accuracy.map("{:.1f}".format))) | dict(
        zip(names + ".infomax", rows.infomax.map("{:.3f}".format)))


def file_numbers():
    """What trainings took and how they ended, by the records in the chapters' checkpoints/, such as
    p1.mnistm_svhn.train.seconds and .val_loss_svhn, and how large the networks are, such as p1.ddpm.megabytes."""
    numbers = {}
    for path in sorted(ROOT.glob("p?_*/checkpoints/*.jsonl")):
        name, lines = f"{path.parts[-3][:2]}.{path.stem}.train", read_jsonl(path)
        taken = sum(line["seconds"] for line in lines)
        numbers |= {f"{name}.seconds": f"{taken:.0f}", f"{name}.minutes": f"{taken / 60:.0f}"}
        numbers |= {f"{name}.{key}": f"{value:.3f}" for key, value in lines[-1].items() if "loss" in key
                    and isinstance(value, float)}
    for row in pd.read_csv(ROOT / "checkpoints.csv").itertuples():
        numbers[f"{row.path[:2]}.{Path(row.path).stem}.megabytes"] = f"{row.bytes / 1e6:.1f}"
    return numbers


def p4_numbers():
    """2020's problem 1: of samples and reconstructions, by weight of the KL and prior, such as p4.auto.normal.mse."""
    rows = pd.read_csv(ROOT / "p4_vae/checkpoints/results.csv", dtype=dict(beta=str))
    decimals = dict(mse=4, kl=0, kid=1, frechet=3, diversity=2, face_rate=1)
    rows = rows.assign(face_rate=100 * rows.face_rate, kid=1000 * rows.kid)
    return {f"p4.{row.beta.replace('-', '_')}.{row.prior}.{name}": f"{row[name]:.{digits}f}"
            for _, row in rows.iterrows() for name, digits in decimals.items() if name in row}


def p5_numbers():
    """2020's problem 2: of the GAN's faces, of other models' and of real ones, such as p5.gan.face_rate, and of other
    recipes of the GAN, such as p5.recipe_public.kid."""
    checkpoints = ROOT / "p5_gan/checkpoints"
    recipes = pd.read_csv(checkpoints / "results.csv")
    recipes = recipes.assign(name="recipe_" + recipes.recipe, images=recipes.images / 1e6)
    rows = pd.concat([pd.read_csv(checkpoints / "faces.csv").drop_duplicates("name"), recipes])
    rows = rows.assign(face_rate=100 * rows.face_rate, kid=1000 * rows.kid)
    decimals = dict(count=0, kid=1, frechet=4, diversity=2, face_rate=1, nearest=1, seconds=0, images=1, steps=0)
    return {f"p5.{row['name']}.{name}": f"{row[name]:.{digits}f}"
            for _, row in rows.iterrows() for name, digits in decimals.items() if pd.notna(row.get(name))}


def p6_numbers():
    """2024's problem 3 in the tiny world: percentages by table and row, such as p6.concepts.new1.objects, and of how
    many images, such as p6.concepts.new1.images."""
    rows = pd.read_csv(ROOT / "p6_personalize/checkpoints/results.csv")
    decimals = dict(objects=1, all_objects=1, look=1, images=0)
    return {f"p6.{row.table}.{as_name(row.row)}.{column}": f"{row[column]:.{digits}f}"
            for _, row in rows.iterrows() for column, digits in decimals.items() if pd.notna(row[column])}


def p7_numbers():
    """NYCU's lab 6: per cents and Frechet ratios over the seeds by table and sets, such as p7.seeds.test.accuracy; of
    other networks, such as p7.ablation.48_96_192_multi_hot_cosine_shift_3_16; what the graders find in held-out
    pictures, such as p7.judge; and minutes of the trainings."""
    checkpoints = ROOT / "p7_clevr/checkpoints"
    rows = read_results(checkpoints / "results.csv", checkpoints / "scenes.pt")
    ablation = rows[(rows.table == "ablation") & (rows.guidance == str(scenes.DEFAULTS["guidance"]))]
    numbers = {f"p7.ablation.{as_name(f'{row.channels} {row.condition} {row.schedule} {row.epochs}')}":
               f"{100 * row.accuracy:.2f}" for _, row in ablation.iterrows()}
    for (table, sets), group in rows[rows.table.isin(["seeds", "judged", "fidelity"])].groupby(["table", "sets"]):
        for name, decimals in scenes.MEASURES.items():
            percent = name in ("accuracy", "judge", "too_many")
            values, decimals = (100 * group[name], 1) if percent else (group[name], decimals)
            numbers[f"p7.{table}.{sets}.{name}"] = mean_and_std(values, decimals)
    for name in "scenes", "evaluator", "judge", "noisy":
        lines = read_jsonl(checkpoints / f"{name}.jsonl")
        numbers[f"p7.{name}.minutes"] = f"{sum(line['seconds'] for line in lines) / 60:.1f}"
        numbers[f"p7.{name}"] = f"{100 * lines[-1]['accuracy']:.2f}" if name != "scenes" else f"{lines[-1]['loss']:.4f}"
    return numbers


def benchmark_numbers():
    """Seconds of each of the benchmark's commands on the CPU, and all of it as a table."""
    rows = pd.read_csv(ROOT / "report/benchmark.csv").query("device == 'cpu'").set_index("name")
    numbers = {f"{name}.seconds": "not measured" for name, *_ in commands(quick=False)}
    numbers |= {f"{name}.seconds": seconds(row.alone_s) for name, row in rows.iterrows()}
    table = markdown_table(["command", "images", "alone, s", "beside a busy process, s", "peak memory, GB"],
                           [[f"`{row.command}`", row.images, seconds(row.alone_s), seconds(row.beside_s),
                             f"{row.peak_mib / 1024:.1f}"] for _, row in rows.iterrows()])
    return numbers | {"benchmark": f"\n\n{table}\n\n"}


def seconds(value):
    return "-" if pd.isna(value) else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def fill(path, numbers):
    """The text of the file `path` with the `numbers`, {name: text}, in its fields."""
    text = path.read_text(encoding="utf-8")
    names = re.findall(r"<!-- ([\w.]+) -->", text)
    strange = [name for name in names if name not in numbers]
    if strange or len(FIELD.findall(text)) < len(names):
        raise UserError(f"{path} has {'an unknown field ' + strange[0] if strange else 'a field without its end'}; "
                        "a field is <!-- name --> text <!-- -->")
    return FIELD.sub(lambda field: f"<!-- {field[1]} -->{numbers[field[1]]}<!-- -->", text)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="only tell whether all numbers are those of the records")
    args = parser.parse_args()
    numbers = (p1_numbers() | p3_numbers() | p3_run_numbers() | p4_numbers() | p5_numbers() | p6_numbers()
               | p7_numbers() | file_numbers() | benchmark_numbers())
    for path in [ROOT / "README.md", *sorted(ROOT.glob("assignments/*/README.md"))]:
        text = fill(path, numbers)
        if text != path.read_text(encoding="utf-8"):
            if args.check:
                raise UserError(f"{path} has stale numbers; run 'python3 report/readme.py'")
            write_atomic(path, text.encode())
            print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
