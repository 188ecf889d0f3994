"""Real peft models: trained tasks are merged in a campaign, and plain peft loads what comes out."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from trainwarden import slao
from trainwarden.errors import PeftAPIError, SLAOMergeDivergedError, SLAOMergeError
from trainwarden.slao.factors import Kind, keys_of

from . import reference
from .adapters import same

TOKENS = torch.arange(12).reshape(2, 6) % 64

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank above the width": {"r": 24},
    "ranks by pattern": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 4}},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "a whole layer": {"modules_to_save": ["lm_head"]},
    "biases of B": {"lora_bias": True},
}


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(7)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64, max_position_embeddings=32))


def adapted(base: LlamaForCausalLM, **variant: Any) -> PeftModel:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **variant}
    return get_peft_model(copy.deepcopy(base), LoraConfig(**config))


def train(model: PeftModel, seed: int) -> None:
    torch.manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    rows = torch.randint(64, (4, 8))
    for _ in range(3):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float()


def campaign(store: slao.SlaoStore, model: PeftModel, tasks: int = 3, **policy: Any) -> list[dict[str, torch.Tensor]]:
    """Train, merge and go on as `warden slao run` would; what each task has trained."""
    trained = []
    for task in range(tasks):
        start = slao.next_start(store, model)
        train(model, seed=task)
        trained.append({k: v.clone() for k, v in slao.adapter_of(model).tensors.items()})
        slao.merge_trained(store, model, slao.MergePolicy(**policy), source=f"task-{task}", start=start)
    return trained


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*", "ignore:.*have invalid shape.*")  # peft's, about biases
def test_a_campaign_is_the_papers_and_plain_peft_loads_its_merged_adapter(
    tmp_path: Path, base: LlamaForCausalLM, variant: str
) -> None:
    store, model = slao.SlaoStore(tmp_path / "m"), adapted(base, **VARIANTS[variant])
    trained = campaign(store, model)
    snapshot = store.current()
    assert snapshot is not None
    assert reference.distance(snapshot.merged, reference.merged(map(reference.arrays, trained))) < 1e-6
    assert [record.recorded_lineage for record in snapshot.history] == [False, True, True]
    slao.install(model, snapshot.exported())
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "m"))
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), base.eval()(input_ids=TOKENS).logits, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_sixteen_bits(tmp_path: Path, base: LlamaForCausalLM, dtype: torch.dtype) -> None:
    store = slao.SlaoStore(tmp_path / "m")
    model = get_peft_model(
        copy.deepcopy(base).to(dtype),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    )
    for seed in range(3):
        torch.manual_seed(seed)
        slao.next_start(store, model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.02
        slao.merge_trained(store, model)
    snapshot = store.current()
    assert snapshot is not None
    assert set(snapshot.dtypes.values()) == {dtype}
    loaded = PeftModel.from_pretrained(copy.deepcopy(base).to(dtype), str(store.path), autocast_adapter_dtype=False)
    slao.install(model, snapshot.exported())
    assert torch.equal(logits(loaded), logits(model))
    saved = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert same({k: v.detach() for k, v in saved.items()}, snapshot.exported())


def test_the_next_task_starts_orthonormal_and_from_what_was_trained(tmp_path: Path, base: LlamaForCausalLM) -> None:
    store, model = slao.SlaoStore(tmp_path / "m"), adapted(base)
    assert slao.next_start(store, model) is None  # the first task starts as peft makes it
    trained = campaign(store, model, tasks=2)
    start = slao.next_start(store, model)
    assert start is not None
    assert start.index == 3
    here = slao.adapter_of(model).tensors
    assert reference.distance(here, reference.start(reference.arrays(trained[-1]))) < 1e-5
    for key in keys_of(Kind.A, here):
        assert torch.allclose(here[key] @ here[key].T, torch.eye(4), atol=1e-5)


def test_one_of_several_adapters_is_merged_and_the_others_are_left_alone(
    tmp_path: Path, base: LlamaForCausalLM
) -> None:
    model = adapted(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for name in ("other", "default_2"):  # a name that begins as another one does
        model.add_adapter(name, config)
    before = {k: v.clone() for k, v in slao.adapter_of(model, "other").tensors.items()}
    store = slao.SlaoStore(tmp_path / "m")
    for seed in (1, 2):
        slao.next_start(store, model, adapter_name="default")
        train(model, seed)
        slao.merge_trained(store, model, adapter_name="default")
    assert same(slao.adapter_of(model, "other").tensors, before)
    snapshot = store.current()
    assert snapshot is not None
    assert all(".other." not in key and "default" not in key for key in snapshot.merged)
    assert {value.shape[0] for key, value in snapshot.merged.items() if "lora_A" in key} == {4}


@pytest.mark.parametrize("mode", ["average", "ties", "dare"])
def test_every_mode_gives_an_adapter_that_loads(tmp_path: Path, base: LlamaForCausalLM, mode: str) -> None:
    store, model = slao.SlaoStore(tmp_path / "m"), adapted(base)
    campaign(store, model, tasks=2, mode=mode)
    snapshot = store.current()
    assert snapshot is not None
    slao.install(model, snapshot.exported())
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(store.path))
    assert torch.equal(logits(loaded), logits(model))


def test_what_a_live_model_holds_is_what_its_saved_directory_holds(tmp_path: Path, base: LlamaForCausalLM) -> None:
    model = adapted(base)
    train(model, 1)
    model.save_pretrained(tmp_path / "a")
    live, read = slao.adapter_of(model), slao.read_adapter(tmp_path / "a")
    assert same(live.tensors, read.tensors)
    assert live.digest() == read.digest()
    assert {k: v for k, v in live.config.items() if k != "base_model_name_or_path"} == {
        k: v for k, v in read.config.items() if k != "base_model_name_or_path"
    }


def test_reading_a_model_copies_it(base: LlamaForCausalLM) -> None:
    model = adapted(base)
    taken = slao.adapter_of(model).tensors
    for value in taken.values():
        value.fill_(9.0)
    assert not any((parameter == 9.0).all() for name, parameter in model.named_parameters() if "lora_" in name)


def test_a_lineage_noted_beside_a_saved_adapter_is_found_again(tmp_path: Path, base: LlamaForCausalLM) -> None:
    store, model = slao.SlaoStore(tmp_path / "m"), adapted(base)
    for task in range(2):
        start = slao.next_start(store, model)
        train(model, task)
        model.save_pretrained(tmp_path / f"task-{task}")
        slao.record_lineage(tmp_path / f"task-{task}", start)
        slao.merge_trained(store, tmp_path / f"task-{task}")
    assert store.history()[-1].recorded_lineage
    assert slao.propose(store, tmp_path / "task-1").notes != ()  # started from task-0, and task-1 is the newest now


def test_a_task_that_diverged_leaves_the_accumulator_to_start_again_from(
    tmp_path: Path, base: LlamaForCausalLM
) -> None:
    store, model = slao.SlaoStore(tmp_path / "m"), adapted(base)
    campaign(store, model, tasks=2)
    good = store.current()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(SLAOMergeDivergedError):
        slao.merge_trained(store, model)
    after = store.current()
    assert good is not None
    assert after is not None
    assert same(after.merged, good.merged)
    assert slao.next_start(store, model) is not None  # the model is good again
    assert all(value.isfinite().all() for value in slao.adapter_of(model).tensors.values())


def test_a_model_of_another_shape_is_refused_and_left_alone(tmp_path: Path, base: LlamaForCausalLM) -> None:
    store = slao.SlaoStore(tmp_path / "m")
    campaign(store, adapted(base), tasks=1)
    for variant, said in (
        ({"r": 8}, "r is 8, and 4"),
        ({"lora_alpha": 99}, "lora_alpha is 99"),
        ({"target_modules": ["q_proj"]}, "the model differs from it in 4 tensors"),
    ):
        model = adapted(base, **variant)
        before = {k: v.clone() for k, v in slao.adapter_of(model).tensors.items()}
        with pytest.raises(SLAOMergeError, match=said):
            slao.next_start(store, model)
        assert same(slao.adapter_of(model).tensors, before)


def test_a_model_without_adapters_is_said_to_have_none(base: LlamaForCausalLM) -> None:
    """Not by its methods: a transformers model has `get_adapter_state_dict` too, for adapters of its own."""
    with pytest.raises(SLAOMergeError, match="LlamaForCausalLM is not a peft model"):
        slao.adapter_of(base)
    with pytest.raises(SLAOMergeError, match="the model has no such adapter; it has default"):
        slao.adapter_of(adapted(base), "other")


def test_another_kind_of_adapter_is_refused(base: LlamaForCausalLM) -> None:
    model = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(SLAOMergeError, match="only LORA can be merged"):
        slao.adapter_of(model)


def test_a_peft_without_what_is_needed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.utils.merge_utils", types.ModuleType("peft.utils.merge_utils"))
    state = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(3, 2)}
    with pytest.raises(PeftAPIError, match=r"peft [0-9.]+ does not offer peft.utils.merge_utils.prune"):
        slao.merge(state, state, 2, slao.MergePolicy(mode="ties"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PeftAPIError, match="does not offer"):
        slao.adapter_of(torch.nn.Linear(2, 2))
    assert slao.merge(state, state, 2).index == 2  # merging directories needs no peft
