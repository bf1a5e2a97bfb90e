"""Checkpoints: resumable state on disk, of which only complete and verified ones are used.

    checkpoints/step-000500/
      model.safetensors  optimizer.safetensors ...   one file per group of tensors
      state.json                                     everything but tensors
      manifest.json                                  step, sizes, digests; written last

A save writes `step-000500.tmp-xxxxxxxx` and renames it. A folder with a manifest is complete even
under its temporary name, so there is a checkpoint at every moment, also during a replacement.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from safetensors import SafetensorError

from gptsmith.files import digest, has_digest, naming, open_safetensors, read_json, sync, write_json

if TYPE_CHECKING:  # torch is imported where tensors are handled, not to list checkpoints
    import torch
    from torch import Tensor

T = TypeVar("T")

MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{6,})(\.tmp-[0-9a-f]{8})?")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    step: int

    def load(self, name: str, part: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
        """The tensors of group `name`, on the CPU. part: see `load_tensors`."""
        return load_tensors(self.path / f"{name}.safetensors", part)

    def stored(self, name: str) -> StoredTensors:
        """The tensors of group `name`, which are read when they are asked for."""
        return StoredTensors(self.path / f"{name}.safetensors")

    @property
    def state(self) -> dict[str, Any]:
        """Everything but the tensors, as given to `save`."""
        return read_json(self.path / STATE)


_DTYPES = {
    "float64": "F64", "int64": "I64", "float32": "F32", "int32": "I32", "bfloat16": "BF16",
    "float16": "F16", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, without fsync (see files.atomic_path).

    Equal tensors give equal files, unlike with the library's own save, which orders the metadata at
    random and needs memory for a second copy. metadata: for the header. Pass tied weights once.
    """
    views = [(t.data_ptr(), t.shape, t.stride()) for t in tensors.values() if t.numel()]
    assert len(views) == len(set(views)), "two names for one tensor"
    # larger elements first, so that each tensor is aligned to its own
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    layout = {name: (tensors[name].dtype, tensors[name].shape) for name in order}
    stream_tensors(path, layout, tensors.items(), metadata)


def stream_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`save_tensors` for tensors that arrive one at a time, in any order: the model may be larger
    than the free memory. layout: dtype and shape of every tensor, in the order of the file."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offsets, end = {}, 0
    for name, (dtype, shape) in layout.items():
        offsets[name], end = end, end + math.prod(shape) * dtype.itemsize
        kind = _DTYPES[str(dtype).removeprefix("torch.")]
        span = [offsets[name], end]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format requires data at a multiple of 8
    with path.open("wb") as file:
        with naming(path):
            file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            dtype, shape = layout[name]
            assert (tensor.dtype, tensor.shape) == (dtype, tuple(shape))
            flat = tensor.detach().cpu().contiguous().view(-1)
            with naming(path):
                file.seek(8 + len(text) + offsets.pop(name))
                file.write(flat.view(torch.uint8).numpy().data)
        with naming(path):
            file.flush()
    assert not offsets


def load_tensors(path: Path, part: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
    """Read a safetensors file; ValueError if it is damaged.

    part: (r, N) reads, of each tensor that has rows, only those of torch.chunk(tensor, N)[r].
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    def load_part() -> dict[str, Tensor]:
        found = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                shape = file.get_slice(name).get_shape()
                if shape:
                    size = -(-shape[0] // part[1])
                    rows = slice(min(shape[0], part[0] * size), (part[0] + 1) * size)
                    found[name] = file.get_slice(name)[rows]
                else:
                    found[name] = file.get_tensor(name)
        return found

    return _read(path, load_part if part[1] > 1 else lambda: load_file(path))


class StoredTensors(Mapping[str, "Tensor"]):
    """The tensors of a safetensors file by name, on the CPU. Each is read when it is asked for, so
    that only those in use take memory. Raises ValueError if the file is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: list[str] = self._with_file(lambda file: list(file.keys()))

    def _with_file(self, function: Callable[[Any], Any]) -> Any:
        from safetensors import safe_open

        def read() -> Any:  # the file is mapped as long as it, or a tensor of it, is in use
            with safe_open(self.path, "pt") as file:
                return function(file)

        return _read(self.path, read)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._with_file(lambda file: file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read(path: Path, function: Callable[[], T]) -> T:
    """The result of `function`, which reads a safetensors file; ValueError if it is damaged."""
    with path.open("rb"):  # the library's errors do not name a missing or unreadable file
        pass
    try:
        with naming(path):
            return open_safetensors(path, function)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]
) -> Path:
    """Write folder/step-NNNNNN durably, replacing an existing one, and return it.

    tensors: group ("model", "optimizer") -> named tensors. state: JSON. If the process is killed at
    any moment, the folder holds the earlier checkpoints, or those and this one.
    """
    final = _path(folder, step)
    temporary, complete = _temporary_path(final), False
    try:
        temporary.mkdir(parents=True)
        for group, group_tensors in tensors.items():
            save_tensors(temporary / f"{group}.safetensors", group_tensors)
        (temporary / STATE).write_text(json.dumps(state, indent=2, ensure_ascii=False) + "\n")
        entries = {}
        for file in sorted(temporary.iterdir()):
            sync(file)
            entries[file.name] = {"size": file.stat().st_size, "sha256": digest(file)}
        write_json(temporary / MANIFEST, {"step": step, "files": entries})  # syncs the names too
        complete = True  # whatever fails from here on, this is a checkpoint
        if final.exists():
            _remove(final)
        temporary.rename(final)
        sync(folder)
    except BaseException as error:
        if not complete:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(final)) from error
        raise
    return final


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, intact or damaged, in ascending order."""
    return sorted({step for step, _ in _candidates(folder)})


def find(folder: Path, which: Literal["last"] | int = "last") -> tuple[Checkpoint, list[str]]:
    """The newest intact checkpoint, or that of a given step, and the damage found in newer ones.

    Raises FileNotFoundError if there is none, ValueError if all are damaged or the requested step
    is damaged or missing; the message lists the others. The run may be in training: if its process
    removes a checkpoint meanwhile, the search starts again.
    """
    while True:
        candidates, damage = _candidates(folder), list[str]()
        if not candidates:
            raise FileNotFoundError(f"no checkpoint in {folder}")
        others = sorted({step for step, _ in candidates if step != which})
        listed = ", ".join(map(str, others)) or "none"
        chosen = [(step, path) for step, path in candidates if which in ("last", step)]
        if not chosen:
            raise ValueError(f"no checkpoint of step {which} in {folder}; available: {listed}")
        for step, path in chosen:
            problem = verify(path, step)
            if problem is None:
                return Checkpoint(path, step), damage
            if not path.exists() or (".tmp-" in path.name and not (path / MANIFEST).exists()):
                break  # pruned, or renamed at the end of a save: look again
            damage.append(f"checkpoint of step {step} is damaged: {problem}")
        else:
            if which == "last":
                raise ValueError(f"every checkpoint in {folder} is damaged: {'; '.join(damage)}")
            raise ValueError(f"{'; '.join(damage)} (other checkpoints: {listed})")


def verify(path: Path, step: int) -> str | None:
    """What is wrong with a checkpoint folder, naming the file; None if it is intact.

    OSError for files that cannot be read, which may be intact and must not be removed as damaged.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        return f"{manifest} is missing"
    try:
        content = read_json(manifest)
        recorded = content["step"]
        files = {
            str(name): (int(entry["size"]), str(entry["sha256"]))
            for name, entry in content["files"].items()
        }
    except FileNotFoundError:  # removed since
        return f"{manifest} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return f"{manifest} is unreadable ({type(error).__name__}: {error})"
    if recorded != step:
        return f"{manifest} says step {recorded}"
    if STATE not in files:
        return f"{manifest} does not list {STATE}"
    for name, (size, recorded_digest) in files.items():
        file = path / name
        try:
            actual = file.stat().st_size
            if actual != size:
                return f"{file} has {actual:,} bytes instead of {size:,}"
            if not has_digest(file, recorded_digest):
                return f"{file} does not have the recorded sha256"
        except FileNotFoundError:
            return f"{file} is missing"
    return None


def prune(folder: Path, keep_last: int, keep: set[int]) -> None:
    """Remove all checkpoints but the newest `keep_last` and those of the steps in `keep`."""
    assert keep_last >= 1, keep_last
    for step in [step for step in steps(folder) if _path(folder, step).exists()][:-keep_last]:
        if step not in keep:
            _remove(_path(folder, step))


def clean(folder: Path, after: int | None = None) -> None:
    """Clean up after killed saves. The caller holds the run's lock.

    Complete saves are renamed to their final names, incomplete ones removed. after: the step that
    the run resumes from. Later checkpoints are damaged or belong to an abandoned continuation; they
    are removed, or `prune` would count them as the newest.
    """
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        step = int(match[1])
        if after is not None and step > after:
            _remove(path)
        elif match[2]:
            final = _path(folder, step)
            if not final.exists() and verify(path, step) is None:
                path.rename(final)
            else:
                _remove(path)
    sync(folder)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _temporary_path(final: Path) -> Path:
    return final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")


def _remove(path: Path) -> None:
    """Remove a checkpoint folder in an order in which its remains never look complete."""
    temporary = path if ".tmp-" in path.name else _temporary_path(path)
    try:
        if temporary != path:
            path.rename(temporary)
        (temporary / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(temporary)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """(step, path), newest first, final names before temporary ones.

    Temporary folders are candidates only if they have a manifest.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir() and (not match[2] or (path / MANIFEST).exists()):
            found.append((int(match[1]), path))
    # Python's sort is stable, and "step-000500" sorts before "step-000500.tmp-..."
    return sorted(found, key=lambda candidate: -candidate[0])
