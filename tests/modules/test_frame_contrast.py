"""ETA (b): similarity logits and the multi-positive InfoNCE."""

import math

import pytest
import torch

from bridge_stg.modules import FrameContrast


def test_logits_are_cosines_over_temperature():
    contrast = FrameContrast(6, 8, temperature=0.5)
    logits = contrast(torch.randn(2, 4, 8), torch.randn(2, 5, 6))
    assert logits.shape == (2, 5)
    assert logits.abs().max() <= 1 / 0.5 + 1e-5
    frames = torch.randn(1, 3, 6)
    query = torch.randn(1, 4, 8)
    with torch.no_grad():
        contrast.project_frame.bias.zero_()
    torch.testing.assert_close(contrast(query, 7 * frames), contrast(query, frames))


def test_loss_of_equal_logits_is_log_of_the_frame_count():
    inside = torch.tensor([[True, True, False, False]])
    torch.testing.assert_close(FrameContrast.loss_sum(torch.zeros(1, 4), inside), torch.tensor(math.log(4.0)))


def test_loss_falls_when_positives_rise():
    inside = torch.tensor([[True, False, False]])
    low = FrameContrast.loss_sum(torch.tensor([[3.0, 0.0, 0.0]]), inside)
    high = FrameContrast.loss_sum(torch.tensor([[0.0, 3.0, 0.0]]), inside)
    assert low < high


def test_clips_without_the_event_add_nothing():
    logits = torch.randn(2, 4, requires_grad=True)
    inside = torch.tensor([[True, False, False, True], [False] * 4])
    loss = FrameContrast.loss_sum(logits, inside)
    torch.testing.assert_close(loss, FrameContrast.loss_sum(logits[:1], inside[:1]))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().sum() > 0
    assert logits.grad[1].abs().sum() == 0


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        FrameContrast(4, 4, temperature=0)


@pytest.mark.parametrize(
    "option",
    [{"temperature": math.nan}, {"temperature": math.inf}, {"temperature": "1"}, {"frame_dim": 0}, {"query_dim": 1.5}],
)
def test_a_bad_constructor_argument_is_a_sentence(option):
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(option))} must be"):
        FrameContrast(**{"frame_dim": 8, "query_dim": 4, **option})


def test_a_bad_tensor_is_a_sentence():
    contrast = FrameContrast(8, 4)
    with pytest.raises(ValueError, match=r"frames must have shape \[B, T, 8\], got \[2, 5, 4\]"):
        contrast(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match=r"frames must have shape \[B, T, 8\] with B=2"):
        contrast(torch.zeros(2, 3, 4), torch.zeros(3, 5, 8))
    with pytest.raises(TypeError, match=r"inside must be torch\.bool, got torch\.float32"):
        FrameContrast.loss_sum(torch.zeros(2, 5), torch.zeros(2, 5))
