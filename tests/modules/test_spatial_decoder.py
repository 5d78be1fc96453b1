"""QGSL: what the decoder may depend on, where its boxes start, and how padding is ignored."""

import pytest
import torch

from bridge_stg.modules import SpatialDecoder
from bridge_stg.modules.spatial_decoder import sinusoidal_embedding

L, B, S, M, K, C = 2, 2, 3, 4, 5, 16


@pytest.fixture
def decoder():
    return SpatialDecoder(C, 4, 32, L).eval()


def inputs():
    return {
        "interactive": torch.randn(L, B, M, C),
        "memory": torch.randn(B, S, K, C),
        "times": torch.arange(S).float().expand(B, S),
        "reference": torch.rand(B, S, 2),
        "bias": torch.randn(B, S, K),
    }


def test_shapes_and_ranges(decoder):
    tubes = decoder(**inputs())
    assert tubes.boxes.shape == (L, B, S, M, 4)
    assert tubes.presence.shape == (L, B, S, M)
    assert ((tubes.boxes >= 0) & (tubes.boxes <= 1)).all()


def test_an_untrained_decoder_starts_at_the_reference(decoder):
    given = inputs()
    boxes = decoder(**given).boxes
    expected = given["reference"].clamp(1e-4, 1 - 1e-4)[None, :, :, None].expand(L, B, S, M, 2)
    torch.testing.assert_close(boxes[..., :2], expected, atol=1e-5, rtol=1e-5)


def test_padding_frames_change_nothing(decoder):
    given = inputs()
    mask = torch.tensor([[True, True, False]] * B)
    masked = decoder(**given, frame_mask=mask)
    given["memory"][:, 2] = 100.0
    given["times"] = given["times"].clone()
    given["times"][:, 2] = 77.0
    again = decoder(**given, frame_mask=mask)
    torch.testing.assert_close(again.presence[:, :, :2], masked.presence[:, :, :2])
    cut = {k: v[:, :2] if k != "interactive" else v for k, v in given.items()}
    torch.testing.assert_close(decoder(**cut).presence, masked.presence[:, :, :2], atol=1e-5, rtol=1e-4)


def test_a_token_with_bias_minus_infinity_is_not_seen(decoder):
    given = inputs()
    given["bias"][:, :, 0] = float("-inf")
    before = decoder(**given).presence
    given["memory"][:, :, 0] += 10.0
    torch.testing.assert_close(decoder(**given).presence, before)
    given["memory"][:, :, 1] += 10.0
    assert not torch.allclose(decoder(**given).presence, before)


def test_layer_l_reads_interactive_query_l(decoder):
    given = inputs()
    before = decoder(**given).presence
    given["interactive"][1] += torch.randn(C)
    after = decoder(**given).presence
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


def test_time_is_seen(decoder):
    given = inputs()
    before = decoder(**given).presence
    given["times"] = given["times"] + 2.0
    assert not torch.allclose(decoder(**given).presence, before)


def test_a_missing_reference_is_named():
    given = inputs() | {"reference": None}
    with pytest.raises(ValueError, match="reference must be given"):
        SpatialDecoder(C, 4, 32, L)(**given)
    assert SpatialDecoder(C, 4, 32, L, learned_reference=True)(**given).boxes.shape == (L, B, S, M, 4)


def test_sinusoidal_embedding_separates_values():
    codes = sinusoidal_embedding(torch.tensor([0.0, 0.25, 0.5, 60.0]), 16)
    assert codes.shape == (4, 16)
    assert torch.pdist(codes).min() > 0.05
    assert sinusoidal_embedding(torch.zeros(2), 7).shape == (2, 7)


@pytest.mark.parametrize("option", [{"dim": 0}, {"heads": "4"}, {"ffn_dim": 0}, {"num_layers": True}])
def test_a_bad_size_is_a_sentence(option):
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(option))} must be"):
        SpatialDecoder(**{"dim": 16, "heads": 4, "ffn_dim": 32, "num_layers": 2, **option})


def test_a_bad_tensor_is_a_sentence():
    with pytest.raises(ValueError, match="heads must divide dim=16, got 3"):
        SpatialDecoder(16, 3, 32, 2)
    decoder = SpatialDecoder(16, 4, 32, 2, learned_reference=True)
    good = {"interactive": torch.zeros(2, 3, 4, 16), "memory": torch.zeros(3, 5, 9, 16), "times": torch.zeros(3, 5)}
    decoder(**good)
    for name, wrong, rule in (
        ("interactive", torch.zeros(3, 3, 4, 16), r"\[2, B, M, 16\]"),
        ("memory", torch.zeros(3, 5, 9, 8), r"\[B, S, K, 16\]"),
        ("times", torch.zeros(3, 6), r"\[B, S\] with S=5"),
        ("reference", torch.zeros(3, 5, 4), r"\[B, S, 2\]"),
        ("bias", torch.zeros(3, 5, 8), r"\[B, S, K\] with K=9"),
        ("frame_mask", torch.ones(2, 5, dtype=torch.bool), r"\[B, S\] with B=3"),
    ):
        with pytest.raises(ValueError, match=f"{name} must have shape {rule}"):
            decoder(**{**good, name: wrong})
