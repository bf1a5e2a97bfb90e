"""gptsmith import and gptsmith export from the command line."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from runs import random_run
from safetensors.torch import load_file
from tokenizers import pre_tokenizers, processors

from gptsmith import cli
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.commands import export, import_model
from gptsmith.model.config import ModelConfig
from gptsmith.run import Run
from gptsmith.tokenizer import Tokenizer

TOKENIZER = Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
CONFIG = ModelConfig(
    n_layer=2, n_head=2, n_embd=32, context_length=64, vocab_size=TOKENIZER.vocab_size
)


def from_weights(path: Path, config: ModelConfig = CONFIG, template: str | None = TEMPLATE) -> Run:
    return random_run(path, config, TOKENIZER, template)


def test_export_and_reimport(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = from_weights(tmp_path / "run")
    export.main([str(run.path), "--format", "hf", "--out", str(tmp_path / "hf"), "--dtype", "bf16"])
    said = capsys.readouterr().out
    assert "AutoModelForCausalLM.from_pretrained(" in said
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "`LlamaForCausalLM` of transformers" in card
    assert "imported from `random numbers`" in card
    assert str(tmp_path) not in card
    import_model.main([str(tmp_path / "hf"), "--out", str(tmp_path / "again")])
    said = capsys.readouterr().out
    assert "model      LlamaForCausalLM, 41,312 parameters in bfloat16" in said
    assert "template   for chat, included" in said
    assert f"gptsmith chat {tmp_path / 'again'}" in said
    again = Run.open(tmp_path / "again")
    assert again.config["import"] == str(tmp_path / "hf")
    assert (again.model_config, again.template) == (CONFIG, TEMPLATE)
    stored = load_file(again.weights)
    for name, tensor in load_file(run.weights).items():
        assert torch.equal(stored[name], tensor.bfloat16()), name


def test_next_command_fits_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from_weights(tmp_path / "base", template=None)
    from_weights(tmp_path / "classes", CONFIG.change(labels=("ham", "spam")), None)
    for name, wanted in (("base", "gptsmith generate"), ("classes", "gptsmith classify")):
        hf = tmp_path / f"{name}-hf"
        export.main([str(tmp_path / name), "--format", "hf", "--out", str(hf)])
        import_model.main([str(hf), "--out", str(tmp_path / f"{name}-again")])
        assert wanted in capsys.readouterr().out


def test_printed_commands_are_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = from_weights(tmp_path / "my run", template=None)
    export.main([str(run.path), "--format", "gguf", "--out", str(tmp_path / "my gguf")])
    assert f"-f '{tmp_path}/my gguf/Modelfile'," in capsys.readouterr().out
    export.main([str(run.path), "--format", "hf", "--out", str(tmp_path / "my hf")])
    import_model.main([str(tmp_path / "my hf"), "--out", str(tmp_path / "again, $x")])
    assert f"gptsmith generate '{tmp_path}/again, $x' --prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "hf", "--dtype", "q8_0"], "--dtype q8_0: --format hf takes keep, fp32"),
        (["--format", "gguf", "--dtype", "keep"], "--dtype keep: --format gguf takes fp32, bf16"),
        (["--format", "gguf", "--adapter"], "a gguf holds the merged model"),
        (["--format", "hf", "--adapter"], "has no adapter"),
        (["--format", "hf", "--checkpoint", "7"], "has no checkpoints"),
        ([], "--format is required"),
    ],
)
def test_invalid_options_are_rejected(words: list[str], message: str, tmp_path: Path) -> None:
    run = from_weights(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        export.main([str(run.path), "--out", str(tmp_path / "out"), *words])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = from_weights(tmp_path / "run", template=None)
    out = tmp_path / "out"
    export.main([str(run.path), "--out", str(out), "--format", "gguf", "--dtype", "q8_0"])
    assert sorted(path.suffix for path in out.iterdir()) == ["", ".gguf"]
    assert "ollama create" in capsys.readouterr().out


def test_occupied_folder_is_untouched(tmp_path: Path) -> None:
    from_weights(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="is not empty: choose another --out"):
        import_model.main(["nobody/nothing", "--out", str(tmp_path / "out")])  # before any download
    for kind in ("hf", "gguf"):
        with pytest.raises(FileExistsError, match="is not empty: choose another --out"):
            export.main([str(tmp_path / "run"), "--format", kind, "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_failed_import_leaves_nothing(tmp_path: Path) -> None:
    from_weights(tmp_path / "run")
    hf = tmp_path / "hf"
    export.main([str(tmp_path / "run"), "--format", "hf", "--out", str(hf)])
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\xff\xff\xff\xff")  # NaN in the last tensor
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        import_model.main([str(hf), "--out", str(tmp_path / "again")])
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(ValueError, match=r"config\.json has hidden_act gelu"):
        import_model.main([str(hf), "--out", str(tmp_path / "again")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_imported_model_can_be_finetuned(tmp_path: Path) -> None:
    """A Llama with an unusual tokenizer, saved by transformers, becomes a chat model."""
    transformers = pytest.importorskip("transformers")
    table = tokenizers.Tokenizer.from_str(Tokenizer.train_bpe(["Hello there. " * 9], 270).to_json())
    digits = pre_tokenizers.Digits(individual_digits=True)
    table.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    table.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    begin = [("<|begin_of_text|>", table.token_to_id("<|begin_of_text|>"))]
    table.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", None, begin)
    config = transformers.LlamaConfig(
        vocab_size=table.get_vocab_size(), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "foreign")
    table.save(str(tmp_path / "foreign" / "tokenizer.json"))
    turns = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 30)

    import_model.main([str(tmp_path / "foreign"), "--out", str(tmp_path / "base")])
    argv = ["finetune", "chat", "--from", tmp_path / "base", "--data", tmp_path / "chat.jsonl"]
    argv += ["--out", tmp_path / "chat", "--lora.rank", 4, "--train.steps", 2]
    argv += ["--train.compile", "off", "--monitor.trackers", "none"]
    assert cli.main([str(word) for word in argv]) == 0
    export.main([str(tmp_path / "chat"), "--format", "hf", "--out", str(tmp_path / "hf")])

    base, chat = Run.open(tmp_path / "base"), Run.open(tmp_path / "chat")
    assert chat.tokenizer.prefix == base.tokenizer.prefix == (begin[0][1],)
    assert chat.tokenizer.vocab_size == base.tokenizer.vocab_size + len(CHAT_TOKENS)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([ChatTemplate(TEMPLATE, chat.tokenizer).prompt(turns[:1])])
    with torch.no_grad():
        torch.testing.assert_close(there(ids).logits, chat.load_model()(ids), atol=1e-4, rtol=0)
