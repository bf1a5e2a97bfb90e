import pytest

from gptsmith.data.report import ReadReport, Tally


def test_place_counts_once_however_often_it_is_read() -> None:
    tally = Tally()
    for _ in range(2):
        for line in range(5):
            tally.add("malformed line", f"a.jsonl:{line}")
    tally.add("empty document", "a.jsonl:0")
    assert tally.counts() == {"empty document": 1, "malformed line": 5}
    assert (tally["malformed line"], tally["other"], tally.total) == (5, 0, 6)
    assert tally.lines() == [
        "malformed line: 5 (a.jsonl:0, a.jsonl:1, a.jsonl:2, ...)",
        "empty document: 1 (a.jsonl:0)",
    ]
    tally.clear()
    assert tally.counts() == {}


def test_rejected_record_is_an_error_or_skipped() -> None:
    report = ReadReport("skip")
    report.reject("malformed line", "a.jsonl:3", "not JSON")
    assert report.lines() == [
        "skipped 1 record",
        "skipped, malformed line: 1 (a.jsonl:3)",
    ]
    with pytest.raises(ValueError, match=r"^a\.jsonl:3: not JSON; --on-error skip"):
        ReadReport("stop").reject("malformed line", "a.jsonl:3", "not JSON")


def test_error_does_not_mention_an_option_that_the_command_lacks() -> None:
    with pytest.raises(ValueError, match=r"^a\.jsonl:3: not JSON$"):
        ReadReport().reject("malformed line", "a.jsonl:3", "not JSON")
