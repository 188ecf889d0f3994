"""What goes into a checkpoint comes back the same, or is refused by its place."""

from __future__ import annotations

import collections
import copy
import enum
import functools
import json
import pickle
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.checkpoint import decode, decoder, encode
from trainwarden.checkpoint.encoder import MAX_DEPTH
from trainwarden.errors import CheckpointError

from .states import round_trip, same, same_tensor

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
SHAPES = [(), (0,), (1,), (3,), (2, 3), (2, 0, 4), (2, 1, 3, 2)]


def bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor with every byte at random, NaNs and all."""
    count = int(np.prod(shape)) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype is torch.bool else 256
    data = torch.randint(high, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


tensors = st.builds(bits, st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(0, 99))
arrays = st.builds(
    lambda dtype, shape, seed: (
        bits(torch.uint8, (*shape, np.dtype(dtype).itemsize), seed).numpy().view(dtype).reshape(shape)
    ),
    st.sampled_from(["u1", "i2", "<u4", ">u4", "<i8", "<f2", "<f4", ">f8", "<c16", "<M8[ns]", "<m8[D]"]),
    st.sampled_from([shape for shape in SHAPES if shape]),
    st.integers(0, 99),
)
numpy_scalars = st.one_of(
    st.floats(width=32).map(np.float32), st.floats().map(np.float64), st.integers(0, 255).map(np.uint8)
) | st.sampled_from([np.bool_(True), np.int64(-(2**63)), np.datetime64("2026-01-02"), np.complex64(1j)])
any_float = st.integers(0, 2**64 - 1).map(lambda number: struct.unpack("d", struct.pack("Q", number))[0])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | any_float
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
)
keys = st.recursive(scalars, lambda children: st.lists(children, max_size=2).map(tuple), max_leaves=3)
string_keys = st.text(st.characters(exclude_categories=()), max_size=5) | st.sampled_from(
    ["$type", "a.b", "a", "__metadata__", ""]
)
leaves = (
    scalars
    | tensors
    | arrays
    | numpy_scalars
    | st.sampled_from([*DTYPES, torch.device("cpu"), torch.device("cuda:1"), Path("/data/x"), Path("y/z")])
    | st.lists(st.integers(0, 9), max_size=3).map(torch.Size)
)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mappings = st.dictionaries(string_keys, children, max_size=4) | st.dictionaries(keys, children, max_size=4)
    return (
        st.lists(children, max_size=4)
        | st.lists(children, max_size=4).map(tuple)
        | mappings
        | mappings.map(collections.OrderedDict)
        | mappings.map(lambda items: collections.defaultdict(list, items))
        | st.dictionaries(keys, st.integers(), max_size=4).map(collections.Counter)
        | st.sets(keys, max_size=4)
    )


trees = st.recursive(leaves, containers, max_leaves=12)


@given(trees)
@settings(max_examples=200, deadline=None)
def test_every_tree_comes_back_the_same_to_the_bit(tree: Any) -> None:
    before = copy.deepcopy(tree)
    assert same(round_trip(tree), before)
    assert same(tree, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dtype_and_shape_of_tensor_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = bits(dtype, shape)
    assert same_tensor(round_trip(tensor), tensor)


def test_packed_four_bit_floats_come_back() -> None:
    tensor = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert same_tensor(round_trip({"w": tensor})["w"], tensor)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[1:, ::2],
        lambda t: t[:, :1].expand(4, 5),
        lambda t: t[0, 0].expand(3, 2),
        lambda t: t.flatten()[7:],
        lambda t: torch.complex(t, t).conj(),
        lambda t: torch.complex(t, t).conj().imag,
        lambda t: t.requires_grad_() * 2,
        torch.nn.Parameter,
    ],
)
def test_a_view_comes_back_with_its_values(view: Any) -> None:
    tensor = view(torch.arange(24.0).reshape(4, 6))
    result = round_trip([tensor])[0]
    assert same_tensor(result, tensor)
    assert not result.requires_grad


def test_the_memory_order_of_a_tensor_comes_back() -> None:
    channels_last = torch.arange(120.0).reshape(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    transposed = torch.arange(6.0).reshape(2, 3).t()
    raw = torch.arange(6).to(torch.complex128).reshape(2, 3).t()
    for tensor in (channels_last, transposed, raw):
        result = round_trip(tensor)
        assert result.stride() == tensor.stride()
        assert same_tensor(result, tensor)


def test_the_file_shows_tensors_in_their_usual_order_under_their_own_names() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    tensors, _ = encode({"layer.weight": weight.t(), "state": {0: {"exp_avg": weight}}, "groups": [weight[0]]})
    assert list(tensors) == ["layer.weight", "state.0.exp_avg", "groups.0"]
    assert torch.equal(tensors["layer.weight"], weight.t())


def test_names_that_would_collide_or_are_reserved_are_told_apart() -> None:
    one, two, three, four = (torch.tensor(value) for value in range(4))
    tree = {"a": {"b": one}, "a.b": two, "__metadata__": three, "\ud800": four}
    tensors, _ = encode(tree)
    assert list(tensors) == ["a.b", "a.b#2", "__metadata__#2", "?"]
    assert same(round_trip(tree), tree)


def test_no_tensor_is_copied_by_encoding() -> None:
    weight = torch.randn(4, 4)
    tensors, _ = encode({"w": weight, "t": weight.t()})
    assert {tensor.data_ptr() for tensor in tensors.values()} == {weight.data_ptr()}


def test_tied_weights_are_stored_once_and_come_back_tied() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    tree = {"embed": weight, "head": weight.data, "other": weight.detach().clone()}
    tensors, _ = encode(tree)
    assert list(tensors) == ["embed", "other"]
    result = round_trip(tree)
    assert result["embed"] is result["head"]
    assert result["embed"].data_ptr() != result["other"].data_ptr()


def test_tied_tensors_of_rare_dtypes_and_orders_come_back_tied() -> None:
    rare = torch.zeros(2, dtype=torch.complex128)
    turned = torch.randn(3, 2).t()
    result = round_trip([rare, rare.view(2), turned, turned[:, :]])
    assert result[0] is result[1]
    assert result[2] is result[3]


def test_views_that_only_overlap_come_back_apart() -> None:
    base = torch.arange(6.0)
    conjugated = torch.complex(base, base)
    tree = [base, base[:3], base.view(2, 3), base.view(torch.int32), conjugated, conjugated.conj()]
    result = round_trip(tree)
    assert same(result, tree)
    assert len({tensor.data_ptr() for tensor in result}) == 6


def test_a_square_matrix_and_its_transpose_come_back_apart() -> None:
    square = torch.arange(4.0).reshape(2, 2)
    assert same(round_trip([square, square.t()]), [square, square.t()])


def test_empty_tensors_come_back_as_they_were_and_apart() -> None:
    tree = [torch.empty(0), torch.empty(0), torch.empty(2, 0), torch.empty(0, dtype=torch.complex128)]
    result = round_trip(tree)
    assert same(result, tree)
    assert result[0] is not result[1]


def test_a_state_dict_keeps_the_versions_of_its_modules() -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    result = round_trip(state)
    assert same(result, state)
    assert result._metadata == state._metadata
    assert result._metadata["1"]["version"] == 2


@pytest.mark.parametrize("factory", [None, int, float, list, dict, set, collections.Counter])
def test_a_default_dict_of_a_plain_type_keeps_its_default(factory: Any) -> None:
    tree = collections.defaultdict(factory, {1: [2]})
    assert round_trip(tree).default_factory is factory


def test_keys_keep_their_type_and_order() -> None:
    tree = {3: "a", "3": "b", (1, ("x", None)): "c", None: "d", 2.5: "e", b"3": "f", True: "g"}
    assert list(round_trip(tree).items()) == list(tree.items())
    assert [type(key) for key in round_trip(tree)] == [type(key) for key in tree]


@pytest.mark.parametrize(
    "number",
    [2**53, 2**53 + 1, -(2**63), 10**5000, -(10**5000)],
    ids=lambda number: f"{number.bit_length()} bits",
)
def test_integers_of_any_size_come_back_and_big_ones_are_no_json_numbers(number: int) -> None:
    _, skeleton = encode([number])
    assert (skeleton[0] == number) == (abs(number) <= 2**53)
    assert round_trip({number: number}) == {number: number}


def test_numpy_arrays_and_scalars_keep_dtype_shape_and_byte_order() -> None:
    tree = [
        np.arange(6, dtype=">u2").reshape(2, 3),
        np.array(5.5),
        np.float64("nan"),
        np.zeros((0, 3)),
        np.array(["2026-01-02"], "M8[D]"),
    ]
    tree[0].flags.writeable = False
    result = round_trip(tree)
    assert same(result, tree)
    assert result[0].flags.writeable


class Color(enum.Enum):
    RED = 1


class StringColor(enum.StrEnum):
    RED = "red"


class Point(NamedTuple):
    x: int


class Text(str):
    pass


class MoreThanADict(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"lr_lambdas": [lambda step: step]}, "state.lr_lambdas[0]: a function"),
        ({"a": {0: {"f b": len}}}, "state.a[0]['f b']: a function"),
        ([functools.partial(print)], "state[0]: an object of type functools.partial"),
        ({"kind": Color.RED}, "state.kind: an object of type "),
        ({"kind": StringColor.RED}, "state.kind: an object of type "),
        ((1, Point(2)), "state[1]: an object of type "),
        (Text("a"), "state: an object of type "),
        (MoreThanADict(), "state: an object of type "),
        (frozenset(), "state: an object of type builtins.frozenset"),
        ([int], "state[0]: the class int"),
        ({Path("a"): 1}, "state[a]: a key or set element that is an object of type pathlib."),
        ({"s": {Color.RED}}, "state.s: a key or set element that is an object of type "),
        (collections.defaultdict(lambda: 0), "state: a defaultdict whose default is a function"),
        ([np.array([object()])], "state[0]: a numpy ndarray of dtype object"),
        ([np.array(["text"])], "state[0]: a numpy ndarray of dtype <U4"),
        ([np.zeros(2, "i4,f4")], "state[0]: a numpy ndarray of dtype [('f0', '<i4'), ('f1', '<f4')]"),
        ([np.ma.zeros(2)], "state[0]: an object of type numpy.ma.MaskedArray"),
        ([torch.eye(2).to_sparse()], "state[0]: a sparse_coo tensor; store a dense one"),
        ([torch.empty(2, device="meta")], "state[0]: a meta tensor, which has no data"),
        ([torch.zeros(2, dtype=torch.uint8).view(torch.uint4)], "state[0]: a tensor of dtype uint4"),
        (
            [torch.nn.parameter.UninitializedParameter()],
            "state[0]: a tensor subclass (UninitializedParameter)",
        ),
        ([torch.Generator()], "state[0]: an object of type torch._C.Generator"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_stored_is_named_with_its_place(tree: Any, problem: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        encode(tree)
    assert str(raised.value.problem).startswith(problem)
    assert raised.value.operation == "save"


def test_the_place_begins_with_the_name_of_the_part() -> None:
    with pytest.raises(CheckpointError) as raised:
        encode({"lambdas": [print]}, place="scheduler", path=Path("run/checkpoints/step-00000001"))
    assert raised.value.problem == "scheduler.lambdas[0]: a function"
    assert "run/checkpoints/step-00000001" in str(raised.value)


def test_a_quantized_tensor_is_refused() -> None:
    with pytest.warns(UserWarning, match="quantize"):
        tensor = torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)
    with pytest.raises(CheckpointError, match="a quantized tensor"):
        encode(tensor)


def test_a_container_that_holds_itself_is_refused() -> None:
    loop: dict[str, Any] = {"a": [1]}
    loop["a"].append(loop)
    with pytest.raises(CheckpointError, match=r"state\.a\[1\]: a container that holds itself"):
        encode(loop)


def test_the_same_container_twice_side_by_side_is_no_loop() -> None:
    shared = [1]
    assert round_trip([shared, shared]) == [[1], [1]]


def nested(depth: int) -> Any:
    tree: Any = float("nan")  # the leaf that is an object in the skeleton
    for level in range(depth):
        tree = [tree] if level % 2 else {1: tree}
    return tree


def test_trees_up_to_the_stated_depth_come_back_and_deeper_ones_are_refused() -> None:
    assert same(round_trip(nested(MAX_DEPTH)), nested(MAX_DEPTH))
    with pytest.raises(CheckpointError, match="nested more than 100 levels deep"):
        encode(nested(MAX_DEPTH + 1))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=8,
)
FIELDS = [
    "hex",
    "bits",
    "base64",
    "value",
    "items",
    "metadata",
    "factory",
    "name",
    "order",
    "dtype",
    "shape",
    "bytes",
]
TAGS = [*decoder._SCALARS, *decoder._CONTAINERS]
forged = st.recursive(
    json_values,
    lambda children: (
        st.builds(
            lambda tag, fields: fields | {"$type": tag},
            st.sampled_from([*TAGS, "object", "__reduce__"]) | json_values,
            st.dictionaries(
                st.sampled_from(FIELDS),
                children
                | st.sampled_from(["w", "raw", "os", "system", "O", "V9", "<f8", "i4,i4", "complex128", "list", "zz"]),
            ),
        )
        | st.lists(children, max_size=4)
    ),
    max_leaves=10,
)


@given(forged)
@settings(max_examples=200, deadline=None)
def test_a_forged_skeleton_is_decoded_to_data_or_refused(skeleton: Any) -> None:
    available = {"w": torch.zeros(2, 3), "raw": torch.zeros(16, dtype=torch.uint8)}
    with suppress(CheckpointError):
        decode(available, skeleton)


@pytest.mark.parametrize(
    "skeleton",
    [
        {"$type": "dtype", "value": "ops"},
        {"$type": "defaultdict", "factory": "eval", "items": []},
        {"$type": "numpy", "dtype": "O", "bytes": "00" * 8},
        {"$type": "object", "class": "os.system"},
        {"$type": ["tuple"], "items": []},
        {"$type": "set", "items": [[1]]},
        {"$type": "tensor", "name": "absent"},
        functools.reduce(lambda inner, _: [inner], range(MAX_DEPTH + 2), []),
    ],
    ids=str,
)
def test_a_skeleton_can_name_nothing_but_data(skeleton: Any) -> None:
    with pytest.raises(CheckpointError, match="malformed"):
        decode({}, skeleton)


def test_no_pickle_is_written() -> None:
    tensors, skeleton = encode({"a": torch.zeros(2), 1: (b"x", {3})})
    text = json.dumps(skeleton).encode()
    with pytest.raises((pickle.UnpicklingError, ValueError, IndexError, KeyError)):
        pickle.loads(text)
    assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
