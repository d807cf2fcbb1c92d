"""Quality against budget: what a model loses when a batch shares fewer experts, measured outside a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_instant.tools.moe.expert_grouping import Interval
from vllm_instant.tools.moe.offline import OfflineModel, Policy, budget_policy, cluster_policy

RESAMPLES = 2000

BUDGET, CLUSTER_PRIOR, EXPERT_PRIOR, HARD, OEA, NATIVE = "budget", "cluster prior", "prior", "clusters", "OEA", "native"
FORMS = (BUDGET, CLUSTER_PRIOR, EXPERT_PRIOR, HARD, OEA, NATIVE)


@dataclass(frozen=True)
class Setting:
    """One way to restrict a batch.

    Attributes:
        form: one of ``FORMS``.
        budget: experts of a layer and step; clusters for the hard form; nothing for OEA.
        keep: experts that no token is refused.
        cohesion: strength of the cluster prior.

    """

    form: str
    budget: int = 0
    keep: int = 0
    cohesion: float = 0.0

    def policy(
        self, top_k: int, cluster: npt.NDArray[np.int64] | None, prior: npt.NDArray[np.float64] | None
    ) -> Policy | None:
        """The policy, with clusters ``[layers, experts]`` where the form needs them."""
        if self.form == NATIVE:
            return None
        if self.form in (CLUSTER_PRIOR, HARD) and cluster is None:
            raise ValueError(f"the form {self.form!r} needs clusters")
        if self.form == HARD and cluster is not None:
            return cluster_policy(top_k, self.budget, cluster)
        if self.form == OEA:
            return budget_policy(top_k, self.keep, 0)
        if self.form == EXPERT_PRIOR:
            return budget_policy(top_k, self.keep, self.budget, prior=prior)
        cohesion = self.cohesion if self.form == CLUSTER_PRIOR else 0.0
        return budget_policy(top_k, self.keep, self.budget, cluster, cohesion)


@dataclass(frozen=True)
class Point:
    """What one setting costs and keeps.

    Attributes:
        setting: which.
        batch: requests that were decoded side by side.
        distinct: experts of a layer and step, mean.
        saved: share of the native ones that this is less; paired.
        perplexity: growth of the perplexity of the text, 0.01 for 1 %; paired.
        kl: divergence from the native next-token distribution to this one, nats.
        agreement: share of tokens where both would say the same greedily.
        mass: router mass of the chosen experts over that of the native choice, at the routers' own inputs.
        by_layer: distinct experts of each layer.

    """

    setting: Setting
    batch: int
    distinct: Interval
    saved: Interval
    perplexity: Interval
    kl: Interval
    agreement: float
    mass: float
    by_layer: tuple[float, ...]

    @classmethod
    def read(cls, record: dict[str, Any]) -> Point:
        """A point from what ``plain`` gave."""
        setting = Setting(*(record[name] for name in ("form", "budget", "keep", "cohesion")))
        intervals = [Interval(*record[name]) for name in ("distinct", "saved", "perplexity", "kl")]
        distinct, saved, perplexity, kl = intervals
        rest = (record["agreement"], record["mass"], tuple(record["by_layer"]))
        return cls(setting, record["batch"], distinct, saved, perplexity, kl, *rest)

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        values = {name: getattr(self, name).plain() for name in ("distinct", "saved", "perplexity", "kl")}
        more = {"agreement": round(self.agreement, 4), "mass": round(self.mass, 4)}
        layers = {"by_layer": [round(value, 2) for value in self.by_layer]}
        return {"batch": self.batch} | asdict(self.setting) | values | more | layers


@dataclass(frozen=True)
class Reading:
    """What one pass over the windows gave, a row a window: sums of nats, of agreeing tokens, of mass; counts."""

    loss: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]
    agreement: npt.NDArray[np.float64]
    mass: npt.NDArray[np.float64]
    distinct: npt.NDArray[np.float64]
    """``[batches, layers]``, mean over steps."""


class Frontier:
    """Measures settings on the same windows, each paired with native routing.

    Args:
        model: the mixture of experts.
        windows: int64 ``[windows, context]``; those of one batch follow each other.
        prompt: tokens at the beginning that are routed natively and not judged.
        cluster: ``[layers, experts]``, for the forms that need it.
        prior: ``[layers, experts]``, for the form that needs it.
        at_once: windows that are read at a time; a multiple of every batch.

    """

    def __init__(
        self,
        model: OfflineModel,
        windows: torch.Tensor,
        prompt: int,
        cluster: npt.NDArray[np.int64] | None = None,
        prior: npt.NDArray[np.float64] | None = None,
        at_once: int = 32,
    ) -> None:
        self.model, self.windows, self.prompt = model, windows, prompt
        self.cluster, self.prior, self.at_once = cluster, prior, at_once
        self._native: list[torch.Tensor] = []
        self._chosen: list[list[npt.NDArray[np.int64]]] = []
        self._distinct: dict[int, npt.NDArray[np.float64]] = {}
        self._loss = self._read_native()

    def _read_native(self) -> npt.NDArray[np.float64]:
        losses = []
        for part in self.windows.split(self.at_once):
            logits, seen = self.model.read(part)
            judged = logits[:, self.prompt : -1].log_softmax(-1)
            self._native.append(judged)
            losses.append(self._loss_of(judged, part))
            self._chosen.append([chosen[:, self.prompt :] for _, _, chosen in seen])
        return np.concatenate(losses)

    def _loss_of(self, log_probabilities: torch.Tensor, part: torch.Tensor) -> npt.NDArray[np.float64]:
        """Mean nats of a token, one a window."""
        following = part[:, self.prompt + 1 :, None]
        found: npt.NDArray[np.float64] = -log_probabilities.gather(-1, following)[..., 0].double().mean(1).numpy()
        return found

    @property
    def perplexity(self) -> float:
        """Of the answers' text, with native routing."""
        return float(np.exp(self._loss.mean()))

    def native_distinct(self, batch: int) -> npt.NDArray[np.float64]:
        """Distinct experts with native routing, ``[batches, layers]``."""
        if batch not in self._distinct:
            self._distinct[batch] = np.concatenate(
                [
                    np.stack([_distinct(chosen, batch, self.model.routed.experts) for chosen in layers], 1)
                    for layers in self._chosen
                ]
            )
        return self._distinct[batch]

    def measure(self, setting: Setting, batch: int, seed: int = 0) -> Point:
        """One setting at one batch size."""
        routed = self.model.routed
        policy = setting.policy(routed.top_k, self.cluster, self.prior)
        read: list[Reading] = []
        for part, native in zip(self.windows.split(self.at_once), self._native, strict=True):
            logits, seen = self.model.read(part, self.prompt, batch, policy)
            judged = logits[:, self.prompt : -1].log_softmax(-1)
            kl = (native.exp() * (native - judged)).sum(-1).double().mean(1).numpy()
            agreement = (native.argmax(-1) == judged.argmax(-1)).double().mean(1).numpy()
            masses, distinct = [], []
            for router, _, chosen in seen:
                decoded = torch.from_numpy(router[:, self.prompt :]).float().softmax(-1)
                own = decoded.gather(-1, torch.from_numpy(chosen[:, self.prompt :])).sum(-1)
                masses.append((own / decoded.topk(routed.top_k, -1).values.sum(-1)).double().mean(1).numpy())
                distinct.append(_distinct(chosen[:, self.prompt :], batch, routed.experts))
            loss = self._loss_of(judged, part)
            read.append(Reading(loss, kl, agreement, np.mean(masses, 0), np.stack(distinct, 1)))
        return self._point(setting, batch, read, seed)

    def _point(self, setting: Setting, batch: int, read: Sequence[Reading], seed: int) -> Point:
        def joined(name: str) -> npt.NDArray[np.float64]:
            return np.concatenate([getattr(reading, name) for reading in read])

        more, kl, distinct = joined("loss") - self._loss, joined("kl"), joined("distinct")
        native = self.native_distinct(batch)
        # Windows of one batch depend on each other: whole batches are drawn.
        batches = len(distinct)
        grouped = [values.reshape(batches, batch).mean(1) for values in (more, kl)]
        generator = np.random.default_rng(seed)
        drawn = generator.integers(0, batches, (RESAMPLES, batches))

        def interval(statistic: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]) -> Interval:
            low, high = np.quantile(statistic(drawn), [0.025, 0.975])
            return Interval(float(statistic(np.arange(batches)[None])[0]), float(low), float(high))

        return Point(
            setting,
            batch,
            interval(lambda rows: distinct.mean(1)[rows].mean(1)),
            interval(lambda rows: 1 - distinct.mean(1)[rows].mean(1) / native.mean(1)[rows].mean(1)),
            interval(lambda rows: np.expm1(grouped[0][rows].mean(1))),
            interval(lambda rows: grouped[1][rows].mean(1)),
            float(joined("agreement").mean()),
            float(joined("mass").mean()),
            tuple(distinct.mean(0).tolist()),
        )


def _distinct(chosen: npt.NDArray[np.int64], batch: int, experts: int) -> npt.NDArray[np.float64]:
    """Distinct experts of each batch, mean over steps, from ``[windows, steps, top_k]``."""
    windows, steps, _ = chosen.shape
    used = np.zeros((windows, steps, experts), bool)
    np.put_along_axis(used, chosen, True, axis=-1)
    return np.asarray(used.reshape(windows // batch, batch, steps, experts).any(1).sum(-1).mean(1), np.float64)
