"""What the texts promise: every script explains every flag, and every command in README and docstrings exists."""

import ast
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for folder in (".", "p1_ddpm", "p2_ddim", "p3_dann", "report")
                 for path in (ROOT / folder).glob("*.py") if '__name__ == "__main__"' in path.read_text())
CALLED_BY = {"hw2_1.sh": "p1_ddpm/inference.py", "hw2_2.sh": "p2_ddim/inference.py", "hw2_3.sh": "p3_dann/inference.py"}
OWN_FLAGS = {"hw2_download.sh": {"--update"}, "get_dataset.sh": set()}


def help_of(script):
    """What `python3 script --help` prints."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", [script, "--help"])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not exit.value.code


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script, capsys):
    help_of(script)
    text = capsys.readouterr().out
    arguments = [call for call in ast.walk(ast.parse((ROOT / script).read_text()))
                 if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"]
    assert arguments
    for call in arguments:
        explained = {keyword.arg: keyword.value for keyword in call.keywords}
        assert "help" in explained, f"{script}: {call.args[0].value} has no help"
        assert call.args[0].value in text
    assert "python3" in text or "bash" in text, "the docstring shows no command"


def commands():
    """(where, command line) of all commands in the README's code blocks and in the scripts' docstrings."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    blocks += re.findall(r"`((?:python3|bash|time|torchrun) [^`]*)`", (ROOT / "README.md").read_text())
    yield from (("README.md", line) for block in blocks for line in block.splitlines())
    for script in SCRIPTS:
        for line in ast.get_docstring(ast.parse((ROOT / script).read_text())).splitlines():
            if line.startswith(("    python3", "    bash", "    torchrun")):
                yield script, line


def test_every_command_in_the_texts_exists(capsys):
    seen = set()
    for where, line in commands():
        for command in re.split(r"&&|\|\||;|\|", line.split("#")[0]):
            words = shlex.split(command)
            for word in words:  # what comes with the repository
                if re.match(r"requirements[\w-]*\.txt$|p\d_\w+/(checkpoints|noise)", word):
                    assert (ROOT / word).exists(), f"{where}: {line}"
            scripts = [word for word in words if re.fullmatch(r"[\w/]+\.(py|sh)", word)]
            for script in scripts:
                assert (ROOT / script).is_file(), f"{where}: {line}"
                flags = {word.split("=")[0] for word in words[words.index(script):] if word.startswith("--")}
                if script.startswith("tests/"):
                    continue
                if script in OWN_FLAGS:
                    assert flags <= OWN_FLAGS[script], f"{where}: {line}"
                    continue
                script = CALLED_BY.get(script, script)
                help_of(script)
                usage = capsys.readouterr().out.split("\n\n")[0]  # lists every flag, and comes before the docstring
                known = set(re.findall(r"--\w+", usage)) | {"--help"}
                assert flags <= known, f"{where}: {line}: {flags - known}"
                for flag, choices in re.findall(r"(--\w+) \{([^}]+)\}", " ".join(usage.split())):
                    values = words[words.index(flag) + 1:] if flag in words else []
                    for value in itertools.takewhile(lambda word: not word.startswith("--"), values):
                        assert value in choices.split(","), f"{where}: {line}: {flag} {value}"
                seen.add(script)
    assert seen == set(SCRIPTS)  # and every script is shown somewhere
