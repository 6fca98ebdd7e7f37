"""Records: what they take, and the one line in which they refuse the rest."""

from __future__ import annotations

import pickle
from typing import Annotated, Any, Literal, Self

import numpy as np
import pytest
from pydantic import Field, model_validator

from lorapower._records import Record, Results
from lorapower.errors import InputError

Rank = Annotated[int, Field(ge=0)]


class Kind(Record):
    kind: Literal["one"] = "one"
    ranks: Rank | tuple[Rank, ...] = 0
    rate: float = Field(1e-3, gt=0)


class Other(Record):
    kind: Literal["two"] = "two"
    on: bool


class Whole(Record):
    part: Annotated[Kind | Other, Field(discriminator="kind")] = Kind()
    width: int = Field(3, ge=1, le=9)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width == 5:
            raise InputError("width", allowed="other than 5", given=5)
        return self


class Found(Results):
    loss: float


@pytest.mark.parametrize(
    ("record", "values", "name"),
    [
        (Kind, {"ranks": True}, "ranks"),
        (Kind, {"ranks": [1]}, "ranks"),
        (Kind, {"rate": "1"}, "rate"),
        (Kind, {"rate": np.nan}, "rate"),
        (Kind, {"rat": 1.0}, "names"),
        (Other, {}, "on"),
        (Whole, {"width": 10}, "width"),
        (Whole, {"width": 5}, "width"),
        (Whole, {"part": {"kind": "two", "on": "x"}}, "on"),
        (Whole, {"part": {"kind": "three"}}, "part"),
        (Kind, {"ranks": "x\n" * 1000}, "ranks"),
    ],
)
def test_what_is_refused_is_named_in_one_line(
    record: type[Record], values: dict[str, Any], name: str
) -> None:
    with pytest.raises(InputError, match=f"^{name} must be ") as caught:
        record(**values)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_numpy_s_scalars_are_python_s() -> None:
    ranks: Any = (np.int64(1), np.int32(2))
    found = Kind(ranks=ranks, rate=np.float64(0.1))
    assert found == Kind(ranks=(1, 2), rate=0.1)
    assert [type(rank) for rank in found.ranks] == [int, int]  # type: ignore[union-attr]
    assert Other(on=np.bool_(True)).on is True  # type: ignore[arg-type]
    assert type(Kind(rate=1).rate) is float


def test_records_are_values() -> None:
    one = Whole(part=Kind(ranks=(1, 2)))
    assert len({one, Whole(part=Kind(ranks=(1, 2))), one.replace(width=4)}) == 2
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(InputError, match="width must be other than 5"):
        one.replace(width=5)
    with pytest.raises(ValueError, match="frozen"):
        one.width = 4  # type: ignore[misc]


def test_results_may_be_no_numbers() -> None:
    texts = [Found(loss=x).model_dump_json() for x in (np.nan, np.inf, -np.inf)]
    assert texts == ['{"loss":NaN}', '{"loss":Infinity}', '{"loss":-Infinity}']
