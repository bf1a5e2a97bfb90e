"""A short run of run.py: what strangers' files may do to us."""

import subprocess
import sys
from pathlib import Path

import pytest

INPUTS = 300


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")
def test_damaged_files_are_read_or_rejected_in_one_line() -> None:
    script = Path(__file__).with_name("run.py")
    done = subprocess.run(
        [sys.executable, str(script), "--inputs", str(INPUTS), "--seed", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-2000:]}"
