"""report.md: the model, how training went, its samples, and commands to try next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from gptsmith.files import write_text
from gptsmith.model import flops
from gptsmith.run import Run
from gptsmith.terminal import counted
from gptsmith.train.monitor import read_events

_COLUMNS = {
    "step": ",",
    "val_loss": ".4f",
    "val_reward": ".4f",
    "val_length": ".1f",
    "perplexity": ".2f",
    "bits_per_byte": ".3f",
    "top1": ".1%",
    "top5": ".1%",
    "accuracy": ".1%",
    "macro_f1": ".3f",
    "val_accuracy": ".1%",
    "val_margin": ".3f",
    "val_kl": ".4f",
    "seconds": ".0f",
}
_NAMES = {
    "val_loss": "validation loss", "top1": "top-1", "top5": "top-5", "macro_f1": "macro F1",
    "val_accuracy": "accuracy of pairs", "val_margin": "margin", "val_kl": "KL to the reference",
    "val_reward": "validation reward", "val_length": "tokens",
}  # fmt: skip


def number(value: float | None, form: str) -> str:
    """A formatted measurement; "-" for None, which stands for NaN and infinity in metrics.jsonl."""
    return "-" if value is None else format(value, form)


def write_report(run: Run, sections: Sequence[str] = ()) -> None:
    """Write the run's report.md durably, from its own files.

    sections: lines of Markdown that a recipe adds before the next commands.
    """
    events = read_events(run.metrics)
    validations = [e for e in events if e["event"] == "val"]
    samples = [e for e in events if e["event"] == "sample"]
    notes = [e for e in events if e["event"] == "note"]
    model = run.model_config
    columns = {n: f for n, f in _COLUMNS.items() if any(n in e for e in validations)}
    names = {n: _NAMES.get(n, n.replace("_", " ")) for n in columns}
    lines = [
        f"# {run.path.resolve().name}",
        "",
        f"{flops.parameters(model):,} parameters: {counted(model.n_layer, 'layer')}, "
        f"{counted(model.n_head, 'head')}, "
        f"{model.n_embd} wide, context {model.context_length}, vocabulary {model.vocab_size}.",
        "",
        "![loss and learning rate](curves.png)",
        "",
        f"| {' | '.join(names.values())} |",
        f"|{'---:|' * len(columns)}",
    ]
    by_step: dict[int, list[dict[str, Any]]] = {}
    for e in validations:
        by_step.setdefault(e["step"], []).append(e)
    for e, *_ in [*by_step.values()][-20:]:
        cells = [number(e.get(name), form) for name, form in columns.items()]
        lines.append(f"| {' | '.join(cells)} |")
    if by_step and len(last := [*by_step.values()][-1]) > 1:  # the final evaluation, on more text
        final = last[-1]
        scores = (
            f"{names[name]} {number(final[name], form)}"
            for name, form in columns.items()
            if name in final and name not in ("step", "seconds")
        )
        amounts = [
            f"{final[unit]:,} {unit}" for unit in ("pairs", "texts", "tokens") if unit in final
        ]
        start = f"On {amounts[0]}, at" if amounts else "At"
        lines += ["", f"{start} the end: {', '.join(scores)}."]
    lines += ["", "## Notes", "", *dict.fromkeys(f"- {e['message']}" for e in notes)]
    if samples:
        lines += ["", "## Samples", ""]
        shown = [e for e in samples if e["step"] in (samples[0]["step"], samples[-1]["step"])]
        for e in shown:
            lines += [f"Step {e['step']:,}, after {len(e['title'])} characters of prompt:", ""]
            lines += [f"    {line}" for line in (e["title"] + e["text"]).splitlines()] + [""]
    lines += ["", *sections, "## Next", "", *(f"    {line}" for line in next_commands(run)), ""]
    write_text(run.report, "\n".join(lines))


def next_commands(run: Run) -> list[str]:
    """Commands to try after this run."""
    path, tuned = shlex.quote(f"{run.path}"), shlex.quote(f"{run.path}-chat")
    if run.model_config.labels:
        return [f'gptsmith classify {path} "some text"', f"gptsmith inspect {path}"]
    if run.template is not None:
        return [f"gptsmith chat {path}", f"gptsmith inspect {path}"]
    return [
        f"gptsmith generate {path} --num-samples 3",
        f"gptsmith evaluate {path}",
        f"gptsmith finetune chat --from {path} --data skills --out {tuned}",
    ]
