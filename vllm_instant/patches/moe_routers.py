"""Let the routers of mixture-of-experts layers call an experts plugin, inside one operator.

A router's class becomes a subclass of itself, so that vLLM's checks of its type, its capture hook and the mapping of
its load balancer still work. The subclass only replaces ``_compute_routing``, by an operator that torch.compile and
CUDA graphs see as one opaque node: vLLM's own routing runs in it unchanged, and rows that picked a forbidden expert
are routed again (``vllm_instant.moe.router_scoring``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from vllm_instant.moe.router_scoring import RouterScoring

NAMESPACE = "vllm_instant"
LAYER = "instant_layer"
"""On a router: its layer's index among the served layers; None for a layer left to vLLM."""

_served: list[Any] = []
"""The ``ServedLayer`` of each index."""


class UnservedRouterError(Exception):
    """A router that experts plugins cannot serve; the message says why."""


def scoring_of(router: Any) -> RouterScoring:
    """The scoring rule of a router of vLLM.

    Raises:
        UnservedRouterError: the rule is not one that plugins know.

    """
    kind = type(router).__name__.removeprefix("Instant")
    if getattr(router, "_hash_indices_table", None) is not None:
        raise UnservedRouterError("it picks experts by the token alone (hash routing)")
    if getattr(router, "bias_vl", None) is not None:
        raise UnservedRouterError("it has a second bias for image tokens")
    if getattr(router, "num_fused_shared_experts", 0):
        raise UnservedRouterError("it routes shared experts along with the others")
    function, custom = getattr(router, "scoring_func", "softmax"), getattr(router, "custom_routing_function", None)
    renormalize = router.renormalize if hasattr(router, "renormalize") else True
    if custom is not None:
        name = f"{custom.__module__.rsplit('.', 1)[-1]}.{custom.__name__}" if hasattr(custom, "__name__") else ""
        if name == "llama4.custom_routing_function":
            return RouterScoring("sigmoid", router.top_k, renormalize=False)
        if name == "cohere2_moe.token_choice_with_bias":
            return RouterScoring("sigmoid", router.top_k, renormalize=renormalize)
        raise UnservedRouterError(f"it picks by a function of the model's own ({name or custom!r})")
    if kind not in ("CPURouter", "FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter"):
        raise UnservedRouterError(f"plugins do not know routers of type {kind}")
    bias = getattr(router, "e_score_correction_bias", None)
    grouped = kind == "GroupedTopKRouter" or getattr(router, "use_grouped_topk", False)
    if kind == "CPURouter" and not grouped and function == "softmax":
        bias = None  # vLLM's CPU build does not look at it either
    groups, top_groups = (router.num_expert_group, router.topk_group) if grouped else (1, 1)
    if router.global_num_experts <= groups or router.global_num_experts % groups:
        groups = top_groups = 1
    return RouterScoring(
        function,
        router.top_k,
        None if bias is None else bias.data.float(),
        groups,
        top_groups,
        renormalize,
        # Rules without groups or bias apply no factor, whatever the field says.
        getattr(router, "routed_scaling_factor", 1.0) if grouped or bias is not None else 1.0,
    )


@lru_cache(maxsize=32)
def _subclass(base: Any, says_custom: bool) -> Any:
    import torch

    def _compute_routing(
        self: Any, hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
    ) -> Any:
        layer = getattr(self, LAYER)
        if layer is None:
            return base._compute_routing(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        return torch.ops.vllm_instant.route(hidden_states, router_logits, input_ids, layer, self.top_k)

    body: dict[str, Any] = {
        "__module__": __name__,
        LAYER: None,
        "_compute_routing": _compute_routing,
        # Kernels that route by themselves would bypass the plugin: from 0.33 on a router can refuse them. Before, a
        # routing method that none of those kernels supports excludes them.
        "supports_monolithic_kernels": property(lambda self: False),
    }
    if says_custom:
        from vllm.model_executor.layers.fused_moe.config import RoutingMethodType

        body["routing_method_type"] = property(lambda self: RoutingMethodType.Custom)
    return type(f"Instant{base.__name__}", (base,), body)


def adopt(router: Any) -> None:
    """Make a router call the plugin once it has a layer index; does nothing the second time or for unknown routers."""
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    if isinstance(router, BaseRouter) and not hasattr(router, LAYER):
        register_operator()
        base: Any = type(router)
        router.__class__ = _subclass(base, not hasattr(base, "supports_monolithic_kernels"))


def serve(layers: list[Any]) -> None:
    """Set the layers of the operator by index; it calls ``layer.route(...)``."""
    _served[:] = layers


def native(router: Any, hidden_states: Any, router_logits: Any, input_ids: Any) -> Any:
    """Weights (float32) and picks (int32) of vLLM's own class, ``[tokens, top_k]`` each."""
    import torch

    base: Any = type(router).__mro__[1]
    weights, picks = base._compute_routing(router, hidden_states, router_logits, torch.int32, input_ids=input_ids)
    return weights.to(torch.float32), picks.to(torch.int32)


def _route(hidden_states: Any, router_logits: Any, input_ids: Any, layer: int, top_k: int) -> Any:
    weights, picks = _served[layer].route(hidden_states, router_logits, input_ids)
    return weights.contiguous(), picks.contiguous()


def _shape_of_route(hidden_states: Any, router_logits: Any, input_ids: Any, layer: int, top_k: int) -> Any:
    import torch

    shape = (router_logits.shape[0], top_k)
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


@lru_cache(maxsize=1)
def register_operator() -> Any:
    """Register ``vllm_instant::route``; keep the library object: the operator is removed with it."""
    import torch

    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(
        "route(Tensor hidden_states, Tensor router_logits, Tensor? input_ids, int layer, int top_k) -> (Tensor, Tensor)"
    )
    library.impl("route", _route, "CPU")
    library.impl("route", _route, "CUDA")
    library._register_fake("route", _shape_of_route)
    return library
