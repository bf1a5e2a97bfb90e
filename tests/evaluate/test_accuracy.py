"""Multiple-choice scores: tokens of the choices, normalisation, means and standard errors."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import processors

from gptsmith.evaluate import accuracy
from gptsmith.evaluate.likelihood import Likelihood, Request, encode_pairs
from gptsmith.evaluate.multiple_choice import TASKS, Question, load
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([Path(accuracy.__file__).read_text("utf-8")], 400)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPTModel:
    torch.manual_seed(0)
    config = ModelConfig.preset("nano", vocab_size=tokenizer.vocab_size, context_length=512)
    made = GPTModel(config).eval()
    for p in made.parameters():
        if p.dim() > 1:
            p.data *= 4
    return made


def test_context_and_continuation_have_the_tokens_of_the_whole_text(tokenizer: Tokenizer) -> None:
    pairs = [("the mean", " over tokens"), ("a space at its end  ", "word"), ("cut", "ting")]
    for (context, text), request in zip(pairs, encode_pairs(tokenizer, pairs), strict=True):
        begun = tokenizer.encode(context.rstrip())
        assert request.context == begun
        assert request.continuation == tokenizer.encode(context + text)[len(begun) :]
        assert tokenizer.decode([*request.context, *request.continuation]) == context + text


def test_separate_encoding_of_continuations_equals_joint_encoding(
    tokenizer: Tokenizer, real_data: Path
) -> None:
    """Of a tokenizer of unknown kind nothing is assumed: each text is encoded as a whole."""
    foreign = Tokenizer(tokenizer.to_json())
    foreign.kind = "other"
    for name in ("hellaswag", "piqa", "winogrande", "lambada", "mmlu"):
        pairs = [pair for q in load(name, real_data, 20, shots=1) for pair in q.choices]
        assert encode_pairs(tokenizer, pairs) == encode_pairs(foreign, pairs)


def test_empty_context_becomes_endoftext(tokenizer: Tokenizer) -> None:
    (request,) = encode_pairs(tokenizer, [("", "mean")])
    assert request == Request([tokenizer.eos_id], tokenizer.encode("mean"))


def result_for(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, name: str, nats: Sequence[float]
) -> Any:
    """The result of one question with choices of 1, 4 and 10 characters; the last is correct."""
    found = [Likelihood(x, x > -1) for x in nats]
    monkeypatch.setattr(accuracy, "log_likelihoods", lambda *_, **__: found)
    texts = (" a", " mean", " characters")
    question = Question("q", tuple(("context", text) for text in texts[: len(nats)]), len(nats) - 1)
    config = ModelConfig.preset("nano", vocab_size=tokenizer.vocab_size)
    return accuracy.score(GPTModel(config), tokenizer, TASKS[name], [question])


def test_normalisation_by_characters_and_by_tokens(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    result = result_for(monkeypatch, tokenizer, "piqa", (-2.0, -5.0, -11.0))
    (item,) = result.items
    assert item["tokens"] == [len(tokenizer.encode(f" {t}")) for t in ("a", "mean", "characters")]
    assert item["nats"] == [-2.0, -5.0, -11.0]
    per_token = [n / size for n, size in zip(item["nats"], item["tokens"], strict=True)]
    right = float(max(per_token) == per_token[2])
    # per character -2, -1.25, -1.1: the last is the likeliest by this measure alone
    assert result.metrics == {"acc": 0.0, "acc_norm": 1.0, "acc_token": right}
    assert set(result_for(monkeypatch, tokenizer, "mmlu", (-2.0, -5.0)).metrics) == {"acc"}


def test_ties_go_to_the_first_choice_and_nan_is_never_correct(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    assert result_for(monkeypatch, tokenizer, "winogrande", (-2.0, -2.0)).metrics == {"acc": 0.0}
    assert result_for(monkeypatch, tokenizer, "winogrande", (-9.0, math.nan)).metrics["acc"] == 0.0
    assert result_for(monkeypatch, tokenizer, "winogrande", (math.nan, -9.0)).metrics["acc"] == 0.0


def test_single_continuation_has_greedy_accuracy_and_perplexity(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    result = result_for(monkeypatch, tokenizer, "lambada", (-0.5,))
    assert result.metrics == {"acc": 1.0, "perplexity": pytest.approx(math.exp(0.5))}


def test_empty_choice_is_never_taken_by_length_normalisation(
    model: GPTModel, tokenizer: Tokenizer
) -> None:
    question = Question(
        "q", (("Question: why?\nAnswer:", " "), ("Question: why?\nAnswer:", " no")), 0
    )
    (item,) = accuracy.score(model, tokenizer, TASKS["piqa"], [question]).items
    assert item["acc_norm"] == 0.0


def test_scores_of_real_questions_are_independent_of_batching(
    model: GPTModel, tokenizer: Tokenizer, real_data: Path
) -> None:
    for name in ("hellaswag", "winogrande", "lambada", "mmlu"):
        questions = load(name, real_data, 8, shots=1)
        together = accuracy.score(model, tokenizer, TASKS[name], questions)
        assert together.n == len(together.items) == 8
        for question, item in zip(questions, together.items, strict=True):
            (one,) = accuracy.score(model, tokenizer, TASKS[name], [question]).items
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


def test_questions_with_too_long_choices_are_left_out_with_a_note(tokenizer: Tokenizer) -> None:
    small = GPTModel(ModelConfig.preset("nano", vocab_size=tokenizer.vocab_size, context_length=16))
    fits = Question("short", (("a", " b"), ("a", " c")), 0)
    longer = Question("train.jsonl:7", (("a", " b"), ("a", " mean of" * 20)), 0)
    result = accuracy.score(small, tokenizer, TASKS["piqa"], [longer, fits])
    assert (result.n, [item["id"] for item in result.items]) == (1, ["short"])
    assert result.items == accuracy.score(small, tokenizer, TASKS["piqa"], [fits]).items
    assert "1 of 2 questions are left out" in result.notes[0]
    with pytest.raises(ValueError, match=r"1 of 1 .* left out: .* context of 16 tokens"):
        accuracy.score(small, tokenizer, TASKS["piqa"], [longer])


def test_tokenizer_prefix_starts_every_context(tokenizer: Tokenizer) -> None:
    """Like Llama's, whose post-processor puts a token before every text."""
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


def test_answer_that_the_mask_reveals_is_not_scored(tokenizer: Tokenizer) -> None:
    """prefix(n): n tokens see each other, and the answer must not be one of them."""
    torch.manual_seed(0)
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=16, context_length=64, vocab_size=400, mask="prefix(4)"
    )
    context = "a b c d e f g h"  # more than four tokens
    questions = [
        Question("short", (("a", " b"), ("a", " c")), 0),
        Question("long", ((context, " b"), (context, " c")), 0),
    ]
    result = accuracy.score(GPTModel(config), tokenizer, TASKS["piqa"], questions)
    assert [item["id"] for item in result.items] == ["long"]
    assert "1 of 2 questions are left out" in result.notes[0]
    assert "fewer than 4 tokens before them, which the mask needs" in result.notes[0]


def test_question_with_an_unknown_character_does_not_stop_the_task() -> None:
    tokenizer = Tokenizer.char(["Question: is it?\nAnswer: yes no"])
    model = GPTModel(ModelConfig.preset("nano", vocab_size=tokenizer.vocab_size))
    known, unknown = (
        Question(q, ((f"Question: {q}\nAnswer:", " yes"), (f"Question: {q}\nAnswer:", " no")), 0)
        for q in ("is it?", "où?")
    )
    result = accuracy.score(model, tokenizer, TASKS["piqa"], [unknown, known])
    assert [item["id"] for item in result.items] == ["is it?"]
    assert "1 of 2 questions are left out: the tokenizer cannot encode them" in result.notes[0]
    assert "(50%: où?)" in result.notes[0]
    with pytest.raises(ValueError, match=r"1 of 1 questions are left out: .*'ù'"):
        accuracy.score(model, tokenizer, TASKS["piqa"], [unknown])


def test_chance_is_the_mean_over_the_questions() -> None:
    pairs = tuple(("a", f" {letter}") for letter in "bcdef")
    questions = [Question(str(n), pairs[:n], 0) for n in (2, 4, 4, 5)]
    known = accuracy.references(TASKS["piqa"], questions)
    assert known["acc"] == {"chance": pytest.approx((1 / 2 + 1 / 4 + 1 / 4 + 1 / 5) / 4)}
    last_words = [Question("w", (("a", " b"),), 0)]
    assert accuracy.references(TASKS["lambada"], last_words) == {"acc": {}, "perplexity": {}}
    assert accuracy.references(TASKS["hellaswag"], questions)["acc"]["GPT-2 124M"] == 0.2892
