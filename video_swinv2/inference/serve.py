"""The verb `serve`: a web page, reachable from this machine only, that classifies a clip dropped on it.

The page itself, and the checks of who may send what, are in web_app.py. That module needs the packages of the extra
`serve`. This one does not, so that it can report a missing package in one line.
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from video_swinv2.errors import UsageError, UserError
from video_swinv2.escaping import for_terminal
from video_swinv2.evaluation.overrides import Device, Precision
from video_swinv2.inference.classifier import DEFAULT_PROTOCOL, open_classifier
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
    protocol: str = DEFAULT_PROTOCOL,
    limits: Limits | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Print the address of the page and serve it until Ctrl-C. port: 0 picks a free one.

    Raises the errors of `open_server`.
    """
    print(for_terminal(f"serve: loading {model_path}"), file=sys.stderr, flush=True)
    with open_server(
        model_path, port=port, top=top, protocol=protocol, limits=limits, device=device, precision=precision
    ) as server:
        print(f"serving on http://{server.address}:{server.port}/; stop with Ctrl-C", flush=True)
        with suppress(KeyboardInterrupt):
            server.run()


def open_server(
    model_path: Path | str,
    *,
    port: int,
    top: int = 5,
    protocol: str = DEFAULT_PROTOCOL,
    limits: Limits | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> PageServer:
    """Load a model and listen for connections; `run` of the returned server then answers them.

    protocol: the views that a clip is classified in. Raises UsageError as `open_classifier` does, and for invalid
    limits and port numbers, and UserError for a port in use and for missing packages.
    """
    limits = limits or Limits()
    if not 0 <= port < 2**16:
        raise UsageError(f"--port {port}: must be between 0 and 65535")
    if limits.upload_bytes < 1 or not limits.seconds > 0:
        raise UsageError("the limits on size and time must be greater than 0")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve: {', '.join(missing)} not installed; pip install 'video-swinv2[serve]'")
    from video_swinv2.inference.web_app import PageServer  # only now, because it imports these packages

    classifier = open_classifier(model_path, top=top, protocol=protocol, device=device, precision=precision)
    # Started before the first request needs it, which would otherwise wait a second or two.
    start_forkserver()
    try:
        return PageServer(classifier, port, limits)
    except OSError as error:
        raise UserError(
            f"--port {port}: cannot be used ({error.strerror}); choose another, or 0 for a free one"
        ) from error
