"""files.py: a reader sees the old file or the new one, never a partial one."""

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gptsmith import files


def test_round_trip_leaves_nothing_else(tmp_path: Path) -> None:
    value = {"text": "naïve – 漢字", "numbers": [1, 2.5, None], "nested": {"a": True}}
    files.write_json(tmp_path / "a.json", value)
    files.write_text(tmp_path / "b.txt", "one\r\ntwo\n")
    files.write_bytes(tmp_path / "c.bin", bytes(range(256)))
    assert files.read_json(tmp_path / "a.json") == value
    assert (tmp_path / "b.txt").read_bytes() == b"one\r\ntwo\n"
    assert files.sha256(tmp_path / "c.bin") == hashlib.sha256(bytes(range(256))).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.txt", "c.bin"]


def test_temporary_name_keeps_the_suffix(tmp_path: Path) -> None:
    with files.atomic_path(tmp_path / "tokens.npy") as temporary:
        np.save(temporary, np.arange(3))  # np.save would append .npy to any other suffix
    assert np.load(tmp_path / "tokens.npy").tolist() == [0, 1, 2]


def test_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def interrupted() -> None:
        with files.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_names_the_file(tmp_path: Path) -> None:
    def write() -> None:
        with files.atomic_path(tmp_path / "model.bin") as temporary:
            temporary.touch()
            Path("/dev/full").write_bytes(b"x" * 8)

    with pytest.raises(OSError, match=r"No space left on device: '.*model\.bin'") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_error_of_an_unwritable_folder_names_the_target_file(tmp_path: Path) -> None:
    for missing in (tmp_path / "gone" / "a.txt", Path("/proc/a.txt")):
        with pytest.raises(FileNotFoundError) as caught:
            files.write_text(missing, "x")
        assert caught.value.filename == str(missing)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"a": 1,\n"b": }', r"a\.json, line 3, column 6: not JSON"),
        (b"", r"a\.json, line 1, column 1: not JSON"),
        (b'{"a": "\xff"}', r"a\.json, byte 7: not UTF-8"),
    ],
)
def test_malformed_json_names_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.read_json(tmp_path / "a.json")


WRITER = """
import sys
from gptsmith import files
value = 0
while True:
    value += 1
    files.write_text(sys.argv[1], str(value % 10) * 200_000)
    print(value, flush=True)
"""


def test_killed_writer_leaves_a_whole_file_and_sweep_removes_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for round_ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.013 * round_)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        text = path.read_text()
        assert len(text) == 200_000
        assert len(set(text)) == 1
    (tmp_path / ".a.tmp-0123abcd.txt").write_text("left by a killed writer")
    (tmp_path / ".tmpSw2efU").write_text("left by safetensors")
    (tmp_path / "notes.tmp-0123abcd.txt").write_text("a user's own file")
    files.remove_temporary_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "notes.tmp-0123abcd.txt"]


def fill(folder: Path, name: str = "a.txt") -> None:
    with files.atomic_folder(folder) as temporary:
        files.write_text(temporary / name, "whole")


def test_folder_appears_complete(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()  # an empty one may be there
    for name in ("new", "below/new"):
        fill(tmp_path / name)
        assert (tmp_path / name / "a.txt").read_text() == "whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["below", "new"]


def test_failed_folder_is_removed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fill(tmp_path / "new", name="missing/a.txt")
    assert not list(tmp_path.iterdir())


def test_an_occupied_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("full", "file", "dangling"):
        with pytest.raises(FileExistsError, match=rf"{name} .*choose another --out"):
            fill(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file", "full"]


def test_leftover_folder_is_removed_unless_locked(tmp_path: Path) -> None:
    code = (
        "import sys, time; from gptsmith import files\n"
        "with files.atomic_folder(sys.argv[1]) as f:\n"
        "    (f / 'half').touch(); print('there', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"there\n"
        fill(tmp_path / "new")  # beside it
        assert len(list(tmp_path.iterdir())) == 2
        writer.send_signal(signal.SIGKILL)
    (tmp_path / "new" / "a.txt").unlink()
    fill(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_error_names_the_folder_that_cannot_be_written(tmp_path: Path) -> None:
    def fill(name: str, error: OSError | None) -> None:
        with files.atomic_folder(tmp_path / name) as folder:
            if error is None:
                (folder / "gone" / "file").write_text("x")
            else:
                raise error

    for error in (OSError(errno.ENOSPC, "No space left on device"), None):
        with pytest.raises(OSError) as caught:
            fill("out", error)
        assert caught.value.filename == str(tmp_path / "out")
    (tmp_path / "file").touch()
    for name in ("file", "file/out", "file/out/deep"):
        with pytest.raises(FileExistsError, match=r"file .*: choose another --out"):
            fill(name, None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_digest_of_large_files(tmp_path: Path) -> None:
    """Parts of 16 MiB: every bit counts, and where it is; a small file has its plain sha256."""
    path, part = tmp_path / "a", 1 << 24
    data = bytearray(os.urandom(1 << 16) * (3 * 256 + 1))  # three parts and 64 KiB
    assert len(data) > 3 * part
    path.write_bytes(data)
    whole = files.digest(path)
    hashed = [hashlib.sha256(data[i : i + part]).digest() for i in range(0, len(data), part)]
    assert whole == "sha256/16MiB:" + hashlib.sha256(b"".join(hashed)).hexdigest()
    assert files.has_digest(path, whole)
    assert files.has_digest(path, hashlib.sha256(data).hexdigest()), "of earlier manifests"
    for at in (0, part - 1, part, 3 * part, len(data) - 1):
        data[at] ^= 4
        path.write_bytes(data)
        assert not files.has_digest(path, whole)
        data[at] ^= 4
    path.write_bytes(data[:part])
    assert files.digest(path) == hashlib.sha256(data[:part]).hexdigest()
    path.write_bytes(b"")
    assert files.digest(path) == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("call", ["fsync", "flock", "pread", "write"])
def test_every_failed_call_names_its_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's errors of open files have no names."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "a.bin"
    path.write_bytes(bytes(1 << 25))
    monkeypatch.setattr(fcntl if call == "flock" else os, call, fail)
    attempts = {
        "fsync": lambda: files.sync(path),
        "flock": lambda: files.lock(path, ""),
        "pread": lambda: files.digest(path),
        "write": lambda: files.lock(path, ""),
    }
    with pytest.raises(OSError, match=r"Input/output error: '.*a\.bin'"):
        attempts[call]()


def test_a_file_that_safetensors_fails_to_open_is_not_called_missing(tmp_path: Path) -> None:
    there, absent = tmp_path / "there", tmp_path / "absent"
    there.touch()
    fails = partial(safe_open, absent, "np")  # the same error as for any other cause
    with pytest.raises(OSError, match=f"Input/output error: '{there}'"):
        files.open_safetensors(there, fails)
    with pytest.raises(FileNotFoundError, match="No such file"):
        files.open_safetensors(absent, fails)


def test_the_cause_for_which_torch_cannot_open_a_file_is_named(tmp_path: Path) -> None:
    def fails() -> None:
        torch.UntypedStorage.from_file(str(tmp_path / "absent"), False, 1)

    tried = []

    def is_interrupted() -> int:
        tried.append(1)
        if len(tried) < 3:
            cause = "Interrupted system call (4)"
            raise RuntimeError(f"unable to open file <x> in read-only mode: {cause}")
        return 7

    with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{tmp_path}'"):
        files.open_safetensors(tmp_path, fails)
    assert files.open_safetensors(tmp_path, is_interrupted) == 7


def test_an_error_with_a_name_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"), files.naming(tmp_path):
        (tmp_path / "gone").read_bytes()
    with pytest.raises(ValueError, match=r"^no system call$"), files.naming(tmp_path):
        raise ValueError("no system call")


def test_a_mount_point_is_rejected_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a Docker volume: rename(2) cannot replace it."""
    (tmp_path / "volume").mkdir()
    files.check_creatable(tmp_path / "volume")
    table = f"36 35 98:0 / {tmp_path}/volume rw,noatime master:1 - ext3 /dev/root rw\n"
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text",
        lambda p, **o: table if str(p) == "/proc/self/mountinfo" else read(p, **o),
    )  # fmt: skip
    with pytest.raises(FileExistsError, match=r"volume is a mount point.*--out .*volume/NAME"):
        files.check_creatable(tmp_path / "volume")
    files.check_creatable(tmp_path / "volume" / "new")


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    for reject in (files.make_folder, files.check_creatable):
        for name in ("loop", "gone", "one", "loop/below", "gone/below/deep"):
            with pytest.raises(FileExistsError, match=r"is a link that leads nowhere.*--out"):
                reject(tmp_path / name)
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to("a")
    files.make_folder(tmp_path / "link" / "c")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b", "c"]


def test_an_unwritable_parent_is_rejected_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(
        PermissionError, match=r"not writable, so .*deep cannot be created"
    ) as caught:
        files.check_creatable(tmp_path / "new" / "deep")
    assert caught.value.filename == str(tmp_path)
