"""What PyTorch's compiler runs on this machine: a C++ compiler for a CPU, Triton for a GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path


def cxx_compiler() -> str | None:
    """The path of the C++ compiler that torch.compile uses for a CPU: $CXX, else g++ (clang++ on
    macOS). None if it is not installed."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def missing(device_type: str) -> str:
    """What is missing to compile for a "cpu" or a "cuda" device; empty if nothing is."""
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if _c_compiler() is None:
            return "there is no C compiler ($CC, else gcc or clang)"
    elif cxx_compiler() is None:
        return "there is no C++ compiler ($CXX, else g++)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are not installed (Debian, Ubuntu: apt install python3-dev)"
    return ""


def _c_compiler() -> str | None:
    """As Triton looks for it, to build its launchers."""
    if (chosen := os.environ.get("CC")) is not None:
        return shutil.which(chosen)
    return shutil.which("gcc") or shutil.which("clang")
