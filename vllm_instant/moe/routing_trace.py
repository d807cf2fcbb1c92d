"""The experts that a model's router selected for each token: the file that `experts trace` writes.

A trace is a compressed NumPy file with the model's own selection, before any plugin restricts it. `experts learn` reads
it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = 1
SCORE_FUNCTIONS = ("softmax", "sigmoid")


class TraceError(ValueError):
    """A trace that cannot be used, with one sentence."""


@dataclass(frozen=True)
class RoutedModel:
    """The model of a trace or a cluster file."""

    name: str
    layers: int
    """Number of layers with routed experts."""
    experts: int
    """Number of routed experts per layer."""
    top_k: int
    """Number of experts per token."""
    score_function: str = "softmax"
    """Function from router logits to weights: ``softmax`` or ``sigmoid``."""
    renormalise: bool = True
    """Whether the weights of the selected experts are divided by their sum."""

    def same_shape(self, other: RoutedModel) -> bool:
        """Whether the numbers of layers, experts and experts per token are those of ``other``."""
        return (self.layers, self.experts, self.top_k) == (other.layers, other.experts, other.top_k)

    def shape(self) -> str:
        """Return these numbers in words, for messages."""
        return f"{self.layers} layers of {self.experts} experts, {self.top_k} per token"


@dataclass(frozen=True, eq=False)
class Trace:
    """The routing of a number of tokens, one row per token.

    Attributes:
        model: The model.
        experts: int16 ``[tokens, layers, top_k]``, the selected experts.
        weights: float16 ``[tokens, layers, top_k]``, the factors of their outputs.
        request: int32 ``[tokens]``, from 0: an index into ``class_of_request``.
        step: int64 ``[tokens]``, the engine step of the token; the rows of one step were one batch.
        is_prefill: bool ``[tokens]``, whether the token is part of a prompt.
        class_of_request: int16 ``[requests]``, an index into ``classes``.
        classes: Names of the prompt classes.

    """

    model: RoutedModel
    experts: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float16]
    request: npt.NDArray[np.int32]
    step: npt.NDArray[np.int64]
    is_prefill: npt.NDArray[np.bool_]
    class_of_request: npt.NDArray[np.int16]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        _check(self, "this trace")

    def __len__(self) -> int:
        return len(self.request)

    @property
    def requests(self) -> npt.NDArray[np.int32]:
        """The requests with tokens in this trace, ascending."""
        return np.unique(self.request)

    @property
    def prompt_group(self) -> npt.NDArray[np.int16]:
        """The prompt class of each token's request, int16 ``[tokens]``."""
        return self.class_of_request[self.request]

    def select(self, rows: npt.NDArray[Any] | slice) -> Trace:
        """Return the rows of a mask, indices or a slice; requests keep their numbers."""
        arrays = {name: getattr(self, name)[rows] for name in ("experts", "weights", "request", "step", "is_prefill")}
        return replace(self, **arrays)

    def decode(self) -> Trace:
        """Return the rows of tokens that are not part of a prompt."""
        return self.select(~self.is_prefill)

    def split(self, share: float, seed: int = 0) -> tuple[Trace, Trace]:
        """Return two traces without a common request: about ``share`` of each class's requests, and the others."""
        generator = np.random.default_rng(seed)
        requests = self.requests
        first: list[int] = []
        for code in range(len(self.classes)):
            own = requests[self.class_of_request[requests] == code]
            first.extend(generator.permutation(own)[: round(share * len(own))].tolist())
        chosen = np.isin(self.request, first)
        return self.select(chosen), self.select(~chosen)

    def write(self, path: Path) -> None:
        """Write the compressed file; an existing one is replaced when the new one is complete."""
        meta = {"format": FORMAT, "model": asdict(self.model), "classes": list(self.classes)}
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        with partial.open("wb") as file:
            np.savez_compressed(file, meta=np.array(json.dumps(meta)), **arrays)
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read a file.

        Raises:
            TraceError: The file does not exist or is no trace.

        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                missing = [name for name in ("meta", *_ARRAYS) if name not in stored]
                if missing:
                    raise TraceError(f"{path} is not an expert trace: it has no {' and no '.join(missing)}")
                meta = json.loads(str(stored["meta"]))
                arrays = {name: stored[name] for name in _ARRAYS}
        except FileNotFoundError:
            raise TraceError(f"there is no trace {path}") from None
        except (OSError, zipfile.BadZipFile, ValueError, EOFError) as error:
            if isinstance(error, TraceError):
                raise
            raise TraceError(f"{path} is not an expert trace: {str(error).splitlines()[0]}") from None
        if meta.get("format") != FORMAT:
            raise TraceError(f"{path} has trace format {meta.get('format')}; this version reads format {FORMAT}")
        try:
            model = RoutedModel(**meta["model"])
            return cls(model=model, classes=tuple(meta["classes"]), **arrays)
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from None
        except (KeyError, TypeError) as error:
            raise TraceError(f"{path} does not describe its model: {error}") from None

    @classmethod
    def merge(cls, traces: Sequence[Trace]) -> Trace:
        """Return one trace of several of the same model, with requests and steps renumbered to be distinct.

        Raises:
            TraceError: There is no trace, or they belong to different models.

        """
        if not traces:
            raise TraceError("no trace was given")
        model = traces[0].model
        for other in traces[1:]:
            if other.model != model:
                raise TraceError(
                    f"the traces come from different models: {model.name} ({model.shape()}) "
                    f"and {other.model.name} ({other.model.shape()})"
                )
        classes = tuple(dict.fromkeys(name for trace in traces for name in trace.classes))
        request, step, of_request = [], [], []
        requests, steps = 0, 0
        for trace in traces:
            request.append(trace.request + np.int32(requests))
            step.append(trace.step + np.int64(steps - (trace.step.min() if len(trace) else 0)))
            codes = np.array([classes.index(name) for name in trace.classes], np.int16)
            of_request.append(codes[trace.class_of_request])
            requests += len(trace.class_of_request)
            steps = int(step[-1].max()) + 1 if len(trace) else steps
        return cls(
            model=model,
            experts=np.concatenate([trace.experts for trace in traces]),
            weights=np.concatenate([trace.weights for trace in traces]),
            request=np.concatenate(request),
            step=np.concatenate(step),
            is_prefill=np.concatenate([trace.is_prefill for trace in traces]),
            class_of_request=np.concatenate(of_request),
            classes=classes,
        )


_TYPES: dict[str, Any] = {
    "experts": np.int16,
    "weights": np.float16,
    "request": np.int32,
    "step": np.int64,
    "is_prefill": np.bool_,
    "class_of_request": np.int16,
}
_ARRAYS = tuple(field.name for field in fields(Trace) if field.name in _TYPES)


def _check(trace: Trace, what: str) -> None:
    """Raise TraceError with the first error."""
    model, tokens = trace.model, len(trace.request)
    if model.score_function not in SCORE_FUNCTIONS:
        raise TraceError(
            f"{what} has score function {model.score_function!r}, valid are {' and '.join(SCORE_FUNCTIONS)}"
        )
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("request", "step", "is_prefill"), (tokens,))
    shapes |= dict.fromkeys(("experts", "weights"), (tokens, model.layers, model.top_k))
    shapes["class_of_request"] = (len(trace.class_of_request),)
    for name, shape in shapes.items():
        array = getattr(trace, name)
        if array.dtype != _TYPES[name] or array.shape != shape:
            raise TraceError(
                f"{what} has {name} as {array.dtype} {list(array.shape)}, "
                f"expected {np.dtype(_TYPES[name])} {list(shape)} for {tokens} tokens, {model.shape()}"
            )
    for name, limit in (("experts", model.experts), ("request", len(trace.class_of_request))):
        array = getattr(trace, name)
        if array.size and not (0 <= array.min() and array.max() < limit):
            raise TraceError(f"{what} has {name} from {array.min()} to {array.max()}, valid are 0 to {limit - 1}")
    codes = trace.class_of_request
    if codes.size and not (0 <= codes.min() and codes.max() < len(trace.classes)):
        raise TraceError(f"{what} names {len(trace.classes)} prompt classes, but uses number {codes.max()}")
