"""What a running server says about itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from vllm_instant.tools.measure.sampling import RefusedError, ServerClient


@dataclass(frozen=True)
class ServerInfo:
    """One server."""

    url: str
    """Without ``/v1``."""
    name: str
    """What requests call the model."""
    root: str
    """What the server was started with."""
    max_model_len: int | None
    version: str
    """Of vLLM; empty if it does not say."""
    kv_bytes_per_token: float | None
    kv_sequences: float | None
    """Sequences of ``max_model_len`` tokens that fit into the KV cache, of all engines together."""
    speculates: bool
    """Whether it can have draft tokens at all."""

    @property
    def model(self) -> str:
        """The model's name without the folder that it lies in on the server's machine."""
        return self.root.rstrip("/").rpartition("/")[2]

    def arm(self, headers: Mapping[str, str] | None = None) -> ServerClient:
        """For asking it."""
        return ServerClient(self.url, self.name, headers=dict(headers or {}))

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def authorization(api_key: str | None) -> dict[str, str]:
    """Headers with the key that was given, or that ``VLLM_API_KEY`` holds; none without one."""
    key = api_key or os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def read_server_info(url: str, headers: Mapping[str, str] | None = None) -> ServerInfo:
    """Ask a server what it serves; raises RefusedError, which says what is there instead."""
    base = url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=base, timeout=10, headers=dict(headers or {})) as client:
            answer = client.get("/v1/models")
            if answer.status_code == 401:
                raise RefusedError(f"{url} wants an API key: give --api-key or set VLLM_API_KEY")
            model = answer.json()["data"][0]
            name = str(model["id"])
            version = client.get("/version")
            metrics = client.get("/metrics")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError):
        raise RefusedError(f"{url} is no running vLLM server") from None
    longest = model.get("max_model_len")
    bytes_per_token, sequences, speculates = _from_metrics(metrics.text if metrics.status_code == 200 else "", longest)
    return ServerInfo(
        url=base,
        name=name,
        root=str(model.get("root") or name),
        max_model_len=longest,
        version=str(version.json().get("version", "")) if version.status_code == 200 else "",
        kv_bytes_per_token=bytes_per_token,
        kv_sequences=sequences,
        speculates=speculates,
    )


def _from_metrics(text: str, longest: int | None) -> tuple[float | None, float | None, bool]:
    bytes_per_token: float | None = None
    sequences: float | None = None
    speculates = False
    for family in text_string_to_metric_families(text):
        speculates = speculates or family.name.startswith("vllm:spec_decode")
        if family.name != "vllm:cache_config_info":
            continue
        for sample in family.samples:
            tokens = _number(sample.labels.get("kv_cache_size_tokens"))
            memory = _number(sample.labels.get("kv_cache_memory_bytes"))
            if tokens and memory:
                bytes_per_token = memory / tokens
            if tokens and longest:
                sequences = (sequences or 0.0) + tokens / longest
    return bytes_per_token, sequences, speculates


def _number(label: str | None) -> float | None:
    try:
        return float(label or "")
    except ValueError:
        return None


def newest_decisions(url: str, count: int, queue: bool = False) -> list[dict[str, Any]]:
    """What a server with this package decided last (of its first engine): at most 2048 decisions, the oldest first.

    Args:
        url: without ``/v1``.
        count: how many.
        queue: about who started when, instead of about draft lengths.

    Raises:
        httpx.HTTPError: when it does not answer, or not with decisions.

    """
    answer = httpx.get(f"{url}/v1/instant/decisions", params={"last": count, "queue": queue}, timeout=30)
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()["engines"][0]["decisions"]
    return found
