"""Makes the files in seeds/, a folder for each input of each parser: python make_seeds.py

Small, undamaged files of the kinds that people bring. Those of TensorFlow's GPT-2, runs and a
prepared corpus are test fixtures already.
"""

import datetime
import gzip
import json
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers as hf
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from gptsmith.chat_template.template import TEMPLATE
from gptsmith.interop.external_model import ExportableModel
from gptsmith.interop.hf import export
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent / "seeds"
FIXTURES = HERE.parent.parent
TEXT = "It was the best of times, it was the worst of times. 12 cats & 3 dogs! Ünïcode 🙂\n"

MARKED = """\
{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}
{{- m.content | trim }}<|im_end|>{% endgeneration %}
{%- else %}{{- '<|' + m.role + '|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""
MACROS = """\
{%- macro turn(role, text, end='<|end|>') -%}<|{{ role }}|>{{ text }}{{ end }}{%- endmacro -%}
{%- set ns = namespace(n=0) -%}
{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}
{%- if tools is defined and tools -%}{{ tools | tojson(indent=2) }}{%- endif -%}
{{- turn(m['role'], m['content']) -}}
{%- if ns.n > 100 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
RECIPE = """\
model: tiny
data: data/shakespeare
out: runs/a
train:
  steps: 200
  batch_size: 8
  total_batch_tokens: 4096
  precision: fp32
  seed: 7
optim:
  learning_rate: 1e-3
  weight_decay: 0.1
eval:
  interval: 50
  prompt: "The "
save:
  keep_last: 2
"""


def write(path: str, data: bytes | str) -> Path:
    target = HERE / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data.encode() if isinstance(data, str) else data)
    return target


def tokenizer_seeds() -> None:
    ours = {"bpe": Tokenizer.train_bpe([TEXT * 3], 280), "char": Tokenizer.char([TEXT])}
    for name, tokenizer in ours.items():
        write(f"tokenizer/{name}/tokenizer.json", tokenizer.to_json())
    for name in ("encoder.json", "vocab.bpe"):
        tables = FIXTURES / "interop" / "fixtures" / "tf_gpt2"
        write(f"tokenizer/tables/{name}", (tables / name).read_bytes())
    pieces = [chr(i) for i in range(97, 123)] + ["\u2581", "\u2581t", "he", "\u2581the"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(pieces)}
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he")]
    spm = hf.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    spm.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    spm.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    spm.add_special_tokens(["<unk>", "<s>", "</s>"])
    spm.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words = {"[UNK]": 0, "[EOS]": 1, "the": 2, "cat": 3, "##s": 4, "a": 5, "##a": 6, "hello": 7}
    wordpiece = hf.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    wordpiece.add_special_tokens(["[UNK]", "[EOS]"])
    unigram = hf.Tokenizer(
        models.Unigram([("<unk>", 0.0), *((p, -float(i + 1)) for i, p in enumerate(pieces))], 0)
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.add_special_tokens(["</s>"])
    split = json.loads(ours["bpe"].to_json())
    regex = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": regex},
                "behavior": "Isolated",
                "invert": False,
            },
            level | {"use_regex": False},
        ],
    }
    for name, other in (("spm", spm), ("wordpiece", wordpiece), ("unigram", unigram)):
        write(f"tokenizer/{name}/tokenizer.json", other.to_str())
    write("tokenizer/split/tokenizer.json", json.dumps(split))


def table_seeds() -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"{TEXT.strip()} {n}", "label": "ab"[n % 2], "n": n, "x": n / 3} for n in range(5)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    csv = "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows)
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": f"A number, {n}."},
            ]
        }
        for n in range(4)
    ]
    chat = "".join(json.dumps(row) + "\n" for row in talks)
    for parser in ("rows", "documents"):
        write(f"{parser}/jsonl/a.jsonl", lines)
        write(f"{parser}/csv/a.csv", csv)
        write(
            f"{parser}/tsv/a.tsv",
            csv.replace('"', "")
            .replace(",a\n", "\ta\n")
            .replace(",b\n", "\tb\n")
            .replace("text,", "text\t"),
        )
        write(f"{parser}/jsonl.gz/a.jsonl.gz", gzip.compress(lines.encode(), mtime=0))
        write(f"{parser}/csv.gz/a.csv.gz", gzip.compress(csv.encode(), mtime=0))
    write("rows/json/a.json", json.dumps(rows, indent=1))
    write("documents/txt/a.txt", TEXT * 9)
    write("conversations/jsonl/a.jsonl", chat)
    write("conversations/json/a.json", json.dumps(talks))
    pairs = [{"instruction": "Add.", "input": f"{n} + 1", "output": f"{n + 1}"} for n in range(4)]
    write("conversations/alpaca/a.json", json.dumps(pairs))
    shutil.copytree(
        FIXTURES / "fixtures" / "landed", HERE / "conversations" / "prepared",
        ignore=lambda folder, names: [name for name in names if name != "chat.arrow"],
        dirs_exist_ok=True,
    )  # fmt: skip
    when = datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC)
    odd = [
        {
            "text": row["text"], "when": when, "money": Decimal("1.50"), "bytes": b"\0\xff",
            "day": when.date(), "nested": {"a": [1, None], "b": {"c": True}}, "none": None,
        }
        for row in rows
    ]  # fmt: skip
    ids = [{"input_ids": [1, 2, 3, n], "labels": [1, 2, 3, n]} for n in range(4)]
    labels = pa.array(["a"] * 5).dictionary_encode()
    tables = {
        "text": pa.Table.from_pylist(rows), "odd": pa.Table.from_pylist(odd),
        "messages": pa.Table.from_pylist(talks), "ids": pa.Table.from_pylist(ids),
        "category": pa.table({"text": [row["text"] for row in rows], "label": labels}),
    }  # fmt: skip
    for name, table in tables.items():
        for parser in ("rows", "conversations" if name == "messages" else "documents"):
            folder = HERE / parser
            for kind in ("snappy", "zstd"):
                (folder / f"{name}-{kind}").mkdir(parents=True, exist_ok=True)
                pq.write_table(
                    table, folder / f"{name}-{kind}" / "a.parquet", compression=kind,
                    store_schema=kind == "zstd",
                )  # fmt: skip
            for kind, new in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
                (folder / f"{name}-{kind}").mkdir(parents=True, exist_ok=True)
                options = pa.ipc.IpcWriteOptions(compression="lz4" if name == "text" else None)
                path = str(folder / f"{name}-{kind}" / "a.arrow")
                with new(path, table.schema, options=options) as sink:
                    sink.write_table(table, max_chunksize=2)


def model_seeds() -> None:
    tokenizer = Tokenizer.train_bpe([TEXT * 3], 264)
    presets = {"gpt2": "gpt2", "llama": "smollm2-135m", "qwen3": "qwen3-0.6b"}
    for family, preset in presets.items():
        torch.manual_seed(0)
        config = ModelConfig.preset(
            preset, n_layer=1, n_head=2, n_embd=8, context_length=16, d_ff=16,
            vocab_size=tokenizer.vocab_size,
            **({} if preset == "gpt2" else {"n_kv_head": 1}),
        )  # fmt: skip
        model = GPTModel(config)
        shutil.rmtree(HERE / "model" / family, ignore_errors=True)
        export(
            ExportableModel("seed", config, model.state_dict, tokenizer),
            HERE / "model" / family,
        )
        (HERE / "model" / family / "README.md").unlink()
        if preset == "gpt2":
            nanogpt(tokenizer)
    source = FIXTURES / "interop" / "fixtures" / "tf_gpt2"
    names = shutil.ignore_patterns("make.py", "logits.json", "__pycache__")
    shutil.copytree(source, HERE / "model" / "openai", ignore=names, dirs_exist_ok=True)


def nanogpt(tokenizer: Tokenizer) -> None:
    """A checkpoint as nanoGPT's train.py saves it, with an optimizer."""
    C, T, V = 8, 16, tokenizer.vocab_size
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C)}
    for name, shape in (
        ("ln_1", (C,)), ("attn.c_attn", (3 * C, C)), ("attn.c_proj", (C, C)), ("ln_2", (C,)),
        ("mlp.c_fc", (4 * C, C)), ("mlp.c_proj", (C, 4 * C)),
    ):  # fmt: skip
        shapes[f"transformer.h.0.{name}.weight"] = shape
    shapes["transformer.ln_f.weight"] = (C,)
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    parameter = torch.nn.Parameter(weights["transformer.ln_f.weight"].clone())
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    path = write("model/nanogpt/ckpt.pt", b"")
    torch.save(
        {
            "model": weights, "optimizer": optimizer.state_dict(),
            "model_args": {
                "n_layer": 1, "n_head": 2, "n_embd": C, "block_size": T, "bias": False,
                "vocab_size": V, "dropout": 0.0,
            },
            "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {"device": "cpu"},
        },
        path,
    )  # fmt: skip
    tokenizer.save(path.parent)


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    write("template/ours/chat_template.jinja", TEMPLATE)
    write("template/macros/chat_template.jinja", MACROS)
    write("template/marked/chat_template.jinja", MARKED)
    write("recipe/pretrain/recipe.yaml", RECIPE)
    tokenizer_seeds()
    table_seeds()
    model_seeds()


if __name__ == "__main__":
    main()
