"""llama.cpp itself as the other side of the GGUF export: `make test-gguf`.

It is compiled when it is installed (minutes), so the ordinary suite goes without: test_gguf.py
reads the same files. GPTSMITH_GGUF_RUN names a trained run to compare besides.
"""

import json
import os
import random
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import GPT2, LLAMA3, SIZES, ours_from, read
from runs import random_run

from gptsmith import cli
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate, Message
from gptsmith.commands.export import exportable
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.interop import gguf
from gptsmith.model.config import ModelConfig, RopeScaling
from gptsmith.model.gpt import ACTIVATIONS, GPTModel
from gptsmith.run.folder import Run
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.formats import SPLITS

pytestmark = pytest.mark.gguf
llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2 untied": dict(GPT2, tie_embeddings=False),
    "llama": SIZES,
    "llama untied": dict(SIZES, tie_embeddings=False, rope_theta=500.0),
    "llama biased": dict(SIZES, bias="all"),
    "llama linear": dict(SIZES, rope_scaling=RopeScaling(rope_type="linear", factor=4.0)),
    "llama3": dict(SIZES, rope_scaling=LLAMA3, rope_theta=100.0),
    "qwen2": dict(SIZES, head_dim=16, bias="qkv", tie_embeddings=False),
    "qwen2 tied": dict(SIZES, head_dim=16, bias="qkv"),
    "qwen3": dict(SIZES, qk_norm=True),
    "qwen3 untied": dict(SIZES, qk_norm=True, tie_embeddings=False),
    "arcee": dict(SIZES, mlp="relu2"),
    "arcee llama3": dict(
        SIZES, mlp="relu2", tie_embeddings=False, rope_scaling=LLAMA3, rope_theta=100.0
    ),
}
# Largest difference of a logit, where the logits of these random models have a spread of about 3.
BOUNDS: dict[gguf.Kind, float] = {"f32": 1e-3, "f16": 0.05, "bf16": 0.5, "q8_0": 0.6, "q4_0": 7}


@contextmanager
def opened(run: Run, folder: Path, kind: gguf.Kind = "f32") -> Iterator[Any]:
    """The exported run in llama.cpp, keys and values in f32, so that only weights are rounded."""
    gguf.export(exportable(run), folder, kind=kind)
    (path,) = folder.glob("*.gguf")
    f32 = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(
        str(path), n_ctx=0, n_threads=1, n_threads_batch=1, type_k=f32, type_v=f32,
        logits_all=True, verbose=False,
    )  # fmt: skip
    try:
        yield llama
    finally:
        llama.close()


def compare(model: GPTModel, llama: Any, ids: list[int]) -> tuple[list[float], float]:
    """The largest difference of a logit at each of 32 steps along our greedy continuation, and the
    largest margin by which ours would have chosen another token than llama.cpp (0: never)."""
    ids, differences, margin = list(ids), [], 0.0
    llama.reset()
    llama.eval(ids)
    for _ in range(32):
        with torch.inference_mode():
            ours = model(torch.tensor([ids]))[0, -1].numpy()
        theirs = llama.scores[llama.n_tokens - 1]
        ours = ours[: len(theirs)]  # without the rows of padding
        differences.append(float(np.abs(ours - theirs).max()))
        chosen = int(ours.argmax())
        margin = max(margin, float(ours[chosen] - ours[int(theirs.argmax())]))
        ids.append(chosen)
        llama.eval([chosen])
    return differences, margin


def gelu_by_table(x: torch.Tensor) -> torch.Tensor:
    """llama.cpp's GELU on a CPU: looked up by its argument in f16 (ggml-cpu/vec.h)."""
    y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x >= 10, x, torch.where(x <= -10, torch.zeros_like(x), y))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_of_every_family(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 but for its GELU, the rounding of which costs llama.cpp about 0.002 here. (By a table
    as well, it is the same but where an argument lies between two numbers of f16.)"""
    monkeypatch.setitem(ACTIVATIONS, "gelu", gelu_by_table)
    run = random_run(tmp_path / "run", ModelConfig(**FAMILIES[family]), size=0.2)  # as BOUNDS
    model = run.load_model()
    for kind, bound in BOUNDS.items():
        if kind != "f32" and "untied" not in family:
            continue
        with opened(run, tmp_path / kind, kind) as llama:
            differences, margin = compare(model, llama, list(b"To be, or not"))
        print(f"{family} {kind}: largest difference of a logit {max(differences):.2g}")
        assert max(differences) < bound
        assert kind != "f32" or (np.median(differences) < 2e-5 and margin < 1e-3)


# Tokenizers

TEXT = (
    "It's 1984, they'll say: we've 12 345 apples!  Don't\n\n\tindent()\r\n    more = x**2 # why?\n"
    "Grüße aus Köln, déjà vu; Привет мир 漢字かな交じり文 🙂👩‍👩‍👧 ẛ̣ e\u0301 123٣٤½ "
)


def foreign(name: str) -> Tokenizer:
    """A tokenizer.json with the split of another family, in the form in which they publish it."""
    document = json.loads(Tokenizer.train_bpe([TEXT * 3], 400).to_json())
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if name == "smollm":
        first: dict[str, Any] = {"type": "Digits", "individual_digits": True}
        last["use_regex"] = True
    else:
        first = {
            "type": "Split", "pattern": {"Regex": SPLITS[name]}, "behavior": "Isolated",
            "invert": False,
        }  # fmt: skip
        last["use_regex"] = False
        document["model"]["ignore_merges"] = name == "llama-bpe"
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, last]}
    return Tokenizer(json.dumps(document, ensure_ascii=False))


def strings(alphabet: str | None = None, count: int = 400) -> list[str]:
    """Text that divides tokenizers: pieces of all scripts, runs of white space, contractions."""
    pick = random.Random(3)
    points = [
        chr(i)
        for i in range(1, sys.maxunicode + 1)
        if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")
    ]
    pieces = [
        " ", "  ", "\n", "\n\n", "\t", "\r\n", " \n ", "\u3000", "'s", "'LL", "'", "n't", "7",
        "2024", "123456", "½", "a", "Word", "été", "e\u0301", "ẛ̣", "🙂", "👩‍👩‍👧", "🇩🇪",
        "<|end|>", "<|endoftext|>",
        "...", "!?", "==", "_x", "#", "漢字", "かな", "ไทย", "नमस्ते", "العربية", "\u200b", "\ufeff",
    ]  # fmt: skip
    texts = []
    for i in range(count):
        source = points if i % 4 == 0 else pieces if i % 4 < 3 else [*points[:300], *pieces]
        source = list(alphabet) if alphabet else source
        texts.append("".join(pick.choices(source, k=pick.randint(1, 40))))
    return texts


@pytest.mark.parametrize("name", ["byte", "bpe", "char", "gpt2", "llama-bpe", "qwen2", "smollm"])
def test_plain_text_has_the_same_tokens(name: str, tmp_path: Path, request: Any) -> None:
    alphabet = "".join(dict.fromkeys(TEXT)) if name == "char" else None
    if name == "byte":
        tokenizer = Tokenizer.byte()
    elif name == "bpe":
        tokenizer = Tokenizer.train_bpe([TEXT * 3], 400)
    elif name == "char":
        tokenizer = Tokenizer.char([TEXT])
    elif name == "gpt2":
        tokenizer = Tokenizer.gpt2(request.getfixturevalue("real_data") / "gpt2_bpe")
    else:
        tokenizer = foreign(name)
    tokenizer = tokenizer.add_special_tokens(CHAT_TOKENS)
    config = ModelConfig(n_layer=1, n_head=1, n_embd=16, vocab_size=tokenizer.vocab_size)
    run = random_run(tmp_path / "run", config, tokenizer)
    gguf.export(exportable(run), tmp_path / "out", kind="f16")
    (path,) = (tmp_path / "out").glob("*.gguf")
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        wrong = []
        for text in strings(alphabet):
            ours = tokenizer.encode(text)
            theirs = llama.tokenize(text.encode(), add_bos=False, special=False)
            if ours != theirs:
                wrong.append((text, ours, theirs))
        assert not wrong, (len(wrong), wrong[:3])
    finally:
        llama.close()


# Trained models

TRAIN = [
    "--train.steps", "100", "--train.batch-size", "8", "--train.num-threads", "1",
    "--eval.interval", "0", "--train.precision", "fp32", "--monitor.trackers", "none",
    "--optim.learning-rate", "0.005",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and a chat run, trained for seconds; and $GPTSMITH_GGUF_RUN, if there is one."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("".join(f"{n} plus {n} is {n + n}. " for n in range(2000)))
    prepare = ["prepare", str(folder / "text.txt"), "--out", str(folder / "data")]
    assert cli.main([*prepare, "--tokenizer", "bpe", "--vocab-size", "400"]) == 0
    model = ["--model", "fast", "--model.n-layer", "2", "--model.n-head", "2"]
    model += ["--model.n-embd", "64", "--model.context-length", "64"]
    base, chat = folder / "base", folder / "chat"
    data = ["--data", str(folder / "data"), "--out", str(base)]
    assert cli.main(["pretrain", *data, *model, *TRAIN]) == 0
    with (folder / "chat.jsonl").open("w") as file:
        for n in range(200):
            talk = {"user": f"{n} plus {n}?", "assistant": f"It is {n + n}."}
            messages = [{"role": role, "content": text} for role, text in talk.items()]
            file.write(json.dumps({"messages": messages}) + "\n")
    data = ["--from", str(base), "--data", str(folder / "chat.jsonl"), "--out", str(chat)]
    assert cli.main(["finetune", "chat", *data, *TRAIN]) == 0
    given = os.environ.get("GPTSMITH_GGUF_RUN")
    return [base, chat, *([Path(given)] if given else [])]


def test_trained_model_continues_with_the_same_tokens(trained: list[Path], tmp_path: Path) -> None:
    """As our model does with the weights of the file, which q8_0 and q4_0 round; llama.cpp then
    rounds what they are multiplied by, too, so only close calls may differ."""
    for path in trained:
        run = Run.open(path)
        model, ids = run.load_model(), run.tokenizer.prompt("12 plus 12 ")
        for kind in BOUNDS:
            with opened(run, tmp_path / path.name / kind, kind) as llama:
                assert llama.tokenize(b"12 plus 12 ", special=False) == ids
                weights = ours_from(read(tmp_path / path.name / kind)[1], model.config, False)
                model.load_state_dict({n: torch.from_numpy(x.copy()) for n, x in weights.items()})
                differences, margin = compare(model, llama, ids)
            print(f"{path.name} {kind}: largest {max(differences):.2g}, margin {margin:.2g}")
            assert margin < (0.2 if kind.startswith("q") else 1e-3)


def test_chat_model_gives_the_same_answers(trained: list[Path], tmp_path: Path) -> None:
    """By the template in the file: the same prompt, and the same answer to its end."""
    run = Run.open(trained[1])
    assert run.template is not None
    chat = ChatTemplate(run.template, run.tokenizer)
    with opened(run, tmp_path / "out") as llama:
        assert llama.token_eos() == run.tokenizer.eos_id
        for question in ("7 plus 7?", "150 plus 150?"):
            messages = [Message(role="user", content=question)]
            ids = chat.prompt(messages)
            text = f"<|user|>{question}<|end|><|assistant|>"
            assert llama.tokenize(text.encode(), special=True) == ids
            config = SamplingConfig(temperature=0, max_new_tokens=24)
            [ours] = Engine(run.load_model()).generate([ids], config, stop_ids=chat.stop_ids)
            answer = llama.create_chat_completion(messages, temperature=0, max_tokens=24)
            [choice] = answer["choices"]
            assert choice["message"]["content"] == run.tokenizer.decode(ours.ids)
            assert choice["finish_reason"] == "stop"
            assert answer["usage"]["prompt_tokens"] == len(ids)


def test_user_text_is_plain_without_parse_special(tmp_path: Path) -> None:
    tokenizer = Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
    config = ModelConfig(n_layer=1, n_head=1, n_embd=32, vocab_size=tokenizer.vocab_size)
    run = random_run(tmp_path / "run", config, tokenizer, TEMPLATE)
    with opened(run, tmp_path / "out") as llama:
        assert llama.tokenize(b"<|end|>", special=False) == list(b"<|end|>")
        assert llama.tokenize(b"<|end|>", special=True) == [tokenizer.special_tokens["<|end|>"]]
