"""Tokenizers and chat templates of transformers, read and written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import random_run
from transformers import AutoTokenizer

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.commands.export import exportable
from gptsmith.interop import hf
from gptsmith.interop.hf_tokenizer import read, read_template
from gptsmith.model.config import ModelConfig, RopeScaling
from gptsmith.tokenizer import Tokenizer

CHAR = Tokenizer.char(["".join(map(chr, range(48, 111)))])  # 64 ids with <|endoftext|>
BPE = Tokenizer.train_bpe(
    ["The quick brown fox jumps over the lazy dog; it barks: woof!\n" * 3], 280
)

# What is read


def test_vocab_and_merges_of_gpt2(tmp_path: Path) -> None:
    bpe = Tokenizer.train_bpe(["aaaa bbbb aaaa bb"], 260)
    document = json.loads(bpe.to_json())
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        read(tmp_path, "gpt2")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"SentencePiece.*save_pretrained"):
        read(tmp_path, "gpt2")
    (tmp_path / "vocab.json").write_text(json.dumps(document["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *document["model"]["merges"]]))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|pad|>": bpe.vocab_size}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|pad|>"}))
    found = read(tmp_path, "gpt2")
    assert found.encode("aaaa bb cc") == bpe.encode("aaaa bb cc")
    assert found.special_tokens["<|pad|>"] == bpe.vocab_size == 260
    with pytest.raises(ValueError, match="of a llama, which do not say how text is split"):
        read(tmp_path, "llama")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    with pytest.raises(ValueError, match="do not say how text is split"):
        read(tmp_path, "gpt2")


def test_special_tokens_of_other_tokenizer_files(tmp_path: Path) -> None:
    CHAR.save(tmp_path / "tokenizer.json")
    config: dict[str, Any] = {
        "eos_token": {"content": "a", "special": True},
        "added_tokens_decoder": {"63": {"content": "<|endoftext|>", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read(tmp_path, "llama").special_tokens == {"a": 49, "<|endoftext|>": 63}
    config["added_tokens_decoder"] = {"70": {"content": "<x>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="disagree about '<x>', 70 or 64"):
        read(tmp_path, "llama")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, '
         '"added_tokens": [5]}', r"tokenizer\.json: `tokenizers` cannot read it"),
        ("tokenizer.json", '{"model": ' + "[" * 100_000, r"tokenizer\.json: .*nested too deeply"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a mapping"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<y>", '
         '"special": true}}}', "'<y>' the id 'x'"),
        ("added_tokens.json", '{"<y>": -1}', "'<y>' the id -1"),
        ("added_tokens.json", '{"<y>": 1.5}', r"'<y>' the id 1\.5"),
    ],
)  # fmt: skip
def test_forged_files_are_rejected(file: str, text: str, message: str, tmp_path: Path) -> None:
    CHAR.save(tmp_path / "tokenizer.json")
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, "llama")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        {"extra_special_tokens": 5},
        {"extra_special_tokens": "abc"},
        {"additional_special_tokens": [{"a": 1}, 5, None]},
        {"added_tokens_decoder": [1]},
        {"bos_token": 5, "chat_template": [{"name": [1], "template": "x"}, 5]},
    ],
)
def test_meaningless_fields_are_ignored(config: dict[str, Any], tmp_path: Path) -> None:
    CHAR.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read(tmp_path, "llama").to_json() == CHAR.to_json()
    assert read_template(tmp_path, CHAR) == (None, [])


def test_chat_templates(tmp_path: Path) -> None:
    ended = CHAR.add_special_tokens(["<|end|>"])
    template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"

    def given(config: dict[str, Any] | None, **files: str) -> Any:
        for path in (*tmp_path.glob("chat_template.*"), tmp_path / "tokenizer_config.json"):
            path.unlink(missing_ok=True)
        for suffix, text in files.items():
            (tmp_path / f"chat_template.{suffix}").write_text(text)
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return read_template(tmp_path, ended)

    assert given(None) == (None, [])
    assert given({"chat_template": template})[0] == template
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    assert given({"chat_template": several})[0] == template
    assert given(None, json=json.dumps({"chat_template": template}))[0] == template
    assert given({"chat_template": "other"}, jinja=template)[0] == template
    unusable, (note,) = given({"chat_template": "{{ messages.nothing() }}"})
    assert unusable is None
    assert "the chat template is left out" in note
    asks = template.replace("<|end|>", "{{ eos_token }}")
    assert given({"chat_template": asks, "eos_token": "<|endoftext|>"})[0] == asks
    told, _ = given({"chat_template": asks, "eos_token": "<|end|>"})
    assert told == f'{{% set eos_token = "<|end|>" %}}\n{asks}'


def test_our_template_is_read(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert read_template(tmp_path, CHAR.add_special_tokens(CHAT_TOKENS)) == (TEMPLATE, [])
    (note,) = read_template(tmp_path, CHAR)[1]
    assert "no special token ends an answer" in note


# What is written


def exported(folder: Path, tokenizer: Tokenizer, template: str | None = None, **axes: Any) -> Path:
    """A folder of transformers with this tokenizer, its model the smallest there is."""
    config = ModelConfig(
        n_layer=1, n_head=4, n_embd=8, context_length=64, vocab_size=tokenizer.vocab_size, **axes
    )
    hf.export(exportable(random_run(folder / "run", config, tokenizer, template)), folder / "out")
    return folder / "out"


STRINGS = st.text() | st.text(alphabet="ab <|>endoftxu's\n 01é漢🙂\u0301")
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: BPE,
    "byte": Tokenizer.byte,
    "char": lambda: Tokenizer.char(["ab <|>endoftxu's\n01é漢🙂\u0301"]),
}


FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": dict(norm="layernorm", mlp="gelu", position="learned", bias="all"),
    "llama": {},
    "qwen2": dict(bias="qkv"),
    "qwen3": dict(qk_norm=True),
    "arcee": dict(mlp="relu2"),
}
PAIRS = [(kind, family) for kind in KINDS for family in FAMILIES]


@pytest.mark.parametrize(("kind", "family"), [*PAIRS, ("gpt2", "gpt2"), ("gpt2", "qwen3")])
def test_tokenizers_agree(
    kind: str, family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "gpt2":
        ours = Tokenizer.gpt2(request.getfixturevalue("real_data") / "gpt2_bpe")
    else:
        ours = KINDS[kind]()
    ours = ours.add_special_tokens(CHAT_TOKENS)
    theirs = AutoTokenizer.from_pretrained(exported(tmp_path, ours, **FAMILIES[family]))
    assert len(theirs) == ours.vocab_size
    strings = st.text(alphabet="ab <|>endoftxu's\n01é漢🙂\u0301") if kind == "char" else STRINGS

    @settings(max_examples=40)
    @given(strings)
    def same(text: str) -> None:
        ids = ours.encode(text)
        found = theirs(text, split_special_tokens=True)
        assert found["input_ids"] == ids
        assert set(found) == {"input_ids", "attention_mask"}
        if "<|" not in text:
            assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids) == text

    same()
    plain = "a<|end|>b<|endoftext|>"
    assert theirs(plain, split_special_tokens=True)["input_ids"] == ours.encode(plain)
    end, eos = ours.special_tokens["<|end|>"], ours.eos_id
    a, b = ours.encode("a"), ours.encode("b")
    assert theirs(plain)["input_ids"] == [*a, end, *b, eos]
    assert theirs.decode([*a, end, eos], skip_special_tokens=True) == "a"
    assert (theirs.eos_token_id, theirs.pad_token) == (eos, "<|pad|>")
    assert theirs.model_max_length == 64


def test_bos_token_is_kept(tmp_path: Path) -> None:
    """As in Llama 3: the tokenizer puts a token before each text, the template its own."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    document = json.loads(BPE.add_special_tokens(names).to_json())
    bos = document["added_tokens"][-3]["id"]
    a, special = {"Sequence": {"id": "A", "type_id": 0}}, {"id": names[0], "type_id": 0}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": special}, a],
        "pair": [{"SpecialToken": special}, a],
        "special_tokens": {names[0]: {"id": names[0], "ids": [bos], "tokens": [names[0]]}},
    }
    document["model"]["ignore_merges"] = True
    ours = Tokenizer(json.dumps(document))
    template = (
        "{{ bos_token }}{% for m in messages %}<|eot_id|>{{ m['role'] }}\n{{ m['content'] }}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|eot_id|>assistant\n{% endif %}"
    )
    scaling = RopeScaling(rope_type="llama3", factor=4, original_max_position_embeddings=16)
    out = exported(tmp_path, ours, template, rope_scaling=scaling)
    theirs = AutoTokenizer.from_pretrained(out)
    assert (
        theirs("The fox")["input_ids"] == ours.prompt("The fox") == [bos, *ours.encode("The fox")]
    )
    assert theirs.bos_token == names[0]
    talk: list[Any] = [dict(role="user", content="The fox")]
    ids = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)
    assert ids["input_ids"] == ChatTemplate(template, ours).prompt(talk)
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [ours.special_tokens[name] for name in ("<|eot_id|>", "<|endoftext|>")]
    assert read(out, "llama").to_json() == ours.to_json()
    assert read_template(out, ours) == (template, [])


def test_chat_templates_render_the_same(tmp_path: Path) -> None:
    tokenizer = BPE.add_special_tokens(CHAT_TOKENS)
    out, ours = exported(tmp_path, tokenizer, TEMPLATE), ChatTemplate(TEMPLATE, tokenizer)
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs.chat_template == TEMPLATE
    talk: list[Any] = [
        dict(role="system", content="Be  kind.\n"),
        dict(role="user", content=" The fox? "),
        dict(role="assistant", content="the dog"),
        dict(role="user", content="and it?"),
    ]
    ids = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)
    assert ids["input_ids"] == ours.prompt(talk)
    assert theirs.apply_chat_template(talk[:3], return_dict=True)["input_ids"] == (
        ours.encode(talk[:3]).ids
    )
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [*ours.stop_ids]
    assert generation["pad_token_id"] == tokenizer.special_tokens["<|pad|>"]
