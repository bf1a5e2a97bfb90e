from pathlib import Path

import pytest
from stopped_run import create, save


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run killed after step 20, whose best was step 10."""
    with create(tmp_path / "run") as run:
        save(run, 0)
        save(run, 10, best_step=10)
        save(run, 20, best_step=10)
    return tmp_path / "run"
