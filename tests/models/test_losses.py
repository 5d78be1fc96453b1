"""Loss terms against hand-computed values; absent labels give absent terms."""

import math

import pytest
import torch
import torch.nn.functional as F

from bridge_stg.models import BridgeSTGOutput
from bridge_stg.models.losses import select_hypotheses
from bridge_stg.training import GroundingTargets, LossWeights, grounding_losses

L, B, S, M, T = 2, 2, 3, 2, 4


def make_targets(**overrides):
    values = {
        "boxes": torch.full((B, S, 4), 0.5),
        "has_box": torch.tensor([[True, True, False], [True, False, False]]),
        "present": torch.tensor([[True, True, False], [True, False, False]]),
        "has_presence": torch.ones(B, S, dtype=torch.bool),
        "inside": torch.tensor([[True, True, False, False], [False, True, True, False]]),
        "has_interval": torch.ones(B, dtype=torch.bool),
    }
    return GroundingTargets(**(values | overrides))


def make_output(**overrides):
    values = {
        "boxes": torch.full((L, B, S, M, 4), 0.5),
        "presence": torch.zeros(L, B, S, M),
        "relevance": torch.zeros(B, T),
        "contrast": torch.zeros(B, T),
        "token_scores": torch.zeros(B, S, 4),
        "token_centres": torch.tensor([[0.5, 0.5], [0.1, 0.1], [0.9, 0.1], [0.5, 0.9]]),
        "answer_logits": torch.zeros(5, 10),
        "answer_targets": torch.arange(5),
    }
    return BridgeSTGOutput(**(values | overrides))


def test_an_undecided_model_scores_the_entropies():
    losses = grounding_losses(make_output(), make_targets(), LossWeights(), match_one=False)
    assert set(losses) == set(LossWeights.terms())
    expected = {
        "language": math.log(10),
        "alignment": math.log(2),
        "contrast": math.log(4),
        "token": math.log(2),
        "presence": math.log(2),
        "box": 0.0,
        "giou": 0.0,
    }
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, abs=1e-5), name


def test_only_positive_frames_teach_boxes():
    boxes = torch.full((L, B, S, M, 4), 0.5)
    boxes[:, :, 2] = 0.9  # frame 2 is negative in both clips
    losses = grounding_losses(make_output(boxes=boxes), make_targets(), LossWeights(), match_one=False)
    assert losses["box"] == 0
    boxes[:, 0, 0, :, 0] = 0.6  # one of three positive frames is off by 0.1 in one coordinate
    losses = grounding_losses(make_output(boxes=boxes), make_targets(), LossWeights(), match_one=False)
    assert losses["box"].item() == pytest.approx(0.1 / 3)


def test_absent_labels_are_absent_terms():
    nothing = torch.zeros(B, S, dtype=torch.bool)
    targets = make_targets(has_box=nothing, has_presence=nothing, has_interval=torch.zeros(B, dtype=torch.bool))
    output = make_output(answer_logits=None, answer_targets=None)
    assert grounding_losses(output, targets, LossWeights(), match_one=False) == {}


def test_clips_without_an_interval_do_not_move_the_alignment():
    targets = make_targets(has_interval=torch.tensor([True, False]))
    relevance = torch.zeros(B, T)
    relevance[1] = 50.0
    losses = grounding_losses(make_output(relevance=relevance), targets, LossWeights(), match_one=False)
    assert losses["alignment"].item() == pytest.approx(math.log(2))


def test_matching_teaches_the_cheapest_hypothesis_and_silences_the_others():
    boxes = torch.full((L, B, S, M, 4), 0.5)
    boxes[:, :, :, 1, 0] = 0.8
    boxes.requires_grad_()
    presence = torch.zeros(L, B, S, M, requires_grad=True)
    output = make_output(boxes=boxes, presence=presence)
    losses = grounding_losses(output, make_targets(), LossWeights(), match_one=True)
    (losses["box"] + losses["presence"]).backward()
    assert boxes.grad[..., 1, :].abs().sum() == 0
    present = make_targets().present
    # Gradient descent raises the winner where the event is on, and lowers the loser everywhere.
    assert (presence.grad[..., 0][:, present] < 0).all()
    assert (presence.grad[..., 1] > 0).all()


def test_all_hypotheses_learn_before_matching():
    boxes = torch.full((L, B, S, M, 4), 0.6, requires_grad=True)
    losses = grounding_losses(make_output(boxes=boxes), make_targets(), LossWeights(), match_one=False)
    losses["box"].backward()
    assert (boxes.grad[:, 0, 0].abs().sum(-1) > 0).all()


def test_earlier_layers_weigh_as_asked():
    boxes = torch.full((L, B, S, M, 4), 0.5)
    boxes[0] += 0.1  # an earlier layer that is off, a last one that is right

    def box(auxiliary):
        weights = LossWeights(auxiliary=auxiliary)
        return grounding_losses(make_output(boxes=boxes), make_targets(), weights, match_one=False)["box"].item()

    assert box(0.0) == pytest.approx(0.0, abs=1e-6)
    assert box(1.0) == pytest.approx(0.4 / 2)
    assert box(0.5) == pytest.approx(0.4 * 0.5 / 1.5)


def test_a_tube_is_matched_as_a_whole():
    cost = torch.zeros(1, 1, 2, 3)
    cost[0, 0] = torch.tensor([[0.0, 1.0, 3.0], [9.0, 1.0, 3.0]])  # hypothesis 0 wins frame 0, loses the tube
    assert select_hypotheses(cost).tolist() == [[0.0, 1.0, 0.0]]


def test_token_loss_asks_for_the_tokens_in_the_box():
    targets = make_targets(boxes=torch.tensor([0.5, 0.5, 0.3, 0.3]).expand(B, S, 4))

    def token(scores):
        output = make_output(token_scores=scores)
        return grounding_losses(output, targets, LossWeights(), match_one=False)["token"]

    right = torch.tensor([8.0, -8.0, -8.0, -8.0]).expand(B, S, 4)
    wrong = -right
    assert token(right) < 0.01 < token(wrong)


def test_padding_of_shorter_clips_teaches_nothing():
    torch.manual_seed(0)
    relevance, contrast = torch.randn(B, T), torch.randn(B, T)
    targets = make_targets(inside=torch.tensor([[True, False, False, False], [False, True, True, False]]))
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    padded = (tensor.masked_fill(~mask, torch.nan) for tensor in (relevance, contrast))
    output = make_output(**dict(zip(("relevance", "contrast"), padded, strict=True)), frame_mask=mask)
    losses = grounding_losses(output, targets, LossWeights(), match_one=False)
    bce = F.binary_cross_entropy_with_logits(relevance, targets.inside.float(), reduction="none")
    torch.testing.assert_close(losses["alignment"], bce[mask].mean())
    short, long = contrast[0, :2].log_softmax(-1)[0], contrast[1].log_softmax(-1)[1:3].mean()
    torch.testing.assert_close(losses["contrast"], -(short + long) / 2)
    everywhere = make_targets(inside=torch.tensor([[True, True, False, False], [False, True, True, False]]))
    losses = grounding_losses(output, everywhere, LossWeights(), match_one=False)
    torch.testing.assert_close(losses["contrast"], -long)  # a clip without negatives does not count


def test_clips_without_both_kinds_of_frames_are_not_contrasted():
    contrast = torch.randn(B, T, requires_grad=True)
    for other in ([True] * T, [False] * T):
        inside = torch.tensor([[True, False, False, True], other])
        losses = grounding_losses(
            make_output(contrast=contrast), make_targets(inside=inside), LossWeights(), match_one=False
        )
        torch.testing.assert_close(losses["contrast"], -contrast[0].log_softmax(-1)[[0, 3]].mean())
        (gradient,) = torch.autograd.grad(losses["contrast"], contrast)
        assert gradient[0].abs().sum() > 0 and gradient[1].abs().sum() == 0
