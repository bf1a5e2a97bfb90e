"""Constrained texts: whatever the model, they are what the constraint says, in any batch."""

import json
import random
import re
import string
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field
from random_weights import randomize

from gptsmith.generate.constraint import Constraint
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Generation, Request
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import SPECIAL_TOKENS, Tokenizer

pytest.importorskip("llguidance")

CONTEXT = 256
SENTENCES = ["The zebra says that it is 42 years old.", '{"name": "Zoë", "n": [1, 2.5]}'] * 20


class Point(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    x: Annotated[int, Field(ge=-1000, le=1000)]
    sign: Literal["plus", "minus", "größer"]


class Person(BaseModel):
    """A schema of every kind of part, none of which is unbounded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=5)]
    age: Annotated[int, Field(ge=0, le=150)]
    tall: bool
    points: Annotated[list[Point], Field(min_length=1, max_length=2)]
    partner: None = None


PERSON = Constraint.json(Person.model_json_schema())


def tokenizers(real_data: Path, kind: str) -> Tokenizer:
    match kind:
        case "bytes":
            return Tokenizer.byte()
        case "characters":
            return Tokenizer.char([string.printable + "öß"])
        case "bpe":
            return Tokenizer.train_bpe(SENTENCES, 320).add_special_tokens(SPECIAL_TOKENS)
    return Tokenizer.gpt2(real_data / "gpt2_bpe")


def model_for(tokenizer: Tokenizer, **axes: int) -> GPTModel:
    size = dict(n_layer=1, n_head=2, n_embd=16, context_length=CONTEXT)
    model = GPTModel(ModelConfig(**size, vocab_size=tokenizer.vocab_size).change(**axes))
    randomize(model)
    return model.eval()


@pytest.fixture(scope="module", params=["bytes", "characters", "bpe", "gpt2"])
def engine(request: pytest.FixtureRequest, real_data: Path) -> Engine:
    tokenizer = tokenizers(real_data, request.param)
    return Engine(model_for(tokenizer), tokenizer)


def sampled(limit: int = 200, seed: int = 0, **fields: float) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=limit, temperature=1, seed=seed, **fields)


def texts(engine: Engine, constraint: Constraint, n: int = 4, limit: int = 200) -> list[str]:
    """Of n seeds; all are complete."""
    found = engine.generate(["The"] * n, sampled(limit), constraint=constraint)
    assert [g.finish_reason for g in found] == ["stop"] * n
    assert [engine.tokenizer.decode(g.ids) for g in found] == [g.text for g in found]
    return [g.text for g in found]


def test_json_of_a_schema_validates(engine: Engine) -> None:
    for text in texts(engine, PERSON):
        Person.model_validate_json(text)


def test_numbers_are_in_their_range(engine: Engine) -> None:
    schema = {"type": "number", "minimum": 0.25, "maximum": 0.5}
    likes_to_end = dict.fromkeys(engine.tokenizer.special_ids.eos_ids, 5.0)
    for seed in range(10):
        found = one(engine, Constraint.json(schema), seed=seed, logit_bias=likes_to_end)
        assert 0.25 <= float(found.text) <= 0.5


def test_a_choice_is_one_of_the_texts(engine: Engine) -> None:
    options = ["yes", "no", 'say "\\no/" \n', "größer", "nothing else"]
    found = texts(engine, Constraint.choice(options), n=20)
    assert set(found) <= set(options)
    assert len(set(found)) > 1


def test_a_regex_matches_the_whole_text(engine: Engine) -> None:
    pattern = r"(\+49|0)[1-9][0-9]{2,4}/[ößa-z]{3}"
    assert all(re.fullmatch(pattern, text) for text in texts(engine, Constraint.regex(pattern)))


@pytest.mark.parametrize("grammar", ['start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'])
def test_a_grammar_balances_brackets(engine: Engine, grammar: str) -> None:
    for text in texts(engine, Constraint.grammar(grammar), limit=250):
        assert text == text.count("(") * "(" + "x" + text.count(")") * ")"
        assert text.count("(") == text.count(")")


@pytest.fixture(scope="module")
def byte_engine() -> Engine:
    tokenizer = Tokenizer.byte()
    return Engine(model_for(tokenizer), tokenizer)


def one(
    engine: Engine, constraint: Constraint, limit: int = 200, seed: int = 0, **fields: object
) -> Generation:
    request = Request([84], sampled(limit, seed), constraint=constraint, **fields)  # type: ignore[arg-type]
    generation = engine.add(request)
    assert [*engine.as_completed([generation])] == [generation]
    return generation


def test_a_text_ends_only_where_it_is_complete(byte_engine: Engine) -> None:
    """A model that wants to end at once."""
    engine = byte_engine
    [end] = engine.tokenizer.special_ids.eos_ids
    found = one(engine, Constraint.regex("(abc)+"), logit_bias={end: 100})
    assert (found.text, found.finish_reason) == ("abc", "stop")
    assert found.stop_logprob is None or found.stop_logprob.id == end
    assert one(engine, PERSON, logit_bias={end: 100}).finish_reason == "stop"


def test_special_tokens_are_never_part_of_a_text() -> None:
    tokenizer = Tokenizer.byte().add_special_tokens(SPECIAL_TOKENS)
    engine = Engine(model_for(tokenizer), tokenizer)
    bias = dict.fromkeys(tokenizer.special_tokens.values(), 100.0)
    for constraint in (Constraint.json_object(), Constraint.regex(".*[^z]z"), PERSON):
        found = one(engine, constraint, 60, logit_bias=bias, stop_ids=[])
        assert found.ids
        assert not set(found.ids) & bias.keys()
    grammar = Constraint.grammar('start: "a" <|end|> "b"')  # names a special token
    assert one(engine, grammar, logit_bias=bias).finish_reason == "error"


def test_white_space_comes_to_an_end(byte_engine: Engine) -> None:
    """A model that would rather write nothing else."""
    bias = dict.fromkeys(b" \n\t\r", 100.0)
    found = one(byte_engine, Constraint.json(Point.model_json_schema()), 200, logit_bias=bias)
    Point.model_validate_json(found.text)
    assert "\n" + 16 * " " in found.text.replace("\t", " ")
    assert not re.search(r"\s{18}", found.text)


def test_json_that_is_cut_says_length(byte_engine: Engine) -> None:
    found = one(byte_engine, Constraint.json_object(), 30, logit_bias={ord("}"): -100})
    assert found.finish_reason == "length"
    assert len(found.ids) == 30
    whole = one(byte_engine, PERSON)
    assert one(byte_engine, PERSON, len(whole.ids)).finish_reason == "stop"
    assert one(byte_engine, PERSON, len(whole.ids) - 1).finish_reason == "length"


def test_a_stop_string_ends_a_constrained_text(byte_engine: Engine) -> None:
    found = one(byte_engine, Constraint.regex("[ab]{50}"), stop="ba")
    assert found.finish_reason == "stop"
    assert re.fullmatch("a*b*", found.text)


def test_logprobs_are_of_the_model_alone(byte_engine: Engine) -> None:
    """As those of penalized tokens: before the constraint."""
    found = one(byte_engine, PERSON, logprobs=3)
    scored = Request([84, *found.ids], SamplingConfig(max_new_tokens=0), prompt_logprobs=3)
    again = byte_engine.add(scored)
    assert [*byte_engine.as_completed([again])]
    expected = again.prompt_logprobs[1:]
    assert [t.id for t in found.logprobs] == [t.id for t in expected]
    for a, b in zip(found.logprobs, expected, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert any(t.id not in dict(t.top) for t in found.logprobs)


def crowd() -> list[Request]:
    """Constrained requests of all kinds, some that share a prompt, and free ones."""
    constraints = [
        PERSON,
        Constraint.json_object(),
        Constraint.choice(["yes", "no", "nothing else"]),
        Constraint.regex("([a-f]{3} )*end"),
        None,
    ]
    choose, made = random.Random(0), []
    for i in range(15):
        prompt = [choose.randrange(256) for _ in range(choose.choice([3, 64, 90]))]
        sampling = sampled(choose.randrange(20, 120), i, frequency_penalty=i % 2)
        if i % 3 == 0:
            sampling = sampling.model_copy(update={"temperature": 0})
        made.append(Request(prompt, sampling, logprobs=2, constraint=constraints[i % 5]))
        if i % 5 == 0:  # another sample of the same prompt
            made.append(Request(prompt, sampled(80, 99), logprobs=2, constraint=PERSON))
    return made


def run(engine: Engine, requests: list[Request]) -> list[tuple[object, ...]]:
    found = [engine.add(request) for request in requests]
    assert len([*engine.as_completed(found)]) == len(found)
    return [(g.ids, g.logprobs, g.text, g.finish_reason) for g in found]


def test_other_requests_preemption_and_speculation_change_no_bit() -> None:
    tokenizer = Tokenizer.byte()
    model = model_for(tokenizer, n_layer=2)
    if not Engine(model).exact:
        pytest.skip("no compiled kernels on this machine")
    alone = [run(Engine(model, tokenizer), [request])[0] for request in crowd()]
    assert run(Engine(model, tokenizer), crowd()) == alone
    few = Engine(model, tokenizer, cache_tokens=CONTEXT + 128, max_batch_size=8)
    assert run(few, crowd()) == alone
    assert few.stats.tokens_computed > 1.2 * sum(map(len, (r.prompt for r in crowd())))
    for draft_tokens in (2, 7):
        drafting = Engine(model, tokenizer, draft_tokens=draft_tokens)
        assert run(drafting, crowd()) == alone
        assert drafting.stats.accepted_drafts > 100


def test_tokens_that_are_certain_need_no_step_of_their_own(byte_engine: Engine) -> None:
    engine = Engine(byte_engine.model, byte_engine.tokenizer, draft_tokens=8)
    keys = {"type": "object", "properties": {"a_long_name": {"enum": ["one long text"]}}}
    schema = {**keys, "required": ["a_long_name"], "additionalProperties": False}
    generation = engine.add(Request([84], sampled(), constraint=Constraint.json(schema)))
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    assert json.loads(generation.text) == {"a_long_name": "one long text"}
    assert steps < len(generation.ids) / 3


def test_a_text_that_cannot_go_on_ends_alone(real_data: Path) -> None:
    """Too complex, or stuck: an error of its own, its pages are free, its neighbours unharmed."""
    tokenizer = Tokenizer.char(["abc"])
    engine = Engine(model_for(tokenizer), tokenizer)
    [neighbour] = engine.generate(["b"], sampled(40))
    stuck = Request([0], sampled(), constraint=Constraint.regex("a?b?c?[XY]"))
    hard = Request([0], sampled(), constraint=Constraint.regex("(a?){1000}a{1000}"))
    found = [engine.add(request) for request in (stuck, hard, Request([1], sampled(40)))]
    assert len([*engine.as_completed(found)]) == 3
    assert [g.finish_reason for g in found[:2]] == ["error", "error"]
    assert "nothing that the model's tokens can spell" in (found[0].error or "")
    assert "too many" in (found[1].error or "")
    assert found[2].ids == neighbour.ids
    engine.generate(["b"], sampled(2))
    engine.step()
    assert engine.stats.pages_used == 0


@pytest.mark.parametrize(
    ("kind", "source", "says"),
    [
        ("json", '{"properties": {"a": {"items": {"not": {}}}}}', "at /properties/a/items: Unimpl"),
        ("json", '{"type": "objekt"}', "Invalid type: objekt"),
        (
            "json",
            '{"$defs": {"x": {"$ref": "http://localhost/y"}}, "$ref": "#/$defs/x"}',
            "/$defs/x",
        ),
        ("json", '{"properties":{"a":' * 70 + "{}" + "}}" * 70, "recursion limit"),
        ("json", '{"enum": []}', "Unsatisfiable"),
        ("json", json.dumps({"enum": ["x" * 99] * 3000}), "longer than 50,000 characters"),
        (
            "json",
            json.dumps({"properties": {f"k{i}": {} for i in range(3500)}}),
            "grammar size",
        ),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "[a", "unclosed character class"),
        ("regex", "(" * 500 + ")" * 500, "nest"),
        ("regex", r"[^\s\S]", "nothing that the model"),
        ("regex", "", "only the empty completion"),
        ("regex", "\udc00", "surrogate"),
        ("choice", '["a", "\\ud800"]', "surrogate"),
        ("grammar", "start: x", 'unknown name: "x"'),
        ("grammar", "start: <|endoftext|>", "nothing that the model"),
        ("grammar", "start: " + "(" * 3000 + '"a"' + ")" * 3000, "nested"),
    ],
)
def test_a_constraint_that_cannot_be_compiled_is_rejected(
    byte_engine: Engine, kind: str, source: str, says: str
) -> None:
    with pytest.raises(ValueError) as caught:
        byte_engine.add(Request([1], constraint=Constraint(kind, source)))  # type: ignore[arg-type]
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_is_no_constraint_is_rejected() -> None:
    for schema in ("[1]", "{", "NaN", {"a": {1, 2}}, '{"a":' * 10**5 + "1" + "}" * 10**5):
        with pytest.raises(ValueError, match="not a JSON schema"):
            Constraint.json(schema)
    for texts in ([], "ab", ["a", ""]):
        with pytest.raises(ValueError, match="give a list of texts"):
            Constraint.choice(texts)


def test_what_a_constraint_needs_is_said(
    byte_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request([1], constraint=PERSON)
    with pytest.raises(ValueError, match="need a tokenizer"):
        Engine(byte_engine.model).add(request)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'gptsmith\[serve\]'"):
        Engine(byte_engine.model, byte_engine.tokenizer).add(request)


def test_a_character_that_the_vocabulary_lacks_is_named() -> None:
    tokenizer = Tokenizer.char(["yes no"])
    engine = Engine(model_for(tokenizer), tokenizer)
    with pytest.raises(ValueError, match="'N'"):
        engine.compile(Constraint.choice(["yes", "No"]))
    assert engine.generate(["yes"], constraint=Constraint.choice(["yes", "no"]))
