"""The shell wrappers, and how scripts start: from anywhere, through links, with another Python, beside other packages.

What a wrapper passes on is seen by a python3 that prints its arguments; what needs the scripts themselves runs them.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, SCRIPTS, SHELL_SCRIPTS

WRAPPERS = [script for script in SHELL_SCRIPTS if "/inference.py" in (ROOT / script).read_text()]
CALLS = {  # what stands before the user's own words
    "hw2_1.sh": "p1_ddpm/inference.py", "hw2_2.sh": "p2_ddim/inference.py", "hw2_3.sh": "p3_dann/inference.py",
    "assignments/dlcv2020_hw3/hw3_p1.sh": "p4_vae/inference.py --grid",
    "assignments/dlcv2020_hw3/hw3_p2.sh": "p5_gan/inference.py --grid",
    "assignments/dlcv2020_hw3/hw3_p3.sh": "p3_dann/inference.py --assignment 2020 --method dann",
    "assignments/dlcv2020_hw3/hw3_p4.sh": "p3_dann/inference.py --assignment 2020 --method adamatch",
    "assignments/dlcv2024_hw2/hw2_1.sh": "p1_ddpm/inference.py --checkpoint p1_ddpm/checkpoints/mnistm_svhn.pt "
                                         "--steps 7 --guidance 3 --interval 300 950",
    "assignments/dlcv2024_hw2/hw2_2.sh": "p2_ddim/inference.py",
    "assignments/dlcv2024_hw2/hw2_3.sh": "p6_personalize/inference.py",
    "assignments/nycu2024_lab6/lab6.sh": "p7_clevr/inference.py"}


def run(*command, cwd, **environment):
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which may hold packages
    return subprocess.run(list(map(str, command)), cwd=cwd, env={**own, **environment}, capture_output=True, text=True,
                          timeout=300)


# --- What a wrapper passes on -------------------------------------------------------------------

@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """(a folder with copies of the wrappers alone, the PATH to a python3 that prints its arguments)"""
    folder = tmp_path_factory.mktemp("wrappers")
    for script in WRAPPERS:
        (folder / "my clone" / script).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / script, folder / "my clone" / script)
    (folder / "bin").mkdir()
    (folder / "bin/python3").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (folder / "bin/python3").chmod(0o755)
    return folder / "my clone", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("script", WRAPPERS)
def test_wrappers_find_their_folder_from_anywhere(clone, tmp_path, script):
    folder, path = clone
    file = folder / script
    links = tmp_path / "some links"
    (links / "deeper").mkdir(parents=True)
    (links / "absolute.sh").symlink_to(file)
    (links / "relative.sh").symlink_to(os.path.relpath(file, links))
    (links / "deeper/chain.sh").symlink_to("../relative.sh")
    (links / "folder").symlink_to(file.parent)
    found = f"{file.parent}{os.pathsep}{path}"
    for cwd, path, command in ((tmp_path, path, ["bash", file]), (file.parent, path, ["bash", file.name]),
                               (file.parent, path, [f"./{file.name}"]), (tmp_path, path, ["sh", file]),
                               (tmp_path, path, ["bash", os.path.relpath(file, tmp_path)]),
                               (tmp_path, path, ["bash", links / "absolute.sh"]),
                               (links, path, ["bash", "relative.sh"]), (tmp_path, path, [links / "deeper/chain.sh"]),
                               (links, path, ["bash", f"folder/{file.name}"]),
                               (tmp_path, found, [file.name]), (tmp_path, found, ["bash", file.name])):
        done = run(*command, "my digits", "", "*", cwd=cwd, PATH=path, CDPATH=str(tmp_path))
        *words, first, second, third = done.stdout.split("\n")[:-1]
        assert done.returncode == 0 and not done.stderr, (command, done.stderr)
        assert [first, second, third] == ["my digits", "", "*"], command
        words = [(cwd / word).resolve().relative_to(folder).as_posix() if "/" in word else word for word in words]
        assert " ".join(words) == CALLS[script], command


def test_windows_line_ends_do_not_reach_the_shell(tmp_path):
    """Git for Windows turns every \\n into \\r\\n by default, at which bash stops."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    names = [".gitattributes", ".ci/run", "checkpoints.csv", *SHELL_SCRIPTS]
    for name in names:
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "there" / name)
    (tmp_path / "there/notes.txt").write_bytes(b"one\ntwo\n")
    plain = dict(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1")  # the user may sign every commit
    for command in (["init", "-q"], ["add", "-A"],
                    ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"]):
        assert run("git", *command, cwd=tmp_path / "there", **plain).returncode == 0
    run("git", "clone", "-q", "-c", "core.autocrlf=true", "there", "here", cwd=tmp_path, **plain)
    assert (tmp_path / "here/notes.txt").read_bytes() == b"one\r\ntwo\r\n"  # so this git does convert
    for name in names[1:]:
        assert b"\r" not in (tmp_path / "here" / name).read_bytes(), name


# --- How scripts start --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The bin folder of a Python without packages."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin"


def says_what_is_missing(done, python):
    return (done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
            and done.stderr.startswith(f"error: python3 is {python}, which lacks torch, ")
            and f"python3 -m pip install -r '{ROOT / 'requirements.txt'}'" in done.stderr)


@pytest.mark.parametrize("script", WRAPPERS)
def test_a_python_without_torch_is_named(bare_python, tmp_path, script):
    path = f"{bare_python}{os.pathsep}{os.environ['PATH']}"
    done = run("bash", ROOT / script, "a", "b", "c", cwd=tmp_path, PATH=path)
    assert says_what_is_missing(done, bare_python / "python3"), done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_find_their_modules_and_ask_for_packages_first(bare_python, tmp_path, script):
    """With a hardened Python (its -P leaves out the script's folder) and foreign modules of the same names."""
    for name in ("startup.py", "utils.py", "files.py", "dataset.py", f"{Path(script).parts[0]}/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise ImportError('the foreign module')")
    done = run(bare_python / "python3", ROOT / script, cwd=tmp_path, PYTHONSAFEPATH="1", PYTHONPATH=str(tmp_path))
    assert says_what_is_missing(done, bare_python / "python3"), done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_old_python_can_read_scripts_up_to_the_sentence_about_it(script):
    """A whole file is parsed before its first line runs."""
    for path in (ROOT / script, ROOT / "utils.py", ROOT / "startup.py"):
        ast.parse(path.read_text(), feature_version=(3, 8))
    assert "__init__.py" in os.listdir((ROOT / script).parent) or "/" not in script  # else a foreign package could win


def test_an_empty_variable_is_refused_beside_a_foreign_package(tmp_path):
    """bash hw2_1.sh "$UNSET" would otherwise write 1,000 images into the current folder."""
    (tmp_path / "foreign/p1_ddpm").mkdir(parents=True)
    (tmp_path / "foreign/p1_ddpm/__init__.py").touch()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = run("bash", ROOT / "hw2_1.sh", "", cwd=tmp_path, PYTHONPATH=str(tmp_path / "foreign"), PATH=path)
    assert done.returncode == 2 and "the path is empty; is a variable not set?" in done.stderr, done.stderr
    assert os.listdir(tmp_path) == ["foreign"]
