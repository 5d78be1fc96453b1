"""Box formats, IoU and GIoU against hand-computed values."""

import pytest
import torch

from bridge_stg.modules.boxes import cxcywh_to_xyxy, inverse_sigmoid, pairwise_iou_giou


def test_corners_of_a_box():
    boxes = torch.tensor([[[0.5, 0.25, 0.5, 0.5]], [[1.0, 2.0, 0.0, 2.0]]])
    assert cxcywh_to_xyxy(boxes).tolist() == [[[0.25, 0.0, 0.75, 0.5]], [[1.0, 1.0, 1.0, 3.0]]]


@pytest.mark.parametrize(
    ("other", "iou", "giou"),
    [
        ((0.5, 0.5, 1.0, 1.0), 1.0, 1.0),
        ((1.0, 0.5, 1.0, 1.0), 1 / 3, 1 / 3),  # shifted by half: overlap 0.5, union 1.5 = hull
        ((2.5, 0.5, 1.0, 1.0), 0.0, -1 / 3),  # a gap of one: hull 3, union 2
    ],
)
def test_known_overlaps(other, iou, giou):
    box = torch.tensor([0.5, 0.5, 1.0, 1.0])
    got = pairwise_iou_giou(box, torch.tensor(other))
    torch.testing.assert_close(torch.stack(got), torch.tensor([iou, giou]), atol=1e-5, rtol=1e-5)


def test_empty_boxes_stay_finite_with_gradient():
    boxes = torch.zeros(2, 4, requires_grad=True)
    iou, giou = pairwise_iou_giou(boxes, torch.zeros(2, 4))
    (iou + giou).sum().backward()
    assert torch.isfinite(giou).all()
    assert boxes.grad is not None and torch.isfinite(boxes.grad).all()


def test_inverse_sigmoid_undoes_sigmoid_and_is_finite_at_the_ends():
    x = torch.tensor([-3.0, 0.0, 4.0])
    torch.testing.assert_close(inverse_sigmoid(x.sigmoid()), x, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(inverse_sigmoid(torch.tensor([0.0, 1.0]))).all()


@pytest.mark.parametrize("convert", [cxcywh_to_xyxy, lambda boxes: pairwise_iou_giou(boxes, boxes)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_what_is_no_box_is_a_sentence(convert, shape):
    with pytest.raises(ValueError, match=r"boxes must have shape \[\.\.\., 4\], got"):
        convert(torch.zeros(shape))
