"""Where the endpoint and the page listen and what they take on, which the command line reads without loading torch."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phi2.inference.config import ModelConfig

if TYPE_CHECKING:
    from phi2.serve.models import Served


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """An endpoint and its limits.

    Raises:
        ValueError: when a value is out of range, or the network could reach a server without a key.
    """

    host: str = "127.0.0.1"
    """Address to listen at; one that other machines reach needs an api_key."""
    port: int = 8000
    """Port to listen at; 0 takes one that is free."""
    api_key: str | None = None
    """Bearer token that every request must carry; unset, the environment variable PHI2_API_KEY, and without it none."""
    allow_origin: Sequence[str] = ()
    """Origin whose web pages may call the endpoint (CORS); on the command line give the flag again for another."""
    slots: int | None = None
    """Choices that are answered side by side; unset, what fits into 4 GiB of keys and values, 64 at most."""
    max_queue: int = 64
    """Choices that may wait for a slot; what comes beyond is refused with status 429."""
    max_body_mb: float = 2.0
    """MB that the body of a request may have."""
    request_timeout: float = 300.0
    """Seconds that a request may take, from its first byte to the last of its answer."""

    def __post_init__(self) -> None:
        _require(0 <= self.port < 2**16, "port", "in [0, 65535]", self.port)
        _require(self.slots is None or self.slots >= 1, "slots", "at least 1", self.slots)
        _require(self.max_queue >= 0, "max_queue", "0 or more", self.max_queue)
        _require(self.max_body_mb > 0, "max_body_mb", "above 0", self.max_body_mb)
        _require(self.request_timeout > 0, "request_timeout", "above 0", self.request_timeout)
        _require(self.api_key is None or bool(self.api_key.strip()), "api_key", "a token", self.api_key)

    def require_key_for_network(self, key: str | None) -> None:
        """Raises ValueError when anyone on the network could ask."""
        if key is None and not is_loopback(self.host):
            raise ValueError(f"host {self.host} can be reached from other machines: give an api_key, or use 127.0.0.1")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(EndpointConfig, ModelConfig):
    """Models that are served."""

    adapters: Sequence[str] = ()
    """Folder or hub id of a LoRA adapter, or of its run, or NAME= and one of them: a model of its own beside its base.
    Give the flag again for another."""

    def load_served(self) -> Served:
        """The base, and every adapter on it."""
        from phi2.serve.models import load_served

        return load_served(
            self.model,
            self.adapters,
            adapter=self.adapter,
            device=self.device,
            dtype=self.dtype,
            quantize=self.quantize,
        )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The models of the page, and where it is."""

    model: list[str]
    """Folder, hub id, "nano", "nano-instruct" or folder of a run, or NAME= and one of them; give the flag again for
    another. Runs on one base share its weights."""
    adapters: list[str] = field(default_factory=list)
    """Folder or hub id of a LoRA adapter, or of its run, given likewise; it shares the weights of the model that it was
    trained on."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets in whoever reaches this machine."""
    port: int = 7860
    """Port to listen at."""

    def __post_init__(self) -> None:
        _require(bool(self.model), "model", "one model at least", self.model)
        _require(0 < self.port < 2**16, "port", "in [1, 65535]", self.port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; of a name other than localhost nobody knows."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _require(is_right: bool, name: str, rule: str, value: object) -> None:
    if not is_right:
        raise ValueError(f"{name} must be {rule}, got {value!r}")
