"""`import gptsmith`: the public names, which are loaded on first use."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gptsmith

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", gptsmith.__all__)
def test_every_public_name_exists(name: str) -> None:
    value = getattr(gptsmith, name)
    assert getattr(value, "__name__", name).rpartition(".")[2] == name


def test_all_is_what_is_exported() -> None:
    assert sorted(gptsmith.__all__) == dir(gptsmith)
    assert set(gptsmith._HOMES) | {"__version__"} == set(gptsmith.__all__)
    typed = Path(gptsmith.__file__).read_text(encoding="utf-8")
    for name, home in gptsmith._HOMES.items():  # what a type checker sees is what is loaded
        assert re.search(rf"    from {home} import (\([^)]*|.*)\b{name}\b", typed)


def test_no_public_name_hides_a_subpackage() -> None:
    """After any import `gptsmith.train` is the module."""
    folder = Path(gptsmith.__file__).parent
    modules = {p.stem for p in folder.glob("*.py")} | {
        p.parent.name for p in folder.glob("*/__init__.py")
    }
    assert not modules & set(gptsmith.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'gptsmith' has no attribute 'GTPModel'"):
        _ = gptsmith.GTPModel


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, gptsmith, gptsmith.cli; "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'yaml', 'argparse') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version_is_defined_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "gptsmith.__version__"
