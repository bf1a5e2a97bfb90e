"""Whether metrics were lost before a run is resumed from a checkpoint of an earlier version, which
does not say how many there were; test_resume.py has those of this version."""

import json
from pathlib import Path

import pytest

from gptsmith.recipes.resume_metrics import lost_history


@pytest.mark.parametrize(
    ("steps", "at", "behind"),
    [
        ([1, 10, 20, 30], 35, None),
        ([1, 10, 20, 30], 40, None),
        ([1, 10, 20], 40, 20),
        ([1, 50, 100], 140, None),  # was logged every 50 steps then
        ([], 40, 0),
        ([], 0, None),
    ],
)
def test_lines_that_are_gone_at_the_end(
    steps: list[int], at: int, behind: int | None, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"event": "train", "step": step}) + "\n" for step in steps]
    metrics.write_text("".join(lines))
    said = lost_history(metrics, at, None, log_interval=10)
    if behind is None:
        assert said == ""
    else:
        assert f"has no metrics behind step {behind} of {at}: curve and report lack" in said
