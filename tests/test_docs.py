"""What the texts promise: every flag is explained and spelled in one way, every command that is shown can be run, every
number is that of the records."""

import argparse
import ast
import functools
import re
import runpy
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from conftest import ROOT, SCRIPTS, SHELL_SCRIPTS
from report import benchmark, readme
from utils import UserError

TEXTS = [ROOT / "README.md", *sorted(ROOT.glob("assignments/*/README.md"))]


class Caught(Exception):
    """Carries a script's parser out of it."""


@functools.lru_cache(maxsize=None)
def parser_of(script):
    """The ArgumentParser of a script, as it is when it reads the command line."""
    def catch(parser, *args):
        raise Caught(parser)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        patch.setattr(sys, "argv", [script])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return caught.value.args[0]


def flags_of(script):
    """{name: argparse's action} of a script's flags and positional arguments."""
    actions = list(parser_of(script)._actions)
    for part in [action for action in actions if isinstance(action, argparse._SubParsersAction)]:
        actions += [action for parser in part.choices.values() for action in parser._actions]
    return {action.option_strings[-1] if action.option_strings else action.dest: action
            for action in actions if action.dest != "help"}


def called_by(wrapper):
    """(script, words that come first) to which a wrapper hands all its arguments, or None."""
    found = re.search(r'^exec python3 ".*?/(\w+/\w+\.py)" (.*)"\$@"$', (ROOT / wrapper).read_text(), re.MULTILINE)
    return found and (found[1], found[2].split())


# --- Flags --------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script):
    assert flags_of(script)
    for name, action in flags_of(script).items():
        assert action.help and action.help[-1] != ".", f"{script} {name}: {action.help}"
    assert re.search("^    (python3|bash) ", parser_of(script).format_help(), re.MULTILINE), "no command is shown"


def takes_path(action):
    """Whether a flag's type is one of paths: it refuses an empty text, which would mean the current folder."""
    try:
        action.type("")
    except argparse.ArgumentTypeError:
        return True
    except (TypeError, ValueError):
        pass
    return False


def test_a_flag_means_the_same_in_every_script():
    kinds, choices, spellings = defaultdict(dict), defaultdict(dict), defaultdict(set)
    for script in SCRIPTS:
        for name, action in flags_of(script).items():
            assert re.fullmatch("(--)?[a-z][a-z0-9_]*", name), f"{script}: {name} is not in snake case"
            kind = "path" if takes_path(action) else getattr(action.type, "__qualname__", None)  # without its bounds
            kinds[name].setdefault((kind, type(action).__name__), []).append(script)
            if name in ("--device", "--amp", "--weights", "--optimizer"):
                choices[name].setdefault((*action.choices, action.nargs), []).append(script)
            spellings[name.replace("_", "")].add(name)
    assert not {name: found for name, found in kinds.items() if len(found) > 1}
    assert not {name: found for name, found in choices.items() if len(found) > 1}
    assert not {name: found for name, found in spellings.items() if len(found) > 1}


# What other repositories call the flags of this one.
OTHER_NAMES = {
    "--learning_rate": "--lr", "--num_epochs": "--epochs", "--num_steps": "--steps", "--n_steps": "--steps",
    "--noise_steps": "--timesteps", "--n_timestep": "--timesteps", "--cfg_scale": "--guidance", "--mode": "--method",
    "--out_dir": "--output_dir", "--out": "--output", "--results": "--output", "--data": "--data_dir",
    "--ckpt": "--checkpoint"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_have_the_names_of_the_house(script):
    for name, action in flags_of(script).items():
        assert name not in OTHER_NAMES, f"{script}: {name} is called {OTHER_NAMES[name]} here"
        path_like = isinstance(action.default, Path) or action.type in (Path, argparse.FileType) or re.search(
            "(^|_)(dir|csv|folder|figure|checkpoints?|output|file|path|unet|noise|gt)$", action.dest)
        if path_like and action.nargs != 0:
            assert takes_path(action), f"{script}: {name} takes an empty path"


# --- Commands -----------------------------------------------------------------------------------

def commands():
    """(where, command line) of all commands in the READMEs and reports, in the docstrings of scripts and the heads of
    wrappers, and those that the benchmark runs."""
    for path in TEXTS:
        text = re.sub("(?<=`)([^`\n]*)\n([^`\n]*)(?=`)", r"\1 \2", path.read_text())  # code may break at a line's end
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            yield from ((path, line) for line in block.splitlines())
        yield from ((path, line) for line in re.findall(r"`((?:python3|bash|torchrun) [^`]*)`", text))
    for path in sorted(ROOT.glob("report/*.typ")):
        for lines in re.findall(r"#command\((.*?)\)\n", path.read_text(), re.DOTALL):
            yield from ((path, line) for line in re.findall('"([^"]*)"', lines))
    for script in SCRIPTS:
        for line in ast.get_docstring(ast.parse((ROOT / script).read_text())).splitlines():
            if re.match(r"    ([A-Z_]+=\S+ )*(python3|bash|torchrun) ", line):
                yield script, line
    for wrapper in SHELL_SCRIPTS:
        head = re.findall(r"^#\s.*?(bash \S+\.sh.*?)(?:  |$)", (ROOT / wrapper).read_text(), re.MULTILINE)
        yield from ((wrapper, line) for line in head)
    for quick in (True, False):
        yield from (("report/benchmark.py", line) for *_, line in benchmark.commands(quick))


def check(words, where):
    """The script or wrapper that the command `words` calls, or None; it and its flags must be there."""
    names = [word for word in words if re.fullmatch(r"[\w./]+\.(py|sh)", word)]
    if not names or names[0].startswith("tests/"):
        return None
    name, given = names[0], words[words.index(names[0]) + 1:]
    if where in SHELL_SCRIPTS and name == Path(where).name:
        name = where
    assert (ROOT / name).is_file(), f"{where}: there is no {name}"
    if name.endswith(".sh"):
        called = called_by(name)
        if not called:  # a wrapper that reads its own arguments explains them in its head
            head = "".join(line for line in (ROOT / name).read_text().splitlines(True) if line.startswith("#"))
            assert all(word in head for word in given if word.startswith("--")), f"{where}: {shlex.join(words)}"
            return name
        name, given = called[0], called[1] + given
        assert (ROOT / name).is_file(), f"{where} calls {name}, which is not there"
    if given == ["--help"]:
        return name
    assert {word.split("=")[0] for word in given if word.startswith("--")} <= flags_of(name).keys(), where
    try:
        parser_of(name).parse_args(given)
    except (SystemExit, UserError):
        pytest.fail(f"{where}: {shlex.join(words)}")
    return name


def test_every_command_in_the_texts_can_be_run():
    seen = set()
    for where, line in commands():
        for command in re.split(r"&&|\|\||;|\|", re.split("#|   ", line.strip())[0]):  # what follows explains it
            words = shlex.split(re.sub(r"[][]", " ", command))  # brackets say that something may be left out
            for word in words:  # what comes with the repository
                if re.match(r"requirements[\w-]*\.txt$|p\d_\w+/(checkpoints|noise)", word):
                    assert (ROOT / word).exists(), f"{where}: {line}"
            seen.add(check(words, where))
    assert set(SCRIPTS) <= seen, "a script that no text shows"
    assert {wrapper for wrapper in SHELL_SCRIPTS if not called_by(wrapper)} <= seen


def test_the_readme_shows_the_house_as_it_is():
    text = TEXTS[0].read_text()
    layout = text.split("## Layout")[1].split("```")[1]
    for word in re.findall(r"^\S+(?: \S+)*", layout, re.MULTILINE):
        for name in word.split():
            assert list(ROOT.glob(name)), f"the layout names {name}"
    built = {path.parts[-3] for path in ROOT.glob("p?_*/checkpoints/*.pt")}
    assert [chapter for chapter in built if f"{chapter}/" not in layout] == []
    for path in TEXTS:
        for link in re.findall(r"\]\(([^):#]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path}: {link}"


# --- Numbers ------------------------------------------------------------------------------------

def test_the_numbers_in_the_texts_are_those_of_the_records(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    readme.main()
    fields = [name for path in TEXTS for name in re.findall(r"<!-- ([\w.]+) -->", path.read_text())]
    assert {"p1.accuracy", "p3.svhn.dann", "benchmark"} <= set(fields)


def test_a_stale_number_is_told_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for name in ("p1", "p3", "p3_run", "p4", "p5", "p6", "p7", "file", "benchmark"):
        monkeypatch.setattr(readme, f"{name}_numbers", lambda: {"p1.accuracy": "99.8", "table": "\n| a |\n"})
    page = tmp_path / "README.md"
    page.write_text("It is <!-- p1.accuracy -->97<!-- --> %.\n<!-- table --><!-- -->\n")
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    with pytest.raises(UserError, match="README.md has stale numbers"):
        readme.main()
    assert "97" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["readme.py"])
    readme.main()
    assert page.read_text() == "It is <!-- p1.accuracy -->99.8<!-- --> %.\n<!-- table -->\n| a |\n<!-- -->\n"
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    readme.main()
    for text, message in (("<!-- p1.acuracy -->1<!-- -->", "unknown field p1.acuracy"),
                          ("<!-- p1.accuracy -->1 <!-- p1.accuracy -->2<!-- -->", "a field without its end")):
        page.write_text(text)
        with pytest.raises(UserError, match=message):
            readme.main()
