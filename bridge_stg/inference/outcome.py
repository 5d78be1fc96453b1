"""What became of one request or sample: an answer, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ..errors import reason_of

Answer = TypeVar("Answer")
Other = TypeVar("Other")


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=_HasId)


@dataclass(frozen=True)
class Outcome(Generic[Answer]):
    """An answer, or the reason why there is none.

    Attributes:
        id: of the request or sample.
        answer: None where there is none.
        reason: one line; None where there is an answer.
        request: fields of the request that are written beside a reason, since an answer repeats them by itself.
    """

    id: str
    answer: Answer | None = None
    reason: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[Answer], Other]) -> Outcome[Other]:
        """The same outcome with another form of its answer, where it has one."""
        return Outcome(self.id, None if self.answer is None else change(self.answer), self.reason, self.request)

    def to_record(self: Outcome[dict[str, Any]]) -> dict[str, Any]:
        """The JSON form: `{"id", **answer}`, or `{"id", **request, "error"}`."""
        return {"id": self.id, **self.request, **({"error": self.reason} if self.answer is None else self.answer)}

    @staticmethod
    def from_record(record: Any) -> Outcome[dict[str, Any]]:
        """Inverse of `to_record`; an answer keeps its `id`.

        Raises:
            ValueError: the record is not a JSON object with an id.
        """
        if not isinstance(record, dict) or not isinstance(record.get("id"), str):
            raise ValueError("it is not a JSON object with an id")
        if "error" not in record:
            return Outcome(record["id"], answer=record)
        request = {key: value for key, value in record.items() if key not in ("id", "error")}
        return Outcome(record["id"], reason=record["error"], request=request)


def answer_together(
    items: Sequence[Item], answer: Callable[[Sequence[Item]], Iterable[Answer]]
) -> list[Outcome[Answer]]:
    """Answer items as one batch; a batch that fails is halved until the item that cannot be answered is alone.

    Args:
        answer: an answer for each of the items that it is given, in order. Whatever it raises is the reason of an item,
            unless `reason_of` says that it is about no item.

    Returns:
        one outcome for each item, in order.
    """
    if not items:
        return []
    try:
        return [Outcome(item.id, found) for item, found in zip(items, answer(items), strict=True)]
    except Exception as error:  # of whatever kind: it is this batch's, and must not end the others
        reason = reason_of(error, items[0].id)
    if len(items) == 1:
        return [Outcome(items[0].id, reason=reason)]
    middle = len(items) // 2  # outside the handler, whose traceback would keep the failed batch in memory
    return [*answer_together(items[:middle], answer), *answer_together(items[middle:], answer)]
