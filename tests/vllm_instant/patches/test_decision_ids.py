"""What clients see of the decisions about other clients' requests."""

import asyncio
import json
import types

from vllm_instant.patches.decision_ids import for_clients

OURS, THEIRS = "chatcmpl-8f0e-1a2b", "chatcmpl-77aa-9c9c"
DECISIONS = [
    {"step": 1, "requests": [{"request": OURS, "draft_tokens": 4}, {"request": THEIRS, "draft_tokens": 0}]},
    {"step": 2, "requests": [{"request": THEIRS, "draft_tokens": 1}]},
    {"request_id": THEIRS, "waited_ms": 3.0, "summary": {"request": THEIRS, "waited ms": "3"}},
]


def test_no_id_of_a_request_is_shown():
    shown = for_clients(DECISIONS, None)
    text = json.dumps(shown)
    assert "chatcmpl" not in text
    assert [d.get("step") for d in shown] == [1, 2, None]
    assert shown[0]["requests"][0]["draft_tokens"] == 4


def test_requests_can_be_told_apart():
    shown = for_clients(DECISIONS, None)
    ours, theirs = (row["request"] for row in shown[0]["requests"])
    assert ours != theirs
    assert shown[1]["requests"][0]["request"] == theirs == shown[2]["request_id"] == shown[2]["summary"]["request"]


def test_a_client_that_knows_an_id_sees_its_request():
    [shown] = for_clients(DECISIONS, "chatcmpl-8f0e")
    ours, theirs = shown["requests"]
    assert ours["request"] == "chatcmpl-8f0e"
    assert "chatcmpl" not in theirs["request"]
    assert for_clients(DECISIONS, OURS)[0]["requests"][0]["request"] == OURS


def test_an_id_cannot_be_found_out_letter_by_letter():
    for beginning in ("c", "chatcmpl-7", "chatcmpl-77a", "chatcmpl-8f0e-1a2"):
        assert for_clients(DECISIONS, beginning) == []


def test_decisions_without_ids_stay_as_they_are():
    decisions = [{"mood": "wary", "lengths": [4, 0]}]
    assert for_clients(decisions, None) == decisions
    assert for_clients(decisions, "chatcmpl-8f0e") == decisions


def test_the_route_answers_with_digests():
    from vllm_instant.patches.http_handlers import show_decisions

    class Core:
        async def call_utility_all_async(self, *_):
            return [DECISIONS, []]

    state = types.SimpleNamespace(engine_client=types.SimpleNamespace(engine_core=Core()))
    request = types.SimpleNamespace(app=types.SimpleNamespace(state=state))
    answer = asyncio.run(show_decisions(request, 20, None, False))
    assert [engine["engine"] for engine in answer["engines"]] == [0, 1]
    assert "chatcmpl" not in json.dumps(answer)
