"""Downloads from HTTP servers on this machine."""

import hashlib
from pathlib import Path

import pytest
from local_web import Site

from gptsmith import download
from gptsmith.download import RemoteFile

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = RemoteFile("weights", len(CONTENT), SHA256)


@pytest.fixture(autouse=True)
def weights(site: Site) -> None:
    site.files["/weights"] = CONTENT


def get(site: Site, folder: Path, wanted: RemoteFile = FILE) -> bytes:
    path = folder / "weights"
    download.fetch(f"{site.url}/weights", path, wanted)
    assert [child.name for child in folder.iterdir()] == ["weights"]
    return path.read_bytes()


def starts(site: Site) -> list[int]:
    """The first byte that each request asked for."""
    return [int(wanted[6:-1]) if wanted else 0 for _, wanted in site.asked]


def break_off(site: Site, folder: Path) -> None:
    """Leave a part, as a killed or disconnected process does."""
    site.cuts[:] = [200_000, 0, 0, 0, 0]
    with pytest.raises(ConnectionError, match="gave up after 4 tries"):
        get(site, folder)
    assert [child.suffix for child in folder.iterdir()] == [".part"]
    site.asked.clear()
    site.cuts.clear()


def test_download(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("gptsmith.progress._LINE_SECONDS", 0)
    assert get(site, tmp_path) == CONTENT
    assert capsys.readouterr().err.endswith("fetching weights: 100%, 0.5 of 0.5 MB\n")
    assert starts(site) == [0]


def test_broken_connection_is_resumed(site: Site, tmp_path: Path) -> None:
    """More often than there are pauses, as long as each attempt makes progress."""
    site.cuts[:] = [50_000] * 8
    assert get(site, tmp_path) == CONTENT
    assert len(site.asked) > 8
    assert starts(site) == sorted(starts(site))
    assert starts(site)[-1] > 300_000


def test_next_call_resumes(site: Site, tmp_path: Path) -> None:
    break_off(site, tmp_path)
    assert get(site, tmp_path) == CONTENT
    assert starts(site)[0] > 100_000


def test_complete_part_is_not_downloaded_again(site: Site, tmp_path: Path) -> None:
    break_off(site, tmp_path)
    next(tmp_path.iterdir()).write_bytes(CONTENT)
    assert get(site, tmp_path) == CONTENT
    assert starts(site) == [len(CONTENT) - 1]


@pytest.mark.parametrize("shorter", [False, True])
def test_part_of_another_version_is_found_and_deleted(
    site: Site, tmp_path: Path, shorter: bool
) -> None:
    break_off(site, tmp_path)
    changed = CONTENT[::-1][: 10_000 if shorter else None]
    site.files["/weights"] = changed
    wanted = RemoteFile("weights", sha256=hashlib.sha256(changed).hexdigest())
    with pytest.raises(ValueError, match="run this again"):
        get(site, tmp_path, wanted)
    assert get(site, tmp_path, wanted) == changed


def test_server_without_ranges(site: Site, tmp_path: Path) -> None:
    break_off(site, tmp_path)
    site.ranges = False
    assert get(site, tmp_path) == CONTENT


def test_server_errors(site: Site, tmp_path: Path) -> None:
    break_off(site, tmp_path)
    site.statuses[:] = [503, 429]
    assert get(site, tmp_path) == CONTENT  # the part was kept
    assert min(starts(site)) > 100_000
    (tmp_path / "weights").unlink()
    site.asked.clear()
    del site.files["/weights"]
    with pytest.raises(ConnectionError, match="answers 404 Not Found"):
        get(site, tmp_path)
    assert len(site.asked) == 1


def test_wrong_size(site: Site, tmp_path: Path) -> None:
    site.files["/weights"] = CONTENT + b"more"
    with pytest.raises(ValueError, match="has 512,004 bytes, expected 512,000"):
        get(site, tmp_path)
    assert not list(tmp_path.iterdir())


def test_truncated_answer(site: Site, tmp_path: Path) -> None:
    site.too_long = 5
    with pytest.raises(ConnectionError, match="gave up after 4 tries"):
        get(site, tmp_path, RemoteFile("weights"))
    assert not (tmp_path / "weights").exists()


def test_wrong_content(site: Site, tmp_path: Path) -> None:
    site.files["/weights"] = CONTENT[::-1]
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{16}\.\.\. instead of"):
        get(site, tmp_path)
    assert not list(tmp_path.iterdir())
