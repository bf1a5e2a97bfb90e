"""Options of `gptsmith serve`, in a file without torch, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from gptsmith.run.options import Quantization, WeightChoice


class ServeOptions(Quantization, WeightChoice):
    """Which models are served, to whom, and with how much memory."""

    run: tuple[Path, ...] = Field((), min_length=1)
    """Run folders. Each is served under the name of its folder."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs an API key."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = Field(None, min_length=1)
    """Key that clients must send. Other users of this machine can read it in the list of processes:
    the environment variable GPTSMITH_API_KEY and --api-key-file are safer."""
    api_key_file: Path | None = None
    """File with one API key per line. Clients with different keys share no cached prefixes."""
    allow_host: tuple[str, ...] = ()
    """Further names by which clients reach this server (the Host header), e.g. of a proxy."""
    allow_origin: tuple[str, ...] = ()
    """Other web sites whose pages may use the API (CORS), such as https://chat.example.org."""
    tls_cert: Path | None = None
    """Certificate (PEM) to serve HTTPS with."""
    tls_key: Path | None = None
    """Its private key (PEM)."""
    max_batch_size: int = Field(32, ge=1, le=1024)
    """Texts of a model that are generated at the same time; the others wait."""
    max_queue: int = Field(256, ge=0)
    """Texts that wait for a place among these, of all models; beyond it, clients are told to try
    again (429)."""
    cache_tokens: int | None = Field(None, ge=1)
    """Tokens of a model whose keys and values are in memory at the same time, at least its context;
    texts that do not fit wait (default: as many contexts as --max-batch-size)."""
    max_body_bytes: int = Field(4_000_000, ge=1000)
    """Longest request body."""
    drain: float = Field(30, ge=0)
    """After SIGTERM or Ctrl-C, seconds in which running requests may finish."""
