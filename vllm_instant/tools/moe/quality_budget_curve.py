"""Quality against the expert budget: what a model loses when batches use fewer experts, measured without a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import PlainSerializer, TypeAdapter

from vllm_instant.tools.moe.expert_grouping import ConfidenceInterval
from vllm_instant.tools.moe.offline import OfflineModel, Policy, budget_policy, cluster_policy

NUM_RESAMPLES = 2000

BUDGET, CLUSTER_PRIOR, EXPERT_PRIOR, HARD, OEA, NATIVE = "budget", "cluster prior", "prior", "clusters", "OEA", "native"

Rounded = Annotated[float, PlainSerializer(lambda value: round(value, 4), return_type=float)]
RoundedCounts = Annotated[
    tuple[float, ...], PlainSerializer(lambda values: [round(value, 2) for value in values], return_type=list)
]


@dataclass(frozen=True)
class Restriction:
    """One way to restrict the experts of a batch.

    Attributes:
        form: ``BUDGET``, a budget with a ``CLUSTER_PRIOR`` or an ``EXPERT_PRIOR``, ``HARD`` clusters, ``OEA`` or
            ``NATIVE`` routing.
        budget: experts per layer and step; for hard clusters the number of clusters; 0 for OEA.
        keep: number of top-ranked experts per token that are never refused.
        cohesion: strength of the cluster prior.

    """

    form: str
    budget: int = 0
    keep: int = 0
    cohesion: float = 0.0

    def policy(
        self, top_k: int, cluster: npt.NDArray[np.int64] | None, prior: npt.NDArray[np.float64] | None
    ) -> Policy | None:
        """The policy; ``cluster`` and ``prior`` are ``[layers, experts]`` where the form needs them."""
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
class CurvePoint:
    """The cost and the quality of one restriction at one batch size.

    Attributes:
        setting: the restriction.
        batch: requests decoded side by side.
        distinct: mean number of distinct experts per layer and step.
        saved: relative reduction of the distinct experts against native routing; paired.
        perplexity: relative growth of the perplexity of the text, 0.01 for 1 %; paired.
        kl: KL divergence of the next-token distribution from that of native routing, in nats.
        agreement: fraction of tokens with the same greedy choice as native routing.
        mass: router weights of the picked experts relative to the native picks, at the routers' own inputs.
        by_layer: distinct experts of each layer.

    """

    setting: Restriction
    batch: int
    distinct: ConfidenceInterval
    saved: ConfidenceInterval
    perplexity: ConfidenceInterval
    kl: ConfidenceInterval
    agreement: Rounded
    mass: Rounded
    by_layer: RoundedCounts

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> CurvePoint:
        """The point that ``to_record`` wrote."""
        rest = dict(record)
        setting = {name: rest.pop(name) for name in Restriction.__dataclass_fields__}
        return _POINT.validate_python({"setting": setting, **rest})

    def to_record(self) -> dict[str, Any]:
        """The point as one flat JSON object."""
        record = _POINT.dump_python(self, mode="json")
        return {"batch": record.pop("batch"), **record.pop("setting"), **record}


_POINT = TypeAdapter(CurvePoint)


@dataclass(frozen=True)
class _WindowMeans:
    """Means over the tokens of each window of one part, ``[windows]``."""

    loss: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]
    agreement: npt.NDArray[np.float64]
    mass: npt.NDArray[np.float64]
    distinct: npt.NDArray[np.float64]
    """``[batches, layers]``, mean over steps."""


class QualityBudgetCurve:
    """Measures restrictions on the same windows, each paired with native routing.

    Args:
        model: the mixture of experts.
        windows: int64 ``[windows, context]``; the windows of one batch are adjacent.
        prompt: number of first tokens, which are routed natively and not evaluated.
        cluster: ``[layers, experts]`` for the forms that need it.
        prior: ``[layers, experts]`` for the form that needs it.
        windows_per_pass: windows per forward pass; a multiple of every batch size.

    """

    def __init__(
        self,
        model: OfflineModel,
        windows: torch.Tensor,
        prompt: int,
        cluster: npt.NDArray[np.int64] | None = None,
        prior: npt.NDArray[np.float64] | None = None,
        windows_per_pass: int = 32,
    ) -> None:
        self.model, self.windows, self.prompt = model, windows, prompt
        self.cluster, self.prior, self.windows_per_pass = cluster, prior, windows_per_pass
        self._native: list[torch.Tensor] = []
        """Log-probabilities of native routing, per pass."""
        self._native_picks: list[list[npt.NDArray[np.int64]]] = []
        self._distinct: dict[int, npt.NDArray[np.float64]] = {}
        self._loss = self._read_native()

    def _read_native(self) -> npt.NDArray[np.float64]:
        losses = []
        for part in self.windows.split(self.windows_per_pass):
            logits, routing = self.model.read(part)
            log_probabilities = logits[:, self.prompt : -1].log_softmax(-1)
            self._native.append(log_probabilities)
            losses.append(self._loss_of(log_probabilities, part))
            self._native_picks.append([picks[:, self.prompt :] for _, _, picks in routing])
        return np.concatenate(losses)

    def _loss_of(self, log_probabilities: torch.Tensor, part: torch.Tensor) -> npt.NDArray[np.float64]:
        """Mean negative log-likelihood per token in nats, ``[windows]``."""
        next_tokens = part[:, self.prompt + 1 :, None]
        loss: npt.NDArray[np.float64] = -log_probabilities.gather(-1, next_tokens)[..., 0].double().mean(1).numpy()
        return loss

    @property
    def perplexity(self) -> float:
        """Perplexity of the text after the prompts with native routing."""
        return float(np.exp(self._loss.mean()))

    def native_distinct(self, batch: int) -> npt.NDArray[np.float64]:
        """Distinct experts with native routing, ``[batches, layers]``."""
        if batch not in self._distinct:
            self._distinct[batch] = np.concatenate(
                [
                    np.stack([_distinct(picks, batch, self.model.routed.experts) for picks in layers], 1)
                    for layers in self._native_picks
                ]
            )
        return self._distinct[batch]

    def measure(self, setting: Restriction, batch: int, seed: int = 0) -> CurvePoint:
        """Measure one restriction at one batch size."""
        routed = self.model.routed
        policy = setting.policy(routed.top_k, self.cluster, self.prior)
        parts: list[_WindowMeans] = []
        for part, native in zip(self.windows.split(self.windows_per_pass), self._native, strict=True):
            logits, routing = self.model.read(part, self.prompt, batch, policy)
            restricted = logits[:, self.prompt : -1].log_softmax(-1)
            # KL(native || restricted) = sum_v p(v) (log p(v) - log q(v)), mean over tokens
            kl = (native.exp() * (native - restricted)).sum(-1).double().mean(1).numpy()
            agreement = (native.argmax(-1) == restricted.argmax(-1)).double().mean(1).numpy()
            masses, distinct = [], []
            for router_logits, _, picks in routing:
                weights = torch.from_numpy(router_logits[:, self.prompt :]).float().softmax(-1)
                picked = weights.gather(-1, torch.from_numpy(picks[:, self.prompt :])).sum(-1)
                masses.append((picked / weights.topk(routed.top_k, -1).values.sum(-1)).double().mean(1).numpy())
                distinct.append(_distinct(picks[:, self.prompt :], batch, routed.experts))
            loss = self._loss_of(restricted, part)
            parts.append(_WindowMeans(loss, kl, agreement, np.mean(masses, 0), np.stack(distinct, 1)))
        return self._point(setting, batch, parts, seed)

    def _point(self, setting: Restriction, batch: int, parts: Sequence[_WindowMeans], seed: int) -> CurvePoint:
        def joined(name: str) -> npt.NDArray[np.float64]:
            return np.concatenate([getattr(part, name) for part in parts])

        added_loss, kl, distinct = joined("loss") - self._loss, joined("kl"), joined("distinct")
        native = self.native_distinct(batch)
        # Windows of one batch depend on each other, so whole batches are resampled.
        batches = len(distinct)
        grouped = [values.reshape(batches, batch).mean(1) for values in (added_loss, kl)]
        generator = np.random.default_rng(seed)
        drawn = generator.integers(0, batches, (NUM_RESAMPLES, batches))

        def interval(statistic: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]) -> ConfidenceInterval:
            return ConfidenceInterval.of(float(statistic(np.arange(batches)[None])[0]), statistic(drawn))

        return CurvePoint(
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


def _distinct(picks: npt.NDArray[np.int64], batch: int, experts: int) -> npt.NDArray[np.float64]:
    """Distinct experts per batch, mean over steps; ``picks`` are ``[windows, steps, top_k]``."""
    windows, steps, _ = picks.shape
    used = np.zeros((windows, steps, experts), bool)
    np.put_along_axis(used, picks, True, axis=-1)
    return np.asarray(used.reshape(windows // batch, batch, steps, experts).any(1).sum(-1).mean(1), np.float64)
