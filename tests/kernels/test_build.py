"""Compiling and caching the kernels: who may put code there, damage, no compiler, a wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.kernels import build, native
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel

ROOT = Path(__file__).resolve().parents[2]


class Compiler:
    """Stands for the compiler: writes a file at once, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, command: list[str], library: Path) -> None:
        self.calls += 1
        library.write_bytes(b"compiled " + " ".join(command).encode())


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    counting = Compiler()
    monkeypatch.setattr(build, "_compile", counting)
    return counting


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gptsmith" / "kernels"


def path_of_library() -> Path:
    with build.built(build.PORTABLE, "int8") as path:
        assert path.read_bytes().startswith(b"compiled")
        return path


def test_a_library_is_compiled_once_into_a_private_folder(cache: Path, compiler: Compiler) -> None:
    first = path_of_library()
    assert not first.exists()  # compiled in a temporary folder, and copied
    second = path_of_library()
    assert second.parent == cache
    assert compiler.calls == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in cache.iterdir()] == [second.name]


def test_a_library_that_is_being_compiled_is_waited_for(
    cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "variants", lambda: [build.PORTABLE])
    build.prebuild("int8")
    assert path_of_library().parent == cache or compiler.calls == 1
    assert path_of_library().parent == cache
    assert compiler.calls == 1


def test_other_flags_source_or_compiler_have_another_library(
    cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {path_of_library().name for _ in range(2)}
    with build.built(build.PORTABLE._replace(flags=("-DOTHER",)), "int8"):
        pass
    monkeypatch.setenv("CC", "cc -DANOTHER")
    path_of_library()
    with build.built(build.PORTABLE, "int4"):
        pass
    assert compiler.calls == 4
    assert len(names) == 2


@pytest.mark.parametrize("content", [b"", b"compiled otherwise"])
def test_a_damaged_library_is_compiled_again(
    cache: Path, compiler: Compiler, content: bytes
) -> None:
    path_of_library()
    path_of_library().write_bytes(content)
    path_of_library()
    assert compiler.calls == 2
    assert path_of_library().parent == cache
    assert compiler.calls == 2


def test_a_link_in_the_cache_is_not_followed(
    cache: Path, compiler: Compiler, tmp_path: Path
) -> None:
    path_of_library()
    library = path_of_library()
    library.rename(tmp_path / "elsewhere")
    library.symlink_to(tmp_path / "elsewhere")
    path_of_library()
    assert compiler.calls == 2


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o702])
def test_a_folder_that_others_can_enter_is_not_used(
    cache: Path, compiler: Compiler, mode: int
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(mode)
    path_of_library()
    path_of_library()
    assert compiler.calls == 2
    assert not list(cache.iterdir())


def test_a_linked_folder_is_not_used(cache: Path, compiler: Compiler, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "real")
    path_of_library()
    assert not list((tmp_path / "real").iterdir())


def test_a_folder_of_another_user_is_not_used(
    cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    path_of_library()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    path_of_library()
    assert compiler.calls == 2


def test_a_place_that_cannot_be_written_costs_the_cache_only(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path_of_library()
    assert compiler.calls == 1


def test_without_a_compiler_torch_serves_and_says_so_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    native.kernels.cache_clear()
    try:
        for _ in range(2):
            engine = Engine(GPTModel(ModelConfig.preset("nano")))
            assert not engine.exact
    finally:
        native.kernels.cache_clear()
    [generation] = engine.generate([[1, 2]], SamplingConfig(max_new_tokens=2))
    assert len(generation.ids) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no C compiler" in said


def test_a_compiler_that_fails_is_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'x.c:1: error: out of luck' >&2; exit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(build.BuildError, match=r"broken-cc failed: x\.c:1: error: out of luck"):
        native.load(build.PORTABLE, "int8")


def test_a_library_that_cannot_be_opened_is_named(cache: Path, compiler: Compiler) -> None:
    with pytest.raises(build.BuildError, match=r"kernels\.so"):
        native.load(build.PORTABLE, "int8")


def test_the_fastest_variant_that_the_cpu_has_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(flags: str, machine: str = "x86_64", key: str = "flags") -> list[str]:
        text = f"model name\t: x\n{key}\t\t: {flags}\n"
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
        monkeypatch.setattr(build.platform, "machine", lambda: machine)
        return [variant.name for variant in build.variants()]

    wide = "avx2 fma avx512f avx512bw avx512vl avx512dq avx512_vnni"
    assert names(f"{wide} avx512_bf16")[0] == "avx512-bf16"
    assert names(wide) == ["avx512", "avx2", "portable"]
    assert names("avx2 fma avx512f") == ["avx2", "portable"]  # the first AVX512, without VNNI
    assert names("sse2") == ["portable"]
    assert names("fp asimd asimddp", "aarch64", "Features")[0] == "neon-dotprod"
    assert names("", "riscv64") == ["portable"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_are_those_of_the_openmp_that_torch_loaded() -> None:
    """In a process of its own: other libraries bring their own OpenMP."""
    code = """
import torch
from pathlib import Path
from gptsmith.kernels import native
assert native.kernels("float32") is not None
assert native.runtime().parallel
assert native.runtime().threads == torch.get_num_threads()
words = Path("/proc/self/maps").read_text().split()
names = {Path(w).name for w in words if "gomp" in w or "iomp" in w or "libomp" in w}
assert len(names) == 1, names
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_kernels_are_built_from_an_installed_wheel(tmp_path: Path) -> None:
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run(
        [sys.executable, *command, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, timeout=120
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "from gptsmith.kernels import build, native;"
        "native.load(build.PORTABLE, 'int8'); print(build.HERE)"
    )
    paths = {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **paths},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert shown.strip() == str(tmp_path / "site" / "gptsmith" / "kernels")
    assert len(list((tmp_path / "cache" / "gptsmith" / "kernels").glob("*.so"))) == 1
