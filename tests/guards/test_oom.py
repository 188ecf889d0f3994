"""What counts as out of memory, what its message tells, and how many rows come next."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainwarden import is_out_of_memory
from trainwarden.guards.oom import MemoryFailure, OOMPolicy, part_sizes
from trainwarden.testing import out_of_memory_error

OUT_OF_MEMORY = [
    out_of_memory_error(),
    torch.OutOfMemoryError(),
    MemoryError(),
    MemoryError("Unable to allocate 4.00 GiB for an array with shape (1073741824,) and data type float32"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'", 2),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("XPU out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 1.00 KB)"),
    RuntimeError("NCCL Error 1: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.hpp:275, unhandled cuda error, NCCL version 2.20.5\nncclUnhandledCudaError: Call to "
        "CUDA function failed.\nLast error:\nCuda failure 'out of memory'"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:82] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8."
    ),
    RuntimeError("std::bad_alloc"),
]

SOMETHING_ELSE = [
    RuntimeError("the queue of prefetched batches ran out of memory."),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x6 and 5x16)"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 1 'invalid argument'"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    RuntimeError("can't start new thread"),
    RuntimeError("worker said: CUDA out of memory is not what happened"),
    RuntimeError("PYTORCH_CUDA_ALLOC_CONF: unrecognised option expandable_segment"),
    ValueError("CUDA out of memory"),
    OSError(28, "No space left on device"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: f"{type(e).__name__}: {str(e)[:40]}")
def test_every_known_allocator_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", SOMETHING_ELSE, ids=lambda e: f"{type(e).__name__}: {str(e)[:40]}")
def test_nothing_else_is_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_the_real_cpu_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert MemoryFailure.from_exception(caught.value).requested_bytes == 2**46


def test_a_cuda_message_tells_what_was_asked_for_and_what_was_free() -> None:
    failure = MemoryFailure.from_exception(out_of_memory_error(3 * 2**30, 512 * 2**20))
    assert (failure.requested_bytes, failure.free_bytes) == (3 * 2**30, 512 * 2**20)
    assert failure.text.startswith("CUDA out of memory")


def test_a_cuda_message_tells_what_the_allocator_held_without_using_it() -> None:
    text = (
        "CUDA out of memory. Tried to allocate 19.68 GiB. GPU 0 has a total capacity of 23.68 GiB of which 11.88 GiB "
        "is free. Including non-PyTorch memory, this process has 11.79 GiB memory in use. Of the allocated memory "
        "11.44 GiB is allocated by PyTorch, and 43.59 MiB is reserved by PyTorch but unallocated."
    )
    failure = MemoryFailure.from_exception(torch.OutOfMemoryError(text))
    assert failure.requested_bytes == int(19.68 * 2**30)
    assert failure.free_bytes == int(11.88 * 2**30)
    assert failure.unused_bytes == int(43.59 * 2**20)


@given(st.text())
def test_any_message_yields_a_failure_and_unknown_sizes_stay_unknown(text: str) -> None:
    failure = MemoryFailure.from_exception(MemoryError(text))
    assert failure.text
    assert "allocate" in text or failure.requested_bytes is None


@given(rows=st.integers(1, 300), limit=st.integers(1, 300), used=st.sets(st.integers(1, 300)))
def test_parts_cover_all_rows_stay_under_the_limit_and_have_at_most_two_sizes(
    rows: int, limit: int, used: set[int]
) -> None:
    sizes = part_sizes(rows, limit, used)
    assert sum(sizes) == rows
    assert max(sizes) <= limit
    assert len(set(sizes)) <= 2
    assert len(sizes) == -(-rows // limit)


@given(rows=st.integers(1, 300), limit=st.integers(1, 300))
def test_without_a_past_parts_are_nearly_equal(rows: int, limit: int) -> None:
    sizes = part_sizes(rows, limit)
    assert max(sizes) - min(sizes) <= 1 or len(set(sizes)) == 1 or rows % limit == 0


def test_sizes_already_used_are_preferred_so_that_compiled_models_do_not_recompile() -> None:
    assert part_sizes(8, 3) == (3, 3, 2)
    assert part_sizes(10, 4) == (4, 3, 3)
    assert part_sizes(10, 4, used={4, 2}) == (4, 4, 2)


@pytest.mark.parametrize(("rows", "limit"), [(0, 1), (1, 0), (-1, 3)])
def test_impossible_parts_are_a_programming_error(rows: int, limit: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        part_sizes(rows, limit)


@given(failed=st.integers(1, 10_000), shrinks=st.integers(0, 10), most=st.integers(0, 8), enabled=st.booleans())
def test_a_shrink_is_allowed_down_to_one_row_within_the_budget(
    failed: int, shrinks: int, most: int, enabled: bool
) -> None:
    assert OOMPolicy(enabled, most).may_shrink(failed, shrinks) is (enabled and failed > 1 and shrinks < most)
