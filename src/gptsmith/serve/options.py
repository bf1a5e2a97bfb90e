"""Options of `gptsmith serve`; this file does not import torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from gptsmith.run.options import Speculation


class ServeOptions(Speculation):
    """Serve runs: a chat page, and the API of OpenAI's clients."""

    run: tuple[Path, ...] = Field(min_length=1)
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
    """Further host names by which clients reach this server (the Host header), as of a proxy."""
    allow_origin: tuple[str, ...] = ()
    """Other web sites whose pages may use the API (CORS), such as https://chat.example.org."""
    tls_cert: Path | None = None
    """Certificate (PEM) to serve HTTPS with."""
    tls_key: Path | None = None
    """Its private key (PEM)."""
    max_batch_size: int = Field(32, ge=1, le=1024)
    """Requests of a model that run at the same time; the others wait."""
    max_queue: int = Field(256, ge=0)
    """Requests that may wait, of all models; beyond that, clients are told to try again later
    (429)."""
    cache_tokens: int | None = Field(None, ge=1)
    """Size of a model's KV cache in tokens, at least its context; requests that do not fit wait
    (default: --max-batch-size contexts)."""
    max_body_bytes: int = Field(4_000_000, ge=1000)
    """Maximum size of a request body."""
    drain: float = Field(30, ge=0)
    """Seconds that running requests have to finish after SIGTERM or Ctrl-C."""
