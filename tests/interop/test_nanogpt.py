"""nanoGPT's checkpoints. The reference here is its forward pass, written out over its own names."""

import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import imported_model
from torch import Tensor

from gptsmith.interop import nanogpt
from gptsmith.tokenizer import Tokenizer

TEXT = "First Citizen: before we proceed any further, hear me speak."
CHARACTERS = len(set(TEXT))
ARGS: dict[str, Any] = dict(
    n_layer=2, n_head=2, n_embd=8, block_size=16, bias=False, vocab_size=CHARACTERS, dropout=0.2
)


def state_of(args: dict[str, Any]) -> dict[str, Tensor]:
    """Weights under nanoGPT's names, the head tied."""
    torch.manual_seed(1)
    C, V = args["n_embd"], args["vocab_size"]
    state = {
        "transformer.wte.weight": torch.randn(V, C),
        "transformer.wpe.weight": torch.randn(args["block_size"], C),
        "transformer.ln_f.weight": 1 + 0.1 * torch.randn(C),
    }
    for i in range(args["n_layer"]):
        h = f"transformer.h.{i}"
        state[f"{h}.ln_1.weight"] = 1 + 0.1 * torch.randn(C)
        state[f"{h}.attn.c_attn.weight"] = 0.4 * torch.randn(3 * C, C)
        state[f"{h}.attn.c_proj.weight"] = 0.4 * torch.randn(C, C)
        state[f"{h}.ln_2.weight"] = 1 + 0.1 * torch.randn(C)
        state[f"{h}.mlp.c_fc.weight"] = 0.4 * torch.randn(4 * C, C)
        state[f"{h}.mlp.c_proj.weight"] = 0.4 * torch.randn(C, 4 * C)
    if args["bias"]:
        for name in [name for name in state if not name.startswith(("transformer.w", "lm"))]:
            rows = state[name].shape[0]
            state[name.replace("weight", "bias")] = 0.1 * torch.randn(rows)
    return {**state, "lm_head.weight": state["transformer.wte.weight"]}


def forward(state: dict[str, Tensor], args: dict[str, Any], ids: Tensor, gelu: str) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        return F.layer_norm(x, weight.shape, weight, bias, 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    (B, T), C, H = ids.shape, args["n_embd"], args["n_head"]
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:T]
    for i in range(args["n_layer"]):
        h = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(C, dim=2)
        q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in qkv)
        scores = (q @ k.transpose(-2, -1)) / (C // H) ** 0.5
        scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)
        x = x + linear(y, f"{h}.attn.c_proj")
        y = F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate=gelu)
        x = x + linear(y, f"{h}.mlp.c_proj")
    return linear(norm(x, "transformer.ln_f"), "lm_head")


def save(folder: Path, args: dict[str, Any], state: dict[str, Any], **more: Any) -> Path:
    """A checkpoint as train.py writes it, and the tokenizer in the same folder."""
    path = folder / "ckpt.pt"
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    content = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 5000,
        "best_val_loss": torch.tensor(1.47),
        "config": {"dataset": "shakespeare_char", "compile": True},
    }
    torch.save({**content, **more}, path)
    Tokenizer.char([TEXT]).save(folder)
    return path


@pytest.mark.parametrize("bias", [False, True])
def test_logits_equal_those_of_nanogpt(tmp_path: Path, bias: bool) -> None:
    args = {**ARGS, "bias": bias}
    state = state_of(args)
    imported = nanogpt.open_file(save(tmp_path, args, state))
    ids = torch.randint(0, CHARACTERS, (2, 16))
    with torch.no_grad():
        logits = imported_model(imported)(ids)[..., :CHARACTERS]
        expected = forward(state, args, ids, gelu="none")
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        older = forward(state, args, ids, gelu="tanh")
        assert 1e-4 < (logits - older).abs().max() < 1e-1  # hence the note
        assert any("set mlp to gelu" in note for note in imported.notes)
        as_note_says = replace(imported, config=imported.config.change(mlp="gelu"))
        logits = imported_model(as_note_says)(ids)[..., :CHARACTERS]
        torch.testing.assert_close(logits, older, atol=1e-4, rtol=0)
    assert imported.config.dropout == 0.2
    assert imported.origin["step"] == 5000


def test_compiled_and_old_checkpoints(tmp_path: Path) -> None:
    """The prefix of a compiled model; the masks of versions before flash attention; no `bias`."""
    args = {**ARGS, "bias": True}
    state = state_of(args)
    plain = dict(nanogpt.open_file(save(tmp_path, args, state)).tensors())
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    changed = {f"_orig_mod.{name}": tensor for name, tensor in {**state, **masks}.items()}
    del args["bias"]
    other = tmp_path / "other"  # what was read is still a view of the first file
    other.mkdir()
    again = nanogpt.open_file(save(other, args, changed))
    assert again.config.bias == "all"
    torch.testing.assert_close(dict(again.tensors()), plain, atol=0, rtol=0)


def test_gpu_checkpoint_opens_on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As train.py saves it on a machine with CUDA."""
    state = state_of(ARGS)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = save(tmp_path, ARGS, state)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)
    table = dict(nanogpt.open_file(path).tensors())["embedding.token.weight"]
    torch.testing.assert_close(table[:-1], state["transformer.wte.weight"], atol=0, rtol=0)


def test_untied_head(tmp_path: Path) -> None:
    state = {**state_of(ARGS), "lm_head.weight": torch.randn(CHARACTERS, 8)}
    imported = nanogpt.open_file(save(tmp_path, ARGS, state))
    assert not imported.config.tie_embeddings
    ids = torch.randint(0, CHARACTERS, (1, 16))
    with torch.no_grad():
        logits = imported_model(imported)(ids)[..., :CHARACTERS]
        torch.testing.assert_close(
            logits, forward(state, ARGS, ids, gelu="none"), atol=1e-4, rtol=0
        )


def test_row_is_added_for_end_of_text(tmp_path: Path) -> None:
    """Our character tokenizer has one id more than nanoGPT's: the mean of the others."""
    imported = nanogpt.open_file(save(tmp_path, ARGS, state_of(ARGS)))
    assert imported.config.vocab_size == imported.tokenizer.vocab_size == CHARACTERS + 1
    table = dict(imported.tensors())["embedding.token.weight"]
    torch.testing.assert_close(table[-1], table[:-1].mean(dim=0))
    assert any("<|endoftext|>" in note for note in imported.notes)


def test_gpt2_vocabulary_is_used_if_it_fits(
    tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTSMITH_DATA", str(real_data))
    args = {**ARGS, "vocab_size": 50304}
    path = save(tmp_path, args, state_of(args))
    (tmp_path / "tokenizer.json").unlink()
    imported = nanogpt.open_file(path)
    assert imported.tokenizer.kind == "gpt2"
    assert imported.config.vocab_size == 50304  # padding stays: the model was trained with it


def test_missing_or_wrong_tokenizer_is_rejected(tmp_path: Path) -> None:
    path = save(tmp_path, ARGS, state_of(ARGS))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer.*prepare TEXT --tokenizer char"):
        nanogpt.open_file(path)
    Tokenizer.byte().save(tmp_path)
    with pytest.raises(ValueError, match="do not belong together"):
        nanogpt.open_file(path)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickle_that_runs_code_is_rejected(tmp_path: Path) -> None:
    trap = tmp_path / "it-ran"
    path = tmp_path / "ckpt.pt"
    torch.save({"model": {}, "model_args": Payload(trap)}, path)
    with pytest.raises(ValueError, match=r"asks for 'posix\.mkdir'") as error:
        nanogpt.open_file(path)
    assert "\n" not in str(error.value)
    path.write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(ValueError, match="not a zip file"):
        nanogpt.open_file(path)
    assert not trap.exists()
    pickle.loads(path.read_bytes())  # the trap works
    assert trap.exists()


def test_damaged_files_are_rejected(tmp_path: Path) -> None:
    path = save(tmp_path, ARGS, state_of(ARGS))
    good = path.read_bytes()
    for broken in (good[:-100], good[: len(good) // 2], b"", bytes(1000)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is damaged or not saved by PyTorch"):
            nanogpt.open_file(path)
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="not a zip file"):
        nanogpt.open_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ckpt/data.pkl", bytes(1 << 20))
    with pytest.raises(ValueError, match="compressed"):
        nanogpt.open_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ckpt/data.pkl", b"nothing of a pickle")
    with pytest.raises(ValueError, match="is not opened"):
        nanogpt.open_file(path)


BOMBS = {
    "bytearray": b"c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R.",
    "bytes": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1tR.",
    "storage": b"ctorch\nUntypedStorage\nJ\x00\x00\x00\x7f\x85R.",
    "tensor": b"ctorch\nzeros\nJ\x00\x00\x00\x7f\x85R.",
    "protocol 4": b"\x8c\x08builtins\x8c\tbytearray\x93J\x00\x00\x00\x7f\x85R.",
    "instance": b"(J\x00\x00\x00\x7fi__builtin__\nbytearray\n.",
    "many operations": b"(" + b"N0" * 3_000_000 + b"t.",
    "too large": b"(" + b"N" * (17 << 20) + b"t.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_that_asks_for_memory_is_rejected_before_it_is_loaded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ckpt/data.pkl", b"\x80\x02" + BOMBS[name])
        archive.writestr("ckpt/version", b"3\n")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"^[^\n]{1,400}$") as caught:
        nanogpt.open_file(path)
    caught.match("it asks for|operations|data.pkl")


FC = "transformer.h.1.mlp.c_fc.weight"
REJECTED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a missing tensor": ({}, {FC: None}, r"h\.1\.mlp\.c_fc\.weight is missing"),
    "a wrong shape": ({}, {FC: torch.zeros(8, 8)}, r"has shape \(8, 8\), expected \(32, 8\)"),
    "a tensor too many": (
        {},
        {"value_head.weight": torch.zeros(8)},
        "value_head.weight is unexpected",
    ),
    "one number repeated": ({}, {FC: torch.zeros(1).expand(1 << 40, 8)}, "not a dense tensor"),
    "integers": ({}, {FC: torch.zeros(32, 8, dtype=torch.int64)}, "not a dense tensor"),
    "a sparse tensor": ({}, {FC: torch.eye(8).to_sparse()}, "asks for .*sparse"),
    "no tensor": ({}, {FC: "weights"}, "not a dense tensor"),
    "fewer layers": ({"n_layer": 1}, {}, "is unexpected"),
    "a size missing": ({"n_head": None}, {}, "n_head is None"),
    "layers beyond all bounds": ({"n_layer": 1 << 40}, {}, "n_layer is"),
    "more layers": ({"n_layer": 1000}, {}, r"h\.2\..* missing"),
    "a width beyond all bounds": ({"n_embd": 1 << 40}, {}, "impossible sizes"),
    "a context beyond all bounds": ({"block_size": 1 << 40}, {}, r"wpe\.weight has shape"),
    "another architecture": ({"use_rmsnorm": True}, {}, "use_rmsnorm True"),
    "heads that do not divide": ({"n_head": 3}, {}, "multiple of"),
    "an impossible dropout": ({"dropout": 1.5}, {}, "less than 1"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unsupported_checkpoint_is_rejected(tmp_path: Path, name: str) -> None:
    args, tensors, words = REJECTED[name]
    state = {**state_of(ARGS), **tensors}
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    with pytest.raises(ValueError, match=words) as error:
        nanogpt.open_file(save(tmp_path, {**ARGS, **args}, state))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path))


@pytest.mark.parametrize("content", [[], {"model": {}}, {"model": [], "model_args": {}}, 3])
def test_other_pickles_are_rejected(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "some.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"some\.pt"):
        nanogpt.open_file(path)
