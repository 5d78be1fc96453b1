"""STSB: interactive queries per layer, aggregated query as their weighted sum."""

import pytest
import torch

from bridge_stg.modules import SemanticBridge


def states(layers=3, batch=2, queries=4, dim=16):
    return [torch.randn(batch, queries, dim) for _ in range(layers)]


def test_aggregated_query_is_the_softmax_weighted_sum_of_the_interactive_ones():
    bridge = SemanticBridge(16, 8, 3)
    with torch.no_grad():
        bridge.layer_logits.copy_(torch.tensor([0.0, 1.0, -2.0]))
    interactive, aggregated = bridge(states())
    assert interactive.shape == (3, 2, 4, 8)
    weights = torch.tensor([0.0, 1.0, -2.0]).softmax(0)
    expected = sum(w * layer for w, layer in zip(weights, interactive, strict=True))
    torch.testing.assert_close(aggregated, expected)


def test_each_layer_reads_its_own_hidden_states():
    bridge = SemanticBridge(16, 8, 3)
    hidden = states()
    before = bridge(hidden).interactive
    hidden[1] = hidden[1] + torch.randn(16)
    changed = (bridge(hidden).interactive - before).abs().amax(dim=(1, 2, 3)) > 0
    assert changed.tolist() == [False, True, False]


def test_single_layer_mode_reads_the_last_layer_only():
    bridge = SemanticBridge(16, 8, 3, multi_layer=False)
    hidden = states()
    before = bridge(hidden).interactive
    hidden[0], hidden[1] = torch.randn(2, 4, 16), torch.randn(2, 4, 16)
    torch.testing.assert_close(bridge(hidden).interactive, before)
    hidden[2] = torch.randn(2, 4, 16)
    assert not torch.allclose(bridge(hidden).interactive, before)


def test_scale_of_the_hidden_states_does_not_matter():
    bridge = SemanticBridge(16, 8, 2)
    hidden = states(2)
    scaled = bridge([100 * state for state in hidden]).interactive
    torch.testing.assert_close(scaled, bridge(hidden).interactive, atol=1e-4, rtol=1e-3)


def test_wrong_number_of_layers_is_named():
    with pytest.raises(ValueError, match="must hold 3 layers, got 2"):
        SemanticBridge(16, 8, 3)(states(2))


@pytest.mark.parametrize("option", [{"hidden_dim": 0}, {"query_dim": -1}, {"num_layers": 0}, {"num_layers": 2.0}])
def test_a_bad_size_is_a_sentence(option):
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(option))} must be"):
        SemanticBridge(**{"hidden_dim": 8, "query_dim": 4, "num_layers": 2, **option})


def test_a_bad_state_is_a_sentence():
    bridge = SemanticBridge(8, 4, 2)
    with pytest.raises(ValueError, match=r"hidden_states\[1\] must have shape \[B, M, 8\], got \[2, 3, 7\]"):
        bridge([torch.zeros(2, 3, 8), torch.zeros(2, 3, 7)])
    with pytest.raises(TypeError, match=r"hidden_states\[0\] must be a tensor, got NoneType"):
        bridge([None, torch.zeros(2, 3, 8)])
