"""`phi2 serve`: a socket, the models, a worker and uvicorn, begun and ended in this order."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from phi2.inference.engine import Engine
from phi2.inference.generate import choices_of
from phi2.serve.config import EndpointConfig
from phi2.serve.models import Served
from phi2.serve.worker import Worker

if TYPE_CHECKING:
    from uvicorn import Server

LAST_SECONDS = 5  # in which replies may still end after Ctrl-C


def serve(config: EndpointConfig, load: Callable[[], Served]) -> None:
    """Answers until it is interrupted.

    Args:
        load: the models; asked for once the socket is known to be free.

    Raises:
        ValueError: when there is no listening at the address, an extra is missing, or anyone could ask.
    """
    key = config.api_key or os.environ.get("PHI2_API_KEY") or None
    config.require_key_for_network(key)
    _require_extra()
    with listen(config.host, config.port) as listener:
        served = load()
        host, port = listener.getsockname()[:2]
        engine = Engine(served.model, choices_of(served.model, served.tokenizer), config.slots)
        server = make_server(served, engine, config, key)
        print(f"serving {', '.join(served.adapters)} at {url(host, port)}; Ctrl-C ends it", file=sys.stderr)
        server.run(sockets=[listener])


def make_server(served: Served, engine: Engine, config: EndpointConfig, key: str | None = None) -> Server:
    """A server that has not begun, with a worker that has."""
    import uvicorn

    from phi2.serve.api import Endpoint, make_app

    app = make_app(Endpoint(served, engine, Worker(engine, served.tokenizer), config, key))
    return uvicorn.Server(
        uvicorn.Config(
            app, http="h11", ws="none", lifespan="on", log_level="warning", timeout_graceful_shutdown=LAST_SECONDS
        )
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: when the port is in use, or the address not ours.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise ValueError(f"cannot listen at {host} port {port}: {reason}") from error


def url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _require_extra() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"phi2 serve needs the extra serve: pip install -e '.[serve]' ({error})") from error
