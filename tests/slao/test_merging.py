"""The merge is the paper's, computed into a new state, and does not let pass what is not finite."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import prune
from peft.utils.merge_utils import ties as peft_ties

from trainwarden import slao
from trainwarden.errors import InvalidSettingError, SLAOMergeDivergedError, SLAOMergeError
from trainwarden.slao.factors import Kind, kind_of

from . import reference
from .adapters import PREFIX, same, state

A = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
B = f"{PREFIX}.1.self_attn.v_proj.lora_B.weight"
HEAD = "base_model.model.lm_head.weight"


def merged_of(states: list[dict[str, torch.Tensor]], policy: slao.MergePolicy | None = None) -> slao.MergeResult:
    result = slao.begin(states[0])
    for index, one in enumerate(states[1:], start=2):
        result = slao.merge(result.tensors, one, index, policy)
    return result


@settings(deadline=None, max_examples=25, print_blob=True)
@given(
    seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rank=st.integers(1, 10),
    dora=st.booleans(),
)
def test_it_agrees_with_the_float64_reference(seeds: list[int], dtype: torch.dtype, rank: int, dora: bool) -> None:
    states = [state(seed, rank=rank, dtype=dtype, dora=dora) for seed in seeds]
    result = merged_of(states)
    assert reference.distance(result.tensors, reference.merged(map(reference.arrays, states))) < 1e-6
    assert result.index == len(seeds)


def test_it_still_agrees_after_64_merges() -> None:
    states = [state(seed) for seed in range(64)]
    distance = reference.distance(merged_of(states).tensors, reference.merged(map(reference.arrays, states)))
    assert distance < 1e-6
    print(f"64 merges: {distance:.1e} from the float64 reference")


@pytest.mark.parametrize("schedule", ["inverse", "inverse_log", "constant"])
def test_every_schedule_agrees_with_the_reference(schedule: str) -> None:
    weights = {
        "inverse": lambda i: 1 / i,
        "inverse_log": lambda i: min(1, 1 / math.log(i + 1)),
        "constant": lambda i: 0.3,
    }
    states = [state(seed) for seed in range(6)]
    result = merged_of(states, slao.MergePolicy(schedule=schedule, constant=0.3))  # type: ignore[arg-type]
    expected = reference.merged(map(reference.arrays, states), weights[schedule])
    assert reference.distance(result.tensors, expected) < 1e-6


@pytest.mark.parametrize("mode", slao.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_input_is_changed_and_no_memory_is_shared(mode: slao.policy.Mode, dtype: torch.dtype) -> None:
    accumulator, adapter = slao.begin(state(1)).tensors, state(2, dtype=dtype, dora=False)
    copies = [{key: value.clone() for key, value in one.items()} for one in (accumulator, adapter)]
    result = slao.merge(accumulator, adapter, 2, slao.MergePolicy(mode=mode, density=1.0))
    for tensor in result.tensors.values():
        tensor.fill_(7.0)
    assert same(accumulator, copies[0])
    assert same(adapter, copies[1])


def test_the_start_shares_no_memory_with_its_adapter() -> None:
    adapter = state(1)
    slao.begin(adapter).tensors[A].fill_(7.0)
    assert same(adapter, state(1))


def test_parameters_that_require_gradients_are_merged_out_of_any_graph() -> None:
    live = {key: torch.nn.Parameter(value) for key, value in state(2).items()}
    result = slao.merge(slao.begin(state(1)).tensors, live, 2)
    assert not any(tensor.requires_grad for tensor in result.tensors.values())


def test_a_is_replaced_and_what_is_saved_whole_moves_as_b_does() -> None:
    first, second = ({**state(seed), HEAD: torch.full((2, 2), float(seed))} for seed in (1, 2))
    result = slao.merge(slao.begin(first).tensors, second, 2, slao.MergePolicy(schedule="inverse"))
    assert torch.equal(result.tensors[A], second[A])
    assert torch.equal(result.tensors[B], torch.lerp(first[B], second[B], 0.5))
    assert torch.equal(result.tensors[HEAD], torch.full((2, 2), 1.5))


def test_with_a_weight_of_one_the_newest_adapter_stands_for_all() -> None:
    policy = slao.MergePolicy(schedule="constant", constant=1.0)
    assert same(merged_of([state(1), state(2), state(3)], policy).tensors, state(3))


def test_an_average_with_one_over_i_is_the_mean_of_all() -> None:
    states = [state(seed) for seed in range(5)]
    result = merged_of(states, slao.MergePolicy(mode="average", schedule="inverse"))
    mean = {key: torch.stack([one[key].double() for one in states]).mean(0).numpy() for key in states[0]}
    assert reference.distance(result.tensors, mean) < 1e-6


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_with_equal_weights_is_what_peft_does(density: float) -> None:
    one, two = slao.begin(state(1)).tensors, state(2)
    result = slao.merge(one, two, 2, slao.MergePolicy(mode="ties", schedule="inverse", density=density))
    for key in one:
        assert torch.allclose(result.tensors[key], peft_ties([one[key], two[key]], torch.ones(2), density), atol=1e-6)


def test_ties_with_other_weights_scales_no_value_that_is_left_alone() -> None:
    """A sum of weighted values divided by their number, as peft has it, would grow at every merge."""
    accumulator = {A: torch.ones(1, 4), A.replace("_A", "_B"): torch.tensor([[1.0], [-1.0], [2.0], [0.0]])}
    adapter = {A: torch.ones(1, 4), A.replace("_A", "_B"): torch.tensor([[-0.1], [0.2], [4.0], [0.0]])}
    policy = slao.MergePolicy(mode="ties", schedule="constant", constant=0.25, density=1.0)
    result = slao.merge(accumulator, adapter, 2, policy)
    assert result.tensors[A.replace("_A", "_B")].flatten().tolist() == pytest.approx([1.0, -1.0, 2.5, 0.0])


def test_dare_thins_the_new_adapter_only() -> None:
    accumulator = slao.begin(state(1)).tensors
    policy = slao.MergePolicy(mode="dare", schedule="inverse", density=0.5, seed=4)
    result = slao.merge(accumulator, state(2), 2, policy).tensors
    moved = [(result[key] - accumulator[key] * 0.5) * 2 for key in accumulator]  # what was averaged in
    for found, key in zip(moved, accumulator, strict=True):
        kept = found.abs() > 1e-6
        assert torch.allclose(found[kept], state(2)[key][kept] * 2, atol=1e-5)
    assert 0.2 < torch.cat([(m.abs() > 1e-6).flatten().float() for m in moved]).mean() < 0.8


def test_dare_is_decided_by_its_seed_and_touches_no_generator() -> None:
    accumulator, before = slao.begin(state(1)).tensors, torch.get_rng_state()
    results = [slao.merge(accumulator, state(2), 2, slao.MergePolicy(mode="dare", seed=s)).tensors for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("mode", ["ties", "dare"])
def test_magnitudes_and_whole_layers_are_never_pruned(mode: str) -> None:
    first, second = ({**state(seed, dora=True), HEAD: torch.randn(4, 4)} for seed in (1, 2))
    result = slao.merge(slao.begin(first).tensors, second, 2, slao.MergePolicy(mode=mode, density=0.1))  # type: ignore[arg-type]
    for key in first:
        if kind_of(key) in (Kind.MAGNITUDE, Kind.WHOLE):
            assert torch.equal(result.tensors[key], torch.lerp(first[key], second[key], 1 / math.sqrt(2)))


@pytest.mark.parametrize("mode", ["ties", "dare"])
def test_a_density_of_one_prunes_nothing(mode: str) -> None:
    result = merged_of([state(1), state(2)], slao.MergePolicy(mode=mode, density=1.0))  # type: ignore[arg-type]
    assert all(torch.count_nonzero(tensor) == tensor.numel() for tensor in result.tensors.values())


def test_peft_prunes_as_the_modes_expect() -> None:
    """What the modes build on, stated here because it is not ours."""
    values = torch.tensor([1.0, -3.0, 2.0, 0.5])
    assert prune(values, 0.5, method="magnitude").tolist() == [0, -3, 2, 0]
    assert {abs(v) for v in prune(values, 0.5, method="random", rescale=True).tolist()} <= {0, 2, 6, 4, 1}


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=["NaN", "+Inf", "-Inf"])
@pytest.mark.parametrize("key", [A, B])
def test_a_value_that_is_not_finite_is_named(key: str, poison: float) -> None:
    word = {math.inf: "+Inf", -math.inf: "-Inf"}.get(poison, "NaN")
    accumulator, adapter = slao.begin(state(1)).tensors, state(2)
    adapter[key][1, 2] = poison
    with pytest.raises(SLAOMergeDivergedError) as raised:
        slao.merge(accumulator, adapter, 2, source="task-2")
    assert raised.value.layer == key.removeprefix("base_model.model.model.")
    assert raised.value.problem == f"the adapter holds {word}"
    assert (raised.value.run_index, raised.value.adapter) == (2, "task-2")
    with pytest.raises(SLAOMergeDivergedError, match="merge 1, of adapter"):
        slao.begin(adapter)


def test_an_accumulator_that_is_not_finite_is_told_apart() -> None:
    accumulator = slao.begin(state(1)).tensors
    accumulator[B][0, 0] = math.nan
    with pytest.raises(SLAOMergeDivergedError, match="the accumulator holds NaN"):
        slao.merge(accumulator, state(2), 2)


def test_large_finite_values_are_no_alarm() -> None:
    huge = {key: value * 1e25 for key, value in state(1).items()}  # their squares overflow float32
    result = merged_of([huge, {key: value * 1e25 for key, value in state(2).items()}])
    assert all(math.isfinite(norm.after) and norm.after > 1e24 for norm in result.norms)


def test_a_result_that_overflows_is_discarded() -> None:
    accumulator, adapter = slao.begin(state(1)).tensors, state(2)
    accumulator[B][0, 0], adapter[B][0, 0] = 3e38, -3e38  # their difference is not finite
    with pytest.raises(SLAOMergeDivergedError, match="the result is not finite"):
        slao.merge(accumulator, adapter, 2)


def test_a_result_that_does_not_fit_its_dtype_is_discarded() -> None:
    """Thinning scales what it keeps: float16 ends at 65504."""
    states = [{key: value * 4e4 / value.abs().max() for key, value in state(s).items()} for s in (1, 2)]
    half = [{key: value.half() for key, value in one.items()} for one in states]
    policy = slao.MergePolicy(mode="dare", schedule="constant", constant=1.0, density=0.3)
    with pytest.raises(SLAOMergeDivergedError, match="does not fit into float16"):
        merged_of(half, policy)
    assert merged_of(states, policy).index == 2


def test_weights_that_explode_without_becoming_infinite_have_diverged() -> None:
    accumulator, adapter = slao.begin(state(1)).tensors, state(2)
    adapter[B] *= 1000
    with pytest.raises(SLAOMergeDivergedError, match="its norm would grow from") as raised:
        slao.merge(accumulator, adapter, 2)
    norms = raised.value.norms
    assert norms["after"] > norms["limit"] > norms["before"]
    assert slao.merge(accumulator, adapter, 2, slao.MergePolicy(max_norm_growth=1e6)).index == 2


def test_an_accumulator_is_float32() -> None:
    with pytest.raises(SLAOMergeError, match="is bfloat16, and an accumulator is float32"):
        slao.merge(state(1, dtype=torch.bfloat16), state(2), 2)


def test_the_first_merge_is_number_two() -> None:
    with pytest.raises(InvalidSettingError, match="at least 2"):
        slao.merge(state(1), state(2), 1)


def test_norms_of_near_orthogonal_tasks_shrink_and_that_is_no_divergence() -> None:
    after = [slao.begin(state(0)).norms[1].after]
    accumulator = slao.begin(state(0))
    for index in range(2, 20):
        accumulator = slao.merge(accumulator.tensors, state(index), index)
        after.append(accumulator.norms[1].after)
    assert min(after) < 0.7 * after[0]
    assert all(math.isfinite(a) for pair in pairwise(after) for a in pair)
