"""Python files of users are run as modules that can be found again."""

import pickle
from pathlib import Path

import pytest

from gptsmith.user_code import run_file


def module(folder: Path, text: str):
    path = folder / "mine.py"
    path.write_text(text)
    return run_file(path, "reward 'mine.py:f'", trust_code=True)


def test_dataclasses_and_pickle_find_the_module(tmp_path):
    found = module(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Score:\n    value: float\ndef f(): return 2.0\n",
    )
    assert pickle.loads(pickle.dumps(found.f)) is found.f  # as a pool of processes does
    assert pickle.loads(pickle.dumps(found.Score(1.0))) == found.Score(1.0)


@pytest.mark.parametrize("text", ["import sys\nsys.exit()", "1 / 0", "def f(:"])
def test_whatever_ends_a_file_is_one_error_that_names_it(tmp_path, text):
    with pytest.raises(ValueError, match=r"^reward 'mine.py:f': .*mine.py raises "):
        module(tmp_path, text)
