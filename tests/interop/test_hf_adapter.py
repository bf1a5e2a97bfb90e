"""LoRA runs exported as adapters of peft, and such adapters imported."""

from pathlib import Path

import peft
import pytest
import torch
from exported import (
    AXES,
    IDS,
    SMALL,
    TEXT,
    TOKENIZER,
    export,
    export_adapter,
    logits,
    lora_run,
    opened,
    save_adapter,
)
from random_weights import add_noise
from runs import imported_run, random_run
from safetensors.torch import load_file
from transformers import AutoTokenizer

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE
from gptsmith.commands.export import ExportOptions
from gptsmith.commands.export import export as export_run
from gptsmith.interop import peft as adapters
from gptsmith.interop.sources import open_source
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import ModelConfig
from gptsmith.train import checkpoint as checkpoints

# peft of transformers, and of a user of GPT-2 who says nothing of its transposed weights
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3"])
def test_adapter_opens_in_peft(name: str, tmp_path: Path) -> None:
    run = lora_run(tmp_path / "run", ModelConfig(**SMALL, **AXES[name]), list(CHAT_TOKENS))
    real = run.tokenizer.vocab_size
    ids = torch.cat([IDS, torch.arange(real - 5, real).expand(3, 5)], dim=1)  # new tokens as well
    wanted = logits(run.load_model(), ids)[..., :real]
    export(run, tmp_path / "merged")
    export_adapter(run, tmp_path / "out")
    plain = logits(opened(tmp_path / "out" / "base"), ids)
    assert (plain - wanted).abs().max() > 0.5
    for theirs in (
        opened(tmp_path / "merged"),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval(),
        peft.PeftModel.from_pretrained(opened(tmp_path / "out" / "base"), tmp_path / "out").eval(),
    ):
        torch.testing.assert_close(logits(theirs, ids), wanted, rtol=0, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == real
    assert tokenizer.chat_template == TEMPLATE


def test_classifier_adapter_opens_in_peft(tmp_path: Path) -> None:
    labels = ("ham", "spam")
    run = lora_run(tmp_path / "run", ModelConfig(**SMALL, **AXES["gpt2"], labels=labels), [])
    export_adapter(run, tmp_path / "out")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "out", num_labels=2
    ).eval()
    ours = run.load_model()
    assert isinstance(ours, GPTClassifier)
    with torch.no_grad():
        wanted = ours.logits(IDS, torch.full((3,), IDS.shape[1]))
    torch.testing.assert_close(logits(theirs), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("labels", [(), ("ham", "spam")])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_an_exported_adapter_is_imported_merged(
    name: str, labels: tuple[str, ...], tmp_path: Path
) -> None:
    tokens = [] if labels else list(CHAT_TOKENS)
    run = lora_run(tmp_path / "run", ModelConfig(**SMALL, **AXES[name], labels=labels), tokens)
    export_adapter(run, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")  # the base is named by its absolute path
    found = open_source(str(tmp_path / "moved"))
    again = imported_run(tmp_path / "again", found)
    assert found.notes[-1].startswith("the adapter (rank ")
    assert again.template == run.template
    assert again.tokenizer.encode(TEXT) == run.tokenizer.encode(TEXT)
    ours, theirs = run.load_model(), again.load_model()
    assert theirs.config.labels == labels
    V = run.tokenizer.vocab_size  # rows that pad the vocabulary are not exported
    for name, tensor in theirs.state_dict().items():
        whole = ours.state_dict()[name]
        assert torch.equal(tensor, whole[:V] if whole.shape != tensor.shape else whole), name


def test_an_adapter_of_peft_is_imported(tmp_path: Path) -> None:
    """Its base is named by a path, its tokenizer is the base's."""
    run = random_run(tmp_path / "run", ModelConfig(**SMALL, **AXES["llama"]), TOKENIZER)
    export(run, tmp_path / "base")
    tuned = peft.get_peft_model(
        opened(tmp_path / "base"),
        peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    ).eval()
    torch.manual_seed(3)
    add_noise(tuned, 0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    again = imported_run(tmp_path / "again", open_source(str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(again.load_model()), logits(tuned), rtol=0, atol=1e-4)
    assert again.config["adapter_of"] == str(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"is an adapter, its base is not here: .*base: "):
        open_source(str(tmp_path / "adapter"))


def test_adapter_of_a_checkpoint(tmp_path: Path) -> None:
    run = lora_run(tmp_path / "run", ModelConfig(**SMALL), [])
    ours = dict(run.load_adapter().tensors)
    earlier = {name: tensor / 2 for name, tensor in ours.items()}
    checkpoints.save(run.checkpoints, 1, {"model": earlier}, {})
    save_adapter(run, ours, step=2)  # after that checkpoint
    last = load_file(run.weights)
    export_adapter(run, tmp_path / "last")
    export_adapter(run, tmp_path / "one", checkpoint=1)
    wanted = {"last": last, "one": {name: tensor / 2 for name, tensor in last.items()}}
    for name, tensors in wanted.items():
        stored = load_file(tmp_path / name / adapters.WEIGHTS)
        assert stored.keys() == tensors.keys()
        assert all(torch.equal(stored[key], tensors[key]) for key in stored)
    run.weights.unlink()  # stopped in training
    options = ExportOptions(run=run.path, out=tmp_path / "un", format="hf", adapter=True)
    assert "is unfinished: this is its step 1" in export_run(run, options)[0]
