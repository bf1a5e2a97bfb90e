"""`import gptsmith`: the public names, which are loaded on first use."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from runs import random_run

import gptsmith
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.data.shards import Shards

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", gptsmith.__all__)
def test_every_public_name_exists(name: str) -> None:
    value = getattr(gptsmith, name)
    assert getattr(value, "__name__", name).rpartition(".")[2] == name


def test_all_is_what_is_exported() -> None:
    assert sorted(gptsmith.__all__) == dir(gptsmith)
    assert set(gptsmith._HOMES) | {"__version__"} == set(gptsmith.__all__)
    typed = Path(gptsmith.__file__).read_text(encoding="utf-8")
    for name, home in gptsmith._HOMES.items():  # what a type checker sees is what is loaded
        assert re.search(rf"    from {home} import (\([^)]*|.*)\b{name}\b", typed)


def test_no_public_name_hides_a_subpackage() -> None:
    """After any import `gptsmith.train` is the module."""
    folder = Path(gptsmith.__file__).parent
    modules = {p.stem for p in folder.glob("*.py")} | {
        p.parent.name for p in folder.glob("*/__init__.py")
    }
    assert not modules & set(gptsmith.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'gptsmith' has no attribute 'GTPModel'"):
        _ = gptsmith.GTPModel


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, gptsmith, gptsmith.cli; "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'yaml', 'argparse') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version_is_defined_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "gptsmith.__version__"


def test_every_public_class_has_a_useful_repr(corpus: Path, tmp_path: Path) -> None:
    tokenizer = gptsmith.Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
    config = gptsmith.ModelConfig(
        n_layer=2, n_head=2, n_embd=16, context_length=32, vocab_size=tokenizer.vocab_size
    )
    run = random_run(tmp_path / "run", config, tokenizer, TEMPLATE)
    loaded = gptsmith.load(run.path)
    opened = gptsmith.Corpus.open(corpus)
    windows = gptsmith.Windows(opened.train, T=16, seed=3)
    request = gptsmith.Request([1, 2])
    generation = loaded.engine.add(request)
    model, template = loaded.model, ChatTemplate(TEMPLATE, tokenizer)
    shown = {
        gptsmith.Batch: (windows.batch(0, 4), "'samples 0..3', 4 x 16 tokens, count 64"),
        gptsmith.Chat: (gptsmith.Chat(model, tokenizer, template), "Engine(2 layers, context 32"),
        gptsmith.Corpus: (opened, f"{str(corpus)!r}, {opened.train_tokens:,} training and "),
        gptsmith.Engine: (loaded.engine, "2 layers, context 32, on cpu, 1 unfinished requests"),
        gptsmith.Generation: (generation, "finish_reason=None"),
        gptsmith.KVCache: (
            gptsmith.KVCache.for_model(config, model.mask, 3),
            "2 layers, 3 rows of 32 slots, lengths [0, 0, 0], torch.float32, cpu",
        ),
        gptsmith.LoadedRun: (loaded, str(run.path)),
        gptsmith.Mask: (model.mask, "causal()"),
        gptsmith.ModelConfig: (config, "n_layer=2"),
        gptsmith.Constraint: (gptsmith.Constraint.regex("a+"), "a+"),
        gptsmith.RMSNorm: (gptsmith.RMSNorm(16), "16, eps=1e-05"),
        gptsmith.Request: (request, "prompt=[1, 2]"),
        gptsmith.Run: (run, repr(str(run.path))),
        gptsmith.SamplingConfig: (gptsmith.SamplingConfig(), "temperature=0.8"),
        gptsmith.Tokenizer: (tokenizer, "kind='byte'"),
        gptsmith.Windows: (windows, f"{windows.per_epoch:,} per epoch of 16 tokens"),
        ChatTemplate: (template, "stop_ids"),
        Shards: (opened.train, f"{opened.train_tokens:,} tokens"),
    }
    for kind, (value, part) in shown.items():
        assert repr(value).startswith(f"{kind.__name__}("), repr(value)
        assert part in repr(value)
        assert len(repr(value)) < 700
    classes = {name for name in gptsmith.__all__ if isinstance(getattr(gptsmith, name), type)}
    modules = {name for name in classes if issubclass(getattr(gptsmith, name), torch.nn.Module)}
    assert classes - modules <= {kind.__name__ for kind in shown}
