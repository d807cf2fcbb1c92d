import pytest

from vllm_instant.tools.measure.prompts import BUILT_IN, built_in


@pytest.mark.parametrize("kind", BUILT_IN)
def test_every_seed_gives_as_many_prompts_as_were_asked_for(kind):
    # Some seeds draw a place with nothing but blank lines after it: `bench` never ended then.
    for seed in range(200):
        prompts = BUILT_IN[kind](1, f"seed/{seed}")
        assert len(prompts) == 1
        assert prompts[0].text.strip()


def test_classes_alternate():
    assert [prompt.kind for prompt in built_in(6, "x")][:4] == list(BUILT_IN)
