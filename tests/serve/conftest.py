"""Servers of the tiny Phi and two adapters of it, and what each says when nobody else asks."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Thread
from typing import NamedTuple

import openai
import pytest
import torch

from phi2.checkpoints.peft_files import save_adapter
from phi2.checkpoints.weights import load
from phi2.inference.engine import Engine
from phi2.inference.generate import choices_of, generate
from phi2.lora import adapter_state, attach
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.serve.config import EndpointConfig
from phi2.serve.models import Served, load_served
from phi2.serve.server import listen, make_server
from phi2.tokenizer import Tokenizer

ADAPTERS = ("left", "right")


class Running(NamedTuple):
    """A server in a thread."""

    port: int
    engine: Engine

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, key: str = "none", **settings) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60, **settings)

    def send(self, head: str, body: bytes = b"") -> socket.socket:
        """A request as it is written by hand, whose answer is yet to be read."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(f"{head}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def post(self, body: bytes, path: str = "completions", headers: str = "Content-Type: application/json") -> tuple:
        """Status, headers and JSON that a body is answered with."""
        with self.send(f"POST /v1/{path} HTTP/1.1\r\nConnection: close\r\n{headers}", body) as connection:
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        head, _, content = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), head.decode().lower(), json.loads(content)

    def is_idle(self) -> bool:
        """Whether the engine has nothing left to do, now or soon."""
        return eventually(lambda: self.engine.is_idle)


def eventually(is_so: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def begun(served: Served, key: str | None = None, slots: int = 8, **settings) -> Iterator[Running]:
    config = EndpointConfig(slots=slots, **settings)
    engine = Engine(served.model, choices_of(served.model, served.tokenizer), slots)
    listener = listen("127.0.0.1", 0)
    server = make_server(served, engine, config, key)
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    assert eventually(lambda: server.started)
    try:
        yield Running(listener.getsockname()[1], engine)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        listener.close()
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def adapter_folders(tiny_phi, tmp_path_factory) -> dict[str, str]:
    """Two adapters of the tiny Phi, far from their start."""
    folders = {}
    for seed, name in enumerate(ADAPTERS):
        model, _ = load(tiny_phi, "cpu")
        attach(model, LoraConfig(r=4, target_modules=("q_proj", "fc2")), seed)
        for tensor in adapter_state(model).values():
            tensor.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        folders[name] = str(tmp_path_factory.mktemp(name))
        save_adapter(model, folders[name], str(tiny_phi))
    return folders


@pytest.fixture(scope="session")
def served(tiny_phi, adapter_folders) -> Served:
    return load_served(str(tiny_phi), [f"{name}={path}" for name, path in adapter_folders.items()], device="cpu")


@pytest.fixture(scope="session")
def base(tiny_phi) -> str:
    """The name of the model without adapters."""
    return str(tiny_phi)


@pytest.fixture(scope="module")
def running(served) -> Iterator[Running]:
    with begun(served) as running:
        yield running


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[Running]]:
    """`with serving(served, **settings) as running:` is a server of its own."""
    return begun


@pytest.fixture(scope="session")
def soon() -> Callable[..., bool]:
    return eventually


@pytest.fixture(scope="module")
def client(running) -> openai.OpenAI:
    return running.client()


@pytest.fixture(scope="session")
def alone(tiny_phi, adapter_folders, base) -> Callable[..., str]:
    """The text that a model says when nobody else asks: alone(name, prompt, **sampling)."""
    loaded = {base: load(tiny_phi, "cpu")}
    loaded |= {name: load(tiny_phi, "cpu", adapter=folder) for name, folder in adapter_folders.items()}
    return lambda name, prompt, **sampling: generate(*loaded[name], prompt, **sampling).text


@pytest.fixture(scope="session")
def plain(tiny_phi) -> tuple[Phi2ForCausalLM, Tokenizer]:
    """The base on its own, for passes that the server has no part in."""
    return load(tiny_phi, "cpu")
