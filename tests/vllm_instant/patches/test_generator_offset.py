"""The repair of seeds with prompts in pieces, on a runner that is only as much as it needs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from patch_harness import wrap

from vllm_instant.patches.cpu import generator_offset
from vllm_instant.patches.names import MODEL_RUNNER

pytestmark = pytest.mark.engine


class Runner:
    """Samples one random number for each generator, and books as vLLM does."""

    def __init__(self, discarded, generators):
        self.discard_request_mask = SimpleNamespace(np=np.array(discarded))
        self.input_batch = SimpleNamespace(num_reqs=len(discarded), generators=generators)

    def _sample(self, logits, spec_decode_metadata):
        return {row: float(torch.rand((), generator=g)) for row, g in self.input_batch.generators.items()}

    def _bookkeeping_sync(self):
        for row in np.nonzero(self.discard_request_mask.np)[0]:
            generator = self.input_batch.generators.get(int(row))
            if generator is not None:
                generator.set_offset(generator.get_offset() - 4)
        return "booked"


def _seeded(*seeds):
    return {row: torch.Generator().manual_seed(seed) for row, seed in enumerate(seeds)}


@pytest.fixture
def runner_class():
    repaired = type("GPUModelRunner", (Runner,), dict(vars(Runner)))
    wrap(generator_offset.PATCH, MODEL_RUNNER, GPUModelRunner=repaired)
    return repaired


def test_the_fault_is_there():
    with pytest.raises(RuntimeError):
        Runner([True], _seeded(1))._bookkeeping_sync()
    assert generator_offset.generators_have_no_offset()
    assert "repairs" in generator_offset._state()


def test_what_was_thrown_away_is_drawn_again(runner_class):
    generators = _seeded(1, 2)
    runner = runner_class([True, False], generators)
    first = runner._sample(None, None)
    assert runner._bookkeeping_sync() == "booked"
    assert list(generators) == [0, 1] or set(generators) == {0, 1}
    runner.discard_request_mask.np[:] = False
    second = runner._sample(None, None)
    assert second[0] == first[0]
    assert second[1] != first[1]


def test_rows_behind_the_batch_are_left_alone(runner_class):
    generators = _seeded(1, 2)
    runner = runner_class([False, True], generators)
    runner.input_batch.num_reqs = 1
    first = runner._sample(None, None)
    assert runner._sample(None, None)[1] != first[1]
