"""What a run learns about micro-batches: predicted, jumped to, grown back, released, remedied, and kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.runtime.loops import ComputeLoss, Loop, distance
from trainwarden import Guard
from trainwarden.errors import GPUMemoryError, InvalidSettingError, SplitRefusedError
from trainwarden.events import Event, MemoryRemedyApplied, MicroBatchGrown, MicroBatchShrunk
from trainwarden.guards.ladder import Trouble, next_rung, release_may_help
from trainwarden.guards.memory_plan import Bounds, Choice, PlanPolicy, Size
from trainwarden.guards.oom import MemoryFailure, OOMPolicy
from trainwarden.runtime import split as splitting
from trainwarden.runtime.plan import OBSERVATIONS, MicroBatchPlan
from trainwarden.testing import MemoryCeiling, out_of_memory_error

FIXED_BYTES, TOKEN_BYTES = 10_000, 100


@dataclass
class Allocator:
    """A device with ``room`` bytes, a linear law, and statistics as CUDA's allocator keeps them."""

    room: int
    told: bool = True
    ooms: int = 0
    ooms_in_checks: int = 0
    run: list[Size] = field(default_factory=list)
    resets: int = 0
    asked: int = 0
    _peak: int = 0

    def begin(self) -> None:
        self.resets += 1
        self._peak = 0

    def peak_bytes(self) -> int | None:
        return self._peak if self.told else None

    def room_bytes(self) -> int | None:
        self.asked += 1
        return self.room if self.told else None

    def limits(self, compute_loss: ComputeLoss) -> ComputeLoss:
        def limited(batch: Any) -> torch.Tensor:
            size = splitting.size(batch)
            assert size is not None
            needed = FIXED_BYTES + TOKEN_BYTES * size.tokens
            if needed > self.room:
                if torch.is_grad_enabled():
                    self.ooms += 1
                else:
                    self.ooms_in_checks += 1
                raise out_of_memory_error(needed, self.room)
            if torch.is_grad_enabled():
                self.run.append(size)
                self._peak = max(self._peak, needed)
            return compute_loss(batch)

        return limited


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 1)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(batch["input_ids"]))).square().mean()


def batches_of(*sizes: tuple[int, int]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(50, size, generator=generator)} for size in sizes]


def train(
    run_dir: Path,
    data: list[dict[str, torch.Tensor]],
    allocator: Allocator | None = None,
    policy: PlanPolicy | None = None,
    *,
    watch: Callable[[Guard], None] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, Guard, list[Event]]:
    """Trains on each batch once. The allocator's statistics are told to the plan."""
    events: list[Event] = []
    model = Tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(run_dir, observers=[events.append], **options)
    guard._progress.plan.meter = allocator
    if policy is not None:
        guard._progress.plan.policy = policy
    compute_loss = allocator.limits(model.loss) if allocator else model.loss
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches(data, max_steps=len(data)):
            guard.backward(compute_loss, batch)
            optimizer.step()
            optimizer.zero_grad()
            if watch:
                watch(guard)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), guard, events


def named(events: list[Event], kind: type[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


# -- foreseen ----------------------------------------------------------------------------------------------------


def test_a_long_batch_is_split_before_memory_ever_runs_out(tmp_path: Path) -> None:
    data = batches_of((8, 10), (8, 20), (8, 30), (8, 100), (8, 25))
    whole, _, _ = train(tmp_path / "a", data)
    allocator = Allocator(room=FIXED_BYTES + 500 * TOKEN_BYTES)
    split, guard, events = train(tmp_path / "b", data, allocator)
    assert (allocator.ooms, allocator.ooms_in_checks) == (0, 0)
    assert allocator.run == [Size(8, 10), Size(8, 20), Size(8, 30), Size(4, 100), Size(4, 100), Size(8, 25)]
    (shrink,) = named(events, MicroBatchShrunk)
    assert (shrink.step, shrink.from_size, shrink.to_size) == (3, 8, 4)
    assert "8 rows of 100 would need" in shrink.reason
    assert distance(split, whole) < 1e-5
    assert not guard._progress.plan.verified, "only a piece was compared with its halves: weaker evidence"
    line = guard._progress.plan.line
    assert line is not None
    assert line.bytes_per_token == pytest.approx(TOKEN_BYTES)
    assert line.fixed_bytes == pytest.approx(FIXED_BYTES, abs=1)


def test_with_statistics_a_stream_of_mixed_lengths_never_fails(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(5, 200, (60,), generator=generator).tolist()
    allocator = Allocator(room=FIXED_BYTES + 700 * TOKEN_BYTES)
    _, guard, _ = train(tmp_path, batches_of((8, 8), (8, 20), *[(8, length) for length in lengths]), allocator)
    assert allocator.ooms == 0
    assert guard.steps_completed == 62


def test_a_prediction_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """While nothing has failed, a loss that cannot be split runs whole, whatever is predicted."""
    allocator = Allocator(room=FIXED_BYTES + 500 * TOKEN_BYTES)
    data = batches_of((8, 10), (8, 20), (8, 100))
    model = Tokens()
    guard = Guard(tmp_path, observers=[])
    guard._progress.plan.meter = allocator
    summed = allocator.limits(lambda batch: model.loss(batch) * len(batch["input_ids"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SplitRefusedError), guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches(data, max_steps=3):
            guard.backward(summed, batch)
            optimizer.step()
    assert allocator.ooms == 1, "refused when it failed, not when it was foreseen"


def test_a_run_that_fits_is_bit_identical_with_and_without_statistics(tmp_path: Path) -> None:
    data = batches_of(*[(8, length) for length in range(5, 40)])
    allocator = Allocator(room=FIXED_BYTES + 8 * 39 * TOKEN_BYTES)
    plain, _, _ = train(tmp_path / "a", data)
    measured, _, events = train(tmp_path / "b", data, allocator)
    assert torch.equal(plain, measured)
    assert not named(events, MicroBatchShrunk)


def test_the_driver_is_asked_only_where_it_can_change_the_choice(tmp_path: Path) -> None:
    allocator = Allocator(room=10**9)
    train(tmp_path, batches_of((8, 10), (8, 20), *[(8, 15)] * 50), allocator)
    assert allocator.asked == 0, "15 is known to fit since 20 did"


def test_once_the_line_is_known_few_batches_are_measured(tmp_path: Path) -> None:
    allocator = Allocator(room=10**9)
    train(tmp_path, batches_of(*[(8, length) for length in range(20, 4, -1)], *[(8, 10)] * 100), allocator)
    assert allocator.resets <= 8 + 2


def test_a_failure_jumps_to_the_size_that_the_line_predicts(tmp_path: Path) -> None:
    """Two thirds of the room go to somebody else: a batch that is known to fit fails, and the next size fits."""
    allocator = Allocator(room=FIXED_BYTES + 900 * TOKEN_BYTES)

    def intrude(guard: Guard) -> None:
        if guard.steps_completed == 3:
            allocator.room = FIXED_BYTES + 300 * TOKEN_BYTES

    _, _, events = train(tmp_path, batches_of((8, 10), (8, 40), (8, 100), (8, 100), (8, 90)), allocator, watch=intrude)
    assert allocator.ooms == 1
    (shrink,) = named(events, MicroBatchShrunk)
    assert (shrink.from_size, shrink.to_size) == (8, 3)
    assert "predicted to fit" in shrink.reason


# -- without statistics ------------------------------------------------------------------------------------------


def test_without_statistics_a_failure_jumps_to_what_has_fitted(tmp_path: Path) -> None:
    allocator = Allocator(room=FIXED_BYTES + 500 * TOKEN_BYTES, told=False)
    data = batches_of((8, 10), (8, 50), (8, 400), (8, 390), (8, 10))
    whole, _, _ = train(tmp_path / "a", data)
    split, _, events = train(tmp_path / "b", data, allocator, PlanPolicy(refine_ratio=1e9))
    assert [e.to_size for e in named(events, MicroBatchShrunk)] == [4, 2, 1], "no longer rows were known to fit"
    assert allocator.run[-9:] == [Size(1, 390)] * 8 + [Size(8, 10)]
    assert distance(split, whole) < 1e-5


def test_a_gap_is_closed_by_larger_parts_that_are_announced(tmp_path: Path) -> None:
    allocator = Allocator(room=FIXED_BYTES + 1600 * TOKEN_BYTES, told=False)
    _, guard, events = train(tmp_path, batches_of((16, 20), (64, 20), (64, 20), (128, 20), (128, 20)), allocator)
    assert allocator.run == [Size(16, 20), *[Size(64, 20)] * 6]
    assert allocator.ooms == 1, "64 rows of 20 were known to fit, and 128 failed: no line between them saves a pass"
    assert named(events, MicroBatchGrown) == []
    assert guard.steps_completed == 5


def test_a_gap_is_tried_in_its_middle_and_what_fits_is_announced(tmp_path: Path) -> None:
    allocator = Allocator(room=FIXED_BYTES + 1200 * TOKEN_BYTES, told=False)
    _, _, events = train(tmp_path, batches_of((16, 20), (16, 20), *[(128, 20)] * 3), allocator)
    assert [(e.from_size, e.to_size) for e in named(events, MicroBatchGrown)] == [(16, 43)]
    assert allocator.run[-3:] == [Size(43, 20), Size(43, 20), Size(42, 20)]
    assert allocator.ooms == 2, "the whole batch, and then two parts of 64"


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=12),
    capacity=st.integers(120, 900),
    told=st.booleans(),
)
def test_however_lengths_mix_every_row_is_trained_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], capacity: int, told: bool
) -> None:
    data = batches_of(*[(8, length) for length in lengths])
    whole, _, _ = train(tmp_path_factory.mktemp("a"), data)
    allocator = Allocator(room=FIXED_BYTES + capacity * TOKEN_BYTES, told=told)
    split, _, _ = train(tmp_path_factory.mktemp("b"), data, allocator)
    assert distance(split, whole) < 1e-5
    assert sum(size.rows for size in allocator.run) >= 8 * len(lengths)


# -- growing back ------------------------------------------------------------------------------------------------

SOON = PlanPolicy(quiet_batches=4, growing_batches=2)


def test_memory_that_comes_back_is_used_again(tmp_path: Path) -> None:
    allocator = Allocator(room=FIXED_BYTES + 200 * TOKEN_BYTES, told=False)

    def leave(guard: Guard) -> None:
        if guard.steps_completed == 3:
            allocator.room = 10**9

    data = batches_of(*[(16, 25)] * 30)
    whole, _, _ = train(tmp_path / "a", data)
    split, guard, events = train(tmp_path / "b", data, allocator, SOON, watch=leave)
    assert [e.to_size for e in named(events, MicroBatchGrown)] == [16]
    assert allocator.run[-1] == Size(16, 25), "whole batches again"
    assert allocator.ooms == 1
    assert guard.shrinks == 1
    assert distance(split, whole) < 1e-5


def test_growth_that_fails_waits_twice_as_long_each_time(tmp_path: Path) -> None:
    allocator = Allocator(room=FIXED_BYTES + 200 * TOKEN_BYTES, told=False)
    failed_at: list[int] = []

    def note(guard: Guard) -> None:
        if allocator.ooms > len(failed_at):
            failed_at.append(guard.steps_completed)

    _, guard, events = train(tmp_path, batches_of(*[(16, 25)] * 70), allocator, SOON, watch=note)
    waits = [later - earlier for earlier, later in itertools.pairwise(failed_at)]
    assert waits == [4, 8, 16, 32]
    assert not named(events, MicroBatchGrown)
    assert guard.steps_completed == 70


def test_growth_is_left_alone_while_a_failure_could_not_be_recovered() -> None:
    plan = MicroBatchPlan(policy=SOON)
    plan.limit = 8
    for _ in range(20):
        assert plan.choose(Size(16, 25), may_grow=False).rows == 8
    assert plan.choose(Size(16, 25)) == Choice(16, "250 tokens did not fit long ago", growing=True)


# -- the ladder --------------------------------------------------------------------------------------------------

FRAGMENTED = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 512.00 MiB is "
    "free. Of the allocated memory 70.00 GiB is allocated by PyTorch, and {} is reserved by PyTorch but unallocated."
)


def failure(unused: str) -> MemoryFailure:
    return MemoryFailure.from_exception(torch.OutOfMemoryError(FRAGMENTED.format(unused)))


def test_the_cache_is_returned_once_where_memory_was_there_in_pieces(tmp_path: Path) -> None:
    calls = itertools.count()

    def disturb(compute_loss: ComputeLoss, guard: Guard) -> ComputeLoss:
        def limited(batch: Any) -> torch.Tensor:
            if next(calls) == 6:
                raise torch.OutOfMemoryError(FRAGMENTED.format("1.50 GiB"))
            return compute_loss(batch)

        return limited

    undisturbed = Loop(tmp_path / "a").run()
    loop = Loop(tmp_path / "b", disturb=disturb).run()
    (event,) = loop.named(MemoryRemedyApplied)
    assert event.remedy == "release_cache"
    assert "unused would have been enough" in event.reason
    assert loop.named(MicroBatchShrunk) == []
    assert torch.equal(loop.weights(), undisturbed.weights()), "the same size again is the same step"


def test_when_returning_the_cache_did_not_help_the_batch_is_split(tmp_path: Path) -> None:
    def disturb(compute_loss: ComputeLoss, guard: Guard) -> ComputeLoss:
        def limited(batch: Any) -> torch.Tensor:
            if len(batch[0]) > 4 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError(FRAGMENTED.format("1.50 GiB"))
            return compute_loss(batch)

        return limited

    loop = Loop(tmp_path, disturb=disturb, max_steps=2).run()
    names = [event.name for event in loop.events]
    assert [n for n in names if "micro" in n or "remedy" in n] == ["memory_remedy_applied", "micro_batch_shrunk"]
    assert loop.guard.micro_batch_size == 4


@pytest.mark.parametrize(("unused", "helps"), [("1.50 GiB", True), ("1.49 GiB", False), ("0 bytes", False)])
def test_releasing_is_tried_where_free_and_unused_memory_would_have_been_enough(unused: str, helps: bool) -> None:
    assert release_may_help(failure(unused)) is helps


def test_releasing_is_not_tried_on_a_message_that_tells_no_sizes() -> None:
    assert not release_may_help(MemoryFailure("DefaultCPUAllocator: can't allocate memory", 2**30, None))


@given(
    st.builds(
        Trouble,
        rows=st.integers(1, 64),
        memory=st.sampled_from([failure("1.50 GiB"), failure("0 bytes")]),
        shrinks_this_step=st.integers(0, 5),
        released=st.booleans(),
        remedies=st.sampled_from(
            [(), ("enable_checkpointing",), ("offload_optimizer",), ("enable_checkpointing", "offload_optimizer")]
        ),
    ),
    st.integers(0, 4),
    st.booleans(),
)
def test_the_ladder_is_climbed_from_its_cheapest_rung(trouble: Trouble, max_shrinks: int, enabled: bool) -> None:
    rung = next_rung(OOMPolicy(enabled, max_shrinks), trouble)
    assert rung.reason
    if not enabled:
        assert rung.action == "give_up"
    elif release_may_help(trouble.memory) and not trouble.released:
        assert rung.action == "release"
    elif trouble.rows > 1 and trouble.shrinks_this_step < max_shrinks:
        assert rung.action == "shrink"
    elif trouble.remedies:
        assert (rung.action, rung.remedy) == ("remedy", trouble.remedies[0])
    else:
        assert rung.action == "give_up"


class Remedied:
    """One row needs more memory than there is until checkpointing is on, and all of it until the state is offloaded."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.called: list[str] = []
        self.ceiling = MemoryCeiling(capacity)

    def enable_checkpointing(self) -> None:
        self.called.append("enable_checkpointing")

    def offload_optimizer(self) -> None:
        self.called.append("offload_optimizer")
        self.ceiling.rows = 2


def remedied_loop(run_dir: Path, remedied: Remedied, **options: Any) -> Loop:
    options["guard_options"] = {
        **options.get("guard_options", {}),
        "remedies": {
            "enable_checkpointing": remedied.enable_checkpointing,
            "offload_optimizer": remedied.offload_optimizer,
        },
    }
    return Loop(run_dir, disturb=lambda compute_loss, guard: remedied.ceiling(compute_loss), **options)


def test_the_users_remedies_are_tried_in_turn_when_one_row_does_not_fit(tmp_path: Path) -> None:
    undisturbed = Loop(tmp_path / "a").run()
    remedied = Remedied()
    loop = remedied_loop(tmp_path / "b", remedied).run()
    assert remedied.called == ["enable_checkpointing", "offload_optimizer"]
    assert [e.remedy for e in loop.named(MemoryRemedyApplied)] == remedied.called
    assert "one row does not fit" in loop.named(MemoryRemedyApplied)[0].reason
    assert distance(loop.weights(), undisturbed.weights()) < 1e-5


def test_remedies_are_applied_again_at_the_start_of_a_resumed_run(tmp_path: Path) -> None:
    class InterruptedError_(Exception):  # noqa: N801, N818 - no error: it stops the loop
        pass

    def stop(guard: Guard) -> None:
        if guard.steps_completed == 2:
            raise InterruptedError_

    every_step = {"guard_options": {"checkpoint_every_steps": 1}}
    with pytest.raises(InterruptedError_):
        remedied_loop(tmp_path, Remedied(), after_step=stop, **every_step).run()
    remedied = Remedied()
    loop = remedied_loop(tmp_path, remedied, **every_step).run()
    assert remedied.called == ["enable_checkpointing", "offload_optimizer"]
    assert "before the resume" in loop.named(MemoryRemedyApplied)[0].reason
    assert remedied.ceiling.struck == 0


@pytest.mark.parametrize("remedies", [{"buy_memory": print}, {"enable_checkpointing": "yes"}], ids=str)
def test_remedies_have_their_names_and_can_be_called(tmp_path: Path, remedies: Any) -> None:
    with pytest.raises(InvalidSettingError, match="enable_checkpointing and offload_optimizer"):
        Guard(tmp_path, remedies=remedies)


def test_when_remedies_do_not_help_the_error_says_what_was_left(tmp_path: Path) -> None:
    remedied = Remedied()
    remedied.offload_optimizer = lambda: remedied.called.append("offload_optimizer")  # type: ignore[method-assign]
    with pytest.raises(GPUMemoryError, match="one row does not fit"):
        remedied_loop(tmp_path, remedied).run()
    assert remedied.called == ["enable_checkpointing", "offload_optimizer"]


# -- kept over checkpoints ---------------------------------------------------------------------------------------


def experienced() -> MicroBatchPlan:
    plan = MicroBatchPlan(meter=Allocator(room=FIXED_BYTES + 500 * TOKEN_BYTES))
    plan.choose(Size(8, 10))
    for size in (Size(8, 10), Size(8, 40)):
        plan.begin_attempt(size)
        plan.meter._peak = FIXED_BYTES + TOKEN_BYTES * size.tokens  # type: ignore[union-attr]
        plan.note_fit(size)
    plan.note_failure(Size(8, 100))
    plan.close_step()
    plan.used = {4, 8}
    plan.verified = True
    return plan


def test_a_resumed_plan_chooses_as_the_one_that_was_saved() -> None:
    saved = experienced()
    state = json.loads(json.dumps(saved.state_dict()))
    resumed = MicroBatchPlan(meter=saved.meter)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == saved.state_dict()
    assert (resumed.limit, resumed.used, resumed.shrinks, resumed.verified) == (saved.limit, {4, 8}, 1, True)
    for size in (Size(8, 100), Size(8, 5), Size(64, 100), Size(3, 400)):
        assert resumed.choose(size) == saved.choose(size)


def test_a_plan_of_an_older_checkpoint_knows_a_number_of_rows() -> None:
    plan = MicroBatchPlan()
    plan.load_state_dict({"limit": 4, "used": [4], "shrinks": 1, "verified": True})
    assert plan.limit == 4
    assert (plan.shrinks, plan.used, plan.verified) == (1, {4}, True)
    assert plan.choose(Size(8, 20)).rows == 4
    assert plan.choose(Size(8, 20)).rows == 4
    untouched = MicroBatchPlan()
    untouched.load_state_dict({"limit": None, "used": [], "shrinks": 0, "verified": False})
    assert untouched.choose(Size(8, 20)).rows is None


def test_what_fitted_before_the_first_optimizer_step_did_so_without_the_optimizers_state() -> None:
    plan = MicroBatchPlan()
    plan.note_fit(Size(8, 10))
    plan.note_failure(Size(8, 90))
    plan.close_step()
    assert plan.bounds.fitting_tokens(10) == 0
    assert plan.bounds.failing_tokens(90) == 720, "what failed without it fails with it"
    plan.note_fit(Size(8, 10))
    plan.close_step()
    assert plan.bounds.fitting_tokens(10) == 80


def test_another_ranks_lesson_is_taken_over() -> None:
    teacher, pupil = MicroBatchPlan(), MicroBatchPlan()
    teacher.note_failure(Size(8, 100))
    assert teacher.lesson == (Size(8, 100), Size(4, 100))
    pupil.learn([teacher.lesson])
    assert pupil.choose(Size(8, 100)).rows == 4
    assert pupil.choose(Size(40, 10)).rows == 40, "shorter rows fit as many tokens"


def test_what_failed_on_any_rank_is_not_tried_whatever_fitted_on_another() -> None:
    """One rank came down to 2 rows, the other to 4: that 4 fit there does not say that they fit here."""
    lessons = [(Size(8, 100), Size(4, 100)), (Size(4, 100), Size(2, 100))]
    for order in (lessons, lessons[::-1]):
        plan = MicroBatchPlan()
        plan.learn(order)
        assert plan.choose(Size(8, 100)).rows == 2
        assert plan.bounds.failing_tokens(100) == 400


@given(
    st.lists(
        st.tuples(st.integers(2, 64), st.integers(1, 300)).flatmap(
            lambda size: st.tuples(st.just(Size(*size)), st.integers(1, size[0] - 1).map(lambda r: Size(r, size[1])))
        ),
        min_size=1,
        max_size=4,
    )
)
def test_after_the_lessons_of_all_ranks_no_failure_is_believed_to_fit(lessons: list[tuple[Size, Size]]) -> None:
    bounds = Bounds().with_lessons(lessons)
    for failed, _ in lessons:
        assert bounds.fitting_tokens(failed.length) < failed.tokens
        fails_at = bounds.failing_tokens(failed.length)
        assert fails_at is not None
        assert fails_at <= failed.tokens


def test_the_observations_do_not_grow_without_end() -> None:
    allocator = Allocator(room=10**9)
    plan = MicroBatchPlan(meter=allocator)
    for length in range(1, 500):
        plan.choose(Size(8, length))
        plan.begin_attempt(Size(8, length))
        allocator._peak = length
        plan.note_fit(Size(8, length))
    assert len(plan.state_dict()["observed"]) == OBSERVATIONS


# -- the size of a batch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(8, 6), Size(8, 6)),
        (torch.zeros(8), Size(8, 1)),
        ((torch.zeros(8, 6), torch.zeros(8, 1)), Size(8, 6)),
        ({"input_ids": torch.zeros(4, 9), "mask": torch.zeros(4, 1, 9, 9)}, Size(4, 9)),
        ({"labels": torch.zeros(4), "pixels": torch.zeros(4, 3, 8, 8)}, Size(4, 192)),
        ({"input_ids": [[1, 2], [3, 4]], "labels": torch.zeros(2)}, Size(2, 1)),
        ({"rows": 3, "name": "no tensor"}, None),
        (torch.zeros(()), None),
        (torch.zeros(0, 5), None),
        ("text", None),
    ],
    ids=str,
)
def test_a_batch_is_measured_by_its_input_ids_or_its_largest_tensor(batch: Any, size: Size | None) -> None:
    assert splitting.size(batch) == size


def test_a_precaution_halves_what_is_run_now_at_any_length() -> None:
    plan = MicroBatchPlan()
    plan.note_fit(Size(8, 100))
    assert plan.precaution(Size(8, 100)).rows == 4
    assert plan.choose(Size(8, 100)).rows == 4
    assert plan.precaution(Size(8, 100)).rows == 2
    assert plan.choose(Size(4, 100)).rows == 2
