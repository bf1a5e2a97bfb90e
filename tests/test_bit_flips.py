"""Damage on a disk is named, or changes nothing. The long form: make test-flips."""

from pathlib import Path

from bit_flips import flips


def test_no_flipped_bit_silently_changes_a_result(tmp_path: Path) -> None:
    found = list(flips(40, 7, tmp_path))
    assert [flip[:5] for flip in found if flip.outcome not in ("named", "same")] == []
    assert sum(flip.outcome == "named" for flip in found) >= 15
