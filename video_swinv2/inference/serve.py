"""The verb `serve`: a web page, on this machine only, that classifies a clip dropped on it.

The page itself, and every rule about who may send what, is in web_app.py. That file needs the packages of the extra
`serve`; this one does not, so that a missing package is reported in one line.
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.overrides import Device, Precision
from video_swinv2.inference.classifier import open_classifier
from video_swinv2.inference.clip_summary import Limits
from video_swinv2.inference.watching import start_forkserver

if TYPE_CHECKING:
    from video_swinv2.inference.web_app import PageServer

_PACKAGES = ("starlette", "uvicorn")


def serve(
    model_path: Path | str,
    *,
    port: int = 8000,
    top: int = 5,
    limits: Limits | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Serve the page of a model until Ctrl-C, and print its address. port: 0 picks a free one.

    Raises the errors of `open_server`.
    """
    with open_server(model_path, port=port, top=top, limits=limits, device=device, precision=precision) as server:
        print(f"serving on http://{server.address}:{server.port}/; stop with Ctrl-C", flush=True)
        with suppress(KeyboardInterrupt):
            server.run()


def open_server(
    model_path: Path | str,
    *,
    port: int,
    top: int = 5,
    limits: Limits | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> PageServer:
    """Load a model and listen for connections, which `run` then answers.

    Raises UsageError for impossible limits and port numbers, UserError for a port in use and if a package is missing.
    """
    limits = limits or Limits()
    if not 0 <= port < 2**16:
        raise UsageError(f"--port {port}: must be between 0 and 65535")
    if limits.upload_bytes < 1 or not limits.seconds > 0:
        raise UsageError("the limits on size and time must be greater than 0")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve: {', '.join(missing)} not installed; pip install 'video-swinv2[serve]'")
    from video_swinv2.inference.web_app import PageServer

    classifier = open_classifier(model_path, top=top, device=device, precision=precision)
    start_forkserver()
    try:
        return PageServer(classifier, port, limits)
    except OSError as error:
        raise UserError(
            f"--port {port}: cannot be used ({error.strerror}); choose another, or 0 for a free one"
        ) from error
