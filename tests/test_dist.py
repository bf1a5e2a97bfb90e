"""The source distribution is complete, and a wheel of it works in an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHEEL = "from setuptools import build_meta; build_meta.build_wheel({!r})"

# What somebody does first, from another folder. `exact`: the C kernels are at work.
USE = """
from contextlib import redirect_stdout

import gptsmith
from gptsmith import cli

assert cli.main("prepare text.txt --tokenizer byte --out data".split()) == 0
with open("mine.yaml", "w") as file, redirect_stdout(file):
    assert cli.main(["recipes", "course-tiny"]) == 0
words = "pretrain mine.yaml --data data --out run --train.steps 1 --train.batch-size 2"
assert cli.main([*words.split(), "--monitor.trackers", "none"]) == 0
print(gptsmith.__file__, gptsmith.load("run").engine.exact)
"""


def copy_of_the_source(tree: Path) -> None:
    """What git tracks: the rest is what tools and people leave in the folder."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: git knows what is source")
    for name in run(["git", "ls-files", "-z"], ROOT).split("\0"):
        file = ROOT / name
        if file.is_file() or file.is_symlink():  # not one that was removed and not yet committed
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, tree / name, follow_symlinks=False)


def files_under(folder: Path) -> set[str]:
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(folder).as_posix() for p in found}


def modules_of(wheel: Path) -> set[str]:
    """What a wheel installs, by the names in the source."""
    with zipfile.ZipFile(wheel) as packed:
        return {f"src/{name}" for name in packed.namelist() if ".dist-info/" not in name}


def run(command: list[str], folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_of_the_source_distribution_works_elsewhere(tmp_path: Path) -> None:
    tree, dist, elsewhere = tmp_path / "tree", tmp_path / "dist", tmp_path / "elsewhere"
    copy_of_the_source(tree)
    source = files_under(tree)
    elsewhere.mkdir()
    for earlier in ("build/lib", "src/gptsmith.egg-info", "dist"):  # of a version with this module
        (tree / earlier / "gptsmith").mkdir(parents=True)
        (tree / earlier / "gptsmith/removed.py").write_text("")
    bin = Path(sys.executable).parent
    run(["make", "dist", f"BIN={bin}", "PIP=:", "VENV=none", "-o", "none/.dev"], tree)
    [archive], [wheel] = (tree / "dist").glob("*.tar.gz"), (tree / "dist").glob("*.whl")
    assert modules_of(wheel) == {x for x in source if x.startswith("src/gptsmith/")}
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    assert source - files_under(unpacked) == {".gitignore"}
    extra = {name for name in files_under(unpacked) - source if ".egg-info/" not in name}
    recipes = {x.removeprefix("src/gptsmith/") for x in source if "gptsmith/configs/" in x}
    assert extra == {"PKG-INFO", "setup.cfg"} | recipes  # configs, which git has as a link

    dist.mkdir()
    run([sys.executable, "-c", WHEEL.format(str(dist))], unpacked)
    [wheel] = dist.glob("*.whl")
    assert modules_of(wheel) == {x for x in source if x.startswith("src/gptsmith/")}

    # The dependencies are those of this environment, without its own gptsmith: a folder that a .pth
    # file names is searched, but the .pth files in it (an editable installation) are not read.
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    where = run([str(python), "-c", "import site; print(*site.getsitepackages())"], tmp_path)
    site = Path(where.split()[0])
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    (elsewhere / "text.txt").write_text("one and one is two. " * 200)
    where, exact = run([str(python), "-c", USE], elsewhere).split()[-2:]
    assert Path(where).is_relative_to(site)
    assert exact == str(shutil.which(os.environ.get("CC", "cc")) is not None)
