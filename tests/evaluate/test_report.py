"""Results: means and standard errors, JSON without NaN, tables, charts."""

import io
import json
import math
import re
import statistics

import pytest
from rich.console import Console

from gptsmith.evaluate import charts, report, result
from gptsmith.evaluate.result import Result

RUN = [
    Result(
        "hellaswag",
        200,
        {"acc": 0.29, "acc_token": 0.3},
        {"acc": 0.032, "acc_token": 0.03},
        references={"acc": {"chance": 0.25, "GPT-2 124M": 0.2892}, "acc_token": {"chance": 0.25}},
    ),
    Result("lambada", 1200, {"acc": 0.32, "perplexity": 1234.5}, {"acc": 0.013}),
    Result("text", 50, {"rouge1": 0.25, "bleu": 5.25}, {"rouge1": 0.02}),
    Result("judge", 1, {"score": 40.0}, {"score": math.nan}),
]
OTHER = [Result("hellaswag", 100, {"acc": 0.25}, {"acc": 0.043})]


def shown(table) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_standard_error_is_that_of_a_sample():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    mean, error = result.mean(values)
    assert mean == 0.6
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert result.mean([1, 1, 1]) == (1.0, 0.0)
    assert math.isnan(result.mean([0.5])[1])
    with pytest.raises(ValueError, match="nothing to score"):
        result.mean([])


def test_fields_are_json_without_nan():
    result = Result(
        "t", 2, {"a": math.inf, "b": 0.5}, {"a": math.nan, "b": 0.1},
        items=[{"id": "1"}], details={"shots": 5}, notes=["cut"],
    )  # fmt: skip
    fields = result.fields()
    assert fields == {
        "n": 2, "a": None, "b": 0.5, "b_stderr": 0.1, "shots": 5, "notes": ["cut"],
    }  # fmt: skip
    json.dumps(fields, allow_nan=False)


def test_table_shows_metrics_and_reference_scores():
    text = shown(report.table(RUN))
    for part in ("29.0% ± 3.2", "1,234.50", "5.25", "25.0% ± 2.0", "chance 25.0%", "1,200"):
        assert part in text
    assert "GPT-2 124M 28.9%" in text
    assert re.search(r"40\.0 *$", text, re.MULTILINE)  # one item has no standard error
    assert "reference" not in shown(report.table(RUN[1:]))


def test_comparison_has_a_column_per_run():
    text = shown(report.comparison({"runs/a": RUN, "runs/b": OTHER}))
    assert "hellaswag, 200 / 100 items" in text
    line = next(line for line in text.splitlines() if line.startswith(" acc "))
    assert line.index("29.0% ± 3.2") < line.index("25.0% ± 4.3")
    assert "runs/a" in text
    assert "runs/b" in text


def test_only_shares_have_an_axis_in_common():
    panels = charts._panels({"a": RUN, "b": OTHER})
    shares = [("hellaswag", "acc"), ("hellaswag", "acc_token"), ("lambada", "acc")]
    assert list(panels.values()) == [
        [*shares, ("text", "rouge1")], [("lambada", "perplexity")], [("text", "bleu")],
        [("judge", "score")],
    ]  # fmt: skip


def test_chart_is_png_and_pdf_and_reproducible(tmp_path):
    stem = tmp_path / "runs.v2"  # a stem, not a suffix
    charts.draw(stem, {"runs/a": RUN, "runs/b": OTHER})
    first = [(tmp_path / f"runs.v2{suffix}").read_bytes() for suffix in (".png", ".pdf")]
    assert first[0].startswith(b"\x89PNG")
    assert first[1].startswith(b"%PDF")
    charts.draw(stem, {"runs/a": RUN, "runs/b": OTHER})
    assert first == [(tmp_path / f"runs.v2{suffix}").read_bytes() for suffix in (".png", ".pdf")]
    assert len(list(tmp_path.iterdir())) == 2


def test_rows_of_a_chart_name_the_task_where_there_are_several():
    rows = [("hellaswag", "acc"), ("hellaswag", "acc_token"), ("lambada", "acc")]
    assert charts._labels(rows, True) == ["hellaswag: acc", "acc_token", "lambada: acc"]
    assert charts._labels(rows[:2], False) == ["acc", "acc_token"]


def test_chart_of_infinity(tmp_path):
    charts.draw(tmp_path / "inf", {"a": [Result("p", 1, {"perplexity": math.inf}, {})]})


def test_narrow_terminal_cuts_no_figures():
    console = Console(width=40, file=io.StringIO())
    console.print(report.table([Result("lambada", 10, {"perplexity": 113355.25}, {})]))
    assert "…" not in console.file.getvalue()


def test_huge_perplexity_has_three_digits():
    assert report.format_value("perplexity", 5.79e16, 2.5e17) == "5.79e+16 ± 2.5e+17"
