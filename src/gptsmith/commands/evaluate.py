"""`gptsmith evaluate RUN`: how well a model predicts text, answers questions and follows
instructions, beside another run if one is named."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from rich.console import Console

from gptsmith import files
from gptsmith.commands import evaluate_perplexity
from gptsmith.commands.evaluate_options import EvaluateOptions
from gptsmith.config import load_config
from gptsmith.evaluate import accuracy, gsm8k, judge, reference_metrics, report, skills
from gptsmith.evaluate.endpoint import Endpoint
from gptsmith.evaluate.multiple_choice import TASKS, load
from gptsmith.evaluate.report import Result
from gptsmith.model.gpt import GPTModel
from gptsmith.run import Run

SEED = 0  # of the questions on skills: the same ones each time

Job = Callable[[], Result]


def main(argv: list[str]) -> None:
    options = load_config(
        EvaluateOptions,
        argv,
        prog="gptsmith evaluate",
        description="Measure a trained model.",
        positional="run",
    )
    runs, stem = _runs(options), _stem(options)
    # What can go wrong without the model goes wrong here, before hours of measuring.
    jobs = {name: prepare(options, run) for name, run in runs.items()}
    found: dict[str, list[Result]] = {name: [] for name in runs}
    try:
        for name in runs:
            for job in jobs.pop(name):  # one model at a time
                found[name].append(job())
        if len(runs) > 1 and "judge" in options.tasks:
            first, second = (_responses(options, run) for run in runs.values())
            duel = judge.compare(first, second, options.judge, cache=_verdicts(options))
            found[next(iter(runs))].append(duel)
    except ValueError:  # a judge that answers nobody: what was measured before it is not lost
        if any(found.values()):
            tell(options, runs, found, stem)
        raise
    tell(options, runs, found, stem)


def tell(
    options: EvaluateOptions,
    runs: Mapping[str, Run],
    found: Mapping[str, Sequence[Result]],
    stem: Path | None,
) -> None:
    """Print what was found, and write it where that was asked for."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    own = next(iter(found.values()))
    if len(runs) > 1:
        console.print(report.comparison(found))
    elif shown := [r for r in own if r.task not in ("perplexity", "skills")]:
        console.print(report.table(shown))
    for name, some in found.items():
        for note in dict.fromkeys(note for result in some for note in result.notes):
            print(f"{name}: {note}" if len(found) > 1 else note, file=sys.stderr)
    tokenizers = {run.tokenizer.fingerprint for run in runs.values()}
    if len(tokenizers) > 1 and "perplexity" in options.tasks:
        print(
            "the tokenizers differ, and so does what a token is: of perplexity and its kin, only"
            " bits_per_byte can be compared",
            file=sys.stderr,
        )
    if stem is not None:
        write(options.out, stem, found)


def _runs(options: EvaluateOptions) -> dict[str, Run]:
    """The run, and that of --compare, by the names that they have in tables."""
    paths = [options.run, *([options.compare] if options.compare else [])]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"--compare {options.compare} is the run itself: name another")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = {name: Run.open(path) for name, path in zip(names, paths, strict=True)}
    if len(runs) > 1 and "perplexity" in options.tasks and options.data is None:
        corpora = [str(run.config["data"]) for run in runs.values() if run.config.get("data")]
        if len(set(corpora)) > 1:
            raise ValueError(
                f"{' and '.join(map(str, paths))} were trained on {' and '.join(corpora)}: "
                "say with --data what both are measured on"
            )
    return runs


def _stem(options: EvaluateOptions) -> Path | None:
    """The chart without its suffix; None if nothing is to be written."""
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
        stem = options.out.with_suffix("")
        stem.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(stem.parent, os.W_OK):
        raise ValueError(f"{stem.parent} cannot be written to: name another place, --out")
    return stem


def prepare(options: EvaluateOptions, run: Run) -> list[Job]:
    """What is to be measured on a run, in the order asked for: questions and texts are read now,
    the model when the first task needs it."""
    if run.model_config.labels:
        raise ValueError(f"{run.path} is a classifier: gptsmith classify {run.path} --file TEXTS")
    model = cache(lambda: options.load(run))
    return [_job(name, options, run, model) for name in options.tasks]


def _job(name: str, options: EvaluateOptions, run: Run, model: Callable[[], GPTModel]) -> Job:
    """One task, ready to be put to the model."""
    if name == "perplexity":
        return evaluate_perplexity.prepare(options, run, model)
    if name == "skills":
        return lambda: _skills(options, run, model())
    if name == "text":
        return partial(reference_metrics.score, _responses(options, run))
    if name == "judge":
        entries = _responses(options, run)
        Endpoint(options.judge).close()  # checks the options; nothing is sent
        return partial(judge.score, entries, options.judge, cache=_verdicts(options))
    if name == "gsm8k":
        shots = (
            (gsm8k.SHOTS if run.template is None else 0) if options.shots is None else options.shots
        )
        problems, examples = gsm8k.load(options.task_data, options.limit, shots)
        return lambda: gsm8k.score(model(), run.tokenizer, run.template, problems, examples)
    questions = load(name, options.task_data, options.limit, options.shots)
    return lambda: accuracy.score(model(), run.tokenizer, TASKS[name], questions, progress=True)


def write(out: Path | None, stem: Path, found: Mapping[str, Sequence[Result]]) -> None:
    """To `out`: results of the run by task, those of the other under `compare`; beside it items and
    chart."""
    if out is not None:
        own, *other = ({r.task: r.fields() for r in some} for some in found.values())
        also = {"compare": {"run": list(found)[1], **other[0]}} if other else {}
        files.write_json(out, own | also)
        items = [
            {"run": name, "task": r.task, **item}
            for name, some in found.items()
            for r in some
            for item in r.items
        ]
        if items:
            lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            files.write_text(f"{stem}.items.jsonl", "".join(lines))
    report.draw(stem, found)
    print(f"{stem}.png, {stem}.pdf: the same as a picture")


def _responses(options: EvaluateOptions, run: Run) -> list[reference_metrics.Entry]:
    return reference_metrics.read_responses(options.responses or run.path)[: options.limit]


def _verdicts(options: EvaluateOptions) -> Path:
    """Where the judge's verdicts are kept, so that a rerun asks nothing twice."""
    return options.run / "verdicts"


def _skills(options: EvaluateOptions, run: Run, model: GPTModel) -> Result:
    if run.chat_template is None:
        scores = skills.score_base(model, run.tokenizer, SEED, options.per_skill)
    else:
        scores = skills.score_chat(model, run.tokenizer, run.chat_template, SEED, options.per_skill)
    print(f"{run.path} on {options.per_skill} questions a skill that training never shows")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(skills.table(scores))
    means = {name: skills.mean(column) for name, column in scores.items()}
    return Result("skills", options.per_skill, means, {}, details={"by_skill": scores})
