"""`gptsmith serve RUN...`: a chat page and an OpenAI-compatible API on this machine."""

from __future__ import annotations

import errno
import gc
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from gptsmith import terminal
from gptsmith.config import load_config
from gptsmith.kernels.build import prebuild
from gptsmith.run import layout
from gptsmith.serve.options import ServeOptions

if TYPE_CHECKING:
    from gptsmith.serve.served import ServedModel

_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, those of Windows under WSL


def main(argv: list[str]) -> None:
    options = load_config(ServeOptions, argv, prog="gptsmith serve", positional="run")
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise ValueError("serving needs the extra serve: pip install 'gptsmith[serve]'") from None
    from gptsmith.serve.access import is_loopback, read_keys

    if (options.tls_cert is None) != (options.tls_key is None):
        raise ValueError("--tls-cert and --tls-key belong together: give both")
    if options.tls_cert is not None and options.tls_key is not None:
        from gptsmith.serve.connection import check_certificate

        check_certificate(options.tls_cert, options.tls_key)
    given = (options.api_key, os.environ.get("GPTSMITH_API_KEY"))
    keys = [key.strip() for key in given if key and key.strip()]
    if options.api_key_file is not None:
        keys += read_keys(options.api_key_file)
    if not is_loopback(options.host) and not keys:
        raise ValueError(
            f"--host {options.host} can be reached from other machines: set an API key, "
            "by --api-key-file FILE or the environment variable GPTSMITH_API_KEY"
        )
    listening = _listen(options.host, options.port)
    try:
        if _is_for_cpu(options.device):
            prebuild(_kernel_format(options))
        from gptsmith.serve.app import create_app  # this imports torch
        from gptsmith.serve.connection import http_server

        models = _load(options)
        app = create_app(models, options, keys)
        server = http_server(app, options)
        port = listening.getsockname()[1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        url = f"http{'s' if options.tls_cert else ''}://{host}:{port}"
        gc.collect()
        gc.freeze()  # else each collection goes through all that was imported and loaded
        for name, model in models.items():
            terminal.say(f"serving {name} ({model.kind}, context {model.context_length:,})")
        terminal.say(f"chat page: {url}    API: {url}/v1    Ctrl-C stops")
        server.run(sockets=[listening])
    finally:
        listening.close()


def _is_for_cpu(device: str) -> bool:
    """Whether a CPU will compute, as far as can be told before torch is imported."""
    if device == "auto":
        return sys.platform != "darwin" and not any(Path(name).exists() for name in _GPUS)
    return device == "cpu"


def _kernel_format(options: ServeOptions) -> str:
    """The format of weights for which the kernels will be asked first, told without torch: for
    weights as they are stored, from the beginning of their file."""
    if options.quantize is not None or options.dtype != "auto":
        return options.quantize or options.dtype
    path = options.run[0] / layout.WEIGHTS
    with suppress(OSError, SafetensorError), safe_open(path, framework="numpy") as file:
        if {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}:  # noqa: SIM118
            return "bfloat16"
    return "float32"  # also where it is not known yet: adapters, checkpoints


def _load(options: ServeOptions) -> dict[str, ServedModel]:
    from gptsmith.run import Run
    from gptsmith.serve.served import ServedModel

    models: dict[str, ServedModel] = {}
    for path in options.run:
        run = Run.open(path)
        name = run.path.resolve().name
        if name in models:
            raise ValueError(f"{path}: a model named {name} is served already: rename the folder")
        model = options.load(run)
        models[name] = ServedModel(
            name,
            run,
            model,
            options.max_batch_size,
            options.quantize,
            options.cache_tokens,
            options.load_draft(run),
            options.draft_tokens,
        )
    return models


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. ValueError for an address that cannot be used."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        other = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise ValueError(f"--host {host} --port {port}: {reason}; try another {other}") from None
