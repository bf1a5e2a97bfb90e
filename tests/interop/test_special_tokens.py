"""Special tokens are those of the model's own files, from import to export, in every stage."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import foreign_models
import numpy as np
import pytest
import torch
import transformers
from foreign_models import KINDS, LISTED
from runs import imported_run

from gptsmith import cli
from gptsmith.commands.export import exportable
from gptsmith.data.classification import encode_texts
from gptsmith.data.options import PrepareConfig, ReadOptions
from gptsmith.data.prepare import prepare
from gptsmith.data.report import ReadReport
from gptsmith.data.shards import Corpus
from gptsmith.data.sources import encode_source
from gptsmith.evaluate.classification import log_probabilities
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.interop import hf
from gptsmith.run import Run
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.roles import as_ids
from gptsmith.train.runtime import choose_precision

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = (
    "The king", "Do not go", "  two", "", "A ship 🚢 came", "日本", "the queen stood by the",
    "One, two,", "naïve café", 'said "yes"', "<s> is plain text</s>", "line\nbreak", "x", "7",
)  # fmt: skip
GREEDY = SamplingConfig(temperature=0, max_new_tokens=12)
FP32 = choose_precision("fp32", torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = foreign_models.save(kind, tmp_path_factory.mktemp("foreign") / kind)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def imported(
    folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    runs: dict[str, Run] = {}

    def get(kind: str) -> Run:
        if kind not in runs:
            out = tmp_path_factory.mktemp("runs") / kind
            runs[kind] = imported_run(out, hf.open_folder(folder(kind)))
        return runs[kind]

    return get


def stock_tokenizer(path: Path) -> Any:
    # AutoTokenizer gives every Qwen2 the tokenizer of Qwen2, whatever tokenizer.json says.
    return transformers.PreTrainedTokenizerFast.from_pretrained(path)


def stock_model(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def roles_of(path: Path) -> dict[str, Any]:
    tokenizer = stock_tokenizer(path)
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    found = {name: getattr(tokenizer, name) for name in names}
    config = transformers.AutoConfig.from_pretrained(path)
    return found | {name: getattr(config, f"{name}_id") for name in names[:3]}


def stock_ends(path: Path, model: Any) -> list[int]:
    """What ends a text in `generate`, else the tokenizer's end."""
    ends = as_ids(model.generation_config.eos_token_id)
    return ends or as_ids(stock_tokenizer(path).eos_token_id)


def continuation(path: Path, model: Any, prompt: str) -> str:
    """By transformers, greedily: what is new in the text of prompt and continuation."""
    tokenizer = stock_tokenizer(path)
    tokenizer.split_special_tokens = True
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    size = len(model.get_input_embeddings().weight)
    with torch.no_grad():
        for _ in range(GREEDY.max_new_tokens):
            logits = model(ids).logits[0, -1, : min(size, len(tokenizer))]
            if int(logits.argmax()) in stock_ends(path, model):
                break
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    start = len(tokenizer(prompt).input_ids)
    before = tokenizer.decode(ids[0, :start], skip_special_tokens=True)
    specials = set(tokenizer.all_special_ids)
    assert not specials & set(ids[0, start:].tolist()), "choose another seed"
    return str(tokenizer.decode(ids[0], skip_special_tokens=True)[len(before) :])


# --- import --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ids_around_a_text_are_those_of_the_stock_tokenizer(
    kind: str, folder: Callable[[str], Path], imported: Callable[[str], Run]
) -> None:
    ours, stock = imported(kind).tokenizer, stock_tokenizer(folder(kind))
    stock.split_special_tokens = True
    for text in PROMPTS:
        expected = stock(text).input_ids
        assert [*ours.prefix, *ours.encode(text), *ours.special_ids.suffix] == expected
    special = ours.special_ids
    ends = as_ids(json.loads((folder(kind) / "config.json").read_text()).get("eos_token_id"))
    if (path := folder(kind) / "generation_config.json").is_file():
        ends = as_ids(json.loads(path.read_text()).get("eos_token_id")) or ends
    assert [*special.eos_ids] == [i for i in ends or as_ids(stock.eos_token_id) if i < len(stock)]
    assert (stock.eos_token_id or special.eos) == special.eos
    assert stock.unk_token_id == special.unk
    assert (stock.bos_token_id or special.bos) == special.bos


@pytest.mark.parametrize("kind", KINDS)
def test_export_writes_special_tokens_back_unchanged(
    kind: str, folder: Callable[[str], Path], imported: Callable[[str], Run], tmp_path: Path
) -> None:
    hf.export(exportable(imported(kind)), tmp_path / "out")
    assert roles_of(tmp_path / "out") == roles_of(folder(kind))
    if kind == "nothing":
        return
    name = "generation_config.json"
    before, after = (json.loads((p / name).read_text()) for p in (folder(kind), tmp_path / "out"))
    for dropped in ("transformers_version", "_from_model_config"):
        before.pop(dropped, None)
    if kind == "added_tokens":  # without the id that no token has
        before["eos_token_id"] = before["eos_token_id"][:1]
    assert after == before
    ours, stock = stock_tokenizer(tmp_path / "out"), stock_tokenizer(folder(kind))
    for text in PROMPTS:
        assert ours(text).input_ids == stock(text).input_ids
    again = imported_run(tmp_path / "again", hf.open_folder(tmp_path / "out"))
    assert again.tokenizer.special_ids == imported(kind).tokenizer.special_ids


# --- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_generated_text_is_that_of_transformers(
    kind: str, folder: Callable[[str], Path], imported: Callable[[str], Run]
) -> None:
    run = imported(kind)
    prompts = [p for p in PROMPTS if p or run.tokenizer.prefix]
    if run.tokenizer.special_ids.suffix:  # a text to be continued has not ended
        prompts = []
    model = stock_model(folder(kind))
    found = Engine(run.load_model(), run.tokenizer).generate(prompts, GREEDY)
    for prompt, generation in zip(prompts, found, strict=True):
        try:
            expected = continuation(folder(kind), model, prompt)
        except AssertionError:  # a special token inside the text, which transformers leaves out
            continue
        assert generation.text == expected, prompt
        pieces: list[str] = []
        stream = run.tokenizer.stream(run.tokenizer.prompt(prompt))
        pieces = [stream.push(i) for i in generation.ids]
        assert "".join([*pieces, stream.flush()]) == expected


@pytest.mark.parametrize("kind", ["always_eot", "always_im"])
def test_generation_ends_at_any_end_of_the_model(
    kind: str, imported: Callable[[str], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = imported(kind)
    assert cli.main(["generate", str(run.path), "--prompt", "The king"]) == 0
    assert capsys.readouterr().out == "The king\n"


def test_stop_string_sees_the_space_before_a_word(imported: Callable[[str], Run]) -> None:
    run = imported("spm")
    engine = Engine(run.load_model(), run.tokenizer)
    [free] = engine.generate("The king", GREEDY)
    [stopped] = engine.generate("The king", GREEDY, stop=[" "])
    assert stopped.text == free.text.partition(" ")[0]


# --- corpora and evaluation ----------------------------------------------------------------------

LETTERS = "abdefghilmno"
DOCUMENTS = ("The king sat in the hall.", "A SHIP came 🚢", "naïve café, ﬁve  spaces")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    texts = [*DOCUMENTS] * 4
    path.write_text(
        "".join(json.dumps({"text": f"{t} '{LETTERS[i]}'"}) + "\n" for i, t in enumerate(texts))
    )
    return path


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "nothing"])
def test_documents_of_a_corpus_begin_and_end_as_texts_of_the_model(
    kind: str, imported: Callable[[str], Run], source: Path, tmp_path: Path
) -> None:
    run = imported(kind)
    ours, special = run.tokenizer, run.tokenizer.special_ids
    config = PrepareConfig(
        sources=(str(source),), out=tmp_path / "corpus", tokenizer=str(run.path), val_fraction=0.3
    )
    corpus = Corpus.open(prepare(config))
    assert corpus.tokenizer.fingerprint == ours.fingerprint
    assert corpus.document == special.document
    ids = np.concatenate(corpus.train).tolist()
    before, after = corpus.document.before, corpus.document.after
    texts = [row["text"] for row in map(json.loads, source.read_text().splitlines())]
    parts = {t: [*before, *ours.encode(t), *after] for t in texts}
    held = [t for t in texts if _holds(ids, parts[t])]
    assert list(chain(*(parts[t] for t in held))) == ids
    assert 0 < len(held) < len(texts)
    if special.prefix:
        assert before == special.prefix
    elif special.suffix:
        assert (before, after) == ((), special.suffix)
    assert {*special.eos_ids, special.eos}.intersection((*before, *after))
    never = set(corpus.document.context_only)
    assert never == set(before) - {*special.eos_ids, special.eos}
    stream, text_bytes = encode_source(str(source), ours, ReadOptions(), ReadReport())
    assert stream.tolist() == list(chain(*parts.values()))
    assert text_bytes == sum(len(t.encode()) for t in texts)
    sizes = corpus.manifest["splits"]
    assert sum(sizes[s]["bytes"] for s in sizes) == text_bytes


def _holds(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


@pytest.mark.parametrize("kind", ["spm", "llama3", "own_names", "wordpiece", "qwen", "two_before"])
def test_perplexity_is_the_stock_models_per_byte_of_text(
    kind: str,
    folder: Callable[[str], Path],
    imported: Callable[[str], Run],
    source: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "scores.json"
    run = imported(kind)
    assert cli.main(["evaluate", str(run.path), "--data", str(source), "--out", str(out),
                     "--precision", "fp32", "--window", "96"]) == 0  # fmt: skip
    result = json.loads(out.read_text())["perplexity"]
    stream, _ = encode_source(str(source), run.tokenizer, ReadOptions(), ReadReport())
    around = run.tokenizer.special_ids.document
    nats, targets = 0.0, 0
    model = stock_model(folder(kind))
    for start in range(0, len(stream) - 1, 96):
        ids = torch.from_numpy(stream[start : start + 97].astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0, :, : len(stock_tokenizer(folder(kind)))]
        p = logits.double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        scored = torch.tensor([i not in around.context_only for i in ids[1:].tolist()])
        nats, targets = nats - float(p[scored].sum()), targets + int(scored.sum())
    assert result["n"] == targets
    assert result["val_loss"] == pytest.approx(nats / targets, rel=1e-4)
    text_bytes = sum(
        len(json.loads(line)["text"].encode()) for line in source.read_text().splitlines()
    )
    expected = nats / np.log(2) / text_bytes
    assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [*LISTED, "appends", "bert", "two_before", "gemma", "gpt2"])
def test_classes_equal_the_stock_pipeline(kind: str, tmp_path: Path) -> None:
    path = foreign_models.save(kind, tmp_path / "model", labels=3)
    run = imported_run(tmp_path / "run", hf.open_folder(path))
    ours = run.load_model()
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = stock_tokenizer(path)
    tokenizer.split_special_tokens = True
    texts = [p.strip() for p in PROMPTS if p.strip()] + ["the king sat " * 60]
    ids, truncated = encode_texts(run.tokenizer, texts, ours.config.context_length)
    found = log_probabilities(ours, ids, FP32)  # type: ignore[arg-type]
    assert truncated == 1
    for text, row in zip(texts, found, strict=True):
        given = tokenizer(text, return_tensors="pt", truncation=True, max_length=foreign_models.T)
        with torch.no_grad():
            expected = stock(input_ids=given.input_ids).logits.log_softmax(-1)[0]
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-4)
    hf.export(exportable(run), tmp_path / "out")
    assert roles_of(tmp_path / "out") == roles_of(path) | (
        {} if stock_tokenizer(path).pad_token else {"pad_token": roles_of(path)["pad_token"]}
    )


# --- tokenizers whose files do not say -----------------------------------------------------------


def test_end_of_text_that_no_file_names_is_given_by_an_option(
    tmp_path: Path, user_error: Callable[..., str], source: Path
) -> None:
    made = foreign_models.byte_level(["<begin>", "<fin>", "<halt>"])
    (tmp_path / "alone").mkdir()
    made.save(str(tmp_path / "alone" / "tokenizer.json"))
    words = ["prepare", source, "--out", tmp_path / "corpus", "--tokenizer", tmp_path / "alone"]
    error = user_error(*words)
    assert "'<fin>'" in error
    assert "--eos-token" in error
    assert "not a token" in user_error(*words, "--eos-token", "<end>")
    words += ["--eos-token", "<fin>", "--eos-token", "<halt>"]
    assert cli.main([*map(str, words)]) == 0
    tokenizer = Corpus.open(tmp_path / "corpus").tokenizer
    assert tokenizer.special_ids.eos_ids == (made.token_to_id("<fin>"), made.token_to_id("<halt>"))
    path = foreign_models.save("nothing", tmp_path / "model")
    run = tmp_path / "run"
    assert cli.main(["import", str(path), "--out", str(run)]) == 0
    assert Tokenizer.load(run).special_ids.eos_ids == ()
    assert cli.main(["generate", str(run), "--prompt", "The", "--max-new-tokens", "3"]) == 0
    assert "--eos-token" in user_error("generate", run)
    named = tmp_path / "named"
    assert cli.main(["import", str(path), "--out", str(named), "--eos-token", "."]) == 0
    assert Tokenizer.load(named).decode(Tokenizer.load(named).special_ids.eos_ids) == "."


@pytest.mark.parametrize("value", ["2", True, 1.5, [1, "x"], {"content": "</s>"}])
def test_ids_of_another_type_are_rejected(value: Any, tmp_path: Path) -> None:
    path = foreign_models.save("own_names", tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is .*expected"):
        hf.open_folder(path)


def test_stored_roles_follow_a_tokenizer(imported: Callable[[str], Run], tmp_path: Path) -> None:
    """Into a copy, through added tokens, and apart from a tokenizer of another model."""
    ours = imported("llama3").tokenizer
    ours.save(tmp_path / "tokenizer.json")
    copy = Tokenizer.load(tmp_path)
    assert (copy.fingerprint, copy.special_ids) == (ours.fingerprint, ours.special_ids)
    assert ours.add_special_tokens(["<new>"]).special_ids.eos_ids == ours.special_ids.eos_ids
    plain = Tokenizer(ours.to_json())
    assert plain.fingerprint != ours.fingerprint
    plain.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == plain.fingerprint
