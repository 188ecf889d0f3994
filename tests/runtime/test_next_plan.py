"""What a rank that had to end leaves behind is what the next start needs, whatever length comes first."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from trainwarden.guards.memory_plan import Size
from trainwarden.runtime import next_plan
from trainwarden.runtime.plan import MicroBatchPlan


def test_the_next_start_splits_what_failed_and_leaves_shorter_rows_alone(tmp_path: Path) -> None:
    next_plan.leave(tmp_path, 1, 4, (Size(8, 400), Size(4, 400)))
    left = next_plan.found(tmp_path)
    assert left is not None
    plan = MicroBatchPlan()
    assert left.teach(plan)
    assert plan.choose(Size(8, 50)).rows in (None, 32), "8 rows of 50 are less than 4 of 400"
    assert plan.choose(Size(8, 400)).rows == 4


def test_what_several_ranks_left_is_learned_together(tmp_path: Path) -> None:
    next_plan.leave(tmp_path, 0, 4, (Size(8, 100), Size(4, 100)))
    next_plan.leave(tmp_path, 1, 2, (Size(4, 100), Size(2, 100)))
    left = next_plan.found(tmp_path)
    assert left == next_plan.Left(2, ((Size(8, 100), Size(4, 100)), (Size(4, 100), Size(2, 100))))
    plan = MicroBatchPlan()
    assert left.teach(plan)
    assert plan.choose(Size(8, 100)).rows == 2
    assert not left.teach(plan), "it knows by now"


def test_rows_alone_are_taken_at_whatever_length_comes_next(tmp_path: Path) -> None:
    next_plan.leave(tmp_path, 0, 3)
    left = next_plan.found(tmp_path)
    plan = MicroBatchPlan()
    assert left is not None
    assert left.teach(plan)
    assert plan.choose(Size(8, 100)).rows == 3
    smaller = MicroBatchPlan()
    smaller.limit = 2
    assert not left.teach(smaller)


def test_nothing_is_left_by_nobody_nor_after_it_is_cleared(tmp_path: Path) -> None:
    assert next_plan.found(tmp_path) is None
    next_plan.leave(tmp_path, 0, 3)
    next_plan.clear(tmp_path)
    assert next_plan.found(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_let_be(tmp_path: Path) -> None:
    next_plan.leave(tmp_path / "gone", 0, 3, (Size(8, 1), Size(3, 1)))
    assert next_plan.found(tmp_path / "gone") is None


@given(
    st.text() | st.sampled_from(['{"micro_batch_size": 0}', '{"micro_batch_size": 2, "lesson": [[1]]}', "[]", "null"])
)
def test_files_that_say_nothing_are_no_error(tmp_path_factory: object, text: str) -> None:
    folder: Path = tmp_path_factory.mktemp("run")  # type: ignore[attr-defined]
    (folder / "next_plan.rank0.json").write_text(text, encoding="utf-8", errors="replace")
    left = next_plan.found(folder)
    assert left is None or left.rows >= 1
