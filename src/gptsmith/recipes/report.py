"""report.md: what a run was, how it went, what it says, and what to do with it."""

from __future__ import annotations

import json

from gptsmith.files import write_text
from gptsmith.model import size
from gptsmith.run import Run
from gptsmith.train.monitor import read_events

_COLUMNS = {
    "step": ",",
    "val_loss": ".4f",
    "perplexity": ".2f",
    "bits_per_byte": ".3f",
    "top1": ".1%",
    "top5": ".1%",
    "seconds": ".0f",
}


def number(value: float | None, form: str) -> str:
    """A measurement in words; NaN and infinity are null in the record and a dash here."""
    return "-" if value is None else format(value, form)


def write_report(run: Run) -> None:
    """Write the run's report.md from its own files, durably."""
    events = read_events(run.metrics)
    validations = [e for e in events if e["event"] == "val"]
    samples = [e for e in events if e["event"] == "sample"]
    notes = [e for e in events if e["event"] == "note"]
    model = run.model_config
    lines = [
        f"# {run.path.resolve().name}",
        "",
        f"{size.parameters(model):,} parameters: {model.n_layer} layers, {model.n_head} heads, "
        f"{model.n_embd} wide, context {model.context_length}, vocabulary {model.vocab_size}.",
        "",
        "![loss and learning rate](curves.png)",
        "",
        "| step | validation loss | perplexity | bits per byte | top-1 | top-5 | seconds |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for e in validations[-20:]:
        cells = [number(e[name], form) for name, form in _COLUMNS.items()]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Notes", "", *dict.fromkeys(f"- {e['message']}" for e in notes)]
    if samples:
        lines += ["", "## Samples", ""]
        shown = dict.fromkeys((0, len(samples) - 1))
        for e in (samples[i] for i in shown):
            lines += [f"Step {e['step']}, prompt {json.dumps(e['title'])}:", ""]
            lines += [f"    {line}" for line in (e["title"] + e["text"]).splitlines()] + [""]
    prompt = json.dumps(samples[-1]["title"] if samples else "")
    lines += [
        "",
        "## Next",
        "",
        f"    gptsmith generate {run.path} --prompt {prompt}",
        f"    gptsmith evaluate {run.path}",
        f"    gptsmith inspect {run.path}",
        "",
    ]
    write_text(run.report, "\n".join(lines))
