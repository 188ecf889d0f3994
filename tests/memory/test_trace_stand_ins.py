"""Stand-ins allocate what bitsandbytes' layers and optimizers allocate, by its documented rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from trainwarden.errors import InvalidSettingError
from trainwarden.memory.trace import TrainingLoop, trace
from trainwarden.memory.trace_attention import causal_attention
from trainwarden.memory.trace_optimizers import AdamW8bit, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit
from trainwarden.memory.trace_packed import PackedLinear, pack_linears

WIDTH = 512
ELEMENTS = WIDTH * WIDTH
TABLES = 2 * 256 * 4


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, bias=False)


def states(make: Any, build: Any = linear) -> tuple[int, int]:
    """Bytes of states on the device, and in host memory."""
    found = trace(build, torch.zeros(1, WIDTH), TrainingLoop(make_optimizer=make), device_type="cpu")
    return found.breakdown["optimizer_states"], found.host_bytes


def test_8_bit_states_are_a_byte_and_a_scale_for_256() -> None:
    moments = 2 * (ELEMENTS + ELEMENTS // 256 * 4)
    assert states(adamw_8bit) == (moments + TABLES, 0)


def test_lion_has_one_moment() -> None:
    one = ELEMENTS + ELEMENTS // 256 * 4 + TABLES // 2
    assert states(lambda p: AdamW8bit(p, moments=1)) == (one, 0)


def test_small_tensors_keep_their_states_in_float32() -> None:
    device, _ = states(adamw_8bit, lambda: nn.Linear(WIDTH, 4, bias=False))
    assert device == 2 * 4 * WIDTH * 4


def test_paged_states_are_host_memory_if_they_are_large() -> None:
    assert states(paged_adamw_8bit) == (2 * ELEMENTS // 256 * 4 + TABLES, 2 * ELEMENTS)
    assert states(paged_adamw_32bit) == (0, 8 * ELEMENTS)
    small, none = states(paged_adamw_32bit, lambda: nn.Linear(WIDTH, 8, bias=False))
    assert (small, none) == (8 * WIDTH * 8, 0)


def test_the_update_needs_no_temporary() -> None:
    found = trace(linear, torch.zeros(1, WIDTH), TrainingLoop(make_optimizer=adamw_8bit), device_type="cpu")
    resting = found.breakdown["weights"] + found.breakdown["gradients"] + found.breakdown["optimizer_states"]
    assert found.phases["optimizer"] == pytest.approx(resting, rel=0.01)


@pytest.mark.parametrize("settings", [{"bits": 4}, {"moments": 3}])
def test_other_states_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(InvalidSettingError, match="bits are 8 or 32"):
        AdamW8bit([nn.Parameter(torch.zeros(1))], **settings)


def test_parameters_without_gradients_get_no_states() -> None:
    optimizer = AdamW8bit([nn.Parameter(torch.zeros(1))])
    optimizer.step()
    assert not optimizer.state


# -- packed layers ----------------------------------------------------------------------------------------------------


def packed(double_quant: bool = True, **options: Any) -> nn.Module:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH, bias=False), "lm_head": nn.Linear(WIDTH, 10)})
    return pack_linears(model, double_quant=double_quant, **options)


def tensors(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def test_four_bits_and_their_scales() -> None:
    scales = ELEMENTS // 64
    assert tensors(packed()["a"]) == ELEMENTS // 2 + scales + scales // 256 * 4 + 4 * (16 + 256 + 1)
    assert tensors(packed(double_quant=False)["a"]) == ELEMENTS // 2 + 4 * scales + 4 * 16


def test_the_head_stays_and_everything_is_frozen() -> None:
    model = packed()
    assert type(model["a"]) is PackedLinear
    assert type(model["lm_head"]) is nn.Linear
    assert not any(p.requires_grad for p in model.parameters())
    assert type(packed(skip=())["lm_head"]) is PackedLinear


def test_biases_are_kept_in_the_compute_type() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    assert pack_linears(model)[0].bias.dtype is torch.bfloat16


class Between(nn.Module):
    """A trained layer, a packed one, a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
        self.packed = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16))
        pack_linears(self.packed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(self.before(x)).float().mean()


def test_the_whole_weight_is_there_during_the_product_and_not_between() -> None:
    found = trace(Between, torch.zeros(1, WIDTH, dtype=torch.bfloat16), TrainingLoop(), device_type="cpu")
    whole = ELEMENTS * 2
    resting = found.phases["load"]
    states_and_gradient = 2 * whole + whole
    assert found.phases["backward"] >= resting + 2 * whole + whole
    assert found.phases["optimizer"] < resting + states_and_gradient + 2 * whole + 64
    assert found.breakdown["weights"] < whole + 0.6 * ELEMENTS


def test_the_gradient_passes_through_a_packed_layer() -> None:
    found = trace(Between, torch.zeros(1, WIDTH, dtype=torch.bfloat16), TrainingLoop(), device_type="cpu")
    assert found.breakdown["optimizer_states"] == pytest.approx(2 * 2 * ELEMENTS, rel=0.001)


# -- attention --------------------------------------------------------------------------------------------------------


def qkv(heads: int, kv_heads: int, length: int = 8) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, n, length, 4) for n in (heads, kv_heads, kv_heads))


def test_attention_is_causal_and_turned_back() -> None:
    q, k, v = qkv(4, 4)
    out, weights = causal_attention(nn.Module(), q, k, v, None)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert weights is None


def test_fewer_heads_of_keys_are_shared() -> None:
    q, k, v = qkv(4, 2)
    out, _ = causal_attention(nn.Module(), q, k, v, None, scaling=0.3)
    again, _ = causal_attention(nn.Module(), q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), None, scaling=0.3)
    torch.testing.assert_close(out, again)


def test_a_module_that_is_not_causal_looks_both_ways() -> None:
    q, k, v = qkv(4, 4)
    module = nn.Module()
    module.is_causal = False
    out, _ = causal_attention(module, q, k, v, None)
    torch.testing.assert_close(out, functional.scaled_dot_product_attention(q, k, v).transpose(1, 2))


def test_a_mask_is_used_if_there_is_one() -> None:
    q, k, v = qkv(4, 4)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[..., 0] = True
    out, _ = causal_attention(nn.Module(), q, k, v, mask)
    torch.testing.assert_close(out, v[:, :, :1].expand_as(v).transpose(1, 2))
