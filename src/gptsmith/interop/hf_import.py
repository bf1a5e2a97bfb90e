"""A model folder of transformers as an import: architecture, weights, tokenizer, template."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith.interop import hf_tokenizer, huggingface, weight_files
from gptsmith.interop.external_model import ExternalModel
from gptsmith.interop.weight_files import Entry, read_json
from gptsmith.model import state_dict
from gptsmith.model.config import ModelConfig
from gptsmith.model.stock import Place, place

# Buffers that old checkpoints hold and the model computes: causal masks, rotary frequencies.
_BUFFERS = re.compile(r"(.*\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)")
_TENSORS_OF_A_BLOCK = 8  # at least: Arcee's
_NO_END = "its tokenizer has no end of text that is known here: generate and chat will refuse it"


def open_folder(folder: Path) -> ExternalModel:
    """The stock model in `folder`, as transformers' save_pretrained leaves it.

    Raises ValueError or FileNotFoundError naming the file that is missing, damaged, or asks for
    something that our models cannot compute. No code of the folder is run, no pickle opened.
    """
    path = folder / "config.json"
    raw = read_json(path)
    config, cls = huggingface.model_config(raw, path), huggingface.class_name(raw, path)
    entries = {
        name: entry
        for name, entry in weight_files.read_index(folder).items()
        if not _BUFFERS.fullmatch(name)
    }
    # Before a model of these sizes is laid out: whoever wrote the file chose the number.
    if config.n_layer * _TENSORS_OF_A_BLOCK > len(entries):
        raise ValueError(
            f"{path} has {config.n_layer:,} layers, its weights {len(entries)} tensors"
        )
    stored = _Stored(folder, config, entries, _absent_biases(raw))
    tokenizer = hf_tokenizer.read(folder, str(raw["model_type"]))
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size:,} ids, the model vectors for "
            f"{config.vocab_size:,}: add them (resize_token_embeddings) with transformers first"
        )
    ends = [] if "eos_token" in hf_tokenizer.roles(tokenizer) else [_NO_END]
    template, unusable = hf_tokenizer.read_template(folder, tokenizer)
    return ExternalModel(
        config=config,
        tensors=stored.tensors,
        dtype=stored.dtype,
        tokenizer=tokenizer,
        template=template,
        origin={"import": str(folder), "format": "huggingface", "class": cls},
        notes=[*huggingface.notes(raw, path), *ends, *unusable],
    )


def _absent_biases(raw: Mapping[str, Any]) -> re.Pattern[str]:
    """Names of biases that a Llama with only some of them does not have: ours are all or none."""
    attention, mlp = raw.get("attention_bias"), raw.get("mlp_bias")
    if bool(attention) == bool(mlp):
        return re.compile("(?!)")
    return re.compile(rf"model\.layers\.\d+\.{'mlp' if attention else 'self_attn'}\..*\.bias")


class _Stored:
    """The weights of a folder under our names; all of them accounted for before one is read."""

    def __init__(
        self, folder: Path, config: ModelConfig, entries: dict[str, Entry], zero: re.Pattern[str]
    ) -> None:
        self.dtype = weight_files.widest(entries)
        self._config = config
        try:
            expected = huggingface.tensor_shapes(config)
        except (RuntimeError, OverflowError, TypeError):  # torch's, of products above 2**63
            raise ValueError(f"{folder / 'config.json'} has sizes that no model has") from None
        # A base model saved alone (GPT2Model) has no prefix before its names.
        prefix = next(iter(expected)).partition(".")[0] + "."
        if not any(name.startswith(prefix) for name in entries):
            whole = ("lm_head.", "score.")
            entries = {n if n.startswith(whole) else prefix + n: e for n, e in entries.items()}
        tie_embeddings = "lm_head.weight" not in expected and not config.labels
        self._tied_head = entries.pop("lm_head.weight", None) if tie_embeddings else None
        self._entries = entries
        self._zero = {name for name in expected if zero.fullmatch(name) and name not in entries}
        given = {name: entry.shape for name, entry in entries.items()}
        given |= {name: expected[name] for name in self._zero}
        state_dict.check_state_dict(expected, given, f"{folder} (its config.json)")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Ours, one by one, each of the one dtype."""
        for ours, shape in state_dict.shapes(self._config).items():
            tensor = self._read(place(self._config, ours, shape[0]))
            if ours == "embedding.token.weight" and self._tied_head is not None:
                self._refuse_other_head(tensor)
            yield ours, tensor

    def _read(self, there: Place) -> Tensor:
        named = zip(there.names, there.rows, strict=True)
        parts = [self._part(name, rows, there.transposed) for name, rows in named]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, name: str, rows: int, transposed: bool) -> Tensor:
        if name in self._zero:
            return torch.zeros(rows, dtype=self.dtype)
        tensor = self._entries[name].read().to(self.dtype)
        return tensor.T.contiguous() if transposed else tensor

    def _refuse_other_head(self, embedding: Tensor) -> None:
        """Files made of pickles hold a tied head twice; it must be the embedding then."""
        assert self._tied_head is not None
        entry = self._tied_head
        same = entry.shape == embedding.shape and torch.equal(
            entry.read().to(embedding.dtype), embedding
        )
        if not same:
            raise ValueError(
                f"{entry.path}: lm_head.weight is not the embedding, though config.json ties them: "
                "set its tie_word_embeddings to false"
            )
