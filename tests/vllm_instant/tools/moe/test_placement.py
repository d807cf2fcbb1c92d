import numpy as np
import pytest
from expert_traces import planted

from vllm_instant.moe.routing_trace import TraceError
from vllm_instant.tools.moe import placement


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_planted_groups_are_placed_better_than_by_default(devices):
    trace, _ = planted()
    first, second = trace.split(0.7)
    placed = placement.place(first, devices)
    assert (np.apply_along_axis(np.bincount, 1, placed) == 32 // devices).all()
    found = placement.compare(second, placed, devices)
    assert found.saved.low > 0.1
    assert found.learned.transfers.value < found.default.transfers.value
    assert found.learned.imbalance < 1.15


def test_traffic_is_counted_correctly():
    trace, _ = planted(experts=4, groups=2, top_k=2, layers=1, requests=8, tokens=1)
    trace.experts[:, 0] = np.array([[0, 1], [0, 2], [0, 3], [2, 3], [0, 1], [0, 1], [1, 3], [2, 3]])
    found = placement.compare(trace, np.array([[0, 1, 1, 0]]), 2)
    assert found.default.devices_touched.value == pytest.approx((1 * 5 + 2 * 3) / 8)
    # {0, 3} and {1, 2}: only the third token stays on one device.
    assert found.learned.devices_touched.value == pytest.approx((1 * 1 + 2 * 7) / 8)
    assert found.default.transfers.value == pytest.approx(found.default.devices_touched.value / 2)
    assert found.default.imbalance == pytest.approx(9 / 8)
    assert found.saved.value < 0


def test_placement_without_structure_is_no_worse_than_the_default_where_it_was_learned():
    trace, _ = planted(loyalty=0.25)
    found = placement.compare(trace, placement.place(trace, 4), 4)
    assert found.saved.value >= 0


def test_experts_that_cannot_be_divided_are_refused():
    with pytest.raises(TraceError, match="32 experts cannot be placed on 5 devices equally"):
        placement.place(planted()[0], 5)


def test_the_table_for_eplb_is_a_permutation_that_gives_every_device_its_experts():
    trace, _ = planted()
    placed = placement.place(trace, 4)
    table = placement.physical_to_logical(placed)
    assert table.shape == (2, 32)
    assert (np.sort(table, 1) == np.arange(32)).all()
    for layer, row in enumerate(table):
        for device in range(4):
            assert (placed[layer][row[device * 8 : device * 8 + 8]] == device).all()


@pytest.mark.engine
def test_vllm_s_eplb_understands_the_table():
    import torch
    from vllm.distributed.eplb.eplb_state import compute_logical_maps

    trace, _ = planted()
    table = placement.physical_to_logical(placement.place(trace, 4))
    to_physical, replicas = compute_logical_maps(torch.from_numpy(table), 32)
    assert (replicas == 1).all()
    places = to_physical[..., 0].numpy()
    assert np.array_equal(np.take_along_axis(table, places, 1), np.tile(np.arange(32), (2, 1)))
