"""Generated adapters: states, directories as peft writes them, and what it means for things to be unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainwarden import slao

PREFIX = "base_model.model.model.layers"
CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": 3,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj"],
}


def state(
    seed: int = 0, *, rank: int = 3, layers: int = 2, dtype: torch.dtype = torch.float32, dora: bool = False
) -> dict[str, Tensor]:
    """The adapter that a task with this seed has trained."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {}
    for layer in range(layers):
        for name, width_in, width_out in (("q_proj", 8, 6), ("v_proj", 5, 7)):
            key = f"{PREFIX}.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = random(rank, width_in)
            tensors[f"{key}.lora_B.weight"] = random(width_out, rank)
            if dora:
                tensors[f"{key}.lora_magnitude_vector"] = random(width_out).abs()
    return tensors


def adapter(seed: int = 0, *, source: str = "", started_from: str | None = None, **options: Any) -> slao.Adapter:
    """The same as an `Adapter`."""
    config = {**CONFIG, "r": options.get("rank", 3), "use_dora": options.get("dora", False)}
    return slao.Adapter(state(seed, **options), config, source or f"task-{seed}", started_from)


def saved(directory: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A directory as peft's `save_pretrained` writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(dict(tensors), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def store_with(path: Path, *seeds: int, **options: Any) -> slao.SlaoStore:
    """A store into which the adapters of these seeds were merged."""
    store = slao.SlaoStore(path)
    for seed in seeds:
        slao.merge_trained(store, adapter(seed, **options))
    return store


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states are equal in names, dtypes, shapes and every bit."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype
        and one[key].shape == other[key].shape
        and one[key].contiguous().view(torch.uint8).equal(other[key].contiguous().view(torch.uint8))
        for key in one
    )


def fingerprint(directory: Path) -> dict[str, tuple[int, str]]:
    """Every file below a directory: when it was written, and what is in it."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
