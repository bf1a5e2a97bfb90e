"""The long form: make soak-serve."""

import sys
from pathlib import Path

import pytest
from soak_server import STATES, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_crowded_requests_get_their_answers_and_nothing_is_left(tmp_path: Path) -> None:
    found = soak(tmp_path, minutes=0, requests=48, closed=24, say=lambda line: None)
    assert found.wrong == []
    assert found.answers == 48
    assert found.closed == dict.fromkeys(STATES, 4)
