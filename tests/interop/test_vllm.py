"""vLLM itself as the other side of the export: `make test-vllm`.

It wants other versions of torch and transformers than the rest, so it has an environment of its
own, whose Python VLLM_PYTHON names, and runs in a process of its own.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import GPT2, LLAMA3, SIZES
from runs import random_run
from vllm_texts import LIMIT

from gptsmith import cli
from gptsmith.chat_template.template import ChatTemplate
from gptsmith.commands.export import exportable
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.interop import hf
from gptsmith.model.config import ModelConfig
from gptsmith.run import Run

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("VLLM_PYTHON") or ROOT / ".venv-vllm/bin/python")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not PYTHON.exists(), reason="vLLM is not installed: make test-vllm, or set VLLM_PYTHON"
    ),
]

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": dict(GPT2, n_head=2, n_kv_head=2, head_dim=32),
    "gpt2 untied": dict(GPT2, n_head=2, n_kv_head=2, head_dim=32, tie_embeddings=False),
    "llama": SIZES,
    "llama untied": dict(SIZES, tie_embeddings=False, rope_theta=500.0),
    "llama biased": dict(SIZES, bias="all"),
    "llama3": dict(SIZES, rope_scaling=LLAMA3, rope_theta=100.0),
    "qwen2": dict(SIZES, n_head=2, n_kv_head=1, bias="qkv"),
    "qwen3": dict(SIZES, qk_norm=True, tie_embeddings=False),
    "arcee": dict(SIZES, mlp="relu2"),
}
PROMPTS = [list(text.encode()) for text in ("To be, or not", "a", "0123456789 " * 3)]
QUESTIONS = ("7 plus 7?", "150 plus 150?")


def vllm_texts(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What vLLM answers to the jobs, see tests/support/vllm_texts.py."""
    asked, answer = folder / "jobs.json", folder / "answer.json"
    asked.write_text(json.dumps(jobs))
    script = ROOT / "tests" / "support" / "vllm_texts.py"
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    environment["OMP_NUM_THREADS"] = "1"  # the models are tiny
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [PYTHON, script, asked, answer], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(answer.read_text())


def export(run: Run, out: Path) -> str:
    hf.export(exportable(run), out)
    return str(out)


def margin(run: Run, ids: list[int], chosen: list[int]) -> float:
    """The largest difference by which our logits prefer another token than the one chosen."""
    with torch.inference_mode():
        logits = run.load_model()(torch.tensor([ids + chosen[:-1]]))[0, len(ids) - 1 :]
    logits = logits[:, : run.tokenizer.vocab_size]  # without the rows of padding
    return float((logits.max(1).values - logits[range(len(chosen)), chosen]).max())


@pytest.fixture(scope="module")
def trained_chat(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A chat model that has learned to add, more or less."""
    folder = tmp_path_factory.mktemp("trained")
    model = ["--model", "fast", "--model.n-layer", "2", "--model.n-head", "2"]
    model += ["--model.n-embd", "64", "--model.context-length", "64"]
    train = ["--train.steps", "100", "--train.batch-size", "8", "--train.precision", "fp32"]
    train += ["--train.num-threads", "1", "--eval.interval", "0", "--monitor.trackers", "none"]
    train += ["--optim.learning-rate", "0.005"]
    base = folder / "base"
    assert cli.main(["pretrain", "--data", str(corpus), "--out", str(base), *model, *train]) == 0
    lines = []
    for n in range(200):
        talk = {"user": f"{n} plus {n}?", "assistant": f"It is {n + n}."}
        messages = [{"role": role, "content": text} for role, text in talk.items()]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (folder / "chat.jsonl").write_text("".join(lines))
    data = ["--data", str(folder / "chat.jsonl"), "--out", str(folder / "chat")]
    assert cli.main(["finetune", "chat", "--from", str(base), *data, *train]) == 0
    return Run.open(folder / "chat")


def test_greedy_tokens_of_every_family(tmp_path: Path) -> None:
    runs = {
        name: random_run(tmp_path / name, ModelConfig(**axes), size=0.2)
        for name, axes in FAMILIES.items()
    }
    jobs = [
        {"folder": export(run, tmp_path / f"{name} export"), "prompts": PROMPTS}
        for name, run in runs.items()
    ]
    for (name, run), answer in zip(runs.items(), vllm_texts(jobs, tmp_path), strict=True):
        for ids, chosen in zip(PROMPTS, answer["texts"], strict=True):
            assert len(chosen) == LIMIT or chosen[-1] in run.tokenizer.special_ids.ends, name
            assert margin(run, ids, chosen) < 1e-3, name


def test_chat_model_gives_the_same_replies(trained_chat: Run, tmp_path: Path) -> None:
    """By the template in the folder: the same prompt, and the same reply to its end."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    out = export(trained_chat, tmp_path / "export")
    [answer] = vllm_texts([{"folder": out, "prompts": [], "chats": chats}], tmp_path)
    template = trained_chat.chat_template
    assert isinstance(template, ChatTemplate)
    engine = Engine(trained_chat.load_model())
    config = SamplingConfig(temperature=0, max_new_tokens=LIMIT)
    for messages, reply in zip(chats, answer["replies"], strict=True):
        ids = template.prompt(messages)  # type: ignore[arg-type]
        assert reply["prompt"] == ids
        [ours] = engine.generate([ids], config, stop_ids=template.stop_ids)
        theirs = [i for i in reply["ids"] if i not in template.stop_ids]
        assert theirs == ours.ids
        assert reply["text"] == trained_chat.tokenizer.decode(ours.ids)
