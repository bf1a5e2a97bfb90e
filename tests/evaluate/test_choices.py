"""What is made of the likelihoods of the choices: tokens, normalisation, means and errors."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import processors

from gptsmith.evaluate import choices, tasks
from gptsmith.evaluate.choices import encode_pairs
from gptsmith.evaluate.likelihood import Likelihood, Request
from gptsmith.evaluate.prompts import Question
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([Path(choices.__file__).read_text("utf-8")], 400)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPTModel:
    torch.manual_seed(0)
    config = ModelConfig.preset("nano", vocab_size=tokenizer.vocab_size, context_length=512)
    made = GPTModel(config).eval()
    for p in made.parameters():
        if p.dim() > 1:
            p.data *= 4
    return made


def test_tokens_are_those_of_the_whole_text(tokenizer: Tokenizer) -> None:
    pairs = [("the mean", " over tokens"), ("a space at its end  ", "word"), ("cut", "ting")]
    for (context, text), request in zip(pairs, encode_pairs(tokenizer, pairs), strict=True):
        begun = tokenizer.encode(context.rstrip())
        assert request.context == begun
        assert request.continuation == tokenizer.encode(context + text)[len(begun) :]
        assert tokenizer.decode([*request.context, *request.continuation]) == context + text


def test_halves_encoded_apart_are_the_whole(tokenizer: Tokenizer, real_data: Path) -> None:
    """With a tokenizer of another kind nothing is known, and every whole text is encoded."""
    foreign = Tokenizer(tokenizer.to_json())
    foreign.kind = "other"
    for name in ("hellaswag", "piqa", "winogrande", "lambada", "mmlu"):
        pairs = [pair for q in tasks.load(name, real_data, 20, shots=1) for pair in q.choices]
        assert encode_pairs(tokenizer, pairs) == encode_pairs(foreign, pairs)


def test_an_empty_context_is_the_end_of_a_text(tokenizer: Tokenizer) -> None:
    (request,) = encode_pairs(tokenizer, [("", "mean")])
    assert request == Request([tokenizer.eos_id], tokenizer.encode("mean"))


def answered(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, name: str, nats: Sequence[float]
) -> Any:
    """The result of one question with choices of 1, 4 and 10 characters, right is the last."""
    found = [Likelihood(x, x > -1) for x in nats]
    monkeypatch.setattr(choices, "log_likelihoods", lambda *_, **__: found)
    texts = (" a", " mean", " characters")
    question = Question("q", tuple(("context", text) for text in texts[: len(nats)]), len(nats) - 1)
    config = ModelConfig.preset("nano", vocab_size=tokenizer.vocab_size)
    return choices.score(GPTModel(config), tokenizer, name, [question])


def test_what_the_sums_are_divided_by(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    result = answered(monkeypatch, tokenizer, "piqa", (-2.0, -5.0, -11.0))
    (item,) = result.items
    assert item["tokens"] == [len(tokenizer.encode(f" {t}")) for t in ("a", "mean", "characters")]
    assert item["nats"] == [-2.0, -5.0, -11.0]
    per_token = [n / size for n, size in zip(item["nats"], item["tokens"], strict=True)]
    right = float(max(per_token) == per_token[2])
    # per character -2, -1.25, -1.1: only there the last is the likeliest
    assert result.metrics == {"acc": 0.0, "acc_norm": 1.0, "acc_token": right}
    assert set(answered(monkeypatch, tokenizer, "mmlu", (-2.0, -5.0)).metrics) == {"acc"}


def test_of_equals_the_first_is_taken_and_nan_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    assert answered(monkeypatch, tokenizer, "winogrande", (-2.0, -2.0)).metrics == {"acc": 0.0}
    assert answered(monkeypatch, tokenizer, "winogrande", (-9.0, math.nan)).metrics["acc"] == 0.0
    assert answered(monkeypatch, tokenizer, "winogrande", (math.nan, -9.0)).metrics["acc"] == 0.0


def test_the_last_word_has_an_accuracy_and_a_perplexity(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    result = answered(monkeypatch, tokenizer, "lambada", (-0.5,))
    assert result.metrics == {"acc": 1.0, "perplexity": pytest.approx(math.exp(0.5))}


def test_an_empty_choice_is_never_taken_by_length(model: GPTModel, tokenizer: Tokenizer) -> None:
    question = Question(
        "q", (("Question: why?\nAnswer:", " "), ("Question: why?\nAnswer:", " no")), 0
    )
    (item,) = choices.score(model, tokenizer, "piqa", [question]).items
    assert item["acc_norm"] == 0.0


def test_real_questions_together_as_one_by_one(
    model: GPTModel, tokenizer: Tokenizer, real_data: Path
) -> None:
    for name in ("hellaswag", "winogrande", "lambada", "mmlu"):
        questions = tasks.load(name, real_data, 8, shots=1)
        together = choices.score(model, tokenizer, name, questions)
        assert together.n == len(together.items) == 8
        for question, item in zip(questions, together.items, strict=True):
            (one,) = choices.score(model, tokenizer, name, [question]).items
            assert one["id"] == item["id"] == question.id
            assert one["nats"] == pytest.approx(item["nats"], abs=1e-4)
            assert one["acc"] == item["acc"]
        for metric, value in together.metrics.items():
            if metric.startswith("acc"):
                values = [item[metric] for item in together.items]
                assert value == sum(values) / 8
                error = math.sqrt(value * (1 - value) / 7)  # of a share
                assert together.stderr[metric] == pytest.approx(error)
    assert together.fields().keys() - {"notes"} == {"n", "acc", "acc_stderr"}


def test_questions_that_do_not_fit_are_left_out_with_a_note(tokenizer: Tokenizer) -> None:
    small = GPTModel(ModelConfig.preset("nano", vocab_size=tokenizer.vocab_size, context_length=16))
    fits = Question("short", (("a", " b"), ("a", " c")), 0)
    longer = Question("train.jsonl:7", (("a", " b"), ("a", " mean of" * 20)), 0)
    result = choices.score(small, tokenizer, "piqa", [longer, fits])
    assert (result.n, [item["id"] for item in result.items]) == (1, ["short"])
    assert result.items == choices.score(small, tokenizer, "piqa", [fits]).items
    assert "1 of 2 questions are left out" in result.notes[0]
    with pytest.raises(ValueError, match=r"1 of 1 .* left out, .* context of 16 tokens"):
        choices.score(small, tokenizer, "piqa", [longer])


def test_texts_begin_as_their_tokenizer_says(tokenizer: Tokenizer) -> None:
    """As Llama's, whose post-processor puts a token before every text."""
    made = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    made.add_special_tokens(["<s>"])
    begin = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", begin)])
    ours = Tokenizer(made.to_str())
    assert ours.prefix == (begin,)
    pairs = [("the mean", " over"), ("cut", "ting"), ("", "mean")]
    for (context, text), request in zip(pairs, encode_pairs(ours, pairs), strict=True):
        assert request.context == made.encode(context).ids
        assert [*request.context, *request.continuation] == made.encode(context + text).ids


def test_an_answer_that_the_mask_gives_away_is_not_scored(tokenizer: Tokenizer) -> None:
    """prefix(n): so many tokens see each other, and the answer must not be one of them."""
    torch.manual_seed(0)
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=16, context_length=64, vocab_size=400, mask="prefix(4)"
    )
    context = "a b c d e f g h"  # more than four tokens
    questions = [
        Question("short", (("a", " b"), ("a", " c")), 0),
        Question("long", ((context, " b"), (context, " c")), 0),
    ]
    result = choices.score(GPTModel(config), tokenizer, "piqa", questions)
    assert [item["id"] for item in result.items] == ["long"]
    assert "1 of 2 questions are left out" in result.notes[0]
    assert "less than 4 tokens before them, which the mask needs" in result.notes[0]
