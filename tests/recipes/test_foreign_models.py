"""Models from elsewhere are tuned and exported with their own special tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_models
import numpy as np
import pytest
import torch
import transformers

from gptsmith import cli
from gptsmith.commands.export import exportable
from gptsmith.data.classification import encode_texts
from gptsmith.data.shards import Corpus
from gptsmith.evaluate.classification import log_probabilities
from gptsmith.generate.chat import Chat
from gptsmith.generate.options import SamplingConfig
from gptsmith.interop import hf
from gptsmith.run import Run
from gptsmith.tokenizer.roles import as_ids
from gptsmith.train.monitor import read_events
from gptsmith.train.runtime import choose_precision

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = [
    *("--train.steps", "2", "--train.batch-size", "2", "--train.device", "cpu"),
    *("--train.precision", "fp32", "--train.compile", "off", "--monitor.trackers", "none"),
    *("--eval.sample-tokens", "4"),
]
QUESTIONS = ("who sat in the hall", "what came over the sea", "who forged a ring", "who spoke")
ANSWERS = ("the king", "a ship", "the smith", "nobody")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("models")
            source, made[kind] = folder / kind, folder / "run"
            foreign_models.save(kind, source)
            assert cli.main(["import", str(source), "--out", str(made[kind])]) == 0
        return made[kind]

    return get


def rows(path: Path, make: Callable[[str, str], dict[str, Any]]) -> Path:
    pairs = [(f"{q} {n}", a) for n in "abcdefgh" for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    path.write_text("".join(json.dumps(make(q, a)) + "\n" for q, a in pairs))
    return path


def finetune(stage: str, base: Path, data: Path, out: Path, *more: str) -> Run:
    words = ["finetune", stage, "--from", base, "--data", data, "--out", out, *FLAGS, *more]
    assert cli.main([*map(str, words)]) == 0
    return Run.open(out)


def exported(run: Run, out: Path) -> Any:
    """The run's folder for transformers, its tokenizer there, and the ids that end a text."""
    hf.export(exportable(run), out)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    roles, stock = run.tokenizer.roles.names, tokenizer.special_tokens_map
    assert {name: stock.get(name) for name in roles} == roles
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    return tokenizer, as_ids(ends)


def conversation(q: str, a: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}


@pytest.mark.parametrize("kind", ["spm", "llama3", "own_names", "wordpiece", "two_before"])
def test_chat_begins_and_ends_as_texts_of_the_model(
    kind: str, imported: Callable[[str], Path], tmp_path: Path
) -> None:
    base = Run.open(imported(kind))
    run = finetune("chat", base.path, rows(tmp_path / "d.jsonl", conversation), tmp_path / "out")
    template, before = run.chat_template, base.tokenizer.special_ids
    assert template is not None
    assert run.tokenizer.special_ids.eos_ids == before.eos_ids
    messages = conversation("who sat in the hall", "the king")["messages"]
    encoded = template.encode(messages)
    assert tuple(encoded.ids[: len(before.prefix)]) == before.prefix
    assert encoded.ids[len(before.prefix)] not in before.prefix
    assert not any(encoded.is_target[: len(before.prefix)])
    tokenizer, ends = exported(run, tmp_path / "hf")
    assert {*template.stop_ids, *before.eos_ids} == {*ends}
    stock = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert stock == encoded.ids
    greedy = SamplingConfig(temperature=0, max_new_tokens=8)
    chat = Chat(run.load_model(), run.tokenizer, template)
    reply = chat.reply(messages[:1], greedy)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    prompt = torch.tensor([template.prompt(messages[:1])])
    ids = model.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    new = ids[prompt.shape[1] :]
    found = [*reply.ids]
    assert found == new[: len(found)]


@pytest.mark.parametrize("kind", ["llama3", "own_names", "wordpiece", "always_im"])
def test_instructions_begin_and_end_as_texts_of_the_model(
    kind: str, imported: Callable[[str], Path], tmp_path: Path
) -> None:
    base = Run.open(imported(kind))
    data = rows(tmp_path / "d.jsonl", lambda q, a: {"instruction": q, "output": a})
    more = ["--prompt", "q: {instruction} a:", "--response-tokens", "4"]
    run = finetune("instruct", base.path, data, tmp_path / "out", *more)
    assert run.chat_template is not None
    encoded = run.chat_template.encode(conversation("who", "the king")["messages"])
    special = base.tokenizer.special_ids
    assert tuple(encoded.ids[: len(special.prefix)]) == special.prefix
    assert encoded.ids[-1] == special.eos
    assert encoded.is_target[-1]
    assert (tmp_path / "out" / "special_tokens.json").read_text() == (
        base.path / "special_tokens.json"
    ).read_text()
    _, ends = exported(run, tmp_path / "hf")
    assert {*ends} == {*special.eos_ids}


@pytest.mark.parametrize("kind", ["spm", "llama3", "own_names", "appends", "gpt2"])
def test_classifier_reads_texts_as_the_stock_pipeline(
    kind: str, imported: Callable[[str], Path], tmp_path: Path
) -> None:
    data = rows(tmp_path / "d.jsonl", lambda q, a: {"text": q, "label": a})
    run = finetune("classify", imported(kind), data, tmp_path / "out")
    hf.export(exportable(run), tmp_path / "hf")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    texts = ["who sat in the hall", "a ship 🚢", "the smith's ring, and the snow in the north"]
    given = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        stock = model.eval()(
            input_ids=given.input_ids, attention_mask=given.attention_mask
        ).logits.log_softmax(-1)
    ids, _ = encode_texts(run.tokenizer, texts, run.model_config.context_length)
    precision = choose_precision("fp32", torch.device("cpu"))
    ours = log_probabilities(run.load_model(), ids, precision)  # type: ignore[arg-type]
    np.testing.assert_allclose(ours, stock.numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["llama3", "own_names", "wordpiece", "appends"])
def test_text_continues_with_the_documents_of_the_model(
    kind: str, imported: Callable[[str], Path], tmp_path: Path
) -> None:
    base = Run.open(imported(kind))
    data = rows(tmp_path / "d.jsonl", lambda q, a: {"text": f"{q}? {a.upper()} 🚢. " * 4})
    words = ["prepare", data, "--out", tmp_path / "corpus", "--tokenizer", base.path]
    assert cli.main([*map(str, words)]) == 0
    more = ("--context-length", "32", "--document-mask", "--eval.tokens", "100000")
    run = finetune("text", base.path, tmp_path / "corpus", tmp_path / "out", *more)
    assert run.tokenizer.fingerprint == base.tokenizer.fingerprint
    val = next(e for e in reversed(list(read_events(run.metrics))) if e["event"] == "val")
    corpus = Corpus.open(tmp_path / "corpus")
    never = corpus.document.context_only
    targets = sum(int((~np.isin(s[1:], never)).sum()) for s in corpus.val)
    assert val["tokens"] == targets
    size = corpus.manifest["splits"]["val"]["bytes"]
    bits = val["val_loss"] * targets / np.log(2) / size
    assert val["bits_per_byte"] == pytest.approx(bits, rel=0.02)  # the first token is no target
    _, ends = exported(run, tmp_path / "hf")
    assert {*ends} == {*base.tokenizer.special_ids.eos_ids}
