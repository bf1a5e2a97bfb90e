"""Parity with lm-evaluation-harness, item by item; and the harness evaluates our runs itself."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from gptsmith.commands.export import exportable
from gptsmith.data.rows import read_rows
from gptsmith.evaluate import accuracy, harness
from gptsmith.evaluate.likelihood import encode_pairs
from gptsmith.evaluate.multiple_choice import TASKS, Question, load
from gptsmith.evaluate.prefix_tree import common_prefix
from gptsmith.interop import hf
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.run import Run
from gptsmith.run.create import create_from_weights
from gptsmith.tokenizer import Tokenizer

N = 24
SUBJECT = "anatomy"

Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file][:N]


# --- rows in the form of the Hub, made from local files ------------------------------------------


def hub_arc(row: Mapping[str, Any]) -> dict[str, Any]:
    labels = list("ABCD")
    return {
        "question": row["query"].removeprefix("Question: "),
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def hub_piqa(row: Mapping[str, Any]) -> dict[str, Any]:
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {
        "goal": goal,
        "sol1": row["choices"][0],
        "sol2": row["choices"][1],
        "label": row["gold"],
    }


def hub_winogrande(row: Mapping[str, Any]) -> dict[str, Any]:
    one, two = row["context_options"]
    start = one[: common_prefix(one, two)].rfind(" ") + 1
    return {
        "sentence": f"{one[:start]}_ {row['continuation']}",
        "option1": one[start:],
        "option2": two[start:],
        "answer": str(row["gold"] + 1),
    }


def hub_mmlu(folder: Path, split: str) -> Rows:
    rows = read_rows(
        folder / split / f"{SUBJECT}_{split}.csv", header=("question", *"ABCD", "answer")
    )
    return [
        {
            "question": row.values["question"],
            "choices": [row.values[letter] for letter in "ABCD"],
            "answer": "ABCD".index(row.values["answer"]),
        }
        for row in rows
    ][:N]


class Set(dict[str, Rows]):
    """Rows by split, and the harness's own task file."""

    def __init__(self, stock: str, **splits: Rows) -> None:
        super().__init__(splits)
        self.stock = stock


@pytest.fixture(scope="module")
def sets(real_data: Path) -> dict[str, Set]:
    common = real_data / "eval" / "llm_foundry"
    mmlu = real_data / "eval" / "mmlu"

    def split(rows: Rows) -> dict[str, Rows]:
        return {"train": rows[:1], "validation": rows, "test": rows}

    arc = {
        name: [hub_arc(row) for row in read(common / f"{name}.jsonl")]
        for name in ("arc_easy", "arc_challenge")
    }
    hellaswag = read(real_data / "hellaswag" / "hellaswag_val_1000.jsonl")
    lambada = read(real_data / "eval" / "lambada" / "lambada_test.jsonl")
    piqa = [hub_piqa(row) for row in read(common / "piqa.jsonl")]
    winogrande = [hub_winogrande(row) for row in read(common / "winogrande.jsonl")]
    return {
        "hellaswag": Set("hellaswag/hellaswag.yaml", **split(hellaswag)),
        "arc_easy": Set("arc/arc_easy.yaml", **split(arc["arc_easy"])),
        "arc_challenge": Set("arc/arc_challenge.yaml", **split(arc["arc_challenge"])),
        "piqa": Set("piqa/piqa.yaml", **split(piqa)),
        "winogrande": Set("winogrande/default.yaml", **split(winogrande)),
        "lambada": Set("lambada/lambada_openai.yaml", **split(lambada)),
        "mmlu": Set(
            f"mmlu/default/mmlu_{SUBJECT}.yaml",
            test=hub_mmlu(mmlu, "test"),
            dev=hub_mmlu(mmlu, "dev"),
        ),
    }


@pytest.fixture(scope="module")
def local(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The local files that our tasks read."""
    common = real_data / "eval" / "llm_foundry"
    folder = tmp_path_factory.mktemp("mmlu")
    for split in ("test", "dev"):
        (folder / split).mkdir()
        name = f"{SUBJECT}_{split}.csv"
        (folder / split / name).symlink_to(real_data / "eval" / "mmlu" / split / name)
    return {
        "hellaswag": real_data,
        "arc_easy": common / "arc_easy.jsonl",
        "arc_challenge": common / "arc_challenge.jsonl",
        "piqa": common / "piqa.jsonl",
        "winogrande": common,
        "lambada": common / "lambada_openai.jsonl",
        "mmlu": folder,
    }


# --- the harness ---------------------------------------------------------------------------------


def made(folder: Path, tokenizer: Tokenizer, context_length: int) -> Run:
    """Weights large enough to tell choices apart."""
    torch.manual_seed(0)
    config = ModelConfig.preset(
        "nano", n_layer=2, vocab_size=tokenizer.vocab_size, context_length=context_length
    )
    tensors = {
        name: 4 * x if x.dim() > 1 else x for name, x in GPTModel(config).state_dict().items()
    }
    return create_from_weights(
        folder, {"import": "random"}, config, tokenizer, tensors.items(), torch.float32
    )


@pytest.fixture(scope="module")
def run(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    text = (real_data / "tinyshakespeare" / "input.txt").read_text("utf-8")[:100_000]
    tokenizer = Tokenizer.train_bpe([text], 600)
    return made(tmp_path_factory.mktemp("run") / "run", tokenizer, 1024)


def stock_lm(run: Run) -> Any:
    from lm_eval.models.huggingface import HFLM

    folder = run.path.parent / "hf"
    hf.export(exportable(run), folder)
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)


@pytest.fixture(scope="module")
def peer(run: Run) -> Any:
    return stock_lm(run)


Evaluate = Callable[..., dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def evaluate(sets: dict[str, Set], tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    """Samples by task, of the harness's own tasks on local files."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    stock = Path(lm_eval.__file__).parent / "tasks"
    for name, rows in sets.items():
        files = {}
        for split, some in rows.items():
            path = folder / f"{name}-{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
            files[split] = str(path)
        task = {
            "include": str(stock / rows.stock),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def evaluate(names: Sequence[str], **model: Any) -> dict[str, list[dict[str, Any]]]:
        samples = {}
        for shots, some in ((5, {"mmlu"} & {*names}), (0, {*names} - {"mmlu"})):
            if some:
                found = lm_eval.simple_evaluate(
                    **model,
                    tasks=sorted(some),
                    num_fewshot=shots,
                    task_manager=manager,
                    bootstrap_iters=0,
                )
                samples |= found["samples"]
        return {name: sorted(s, key=lambda one: one["doc_id"]) for name, s in samples.items()}

    return evaluate


def nats_of(sample: Mapping[str, Any]) -> list[float]:
    return [float(one[0][0]) for one in sample["resps"]]


def test_every_item_equals_the_harness(
    run: Run, peer: Any, evaluate: Evaluate, local: dict[str, Path]
) -> None:
    samples = evaluate(list(local), model=peer)
    model = run.load_model()
    for name, theirs in samples.items():
        questions = load(name, local[name], N)
        result = accuracy.score(model, run.tokenizer, TASKS[name], questions)
        assert len(theirs) == len(questions) == result.n == N, name
        for sample, question, item in zip(theirs, questions, result.items, strict=True):
            asked = [tuple(pair) for pair in sample["arguments"]]
            assert asked == list(question.choices), name
            assert item["nats"] == pytest.approx(nats_of(sample), abs=1e-3), name
            for metric in ("acc", "acc_norm"):
                assert item.get(metric) == sample.get(metric, item.get(metric)), name
    # and not because all are correct or all wrong
    assert {item["acc"] for item in result.items} == {0.0, 1.0}


def test_harness_evaluates_our_run(run: Run, evaluate: Evaluate, local: dict[str, Path]) -> None:
    harness.register()
    names = ["hellaswag", "winogrande", "lambada"]
    samples = evaluate(names, model="gptsmith", model_args=f"run={run.path},device=cpu")
    for name in names:
        result = accuracy.score(
            run.load_model(), run.tokenizer, TASKS[name], load(name, local[name], N)
        )
        for sample, item in zip(samples[name], result.items, strict=True):
            assert nats_of(sample) == pytest.approx(item["nats"], abs=1e-3)
            assert sample["acc"] == item["acc"]
            assert sample.get("acc_norm") == item.get("acc_norm")


def test_other_request_types_equal_the_stock_model(run: Run, peer: Any, real_data: Path) -> None:
    from lm_eval.api.instance import Instance

    ours = harness.lm(run, device="cpu")

    def ask(kind: str, *arguments: Any) -> Any:
        requests = [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]
        return getattr(ours, kind)(requests), getattr(peer, kind)(requests)

    text = (real_data / "tinyshakespeare" / "input.txt").read_text("utf-8")
    mine, theirs = ask("loglikelihood_rolling", (text[:9000],), (text[100:200],), ("",))
    assert len(run.tokenizer.encode(text[:9000])) > 3 * run.model_config.context_length
    assert mine == pytest.approx(theirs, rel=1e-5)
    mine, theirs = ask("loglikelihood", ("", "First"), ("ends in ", "space"), ("a", "b"))
    assert [m[0] for m in mine] == pytest.approx([t[0] for t in theirs], abs=1e-4)
    assert [m[1] for m in mine] == [t[1] for t in theirs]
    some = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    more = {"until": ["zzz"], "max_gen_toks": 7}
    mine, theirs = ask(
        "generate_until", (text[:50], some), (text[300:420], more), (text[500:520], some)
    )
    assert mine == theirs


def test_text_longer_than_the_context_is_truncated_on_the_left(
    run: Run, real_data: Path, tmp_path: Path
) -> None:
    from lm_eval.api.instance import Instance

    short = made(tmp_path / "run", run.tokenizer, 48)
    pairs = [pair for q in load("hellaswag", real_data, 6) for pair in q.choices]
    requests = encode_pairs(run.tokenizer, pairs)
    assert any(len(context) + len(text) > 49 for context, text in requests)
    kept = [
        i for i, (_, text) in enumerate(requests) if len(text) <= 48
    ]  # the harness cannot score longer ones
    asked = [Instance("loglikelihood", {}, pairs[i], i) for i in kept]
    mine, theirs = (lm.loglikelihood(asked) for lm in (harness.lm(short), stock_lm(short)))
    assert [m[0] for m in mine] == pytest.approx([t[0] for t in theirs], abs=1e-3)


def crossing_tokenizer(lines: Sequence[str]) -> Tokenizer:
    """BPE without a split before it: its tokens cross the end of the question."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, show_progress=False,
        special_tokens=["<|endoftext|>"],
    )  # fmt: skip
    made.train_from_iterator(lines, trainer)
    return Tokenizer(made.to_str())


def test_answers_joined_to_their_questions_are_scored_as_by_the_harness(tmp_path: Path) -> None:
    """Of a short answer nothing may be left: the question is left out, and named."""
    from lm_eval.api.instance import Instance

    words = ("yes", "no", "red", "green", "the sea", "an ox")
    asked = [f"Question: Which of {n} is it?\nAnswer:" for n in range(40)]
    tokenizer = crossing_tokenizer([f"{q} {words[i % 6]}" for i, q in enumerate(asked)] * 4)
    run = made(tmp_path / "run", tokenizer, 64)
    peer = stock_lm(run)
    sets = (words[:2], words[2:], ("maybe", "never", "no doubt"), ("the sea is wide", "a bay"))
    questions = [
        Question(f"q{i}", tuple((question, f" {word}") for word in sets[i % 4]), i % 2)
        for i, question in enumerate(asked)
    ]
    expected = {}
    crossed = 0
    for question in questions:
        parts = [peer._encode_pair(*pair) for pair in question.choices]
        crossed += any(
            whole[: len(context)] != context
            for (context, _), pair in zip(parts, question.choices, strict=True)
            if (whole := peer.tok_encode("".join(pair)))
        )
        if all(continuation for _, continuation in parts):  # else it stops at an assertion
            pairs = [Instance("loglikelihood", {}, pair, 0) for pair in question.choices]
            expected[question.id] = [nats for nats, _ in peer.loglikelihood(pairs)]
    assert crossed > 10
    assert 10 < len(expected) < 40
    result = accuracy.score(run.load_model(), run.tokenizer, TASKS["arc_easy"], questions)
    assert {item["id"]: item["nats"] for item in result.items} == {
        name: pytest.approx(nats, abs=1e-3) for name, nats in expected.items()
    }
    [note] = result.notes
    left_out = [question.id for question in questions if question.id not in expected]
    assert f"{len(left_out)} of 40 questions are left out: the tokenizer joins" in note
    assert ", ".join(left_out[:3]) in note
    # chance is that of the questions that were scored
    counts = [1 / len(q.choices) for q in questions if q.id in expected]
    chance = result.references["acc"]["chance"]
    assert chance == pytest.approx(sum(counts) / len(counts))


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ValueError, match=r"pip install 'gptsmith\[eval\]'"):
        harness._model_class.__wrapped__()
