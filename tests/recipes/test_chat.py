"""Chat tuning by the real command: what is trained, killed and resumed, what is rejected."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import assert_same_checkpoints, assert_same_weights, events, finish, kill_after

from gptsmith import cli
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.data.chat import load_chat
from gptsmith.data.options import ChatFiles
from gptsmith.data.packing import PaddedRows
from gptsmith.evaluate.perplexity import evaluate
from gptsmith.run import Run
from gptsmith.train import checkpoint, runtime

CPU = torch.device("cpu")
COMMON = [
    "--train.steps", "60", "--train.batch-size", "4", "--train.num-threads", "1",
    "--train.precision", "fp32", "--eval.interval", "20", "--eval.sample-tokens", "6",
    "--save.interval", "5", "--monitor.trackers", "none", "--monitor.log-interval", "1",
    "--optim.learning-rate", "0.01", "--val-fraction", "0.1",
]  # fmt: skip
KINDS = {
    "all": [],
    "lora": ["--lora.rank", "2", "--lora.dropout", "0.1", "--dropout", "0.2"],
    "nf4": ["--lora.rank", "2", "--quantize", "nf4", "--train.activation-checkpointing"],
    "frozen": ["--freeze", "embedding.*", "--freeze", "blocks.0.*", "--dropout", "0.1"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of one and two turns in which the answer is the question in capitals."""
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    with path.open("w") as file:
        for i in range(60):
            turns = []
            for word in (f"word{i}", f"next{i * i}")[: 1 + i % 2]:
                turns += [("user", word), ("assistant", word.upper())]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "finetune", "chat", "--from", str(base),
        "--data", str(data), "--out", str(out), *COMMON, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def tuned(request, base: Path, data: Path, tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param) / "run"
    finish(command(base, data, out, *KINDS[request.param]))
    return request.param, out


def loss(run: Path, data: Path) -> float:
    opened = Run.open(run)
    model, tokenizer = opened.load_model(), opened.tokenizer
    assert opened.template is not None
    template = ChatTemplate(opened.template, tokenizer)
    examples, _ = load_chat([data], ChatFiles(), template, 64)
    batches = PaddedRows(examples, 64, 0, 0).validation(8)
    return evaluate(model, batches, runtime.choose_precision("fp32", CPU)).loss


def test_learns_and_produces_a_chat_model(base: Path, data: Path, tuned) -> None:
    kind, path = tuned
    run = Run.open(path)
    assert run.template == TEMPLATE
    assert [run.tokenizer.special_tokens[t] for t in CHAT_TOKENS] == [257, 258, 259, 260, 261]
    assert run.model_config.vocab_size == 262
    assert run.model_config.dropout == {"all": 0, "lora": 0.2, "nf4": 0, "frozen": 0.1}[kind]
    first, *_, last = (e["val_loss"] for e in events(path, "val"))
    assert last < 0.8 * first
    assert loss(path, data) == pytest.approx(last, rel=0.1)  # merged, on the whole set
    assert (path / "adapter").is_dir() == (kind in ("lora", "nf4"))
    assert (path / "model.safetensors").is_file() == (kind not in ("lora", "nf4"))
    assert (path / "base.safetensors").is_file() == (kind != "all")
    report = (path / "report.md").read_text()
    assert f"gptsmith chat {path}" in report
    assert "of them the assistant's" in report


def test_frozen_parameters_do_not_change(base: Path, tuned) -> None:
    kind, path = tuned
    before, after = Run.open(base).load_model(), Run.open(path).load_model()
    old, new = before.embedding.token.weight, after.embedding.token.weight
    moved = not torch.equal(old, new[:257])
    assert moved == (kind == "all")
    mean = old.mean(dim=0)
    assert not torch.allclose(new[258:262], mean.expand(4, -1), atol=1e-4)  # the new ones learn
    same = torch.equal(before.blocks[0].mlp.down.weight, after.blocks[0].mlp.down.weight)
    assert same == (kind == "frozen")
    assert not torch.equal(before.blocks[1].mlp.down.weight, after.blocks[1].mlp.down.weight)


def test_killed_and_resumed_without_its_base(base: Path, data: Path, tuned, tmp_path: Path) -> None:
    kind, whole = tuned
    away = tmp_path / "base"
    shutil.copytree(base, away)
    run = tmp_path / "run"
    for attempt in range(2):
        argv = command(away, data, run, *KINDS[kind], *(["--resume"] if attempt else []))
        kill_after(10 + 20 * attempt, argv, run)
        if away.exists():
            shutil.rmtree(away)  # a run in progress needs what it started from no more
    assert 0 < checkpoint.steps(run / "checkpoints")[-1] < 60
    finish(command(away, data, run, *KINDS[kind], "--resume"))
    assert_same_checkpoints(whole, run)
    assert_same_weights(whole, run)


def test_template_with_own_special_tokens(base: Path, data: Path, tmp_path: Path) -> None:
    """ChatML on a model that never saw it: its tokens are single ids, and end answers."""
    template = tmp_path / "chatml.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    out, names = tmp_path / "run", ("<|im_start|>", "<|im_end|>")
    flags = [word for name in names for word in ("--special-tokens", name)]
    finish(command(base, data, out, "--template", str(template), *flags))
    run = Run.open(out)
    assert run.model_config.vocab_size == 259
    assert [run.tokenizer.special_tokens[name] for name in names] == [257, 258]
    assert run.template is not None
    assert 258 in ChatTemplate(run.template, run.tokenizer).stop_ids
    first, *_, last = (e["val_loss"] for e in events(out, "val"))
    assert last < 0.8 * first


def test_checkpoint_contains_trained_parameters_only(base: Path, tuned) -> None:
    kind, path = tuned
    step = checkpoint.find(path / "checkpoints")[0]
    size = (step.path / "model.safetensors").stat().st_size
    whole = (base / "model.safetensors").stat().st_size
    assert (size < 0.5 * whole) == (kind != "all")


def test_user_errors(base: Path, data: Path, tuned, tmp_path: Path, user_error) -> None:
    _, path = tuned

    def rejected(*argv: object) -> str:
        return user_error("finetune", "chat", *argv)

    out = tmp_path / "out"
    start = ("--from", base, "--data", data, "--out", out)
    assert "contains a run that ended at step 60: gptsmith finetune chat --out" in rejected(
        "--from", base, "--data", data, "--out", path
    )
    assert "no run folder" in rejected("--from", tmp_path / "x", "--data", data, "--out", out)
    assert "more than the model's 64" in rejected(*start, "--context-length", "65")
    assert "lora.targets has 'q'" in rejected(*start, "--lora.rank", "2", "--lora.targets", "q")
    assert "no effect with rank 0" in rejected(*start, "--lora.targets", "qkv")
    assert "matches no parameter" in rejected(*start, "--freeze", "block.*")
    assert "leaves nothing to train" in rejected(*start, "--freeze", "*")
    assert "nothing to resume" in rejected(*start, "--resume")
    assert "give both" in rejected(*start, "--special-tokens", "<|x|>")
    odd = tmp_path / "odd.jinja"
    odd.write_bytes(b"\xb0")
    assert f"{odd}, byte 0: not UTF-8" in rejected(*start, "--template", odd)
    odd.write_text("")
    assert f"--template {odd}: " in rejected(*start, "--template", odd)
    odd.write_text("{{ messages[0].content }} ")
    assert "does not contain this token" in rejected(
        *start, "--template", odd, "--special-tokens", "<|x|>"
    )
    assert f"--template {odd}: " in rejected(*start, "--template", odd)
    assert "no such file" in rejected(*start, "--template", tmp_path / "none.jinja")
    skills = ("--from", base, "--data", "skills", "--questions", "9", "--out", out)
    assert "--data skills: no conversation is left: left out" in rejected(
        *skills, "--context-length", "2"
    )
    assert "--val skills: the built-in set is for --data" in rejected(*start, "--val", "skills")
    assert "--from is required" in rejected("--data", data, "--out", out)
    anywhere = ("--from", base, "--out", out, "--data")
    assert f"{base} is a run, not a table" in rejected(*anywhere, base)
    more = ("--from", base, "--data", data, "--out", path, "--resume")
    assert "tuning." in rejected(*more, *COMMON, "--lora.rank", "3")
    assert "unexpected argument 'oops'" in rejected(*more, "oops")
    assert "--train.steps none" in rejected(*more, "--train.seconds", "3")
    assert "a.yaml" not in rejected(*more, "--eval.prompt", "a.yaml", "--dropout", "0.3")
    error = user_error("finetune", "text", "--out", path, "--resume")
    assert "was made by gptsmith finetune chat" in error
    other = ("--from", out, "--data", data, "--out", path, "--resume")
    assert "from: " in rejected(*other, *COMMON)
    for flag, value in (
        ("--dropout", "0.3"),
        ("--template", odd),
        ("--checkpoint", "best"),
        ("--questions", "3"),
    ):
        assert f"{flag[2:]}: " in rejected(*more, *COMMON, flag, value)
    assert not out.exists()


def test_prepared_set_fits_the_run_it_is_prepared_for(
    base: Path, data: Path, tmp_path: Path, user_error, capsys
) -> None:
    out, run = tmp_path / "chat.arrow", tmp_path / "run"
    argv = ["prepare", str(data), "--format", "chat", "--tokenizer", str(base), "--out", str(out)]
    error = user_error(*argv, "--context-length", "65")
    assert "--context-length 65 is more than the model's 64" in error
    error = user_error("inspect", data, "--tokenizer", base, "--context-length", "65")
    assert "--context-length 65 is more than the model's 64" in error
    for length in ("64", "40"):
        assert cli.main([*argv, "--context-length", length, "--overwrite"]) == 0
    said = capsys.readouterr().out
    proposed = said.rpartition("next: gptsmith ")[2].replace("RUN2", str(run)).split()
    finish([*proposed, *COMMON, "--train.steps", "1"])
    notes = [event["message"] for event in events(run, "note")]
    assert "data: all 90 answers of 60 conversations are trained on" in notes


def test_corpus_is_not_a_chat_set(base: Path, corpus: Path, tmp_path: Path, user_error) -> None:
    rest = ("--from", base, "--out", tmp_path / "run", "--data", corpus)
    for verb in ("chat", "instruct"):
        error = user_error("finetune", verb, *rest)
        assert f"{corpus} is a prepared corpus, not a table or a folder of tables" in error
        assert f"gptsmith pretrain --data {corpus}" in error


def test_run_from_before_windows_resumes_on_the_same_examples(base: Path, tmp_path: Path) -> None:
    """Its configuration does not mention them, and it had only the beginnings."""
    data, run = tmp_path / "long.jsonl", tmp_path / "run"
    turns = [{"role": r, "content": f"{r[0]}" * 9} for r in ("user", "assistant")] * 4
    data.write_text(f"{json.dumps(turns)}\n" * 12)
    argv = [*command(base, data, run), "--train.steps", "3"]
    finish([*argv, "--no-windows"])
    notes = [event["message"] for event in events(run, "note")]
    assert any("left out: 24 of 48 answers (50.0%), as the conversation" in note for note in notes)
    config = (run / "config.yaml").read_text()
    assert config.count("\nwindows: false\n") == 1
    (run / "config.yaml").write_text(config.replace("\nwindows: false\n", "\n"))
    (run / "digests.json").unlink()  # such a run has none
    shutil.copytree(run, tmp_path / "before")
    finish([*argv, "--resume"])
    assert_same_weights(tmp_path / "before", run)
