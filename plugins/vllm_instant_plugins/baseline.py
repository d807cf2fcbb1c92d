"""Plugins that stand for vLLM's own behaviour, so that every slot of a deployment has one."""

from vllm_instant import Plugin

PLUGINS = (
    Plugin(slot="rejection_sampler", name="native", summary="vLLM's own rejection sampler, token by token"),
    Plugin(slot="batching", name="fcfs", summary="vLLM's own queue: first come, first served"),
    Plugin(slot="experts", name="native", summary="the model's own routing"),
    Plugin(slot="attention", name="native", summary="the attention backend and KV cache that vLLM chooses"),
    Plugin(slot="streaming", name="off", summary="prompts are read when they are complete"),
    Plugin(slot="guard", name="off", summary="answers are not judged"),
    Plugin(slot="escalation", name="off", summary="every request is answered here, as it came"),
)
