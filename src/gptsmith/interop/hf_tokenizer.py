"""Read and write the tokenizer and chat template of a transformers model folder."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptsmith import files
from gptsmith.chat_template.template import ChatTemplate
from gptsmith.interop.external_model import ExportableModel
from gptsmith.interop.hf_files import check_link_target, read_json
from gptsmith.tokenizer import Tokenizer, TokenRoles
from gptsmith.tokenizer.formats import SPLITS, with_special_tokens
from gptsmith.tokenizer.roles import CLEAN_UP, IDS, NAMES, as_ids, token_text

_CONFIG, _JSON, _TEMPLATE = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
_TELL_ROLES = ("config.json", "generation_config.json", "special_tokens_map.json")


def read(folder: Path, model_type: str) -> Tokenizer:
    """The tokenizer in a folder: tokenizer.json, or GPT-2's vocab.json and merges.txt, with the
    special tokens that the other files name, in their roles.

    Raises ValueError or FileNotFoundError saying what was found instead, and the remedy.
    """
    config = _optional(folder / _CONFIG)
    for name in _TELL_ROLES:  # read again by Tokenizer.load, without these checks
        _optional(folder / name)
    remedy = "in transformers, AutoTokenizer.from_pretrained(F).save_pretrained(F) makes one"
    if (path := folder / _JSON).is_file():
        check_link_target(path)
        tokenizer = Tokenizer.load(path)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        kind = str(config.get("tokenizer_class", "GPT2Tokenizer"))
        if model_type != "gpt2" or kind.removesuffix("Fast") != "GPT2Tokenizer":
            raise ValueError(
                f"{folder} has vocab.json and merges.txt of a {model_type}, which do not say how "
                f"text is split; a tokenizer.json does: {remedy}"
            )
        if config.get("add_prefix_space") or config.get("add_bos_token"):
            raise ValueError(
                f"{folder / _CONFIG} adds a space or token to texts; a tokenizer.json says how: "
                f"{remedy}"
            )
        tokenizer = Tokenizer.load(folder)
    elif found := sorted(path.name for path in folder.glob("*.model")):
        raise ValueError(
            f"{folder} has a SentencePiece tokenizer ({found[0]}) and no tokenizer.json: {remedy}"
        )
    else:
        raise FileNotFoundError(
            f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
        )
    return _with_special(tokenizer, folder, config)


def _with_special(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer, plus the special tokens that only the other tokenizer files name."""
    wanted: dict[str, int | None] = dict(_named(config))
    wanted |= _named(_optional(folder / "special_tokens_map.json"))
    for name, i in (*_added(config), *_optional(folder / "added_tokens.json").items()):
        if not str(i).isdecimal():
            raise ValueError(
                f"{folder}: its tokenizer files give {name!r:.40} the id {i!r:.40}: save the "
                "tokenizer with transformers again"
            )
        wanted[name] = int(i)
    new = {name: i for name, i in wanted.items() if name not in tokenizer.special_tokens}
    places = {name: tokenizer.vocab.get(name, i) for name, i in new.items()}
    known = {name: i for name, i in places.items() if i is not None}
    if known:
        text = with_special_tokens(tokenizer.to_json(), known)
        tokenizer = Tokenizer(text, folder / _JSON, TokenRoles.read(folder))
    for name, i in new.items():
        if i is not None and tokenizer.special_tokens.get(name) != i:
            raise ValueError(
                f"{folder}: its tokenizer files disagree about {name!r}, {i} or "
                f"{tokenizer.special_tokens.get(name)}: save the tokenizer with transformers again"
            )
    return tokenizer


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, None]]:
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens")
    more = more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
    for value in [*map(config.get, NAMES), *more]:
        if text := token_text(value):
            yield text, None


def _added(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    decoder = config.get("added_tokens_decoder")
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and token.get("special") and (text := token_text(token)):
            yield text, i


def read_template(folder: Path, tokenizer: Tokenizer) -> tuple[str | None, list[str]]:
    """The chat template of a folder, and notes for the user.

    None if there is none, or, with a note, if it cannot be used here (see ChatTemplate).
    """
    config = _optional(folder / _CONFIG)
    source = _template_in(folder, config)
    if source is None:
        return None, []
    # Templates may refer to tokens by role. Where tokenizer_config.json names one that is no token
    # of the tokenizer, the template sets it first. The line break after a block is not printed.
    ours = tokenizer.roles.names
    for role in NAMES:
        token = token_text(config.get(role))
        if token and token != ours.get(role) and re.search(rf"\b{role}\b", source):
            source = f"{{% set {role} = {json.dumps(token, ensure_ascii=False)} %}}\n{source}"
    try:
        ChatTemplate(source, tokenizer)
    except ValueError as error:
        why = " ".join(str(error).split())[:160]
        return None, [f"the chat template is left out, it cannot be used here: {why}"]
    return source, []


def _template_in(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / _TEMPLATE
    if path.is_file():
        check_link_target(path)
        return files.read_text(path)
    given = _optional(folder / "chat_template.json").get("chat_template")
    given = given or config.get("chat_template")
    if isinstance(given, list):  # several by name
        default = (t for t in given if isinstance(t, dict) and t.get("name") == "default")
        given = next(default, {}).get("template")
    return given if isinstance(given, str) and given else None


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def roles(tokenizer: Tokenizer, classifier: bool = False) -> dict[str, str]:
    """Special tokens by their role in transformers: bos_token, eos_token, pad_token, unk_token.

    Where no file says, and in a classifier (transformers needs it to find the end of a text), the
    end of text pads if nothing else does.
    """
    found, ids = tokenizer.roles.names, tokenizer.special_ids
    if "pad_token" not in found and (classifier or tokenizer.declared_roles is None):
        known = {i: name for name, i in tokenizer.special_tokens.items()}
        usable = (i for i in (ids.eos, ids.unk, ids.bos) if i in known and i not in ids.suffix)
        if (pad := next(usable, None)) is not None:
            found["pad_token"] = known[pad]
    return found


def config_ids(tokenizer: Tokenizer, classifier: bool = False) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id of config.json, as the model's own said."""
    names = roles(tokenizer, classifier)
    ids = {f"{role}_id": tokenizer.special_tokens.get(names.get(role, "")) for role in NAMES[:3]}
    if (declared := tokenizer.declared_roles) is None:
        return ids
    kept = {name: declared.config[name] for name in IDS if name in declared.config}
    if classifier and kept.get("pad_token_id") is None:
        kept["pad_token_id"] = ids["pad_token_id"]
    return kept


def generation_config(tokenizer: Tokenizer, stop_ids: Sequence[int]) -> dict[str, Any]:
    """generation_config.json, as the model's own said. stop_ids: what ends an answer in a chat."""
    declared, ends = tokenizer.declared_roles, tokenizer.special_ids.eos_ids
    if declared is not None and declared.generation is not None:
        fields = dict(declared.generation)
    else:
        fields = config_ids(tokenizer)
        if ends and not as_ids(fields.get("eos_token_id")):
            fields["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
    if declared is None and fields["bos_token_id"] is None:
        fields["bos_token_id"] = fields["eos_token_id"]  # without a prompt, it is what starts one
    if not {*stop_ids} <= {*as_ids(fields.get("eos_token_id"))}:
        fields["eos_token_id"] = list(dict.fromkeys([*stop_ids, *ends]))
    return fields


def splits_as_qwen2(tokenizer: Tokenizer) -> bool:
    """Whether it splits text as Qwen2Tokenizer does, which transformers 5 uses for every Qwen2,
    ignoring tokenizer.json and tokenizer_config.json (models/auto/tokenization_auto.py)."""
    before = json.loads(tokenizer.to_json()).get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [before]
    return (steps[0].get("pattern") or {}).get("Regex") == SPLITS["qwen2"]


def write(folder: Path, model: ExportableModel) -> None:
    """The files from which AutoTokenizer makes the same tokenizer, and its chat template."""
    tokenizer = model.tokenizer
    files.write_text(folder / _JSON, tokenizer.to_json())
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.context_length,
        "clean_up_tokenization_spaces": bool(tokenizer.roles.tokenizer.get(CLEAN_UP)),
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add token_type_ids
        **roles(tokenizer, bool(model.config.labels)),
    }
    if model.chat_template is not None:
        config["chat_template"] = model.chat_template.source
        files.write_text(folder / _TEMPLATE, model.chat_template.source)
    files.write_json(folder / _CONFIG, config)
