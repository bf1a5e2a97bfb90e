"""prepare, pretrain, inspect, evaluate, generate: what the verbs print, and their errors."""

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pseudo_terminal import pieces

from gptsmith.model import flops
from gptsmith.run import Run

TEXT = "".join(f"The {n}th line of {n * n} words, and so on.\n" for n in range(400))
SMALL = (
    "--model nano --model.context-length 32 --model.mask prefix(3) --train.steps 40 "
    "--optim.learning-rate 0.01 --train.precision fp32 --train.batch-size 4 --eval.sample-tokens 0 "
    "--monitor.trackers none"
)


def succeed(*argv: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gptsmith", *map(str, argv)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    out = succeed("prepare", folder / "text.txt", "--out", folder / "data", "--tokenizer", "char")
    for verb in ("inspect", "plan --data", "pretrain --data"):  # what to type next
        assert f"gptsmith {verb} {folder / 'data'}" in out
    return folder / "data"


@pytest.fixture(scope="module")
def run(corpus: Path) -> Path:
    path = corpus.parent / "run"
    succeed("pretrain", "--data", corpus, "--out", path, *SMALL.split())
    return path


def test_evaluate_repeats_the_last_validation(command, run: Path, corpus: Path) -> None:
    code, out, err = command("evaluate", run)
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [event["val_loss"] for event in events if event["event"] == "val"][-1]
    assert f"loss          {loss:.4f} nats per token" in out
    assert command("evaluate", run, "--data", corpus)[1] == out


def test_evaluate_measures_as_training_did(command, run: Path, tmp_path: Path) -> None:
    def evaluate(trained: str, *argv: str) -> tuple[str, str]:
        copy = tmp_path / trained
        shutil.copytree(run, copy, dirs_exist_ok=True)
        config = (run / "config.yaml").read_text()
        (copy / "digests.json").unlink(missing_ok=True)  # edited by hand
        (copy / "config.yaml").write_text(
            config.replace("precision: fp32", f"precision: {trained}")
        )
        code, out, _ = command("evaluate", copy, *argv)
        assert code == 0
        lines = out.splitlines()
        return lines[1].removeprefix("  precision     "), "\n".join(lines[2:])

    precision, fp32 = evaluate("fp32")
    assert precision == "fp32, as in training"
    precision, bf16 = evaluate("bf16")
    assert precision == "bf16, as in training"
    assert bf16 != fp32
    assert evaluate("bf16", "--precision", "fp32") == ("fp32, as requested", fp32)
    assert evaluate("fp32", "--precision", "bf16") == ("bf16, as requested", bf16)
    because = "fp32, because the fp16 of its training is for GPUs"
    assert evaluate("fp16", "--device", "cpu") == (because, fp32)


def test_inspect_shows_corpus_and_run(command, run: Path, corpus: Path, tmp_path: Path) -> None:
    code, out, _ = command("inspect", corpus, "--top", "3", "--png", tmp_path / "c.png")
    assert code == 0
    assert "char" in out
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = command("inspect", run)
    assert code == 0
    assert f"{flops.parameters(Run.open(run).model_config):,}" in out
    assert "prefix(3)" in out


def test_prepare_and_inspect_conversations(command, run: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "The line"}, {"role": "assistant", "content": "so on"}]
    chat, out = tmp_path / "chat.jsonl", tmp_path / "chat.arrow"
    chat.write_text(json.dumps({"messages": turns}) + "\n")
    code, text, _ = command("prepare", chat, "--format", "chat", "--tokenizer", run, "--out", out)
    assert code == 0
    assert f"gptsmith finetune chat --from {run} --data {out}" in text
    for path in (chat, out):
        code, text, _ = command("inspect", path, "--tokenizer", run)
        assert code == 0
        assert "1, 1 answer (1.0 each)" in text
    assert command("prepare", chat, "--format", "arrow")[0] == 2


def samples(text: str) -> dict[str, str]:
    parts = re.split(r"^--- (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_generate_is_independent_of_other_samples(command, run: Path) -> None:
    common = ("generate", run, "--max-new-tokens", "20")
    three = samples(command(*common, "--prompt", "The 1", "--num-samples", "3", "--seed", "5")[1])
    assert list(three) == ["seed 5", "seed 6", "seed 7"]
    assert len(set(three.values())) == 3
    assert command(*common, "--prompt", "The 1", "--seed", "6")[1] == three["seed 6"]
    both = samples(command(*common, "--prompt", "T", "--prompt", "The 1", "--seed", "7")[1])
    assert list(both) == ["seed 7, prompt 'T'", "seed 7, prompt 'The 1'"]
    assert both["seed 7, prompt 'The 1'"] == three["seed 7"]


def test_generate_reads_standard_input(command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = command("generate", run, "--prompt", "The 1", "--max-new-tokens", "9")
    monkeypatch.setattr("sys.stdin", io.StringIO("The 1\n"))
    assert command("generate", run, "--prompt", "-", "--max-new-tokens", "9") == wanted


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ("strict", "--prompt -: standard input is not UTF-8"),
        ("surrogateescape", r"--prompt 'The \udcff': text has a lone surrogate"),  # LANG=C
    ],
)
def test_generate_names_standard_input(run: Path, errors: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gptsmith", "generate", str(run), "--prompt", "-"],
        input=b"The \xff",
        env=os.environ | {"PYTHONIOENCODING": f"utf-8:{errors}"},
        capture_output=True,
    )
    assert done.returncode == 2
    assert done.stderr.decode().startswith(f"gptsmith generate: {message}")


def test_generate_stops_at_a_string(command, run: Path) -> None:
    asked = ("generate", run, "--prompt", "The", "--max-new-tokens", "40")
    whole = command(*asked)[1].removeprefix("The")
    stop = whole[20:22]
    assert command(*asked, "--stop", stop, "--stop", "☃")[1] == f"The{whole[: whole.index(stop)]}\n"


def test_generate_reports_truncated_prompts(command, run: Path) -> None:
    argv = ("generate", run, "--max-new-tokens", "2", "--prompt")
    text = "The line of words, " * 5
    _, whole, remark = command(*argv, text)
    expected = "a prompt has 95 tokens and the model reads 32: it continues from the last 16\n"
    assert remark == expected
    _, end, nothing = command(*argv, text[-16:])
    assert whole == text[:-16] + end
    assert nothing == ""


def test_generate_takes_the_weights_of_a_checkpoint(command, run: Path) -> None:
    greedy = ("generate", run, "--prompt", "The", "--temperature", "0", "--max-new-tokens", "12")
    end = command(*greedy)
    assert command(*greedy, "--checkpoint", "40") == command(*greedy, "--checkpoint", "best") == end
    assert command(*greedy, "--checkpoint", "0")[1] != end[1]


def test_generate_streams_to_a_terminal(command, run: Path) -> None:
    argv = ["generate", str(run), "--prompt", "The 1", "--max-new-tokens", "20"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "gptsmith", *argv], stdout=theirs)
    os.close(theirs)
    written = pieces(ours)
    assert process.wait() == 0
    assert b"".join(written).decode().replace("\r\n", "\n") == command(*argv)[1]
    assert len(written) > 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "generate nowhere",
            "generate: there is no run folder nowhere: gptsmith pretrain makes one",
        ),
        ("generate {corpus}", "is a prepared corpus, not a run"),
        ("generate", "generate: RUN is required"),
        ("generate {run} other", "generate: unexpected argument 'other': one run was expected"),
        (
            "generate {run} --temperatur 1",
            "unknown option --temperatur: did you mean --temperature?",
        ),
        ("generate {run} --top-p 1.5", "--top-p: should be less than or equal to 1, got '1.5'"),
        ("generate {run} --stop=", "generate: --stop: "),
        ("generate {run} --checkpoint 3", "no checkpoint of step 3"),
        ("generate {run} --device tpu", "generate: --device: no device 'tpu'"),
        ("generate {run} --prompt ☃", "generate: --prompt '☃': character '☃'"),
        (
            "generate {run} --prompt \udcff",
            r"generate: --prompt: should be UTF-8, got '\udcff'",
        ),
        ("evaluate {run} --data {run}", "is a run: give a corpus or text"),
        (
            "evaluate {run} --precision fp8",
            "--precision: should be 'auto', 'fp32', 'bf16' or 'fp16'",
        ),
        ("evaluate {run} --data nowhere", "'nowhere': no such file, folder or corpus"),
        ("inspect {run} --png x.png", "--png draws a corpus"),
        ("inspect nowhere", "nowhere"),
        ("inspect .", "is an empty folder, not a run"),
        ("prepare", "prepare: SOURCES is required"),
        ("prepare nowhere.txt --out x", "nowhere.txt: no such file or folder"),
        ("prepare pydoc --out x", "did you mean 'pydocs'?"),
        ("pretrain --data nowhere --out x", "nowhere: no prepared corpus here"),
        ("pretrain --data {corpus} --out {run}", "contains a run that ended at step"),
        ("pretrain --data {corpus} --out {corpus}", "is not empty and contains no run"),
        ("pretrain --data {corpus} --out x --model.mask 1+1", "mask"),
        ("pretrain --data {corpus} --out x --model.mask bidirectional()", "see"),
        (
            "pretrain --data {corpus} --out x --model.context-length 100000",
            "a shorter context",
        ),
        ("pretrain --data {corpus} --out x --train.steps 1 --train.tokens 5", "give one length"),
    ],
)
def test_wrong_input_is_a_one_line_error(
    command, run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    argv: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*argv.format(run=run, corpus=corpus).split())
    assert message in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"gptsmith {argv.split()[0]}: ")
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_moved_corpus_is_reported(command, run: Path, corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    config = (copy / "config.yaml").read_text()
    (copy / "digests.json").unlink()  # edited by hand
    (copy / "config.yaml").write_text(config.replace(f"data: {corpus}\n", "data: gone\n"))
    code, _, err = command("evaluate", copy)
    assert code == 2
    assert f"{copy} was trained on gone: no prepared corpus here" in err
    assert err.endswith("; or give --data\n")
    assert command("evaluate", copy, "--data", corpus)[0] == 0
    (copy / "config.yaml").write_text(config.replace(f"data: {corpus}\n", "data: [a, b]\n"))
    assert "was not trained on a prepared corpus: give --data" in command("evaluate", copy)[2]


def test_another_tokenizer_is_rejected(command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT + "ÄÖÜ", encoding="utf-8")
    succeed("prepare", tmp_path / "text.txt", "--out", tmp_path / "data", "--tokenizer", "byte")
    code, _, err = command("evaluate", run, "--data", tmp_path / "data")
    assert code == 2
    assert f"prepare it with --tokenizer {run / 'tokenizer.json'}" in err
