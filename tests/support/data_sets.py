"""The complete data sets, of which tests/fixtures/data holds excerpts."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def complete_data(sizes: Mapping[str, int]) -> Path:
    """The folder of complete data sets: $GPTSMITH_DATA, else ../shared/data.

    sizes: {path or pattern in that folder: bytes}, of what the test reads. Another size is another
    version, or an excerpt, of which the numbers in the test do not hold. Where anything is missing
    the test is skipped.
    """
    __tracebackhide__ = True  # pytest then names the test as the place of the skip
    folder = Path(os.environ.get("GPTSMITH_DATA") or ROOT.parent / "shared" / "data")
    missing = [
        f"{name} ({size:,} bytes)"
        for name, size in sizes.items()
        if sum(path.stat().st_size for path in folder.glob(name)) != size
    ]
    if missing:
        pytest.skip(f"needs the complete {', '.join(missing)} in the folder $GPTSMITH_DATA")
    return folder
