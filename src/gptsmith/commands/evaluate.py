"""`gptsmith evaluate RUN`: evaluate a run on text, questions or instructions, or compare two."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptsmith import files, terminal
from gptsmith.config import load_config
from gptsmith.console import Console
from gptsmith.evaluate.options import EvaluateOptions

# Tasks whose results are printed separately, not in the table of all results.
SHOWN_ALONE = ("perplexity", "skills", "classify")

if TYPE_CHECKING:
    from gptsmith.evaluate.comparison import Comparison
    from gptsmith.evaluate.result import Result
    from gptsmith.run import Run


def main(argv: list[str]) -> None:
    options = load_config(EvaluateOptions, argv, prog="gptsmith evaluate", positional="run")
    from gptsmith.evaluate import tasks  # imports torch: not before help and option errors

    runs, stem = _open_runs(options), _chart_stem(options)
    jobs = {name: tasks.prepare(options, run) for name, run in runs.items()}
    if len(runs) > 1 and options.responses and {"text", "judge"} & {*options.tasks}:
        terminal.note(f"both runs are scored on the same responses, {options.responses}")
    results: dict[str, list[Result]] = {name: [] for name in runs}
    try:
        for name, run in runs.items():
            for job in jobs.pop(name):  # one model in memory at a time
                results[name].append(job())
                _show(options, run, results[name][-1])
        if len(runs) > 1 and "judge" in options.tasks:
            results[next(iter(runs))].append(tasks.compare_responses(options, [*runs.values()]))
    finally:  # whatever ended it: results of hours are not lost
        if any(results.values()):
            _report(options, runs, results, stem)


def _open_runs(options: EvaluateOptions) -> dict[str, Run]:
    """The run and that of --compare, by their names in tables."""
    from gptsmith.run import Run

    paths = [options.run, *([options.compare] if options.compare else [])]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"--compare {options.compare} is the run itself: name another")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = {name: Run.open(path) for name, path in zip(names, paths, strict=True)}
    if len({bool(run.model_config.labels) for run in runs.values()}) > 1:
        raise ValueError(
            f"{' and '.join(map(str, paths))} are a classifier and a language model: no task can "
            "compare them"
        )
    tasks = options.tasks or ("perplexity",)
    if len(runs) > 1 and "perplexity" in tasks and options.data is None:
        corpora = [str(run.config["data"]) for run in runs.values() if run.config.get("data")]
        if len(set(corpora)) > 1:
            raise ValueError(
                f"{' and '.join(map(str, paths))} were trained on {' and '.join(corpora)}: "
                "give the text for both with --data"
            )
    return runs


def _chart_stem(options: EvaluateOptions) -> Path | None:
    """Path of the chart without its suffix; None if nothing is to be written."""
    if options.out is None and options.compare is None:
        return None
    if options.out is None:
        assert options.compare is not None
        stem = options.run / f"against-{options.compare.resolve().name}"
    elif options.out.suffix != ".json":
        raise ValueError(f"--out {options.out}: name a file that ends in .json")
    elif options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder: name a file")
    else:
        from gptsmith.evaluate.reference_metrics import RESPONSES

        read = (options.data, options.task_data, options.responses, options.run / RESPONSES)
        files.check_not_read(options.out, [*read, *options.tasks])
        stem = options.out.with_suffix("")
        stem.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(stem.parent, os.W_OK):
        raise ValueError(f"{stem.parent} is not writable: give another path, --out")
    return stem


def _show(options: EvaluateOptions, run: Run, result: Result) -> None:
    """Print what the table of all results does not show."""
    if result.task == "skills":
        from gptsmith.evaluate import skills

        terminal.say(
            f"{run.path} on {options.per_skill} questions per skill (of some everyday turns there "
            f"are fewer): {result.n:,}, none of them in training"
        )
        Console().print(skills.tables(result.details["by_skill"]))
    if result.task == "classify":
        from gptsmith.evaluate import classification

        scores = classification.scores_of(result)
        terminal.say(f"{run.path} on {options.data}, {terminal.counted(result.n, 'text')}")
        Console().print(classification.table(scores))
        terminal.say(f"{classification.summary(scores)}")
    if result.task == "perplexity":
        m, d = result.metrics, {**result.details, **result.conditions}
        stride = "" if d["stride"] == d["window"] else f", every {d['stride']:,}"
        per_byte = f"  bits per byte {m['bits_per_byte']:.4f}\n" if "bits_per_byte" in m else ""
        terminal.say(
            f"{run.path} on {d['on']}, {result.n:,} tokens, windows of {d['window']:,}{stride}\n"
            f"  precision     {d['precision']}, {d['precision_reason']}\n"
            f"  loss          {m['val_loss']:.4f} nats per token\n"
            f"  perplexity    {m['perplexity']:,.2f}\n{per_byte}"
            f"  next token    {m['top1']:.1%} predicted first, {m['top5']:.1%} among the first 5"
        )


def _report(
    options: EvaluateOptions,
    runs: Mapping[str, Run],
    results: Mapping[str, Sequence[Result]],
    stem: Path | None,
) -> None:
    """Print the results and notes, and write the requested files."""
    from gptsmith.evaluate import charts, classification, report

    for name, some in results.items():
        for note in dict.fromkeys(note for result in some for note in result.notes):
            terminal.note(f"{name}: {note}" if len(results) > 1 else note)
    compared = _compare(results)
    shown: Mapping[str, Sequence[Result]] = results
    if compared:
        for note in [note for comparison in compared.values() for note in comparison.notes]:
            terminal.note(note)
        first, second = results
        shown = {
            first: [compared[r.task].first if r.task in compared else r for r in results[first]],
            second: [comparison.second for comparison in compared.values()],
        }
        differences = {task: comparison.differences for task, comparison in compared.items()}
        Console().print(report.comparison(shown, differences))
    elif some := [r for r in next(iter(results.values())) if r.task not in SHOWN_ALONE]:
        Console().print(report.table(some))
    if stem is None:
        return
    if options.out is not None:
        _write(options.out, stem, results, compared)
    drawn = []
    if any(result.metrics for some in shown.values() for result in some):
        charts.draw(stem, shown)
        drawn.append(stem)
    for name, result in ((name, r) for name, some in results.items() for r in some):
        if result.task == "classify":
            title = Path(name).name
            suffix = "-confusion" if len(results) == 1 else f"-confusion-{title}"
            drawn.append(stem.with_name(stem.name + suffix))
            charts.draw_confusion(drawn[-1], classification.scores_of(result), title)
    if drawn:
        terminal.say(f"chart: {', '.join(f'{chart}.png, {chart}.pdf' for chart in drawn)}")


def _compare(results: Mapping[str, Sequence[Result]]) -> dict[str, Comparison]:
    """The comparison of two runs, by task; empty for one run."""
    from gptsmith.evaluate.comparison import compare

    if len(results) < 2:
        return {}
    (first, own), (second, other) = results.items()
    pairs = [(one, two) for one in own for two in other if one.task == two.task]
    return {one.task: compare((first, second), one, two) for one, two in pairs}


def _write(
    out: Path,
    stem: Path,
    results: Mapping[str, Sequence[Result]],
    compared: Mapping[str, Comparison],
) -> None:
    """Results of the run by task, those of the other run under `compare` and the differences under
    `compare.paired`, and all items."""
    own, *other = ({r.task: r.fields() for r in some} for some in results.values())
    if other:
        names = list(results)
        paired = {task: comparison.fields(*names) for task, comparison in compared.items()}
        own["compare"] = {"run": names[1], **other[0], "paired": paired}
    files.write_json(out, own)
    lines = [
        json.dumps({"run": name, "task": r.task, **item}, ensure_ascii=False) + "\n"
        for name, some in results.items()
        for r in some
        for item in r.items
    ]
    if lines:
        files.write_text(f"{stem}.items.jsonl", "".join(lines))
