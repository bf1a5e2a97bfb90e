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

ROOT = Path(__file__).resolve().parents[1]
# At the top of the tree: what .gitignore names.
NOT_SOURCE = {".git", ".venv", ".venv-vllm", "build", "dist", "runs", "data"}
BUILD = "from setuptools import build_meta; build_meta.build_{}({!r})"

# What somebody does first, from another folder. `exact`: the C kernels are at work.
USE = """
import gptsmith
from gptsmith import cli

assert cli.main("prepare text.txt --tokenizer byte --out data".split()) == 0
words = "pretrain --data data --out run --model nano --train.steps 1 --train.batch-size 2"
assert cli.main([*words.split(), "--monitor.trackers", "none"]) == 0
print(gptsmith.__file__, gptsmith.load("run").engine.exact)
"""


def not_source(folder: str, names: list[str]) -> set[str]:
    found = {name for name in names if name.endswith(("__pycache__", "_cache", ".egg-info"))}
    return found | (NOT_SOURCE & set(names) if Path(folder) == ROOT else set())


def files_under(folder: Path) -> set[str]:
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(folder).as_posix() for p in found}


def run(command: list[str], folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_of_the_source_distribution_works_elsewhere(tmp_path: Path) -> None:
    tree, dist, elsewhere = tmp_path / "tree", tmp_path / "dist", tmp_path / "elsewhere"
    shutil.copytree(ROOT, tree, ignore=not_source)
    elsewhere.mkdir()
    run([sys.executable, "-c", BUILD.format("sdist", str(dist))], tree)
    [archive] = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    made = {"PKG-INFO", "setup.cfg"}
    missing = files_under(tree) - files_under(unpacked) - {".gitignore"}
    assert not missing
    extra = {name for name in files_under(unpacked) - files_under(tree) if ".egg-info/" not in name}
    assert extra == made

    run([sys.executable, "-c", BUILD.format("wheel", str(dist))], unpacked)
    [wheel] = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
        assert names == {f"gptsmith/{name}" for name in files_under(ROOT / "src/gptsmith")}

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
