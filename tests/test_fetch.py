"""Downloads, from real HTTP servers on this machine."""

import base64
import hashlib
from pathlib import Path

import pytest
from local_web import Site

from gptsmith import download
from gptsmith.download import Wanted

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = Wanted("weights", len(CONTENT), SHA256)


@pytest.fixture(autouse=True)
def weights(site: Site) -> None:
    site.files["/weights"] = CONTENT


def get(site: Site, folder: Path, wanted: Wanted = FILE) -> bytes:
    path = folder / "weights"
    download.fetch(f"{site.url}/weights", path, wanted, lambda *_: None)
    assert [child.name for child in folder.iterdir()] == ["weights"]
    return path.read_bytes()


def starts(site: Site) -> list[int]:
    """From which byte on each request asked."""
    return [int(wanted[6:-1]) if wanted else 0 for _, wanted in site.asked]


def break_off(site: Site, folder: Path) -> None:
    """Leave a part behind, as a killed or disconnected process would."""
    site.cuts[:] = [200_000, 0, 0, 0, 0]
    with pytest.raises(ConnectionError, match="gave up after 4 tries"):
        get(site, folder)
    assert [child.suffix for child in folder.iterdir()] == [".part"]
    site.asked.clear()
    site.cuts.clear()


def test_a_file(site: Site, tmp_path: Path) -> None:
    progress = []
    path = tmp_path / "weights"
    download.fetch(f"{site.url}/weights", path, FILE, lambda *how_far: progress.append(how_far))
    assert path.read_bytes() == CONTENT
    assert progress[-1] == ("weights", len(CONTENT), len(CONTENT))
    assert starts(site) == [0]


def test_a_broken_connection_is_taken_up_again(site: Site, tmp_path: Path) -> None:
    """More often than there are pauses, as long as it comes further each time."""
    site.cuts[:] = [50_000] * 8
    assert get(site, tmp_path) == CONTENT
    assert len(site.asked) > 8
    assert starts(site) == sorted(starts(site))
    assert starts(site)[-1] > 300_000


def test_the_next_call_goes_on(site: Site, tmp_path: Path) -> None:
    break_off(site, tmp_path)
    assert get(site, tmp_path) == CONTENT
    assert starts(site)[0] > 100_000


def test_a_complete_part_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    break_off(site, tmp_path)
    next(tmp_path.iterdir()).write_bytes(CONTENT)
    assert get(site, tmp_path) == CONTENT
    assert starts(site) == [len(CONTENT) - 1]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("shorter", [False, True])
def test_a_file_that_changed_between_is_begun_anew(
    site: Site, tmp_path: Path, shorter: bool, ranges: bool
) -> None:
    break_off(site, tmp_path)
    site.ranges = ranges
    changed = CONTENT[::-1][: 10_000 if shorter else None]
    site.files["/weights"], site.etag = changed, '"two"'
    assert get(site, tmp_path, Wanted("weights")) == changed


def test_a_server_without_ranges(site: Site, tmp_path: Path) -> None:
    break_off(site, tmp_path)
    site.ranges = False
    assert get(site, tmp_path) == CONTENT


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_a_server_that_names_no_version(site: Site, tmp_path: Path, etag: str | None) -> None:
    """Nothing says that the rest belongs to the part, so all is fetched."""
    site.etag = etag
    site.cuts[:] = [200_000]
    assert get(site, tmp_path) == CONTENT
    assert starts(site) == [0, 0]


def test_errors_of_the_server(site: Site, tmp_path: Path) -> None:
    break_off(site, tmp_path)
    site.statuses[:] = [503, 429]
    assert get(site, tmp_path) == CONTENT  # and its part was kept
    assert min(starts(site)) > 100_000
    (tmp_path / "weights").unlink()
    site.asked.clear()
    del site.files["/weights"]
    with pytest.raises(ConnectionError, match="answers 404 Not Found"):
        get(site, tmp_path)
    assert len(site.asked) == 1


def test_another_size_than_was_published(site: Site, tmp_path: Path) -> None:
    site.files["/weights"] = CONTENT + b"more"
    with pytest.raises(ValueError, match="has 512004 bytes, expected 512000"):
        get(site, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_promise_of_more_than_comes(site: Site, tmp_path: Path) -> None:
    site.too_long = 5
    with pytest.raises(ConnectionError, match="gave up after 4 tries"):
        get(site, tmp_path, Wanted("weights"))
    assert not (tmp_path / "weights").exists()


def test_another_content_than_was_published(site: Site, tmp_path: Path) -> None:
    site.files["/weights"] = CONTENT[::-1]
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{16}\.\.\. instead of"):
        get(site, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("header", ["Content-MD5", "x-ms-blob-content-md5"])
def test_the_servers_own_md5(site: Site, tmp_path: Path, header: str) -> None:
    unpublished = Wanted("weights")
    site.headers[header] = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    assert get(site, tmp_path, unpublished) == CONTENT
    (tmp_path / "weights").unlink()
    site.files["/weights"] = CONTENT[::-1]
    with pytest.raises(ValueError, match="MD5 that it announced"):
        get(site, tmp_path, unpublished)
    assert not list(tmp_path.iterdir())
