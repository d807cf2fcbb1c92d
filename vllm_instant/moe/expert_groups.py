"""Groups of experts that tokens use together: the file that `experts learn` writes and servers read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from vllm_instant.moe.routing_trace import RoutedModel

FORMAT = 1

Table = tuple[tuple[int, ...], ...]
"""``[layers][experts]`` or ``[layers][clusters]``."""
Shares = tuple[tuple[float, ...], ...]


class ClusterError(ValueError):
    """A cluster file that cannot be used, with one sentence."""


@dataclass(frozen=True)
class SuperExperts:
    """The clusters of each layer's experts, with priors, affinities and placements.

    Attributes:
        model: The model of the experts.
        cluster: ``[layers][experts]``, the cluster of each expert, numbered from 0 without gaps in each layer.
        prior: ``[layers][experts]``, positive, about 1: weight of an expert when a batch's experts are restricted.
        affinity: For each prompt class ``[layers][clusters]``: the fraction of its router weight in a cluster.
        placement: For each number of devices ``[layers][experts]``: the device of each expert.
        learned_from: Numbers of tokens and requests, and results of the learning, for information.

    """

    model: RoutedModel
    cluster: Table
    prior: Shares
    affinity: Mapping[str, Shares] = field(default_factory=dict)
    placement: Mapping[int, Table] = field(default_factory=dict)
    learned_from: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def clusters(self) -> tuple[int, ...]:
        """Number of clusters of each layer."""
        return tuple(max(layer) + 1 for layer in self.cluster)

    def require(self, model: RoutedModel, path: Path | str = "the cluster file") -> None:
        """Check that the clusters belong to the served model.

        Raises:
            ClusterError: The numbers of layers, experts or experts per token differ.

        """
        if not self.model.same_shape(model):
            raise ClusterError(
                f"{path} was learned for {self.model.name} ({self.model.shape()}), "
                f"but {model.name} with {model.shape()} is served; learn from a trace of that model"
            )

    def write(self, path: Path) -> None:
        """Write the file with one line per layer."""
        record: dict[str, Any] = {
            "format": FORMAT,
            "model": asdict(self.model),
            "learned_from": dict(self.learned_from),
            "cluster": self.cluster,
            "prior": _rounded(self.prior),
            "affinity": {name: _rounded(rows) for name, rows in self.affinity.items()},
            "placement": {str(devices): rows for devices, rows in sorted(self.placement.items())},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_readable(record) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> SuperExperts:
        """Read a file.

        Raises:
            ClusterError: The file does not exist or is not valid.

        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ClusterError(f"there is no cluster file {path}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ClusterError(f"{path} cannot be read: {error}") from None
        except json.JSONDecodeError as error:
            raise ClusterError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            found = record.get("format") if isinstance(record, dict) else type(record).__name__
            raise ClusterError(f"{path} has cluster format {found}; this version reads format {FORMAT}")
        del record["format"]
        try:
            return _FILE.validate_json(json.dumps(record), strict=True)
        except ValidationError as error:
            raise ClusterError(f"{path}: {_sentence(error)}") from None


def one_cluster(model: RoutedModel) -> SuperExperts:
    """Return clusters without learning: one per layer with all experts, at equal priors."""
    layer = (0,) * model.experts
    return SuperExperts(model, (layer,) * model.layers, ((1.0,) * model.experts,) * model.layers)


_FILE = TypeAdapter(SuperExperts)


def _sentence(error: ValidationError) -> str:
    detail = error.errors()[0]
    if isinstance(cause := detail.get("ctx", {}).get("error"), ClusterError):
        return str(cause)
    key = ".".join(str(part) for part in detail["loc"])
    return f"{key}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _rounded(rows: Shares) -> list[list[float]]:
    return [[float(f"{value:.5g}") for value in row] for row in rows]


def _readable(record: dict[str, Any]) -> str:
    """JSON with one line per layer, so that files can be read and compared."""
    tables: dict[str, str] = {}

    def mark(value: Any) -> Any:
        if isinstance(value, list | tuple) and value and all(isinstance(item, int | float) for item in value):
            key = f"\0{len(tables)}\0"
            tables[json.dumps(key)] = json.dumps(value)
            return key
        if isinstance(value, list | tuple):
            return [mark(item) for item in value]
        return {key: mark(item) for key, item in value.items()} if isinstance(value, dict) else value

    text = json.dumps(mark(record), indent=2)
    for key, row in tables.items():
        text = text.replace(key, row, 1)
    return text


def _check(found: SuperExperts) -> None:
    model = found.model
    for name, rows in (("cluster", found.cluster), ("prior", found.prior)):
        _shape(name, rows, model)
    for layer, row in enumerate(found.cluster):
        numbers = np.unique(row)
        if not np.array_equal(numbers, np.arange(len(numbers))):
            raise ClusterError(
                f"cluster, layer {layer}: numbers from 0 to {len(numbers) - 1} without gaps are expected, "
                f"found {numbers[0]} to {numbers[-1]}"
            )
    for layer, prior in enumerate(found.prior):
        if not all(np.isfinite(value) and value > 0 for value in prior):
            raise ClusterError(f"prior, layer {layer}: positive numbers are expected, found {min(prior)}")
    for name, shares in found.affinity.items():
        if [len(row) for row in shares] != list(found.clusters):
            raise ClusterError(f"affinity of {name!r} does not have one number for each cluster of each layer")
    for devices, placed in found.placement.items():
        _shape(f"placement on {devices} devices", placed, model)
        outside = [device for row in placed for device in row if not 0 <= device < devices]
        if outside:
            raise ClusterError(f"placement on {devices} devices names device {outside[0]}")


def _shape(name: str, rows: Sequence[Sequence[Any]], model: RoutedModel) -> None:
    sizes = sorted({len(row) for row in rows})
    if len(rows) != model.layers or sizes != [model.experts]:
        raise ClusterError(
            f"{name} has {len(rows)} layers of {' or '.join(map(str, sizes)) or 'no'} experts, "
            f"the model has {model.layers} of {model.experts}"
        )
