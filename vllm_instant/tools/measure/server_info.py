"""What a running server says about itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from vllm_instant.deployment.secrets import masked
from vllm_instant.tools.measure.http_client import base_url, get, sync_client
from vllm_instant.tools.measure.sampling import RefusedError, ServerClient
from vllm_instant.tools.measure.server_metrics import CACHE_CONFIG, SPECULATION_PREFIX


@dataclass(frozen=True)
class ServerInfo:
    """One server."""

    url: str
    """Its address without ``/v1``."""
    name: str
    """The model name in requests."""
    root: str
    """The model that the server was started with."""
    max_model_len: int | None
    version: str
    """Of vLLM; empty where the server does not report it."""
    kv_bytes_per_token: float | None
    kv_sequences: float | None
    """Number of sequences of ``max_model_len`` tokens that fit into the KV cache, of all engines together."""
    speculates: bool
    """Whether it can produce draft tokens at all."""

    @property
    def model(self) -> str:
        """The model's name without its folder on the server's machine."""
        return self.root.rstrip("/").rpartition("/")[2]

    def arm(self, headers: Mapping[str, str] | None = None) -> ServerClient:
        """A client for requests to the server."""
        return ServerClient(self.url, self.name, headers=dict(headers or {}))

    def plain(self) -> dict[str, Any]:
        """The fields as JSON types, for records: without a user's name and password in the address."""
        return asdict(self) | {"url": masked(self.url)}


def authorization(api_key: str | None) -> dict[str, str]:
    """Headers with the given key or the one in ``VLLM_API_KEY``; empty without a key."""
    key = api_key or os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def read_server_info(url: str, headers: Mapping[str, str] | None = None) -> ServerInfo:
    """Ask a server what it serves; raises RefusedError with what was found instead."""
    base = base_url(url)
    try:
        with sync_client(base, timeout=10, headers=dict(headers or {})) as client:
            answer = client.get("/v1/models")
            if answer.status_code == 401:
                raise RefusedError(f"{url} wants an API key: give --api-key or set VLLM_API_KEY")
            model = answer.json()["data"][0]
            name = str(model["id"])
            version = client.get("/version")
            metrics = client.get("/metrics")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError):
        raise RefusedError(f"{url} is no running vLLM server") from None
    max_model_len = model.get("max_model_len")
    page = metrics.text if metrics.status_code == 200 else ""
    bytes_per_token, sequences, speculates = _from_metrics(page, max_model_len)
    return ServerInfo(
        url=base,
        name=name,
        root=str(model.get("root") or name),
        max_model_len=max_model_len,
        version=_version(version),
        kv_bytes_per_token=bytes_per_token,
        kv_sequences=sequences,
        speculates=speculates,
    )


def _version(answer: httpx.Response) -> str:
    try:
        return str(answer.json().get("version", "")) if answer.status_code == 200 else ""
    except (ValueError, AttributeError):
        return ""


def _from_metrics(text: str, max_model_len: int | None) -> tuple[float | None, float | None, bool]:
    """Bytes per token of the KV cache, full-length sequences that fit, and whether the server speculates."""
    bytes_per_token: float | None = None
    sequences: float | None = None
    for sample in _samples(text, CACHE_CONFIG):
        tokens = _number(sample.get("kv_cache_size_tokens"))
        memory = _number(sample.get("kv_cache_memory_bytes"))
        if tokens and memory:
            bytes_per_token = memory / tokens
        if tokens and max_model_len:
            sequences = (sequences or 0.0) + tokens / max_model_len
    return bytes_per_token, sequences, SPECULATION_PREFIX in text


def _samples(text: str, name: str) -> list[Mapping[str, str]]:
    """The labels of each sample of one metric."""
    lines = [line for line in text.splitlines() if line.startswith(name)]
    return [
        sample.labels for family in text_string_to_metric_families("\n".join([*lines, ""])) for sample in family.samples
    ]


def _number(label: str | None) -> float | None:
    try:
        return float(label or "")
    except ValueError:
        return None


def read_decisions(
    url: str, parameters: Mapping[str, Any], headers: Mapping[str, str] | None = None, route: str = "decisions"
) -> dict[str, Any]:
    """What ``/v1/instant/decisions``, or another route of this kind, answers.

    Args:
        url: of the server, with or without ``/v1``.
        parameters: of the query.
        headers: of the request.
        route: ``decisions``, or ``guard`` or ``escalation`` for those of these slots.

    Raises:
        RefusedError: when there is no such answer; the message says what is there instead.

    """
    try:
        answer = get(
            base_url(url), f"/v1/instant/{route}", timeout=30, params=dict(parameters), headers=dict(headers or {})
        )
    except httpx.InvalidURL as error:
        raise RefusedError(f"{url} is no address: {error}") from None
    except httpx.HTTPError as error:
        raise RefusedError(f"{url} does not answer ({type(error).__name__}: {error})") from None
    if answer.status_code == 401:
        raise RefusedError(f"{url} wants an API key: give --api-key or set VLLM_API_KEY")
    if answer.status_code == 404:
        if route != "decisions" and f"no {route}" in answer.text:
            raise RefusedError(f"{url} has no {route}: choose a plugin in [{route}] of its deployment file")
        raise RefusedError(f"{url} runs without vllm-instant: start it with --plugins vllm_instant")
    if answer.status_code != 200:
        raise RefusedError(f"{url} answers HTTP {answer.status_code}: {answer.text[:200]}")
    try:
        found = answer.json()
        _ = [engine["decisions"] for engine in found["engines"]]
    except (ValueError, KeyError, TypeError):
        kind = answer.headers.get("content-type", "no content type")
        raise RefusedError(
            f"{url} is no vLLM server with vllm-instant: it answers {kind} where decisions in JSON are expected"
        ) from None
    return dict(found)


def newest_decisions(url: str, count: int, queue: bool = False) -> list[dict[str, Any]]:
    """The latest decisions of a server's first engine, at most 2048, the oldest first.

    Args:
        url: of the server.
        count: number of decisions.
        queue: about admission, instead of about draft lengths.

    Raises:
        RefusedError: when the server does not answer with decisions.

    """
    found: list[dict[str, Any]] = read_decisions(url, {"last": count, "queue": queue})["engines"][0]["decisions"]
    return found
