"""Options of evaluation. Nothing here needs torch: help and option errors must be immediate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, HttpUrl

from gptsmith.config import Section


class JudgeOptions(Section):
    """The model that judges, and where it is served."""

    url: HttpUrl = HttpUrl("http://localhost:11434")
    """URL of Ollama, or of any server with OpenAI's chat completions (https://HOST/v1)."""
    model: str | None = None
    """Name of the model at that server."""
    protocol: Literal["auto", "openai", "ollama"] = "auto"
    """auto: Ollama's on port 11434 and for URLs that end in /api/chat, else OpenAI's."""
    key_variable: str | None = None
    """Name of the environment variable that holds the API key, if the server needs one."""
    parallel: int = Field(4, ge=1, le=64)
    """Concurrent requests."""
    timeout: float = Field(120, gt=0)
    """Seconds to wait for an answer."""
    retries: int = Field(5, ge=0, le=20)
    """Further attempts when the server is busy, fails or is not reachable."""
    num_ctx: int = Field(8192, ge=512)
    """Ollama: context in tokens; longer prompts are not judged."""
