"""Tiny models of transformers, random weights, with tokenizers of the kinds that people bring.

`save(kind, folder)` makes one. Kinds differ in what begins and ends a text, in the files that say
so, and in how tokens spell text.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

T = 96  # context
TEXT = """The king sat in the hall and the queen stood by the door.
"Who comes there?" said the old king, and his voice was low.
A ship came over the sea in the night; its sails were grey as rain.
They took the sword, the ring and the cup, and went away to the north.
In the morning the snow had gone, and nobody spoke of the ship again.
The smith forged a ring for the queen. It was thin and bright.
Do not go to the mill, said the miller's daughter: the water is high.
One, two, three riders; four, five, six hounds; seven miles to the ford.
When the moon rose the owls began to call from the wood beyond the wall.
She had read the book twice and could not say what it was about.
"""
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
LLAMA3 = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
)  # fmt: skip
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] +"
    " '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# --- tokenizers ----------------------------------------------------------------------------------


def byte_level(
    specials: Sequence[str],
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    normalizer: Any = None,
) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXT.splitlines(), trainer)
    made.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    if normalizer is not None:
        made.normalizer = normalizer
    if before or after:
        names = {name: made.token_to_id(name) for name in (*before, *after)}
        made.post_processor = processors.TemplateProcessing(
            " ".join([*before, "$A", *after]), None, list(names.items())
        )
    return made


def sentencepiece(first: Sequence[str] = ("<unk>", "<s>", "</s>")) -> Tokenizer:
    """As Llama 2: pieces with a mark for the space, single bytes for what they lack, and a decoder
    that drops the first space of a text."""
    learned = Tokenizer(models.BPE(unk_token=first[0]))
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(first), show_progress=False)
    learned.train_from_iterator(TEXT.splitlines(), trainer)
    model = json.loads(learned.to_str())["model"]
    vocab = {name: i for i, name in enumerate(first)}
    vocab |= {f"<0x{i:02X}>": len(first) + i for i in range(256)}
    for piece in sorted(model["vocab"], key=model["vocab"].get):
        vocab.setdefault(piece, len(vocab))
    made = Tokenizer(models.BPE(
        vocab=vocab, merges=[tuple(m) for m in model["merges"]], byte_fallback=True,
        unk_token=first[0], fuse_unk=True,
    ))  # fmt: skip
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    made.add_special_tokens(list(first))
    made.post_processor = processors.TemplateProcessing(f"{first[1]} $A", None, [(first[1], 1)])
    return made


def wordpiece(specials: Sequence[str] = ("[UNK]", "[EOS]")) -> Tokenizer:
    """As BERT, lower-casing: its tokens do not spell the bytes of the text."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=list(specials), show_progress=False
    )
    made.train_from_iterator(TEXT.splitlines(), trainer)
    return made


def wrapped(made: Tokenizer, template: str | None = None, **roles: Any) -> Any:
    stock = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **roles)
    if template is not None:
        stock.chat_template = template
    return stock


# --- models --------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A tokenizer; fields of generation_config.json, by the names of tokens for eos_token_id; the
    token that the model always answers; further fields of config.json and tokenizer_config.json."""

    tokenizer: Callable[[], Any]
    generation: dict[str, Any] | None = None
    always: str | None = None
    config: Mapping[str, Any] = MappingProxyType({})
    tokenizer_config: Mapping[str, Any] = MappingProxyType({})
    family: str = "Llama"


def _llama3(template: str | None = LLAMA3_TEMPLATE) -> Any:
    made = byte_level(LLAMA3, before=LLAMA3[:1])
    return wrapped(made, template, bos_token=LLAMA3[0], eos_token=LLAMA3[4])


def _chatml() -> Any:
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return wrapped(byte_level(CHATML), CHATML_TEMPLATE, **roles)


_TWO_ENDS = {"eos_token_id": ["<|eot_id|>", "<|end_of_text|>"]}
_SPM = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
KINDS: dict[str, Kind] = {
    "spm": Kind(lambda: wrapped(sentencepiece(), **_SPM)),
    "llama3": Kind(_llama3, _TWO_ENDS),
    "always_eot": Kind(_llama3, _TWO_ENDS, always="<|eot_id|>"),
    "always_im": Kind(
        _chatml, {"eos_token_id": list(CHATML[::-2])}, always="<|im_end|>", family="Qwen2"
    ),
    "plain_end": Kind(lambda: _llama3(None), _TWO_ENDS),
    "own_names": Kind(lambda: wrapped(
        byte_level(["[PAD]", "[BOS]", "[EOS]"]),
        bos_token="[BOS]", eos_token="[EOS]", pad_token="[PAD]",
    )),
    "wordpiece": Kind(lambda: wrapped(wordpiece(), eos_token="[EOS]", unk_token="[UNK]")),
    # neighbours: other ways to say the same things
    "gpt2": Kind(
        lambda: wrapped(byte_level(["<|endoftext|>"]), **dict.fromkeys(
            ("bos_token", "eos_token", "unk_token"), "<|endoftext|>")),
        {"eos_token_id": "<|endoftext|>", "bos_token_id": "<|endoftext|>"}, family="GPT2",
    ),
    "gemma": Kind(  # transformers 5 reads tokenizer.json, whatever add_bos_token says
        lambda: wrapped(
            sentencepiece(("<unk>", "<bos>", "<eos>", "<pad>", "<end_of_turn>")),
            bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>",
        ),
        {"eos_token_id": ["<eos>", "<end_of_turn>"], "do_sample": True, "top_k": 64},
        tokenizer_config={"add_bos_token": False, "add_eos_token": True},
    ),
    "deepseek": Kind(lambda: wrapped(
        byte_level(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
                   before=["<｜begin▁of▁sentence｜>"]),
        bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>",
    )),
    "qwen": Kind(  # bos_token null, but bos_token_id in config.json; normalizes
        lambda: wrapped(byte_level(CHATML, normalizer=normalizers.NFC()), CHATML_TEMPLATE,
                        eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        {"eos_token_id": ["<|im_end|>", "<|endoftext|>"], "pad_token_id": "<|endoftext|>"},
        config={"bos_token_id": "<|endoftext|>"}, tokenizer_config={"bos_token": None},
    ),
    "appends": Kind(lambda: wrapped(  # T5's way
        byte_level(["<pad>", "</s>"], after=["</s>"]), eos_token="</s>", pad_token="<pad>",
    )),
    "bert": Kind(lambda: wrapped(
        byte_level(["[CLS]", "[SEP]", "[PAD]"], before=["[CLS]"], after=["[SEP]"]),
        bos_token="[CLS]", eos_token="[SEP]", pad_token="[PAD]",
    )),
    "two_before": Kind(lambda: wrapped(
        byte_level(["<s>", "</s>", "<en>"], before=["<s>", "<en>"]),
        bos_token="<s>", eos_token="</s>",
    )),
    "added_tokens": Kind(  # AddedToken objects, and an id that no token has
        lambda: wrapped(byte_level(["<start>", "<stop>"]),
                        bos_token=AddedToken("<start>"), eos_token=AddedToken("<stop>")),
        {"eos_token_id": ["<stop>", 99_999], "bos_token_id": "<start>"},
        tokenizer_config={
            "eos_token": {"__type": "AddedToken", "content": "<stop>", "lstrip": False,
                          "normalized": False, "rstrip": False, "single_word": False},
        },
    ),
    "no_eos_in_generation": Kind(
        lambda: wrapped(byte_level(["<stop>"]), eos_token="<stop>"), {"do_sample": False},
    ),
    "nothing": Kind(lambda: wrapped(byte_level([]))),
}  # fmt: skip
LISTED = tuple(KINDS)[:7]


def save(kind: str, folder: Path, labels: int = 0) -> Path:
    """Write a model of transformers, a classifier given a number of labels."""
    made = KINDS[kind]
    stock = made.tokenizer()

    def ids(value: Any) -> Any:
        if isinstance(value, list):
            return [ids(v) for v in value]
        return stock.convert_tokens_to_ids(value) if isinstance(value, str) else value

    special = {f"{role}_token_id": getattr(stock, f"{role}_token_id")
               for role in ("bos", "eos", "pad")}  # fmt: skip
    special |= {name: ids(value) for name, value in made.config.items()}
    if made.family == "GPT2":
        sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=T)
    else:
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=T,
                     tie_word_embeddings=False)  # fmt: skip
    more = {"num_labels": labels} if labels else {}
    if labels and special["pad_token_id"] is None:
        special["pad_token_id"] = stock.eos_token_id
    head = "LMHeadModel" if made.family == "GPT2" else "ForCausalLM"
    cls = getattr(transformers, made.family + ("ForSequenceClassification" if labels else head))
    torch.manual_seed(0)
    config = cls.config_class(
        vocab_size=len(stock), initializer_range=0.2, **sizes, **special, **more
    )
    model = cls(config)
    if made.always is not None and not labels:
        _always(model, stock.convert_tokens_to_ids(made.always))
    model.save_pretrained(folder)
    stock.save_pretrained(folder)
    if made.tokenizer_config:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **made.tokenizer_config}))
    path = folder / "generation_config.json"
    if made.generation is not None and not labels:
        path.write_text(json.dumps({n: ids(v) for n, v in made.generation.items()}))
    return folder


def _always(model: Any, token: int) -> None:
    """Weights with which the likeliest token is always the same."""
    with torch.no_grad():
        direction = torch.randn(32)
        model.model.embed_tokens.weight.copy_(direction.expand_as(model.model.embed_tokens.weight))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = direction
