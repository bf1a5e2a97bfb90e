"""Compile the C of this folder for this machine's CPU, once, with the system's compiler."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from gptsmith import files

HERE = Path(__file__).parent
# No fused multiply-add but where the code says so: the same operations for any number of rows.
FLAGS = (
    *("-std=gnu11", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-shared", "-fPIC"),
)


class Variant(NamedTuple):
    """A set of vector instructions. needs: as the kernel names them in /proc/cpuinfo."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_WIDE = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"})
_MACHINES = {
    "x86_64": (
        Variant("avx512-bf16", _WIDE | {"avx512_bf16"}, (*_AVX512, "-mavx512bf16")),
        Variant("avx512", _WIDE, _AVX512),
        Variant("avx2-vnni", frozenset({"avx2", "fma", "avx_vnni"}), (*_AVX2, "-mavxvnni")),
        Variant("avx2", frozenset({"avx2", "fma"}), _AVX2),
    ),
    "aarch64": (
        Variant("neon-dotprod", frozenset({"asimddp"}), ("-march=armv8.2-a+dotprod",)),
        Variant("neon", frozenset({"asimd"}), ()),
    ),
    "arm64": (Variant("neon-dotprod", frozenset(), ("-march=armv8.2-a+dotprod",)),),  # Apple's
}
PORTABLE = Variant("portable", frozenset(), ())


_compiling = threading.Lock()  # whoever comes second finds the library in the cache


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def variants() -> list[Variant]:
    """Those that this CPU runs, the fastest first."""
    has: set[str] = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                has.update(value.split())
                break
    known = _MACHINES.get(platform.machine(), ())
    return [variant for variant in known if variant.needs <= has] + [PORTABLE]


@contextmanager
def built(variant: Variant, format: str) -> Iterator[Path]:
    """The shared library for this variant and format of weights, from the cache if it is there. The
    path is valid inside the `with` only, so load it there. BuildError if there is no compiler, or
    it fails."""
    compiler = _compiler()
    flags = (*FLAGS, *variant.flags, f"-DFORMAT={format.upper()}")
    source = b"".join(path.read_bytes() for path in sorted(HERE.glob("*.[ch]")))
    binary = Path(compiler[0]).resolve()
    status = binary.stat()
    facts = (*flags, *compiler, binary, status.st_size, status.st_mtime_ns)
    key = hashlib.sha256(source + repr((facts, platform.uname()[0::4])).encode()).hexdigest()[:24]
    cache = _cache_folder()
    with ExitStack() as stack:
        with _compiling:
            known = () if cache is None else cache.glob(f"{key}-*.so")
            library = next(filter(_is_whole, known), None)
            if library is None:
                prefix = "gptsmith-kernels-"
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix))
                library = Path(folder, "kernels.so")
                _compile([*compiler, *flags, str(HERE / "forward.c")], library)
                if cache is not None:
                    content = library.read_bytes()
                    name = f"{key}-{hashlib.sha256(content).hexdigest()}.so"
                    with suppress(OSError):  # a full disk: compiled again next time
                        files.write_bytes(cache / name, content)
        yield library


def prebuild(format: str) -> None:
    """Compile in a thread what `built` will be asked for. On first use this takes as long as the
    import of torch, during which it can be done."""

    def work() -> None:
        with suppress(BuildError, OSError), built(variants()[0], format):
            pass

    threading.Thread(target=work, name="compiler").start()


def _compiler() -> list[str]:
    if os.name == "nt":
        raise BuildError("on Windows they are not built")
    for command in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        words = shlex.split(command)
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    raise BuildError("there is no C compiler (cc, gcc or clang)")


def _compile(command: list[str], library: Path) -> None:
    command = [*command, "-o", str(library), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler failed: {error}") from None
    if done.returncode or not library.exists():
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise BuildError(f"{command[0]} failed: {lines[0]}")


def _cache_folder() -> Path | None:
    """Where libraries are kept; None if the place is not ours alone, as who can write there can
    run code as us."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "gptsmith" / "kernels"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError:
        return None
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return folder if ours and not status.st_mode & 0o077 else None


def _is_whole(path: Path) -> bool:
    """Whether a cached library is a file of ours with the content that its name tells."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == path.stem.split("-")[1]
    except OSError:
        return False
