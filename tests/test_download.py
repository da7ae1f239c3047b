"""hw2_download.sh and get_dataset.sh as a user runs them: in a folder with a space, from another current directory."""

import csv
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_dataset import make_sources, tree

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = [path.relative_to(ROOT).as_posix()
               for pattern in ("*.pth", "*/checkpoints/*.pt") for path in ROOT.glob(pattern)]


def bash(folder, script, *args, **environment):
    """Runs a script of `folder` from another current directory; python3 is this interpreter."""
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", folder / script, *args], cwd=folder.parent, env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=300)


@pytest.fixture
def stubs(tmp_path):
    """A folder for PYTHONPATH whose gdown needs no network: from any address but dead ones it brings DRIVE_FILE."""
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs/gdown.py").write_text(
        "import os, shutil, sys\n"
        "os.system(os.environ.pop('SECOND_RUN', ''))\n"
        "_, address, flag, path = sys.argv\n"
        "assert address.startswith('https://') and flag == '-O'\n"
        "if address.endswith('dead') or not os.environ.get('DRIVE_FILE'):\n"
        "    sys.exit('the link is dead')\n"
        "shutil.copy(os.environ['DRIVE_FILE'], path)\n")
    return str(tmp_path / "stubs")


# --- hw2_download.sh ----------------------------------------------------------------------------

def line(path, content, address="in the repository"):
    return f"{path},{len(content)},{hashlib.sha256(content).hexdigest()},{address}\n"


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "my clone"
    (folder / "p1_ddpm" / "checkpoints").mkdir(parents=True)
    shutil.copy(ROOT / "hw2_download.sh", folder)
    (folder / "Classifier.pth").write_bytes(b"weights")
    (folder / "p1_ddpm/checkpoints/a.pt").write_bytes(b"a" * 3000)
    return folder


def manifest(folder, *lines):
    (folder / "checkpoints.csv").write_text("path,bytes,sha256,address\n" + "".join(lines))


def test_intact_checkpoints(clone, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links/check.sh").symlink_to("../my clone/hw2_download.sh")
    for end in ("\n", "\r\n"):  # as Git for Windows may have written it
        manifest(clone, *(text.replace("\n", end) for text in
                          (line("Classifier.pth", b"weights"), line("p1_ddpm/checkpoints/a.pt", b"a" * 3000))))
        for folder, script in ((clone, "hw2_download.sh"), (tmp_path / "links", "check.sh")):
            done = bash(folder, script)
            assert done.returncode == 0 and done.stdout == "all 2 checkpoints are there and intact\n", done.stderr


def test_missing_and_damaged_checkpoints_are_listed(clone):
    (clone / "p1_ddpm/checkpoints/a.pt").write_bytes(b"a" * 2999 + b"b")
    manifest(clone, line("Classifier.pth", b"weights"), line("p1_ddpm/checkpoints/a.pt", b"a" * 3000),
             line("p3_dann/checkpoints/b.pt", b"b").replace("\n", "\r"))  # nor does the last line need an end
    failed = bash(clone, "hw2_download.sh")
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.splitlines() == [
        "2 of 3 checkpoints are missing or damaged:",
        "  p1_ddpm/checkpoints/a.pt: damaged; 'git checkout -- p1_ddpm/checkpoints/a.pt' brings it back",
        "  p3_dann/checkpoints/b.pt: missing; 'git checkout -- p3_dann/checkpoints/b.pt' brings it back"]


def test_downloads_what_has_an_address(clone, stubs, tmp_path):
    (tmp_path / "file").write_bytes(b"good")
    server, address = dict(PYTHONPATH=stubs, DRIVE_FILE=str(tmp_path / "file")), "https://drive.google.com/uc?id=1"
    manifest(clone, line("p3_dann/checkpoints/b.pt", b"good", address), line("Classifier.pth", b"good", address))
    done = bash(clone, "hw2_download.sh", **server)
    assert done.returncode == 0, done.stderr
    assert (clone / "p3_dann/checkpoints/b.pt").read_bytes() == (clone / "Classifier.pth").read_bytes() == b"good"

    manifest(clone, line("Classifier.pth", b"evil", address), line("p3_dann/checkpoints/c.pt", b"c", f"{address}-dead"))
    failed = bash(clone, "hw2_download.sh", **server)
    assert failed.returncode == 1 and "2 of 2 checkpoints are missing or damaged" in failed.stderr
    assert (clone / "Classifier.pth").read_bytes() == b"good"  # never overwritten by something unverified
    assert not list(clone.rglob("*.partial")) and not (clone / "p3_dann/checkpoints/c.pt").exists()


def test_update_writes_the_manifest(clone):
    elsewhere = line("p3_dann/checkpoints/big.pt", b"big", "https://example.org/big.pt")
    manifest(clone, line("Classifier.pth", b"old weights"), line("p1_ddpm/checkpoints/gone.pt", b"x"), elsewhere)
    (clone / "Another.pth").write_bytes(b"more")
    for name in "b.pt", "clip/model.safetensors", "pipeline/unet/model.safetensors":
        (clone / "p9_new/checkpoints" / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / "p9_new/checkpoints" / name).write_bytes(b"b")
    assert bash(clone, "hw2_download.sh", "--update").returncode == 0
    assert (clone / "checkpoints.csv").read_text() == (
        "path,bytes,sha256,address\n" + elsewhere + line("Another.pth", b"more") + line("Classifier.pth", b"weights")
        + line("p1_ddpm/checkpoints/a.pt", b"a" * 3000) + line("p9_new/checkpoints/b.pt", b"b")
        + line("p9_new/checkpoints/clip/model.safetensors", b"b")
        + line("p9_new/checkpoints/pipeline/unet/model.safetensors", b"b"))
    assert bash(clone, "hw2_download.sh", "--upgrade").returncode == 2


def test_the_repository_s_own_checkpoints():
    done = bash(ROOT, "hw2_download.sh")
    assert done.returncode == 0, done.stderr
    with open(ROOT / "checkpoints.csv", newline="") as file:
        listed = [row["path"] for row in csv.DictReader(file)]
    assert set(CHECKPOINTS) <= set(listed), "run 'bash hw2_download.sh --update'"


# --- get_dataset.sh -----------------------------------------------------------------------------

STUB = '''
import pathlib, sys
source, data = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--source_dir", "--data_dir"))
if "--download" in sys.argv and not pathlib.Path(source, "MNIST").exists():
    sys.exit(2)
for domain in ("mnistm", "svhn", "usps"):
    for name in ("data/0.png", "train.csv", "val.csv"):
        path = pathlib.Path(data, "digits", domain, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("built from " + source)
'''


@pytest.fixture
def repository(tmp_path, stubs):
    """A folder with get_dataset.sh and a build_dataset.py that only writes from where it builds, and `stubs`."""
    folder = tmp_path / "my clone"
    folder.mkdir()
    shutil.copy(ROOT / "get_dataset.sh", folder)
    (folder / "build_dataset.py").write_text(STUB)
    return folder, stubs


def test_a_source_folder_needs_no_network(repository, tmp_path):
    """With the real build_dataset.py."""
    folder, stubs = repository
    for name in ("build_dataset.py", "startup.py", "utils.py", "files.py", "dataset.py"):
        shutil.copy(ROOT / name, folder)
    source = tmp_path / "public files"
    shutil.rmtree(make_sources(source))
    # A relative path counts from the caller's current directory, not from the script's folder.
    relative = os.path.relpath(source, folder.parent)
    done = bash(folder, "get_dataset.sh", relative)
    assert done.returncode == 0, done.stderr
    assert f"was built from the public files in {source}" in done.stdout
    built = tree(folder / "hw2_data")
    assert all(f"digits/{domain}/train.csv" in built for domain in ("mnistm", "svhn", "usps"))

    (tmp_path / "links").mkdir()
    (tmp_path / "links/get.sh").symlink_to(folder / "get_dataset.sh")
    for arguments, message in (([relative], "complete already; nothing"), ([], "face/ is only in the course's zip")):
        again = bash(tmp_path / "links", "get.sh", *arguments, PYTHONPATH=stubs)
        assert again.returncode == 0 and message in again.stdout and tree(folder / "hw2_data") == built


@pytest.mark.parametrize("script", ["get_dataset.sh", "hw2_download.sh"])
def test_help(script):
    done = bash(ROOT, script, "--help")
    assert done.returncode == 0 and not done.stderr and script in done.stdout


@pytest.mark.parametrize("name", ["no where", ""])
def test_a_source_folder_that_is_not_there(repository, name):
    failed = bash(repository[0], "get_dataset.sh", name)
    assert failed.returncode == 2 and f"there is no folder '{name}'" in failed.stderr


def test_the_course_s_zip(repository, tmp_path):
    folder, stubs = repository
    with zipfile.ZipFile(tmp_path / "hw2_data.zip", "w") as archive:
        for name in ("digits/mnistm", "digits/svhn", "digits/usps"):
            for file in ("data/1.png", "train.csv", "val.csv"):
                archive.writestr(f"hw2_data/{name}/{file}", "from the zip")
            archive.writestr(f"__MACOSX/hw2_data/{name}/._train.csv", "junk")
        for file in ("UNet.pt", "noise/00.pt", "GT/00.png"):
            archive.writestr(f"hw2_data/face/{file}", "from the zip")

    def get(**environment):
        return bash(folder, "get_dataset.sh", PYTHONPATH=stubs, DRIVE_FILE=str(tmp_path / "hw2_data.zip"),
                    **environment)

    own = folder / "hw2_data/digits/usps/own.txt"
    own.parent.mkdir(parents=True)
    own.write_text("the user's own")
    failed = get()
    assert failed.returncode == 2 and "hw2_data/digits/usps was there already but is not whole" in failed.stderr
    assert own.exists()
    own.parent.rename(tmp_path / "away")
    weights = folder / "hw2_data/face/UNet.pt"
    weights.write_text("the user's own")
    (weights.parent / "GT").rename(tmp_path / "GT")
    done = get(SECOND_RUN="bash get_dataset.sh")  # which ends while this one downloads
    assert done.returncode == 0 and done.stdout.count("comes from the course's zip") == 2, done.stderr
    assert sorted(tree(folder / "hw2_data")) == [
        *(f"digits/{domain}/{file}" for domain in ("mnistm", "svhn", "usps")
          for file in ("data/1.png", "train.csv", "val.csv")), "face/GT/00.png", "face/UNet.pt", "face/noise/00.pt"]
    assert weights.read_text() == "the user's own"
    assert not list((folder / "hw2_data").glob(".*"))
    assert "complete already" in get().stdout


def test_a_zip_without_all_parts_is_not_mixed_with_other_data(repository, tmp_path):
    folder, stubs = repository
    (folder / "public_data/MNIST").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "hw2_data.zip", "w") as archive:
        archive.writestr("hw2_data/digits/mnistm/train.csv", "from the zip")
    done = bash(folder, "get_dataset.sh", PYTHONPATH=stubs, DRIVE_FILE=str(tmp_path / "hw2_data.zip"))
    assert done.returncode == 0 and "was built from the public data sets" in done.stdout, done.stderr
    assert set(tree(folder / "hw2_data").values()) == {b"built from public_data"}


def test_a_dead_link_leads_to_the_public_data_sets(repository):
    folder, stubs = repository
    failed = bash(folder, "get_dataset.sh", PYTHONPATH=stubs)
    assert failed.returncode == 2 and not (folder / "hw2_data").exists()  # nor can the public data sets be had
    (folder / "public_data/MNIST").mkdir(parents=True)
    done = bash(folder, "get_dataset.sh", PYTHONPATH=stubs)
    assert done.returncode == 0 and "was built from the public data sets" in done.stdout, done.stderr
    assert (folder / "hw2_data/digits/mnistm/train.csv").read_text() == "built from public_data"
