"""The flat buffer: there and back for any layout; digests that any change of what they cover changes."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from cluster.flat import FlatSpec, Tensors, tensors_digest, update_digest

NAMES = st.text("abcxyz._0123456789", min_size=1, max_size=8)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64])
GROUPS = ("theta", "state", "optimizer")


def filled(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


LAYOUTS = st.dictionaries(NAMES, SHAPES, max_size=6)


# -------------------------------------------------------------------------------------------------------------- layout


@given(shapes=LAYOUTS, dtype=DTYPES)
def test_flatten_and_unflatten_are_inverse(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    tensors = filled(shapes, dtype)
    spec = FlatSpec.of(tensors)
    flat = spec.flatten(tensors)
    assert flat.shape == (spec.size,) == (sum(math.prod(shape) for shape in shapes.values()),)
    back = spec.unflatten(flat)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape and back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert torch.equal(spec.flatten(back), flat)


@given(shapes=LAYOUTS, seed=st.integers(0, 100))
def test_flat_order_is_the_order_of_the_layout_not_of_the_mapping(
    shapes: dict[str, tuple[int, ...]], seed: int
) -> None:
    tensors = filled(shapes)
    spec = FlatSpec.of(tensors)
    names = np.random.default_rng(seed).permutation(list(tensors)).tolist()
    shuffled = {name: tensors[name] for name in names}
    assert torch.equal(spec.flatten(shuffled), spec.flatten(tensors))
    pieces = [tensor.flatten() for tensor in tensors.values()]
    assert torch.equal(spec.flatten(tensors), torch.cat(pieces) if pieces else torch.empty(0))


def test_flatten_makes_a_buffer_of_its_own() -> None:
    tensors = {"only": torch.zeros(3, requires_grad=True)}
    spec = FlatSpec.of(tensors)
    flat = spec.flatten(tensors)
    assert not flat.requires_grad
    flat += 1
    assert torch.equal(tensors["only"], torch.zeros(3))


def test_flatten_reads_tensors_of_any_strides() -> None:
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T, "u": torch.arange(8.0)[::2]}
    assert FlatSpec.of(tensors).flatten(tensors).tolist() == [0, 3, 1, 4, 2, 5, 0, 2, 4, 6]


def test_unflatten_gives_views() -> None:
    spec = FlatSpec(("a", "b"), ((2,), (1, 2)), torch.float32)
    flat = torch.zeros(4)
    spec.unflatten(flat)["b"][0, 1] = 5
    assert flat.tolist() == [0, 0, 0, 5]


@pytest.mark.parametrize("elements", [0, 5, 7])
def test_a_buffer_of_another_size_is_refused(elements: int) -> None:
    spec = FlatSpec(("a", "b"), ((2,), (2, 2)), torch.float32)
    with pytest.raises(ValueError, match=f"{elements} elements.*needs 6"):
        spec.unflatten(torch.zeros(elements))


def test_a_layout_of_two_dtypes_is_refused() -> None:
    with pytest.raises(TypeError, match=r"float32.*float64"):
        FlatSpec.of({"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.float64)})


def test_layouts_are_equal_where_names_shapes_order_and_dtype_are() -> None:
    layout = FlatSpec.of(filled({"a": (2,), "b": (3, 1)}))
    assert layout == FlatSpec.of(filled({"a": (2,), "b": (3, 1)}, seed=1))
    others = [filled({"b": (3, 1), "a": (2,)}), filled({"a": (2,), "b": (1, 3)}), filled({"a": (2,), "c": (3, 1)})]
    others.append(filled({"a": (2,), "b": (3, 1)}, torch.float64))
    assert all(FlatSpec.of(other) != layout for other in others)


# -------------------------------------------------------------------------------------------------------------- digests


def digest_of(name: str, array: np.ndarray) -> str:
    digest = hashlib.sha256()
    update_digest(digest, name, array)
    return digest.hexdigest()


def test_digest_covers_name_dtype_shape_and_bytes_of_an_array() -> None:
    array = np.arange(6, dtype=np.float32)
    changed = array.copy()
    changed.view(np.uint8)[7] ^= 1
    variants = [
        digest_of("a", array),
        digest_of("b", array),
        digest_of("a", array.reshape(2, 3)),
        digest_of("a", array.reshape(3, 2)),
        digest_of("a", array.view(np.int32)),
        digest_of("a", array.astype(np.float64)),
        digest_of("a", array.astype(">f4")),
        digest_of("a", changed),
        digest_of("a", array[:5]),
    ]
    assert len(set(variants)) == len(variants)


def test_digest_tells_scalars_empty_arrays_and_signs_of_zero_apart() -> None:
    arrays = [np.float32(0), np.zeros(1, np.float32), np.zeros((0, 2), np.float32), np.zeros((2, 0), np.float32)]
    arrays += [np.array(-0.0, np.float32)]
    assert len({digest_of("a", np.asarray(array)) for array in arrays}) == len(arrays)


def test_digest_is_of_the_elements_not_of_their_strides() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest_of("a", array.T) == digest_of("a", np.ascontiguousarray(array.T)) != digest_of("a", array)


def test_digest_is_the_documented_one() -> None:
    # The format is part of run directories: a change of it breaks resume and replay of every older run.
    expected = hashlib.sha256(b"version|7|")
    for name, shape, values in (
        ("state/m", "()", [1.0]),
        ("theta/a", "(2, 2)", [2.0, 3.0, 4.0, 5.0]),
        ("theta/b", "(0, 4)", []),
    ):
        expected.update(f"{name}|<f4|{shape}|".encode() + np.array(values, "<f4").tobytes())
    groups = {
        "theta": {"b": torch.empty(0, 4), "a": torch.tensor([[2.0, 3.0], [4.0, 5.0]], requires_grad=True)},
        "state": {"m": torch.tensor(1.0)},
    }
    assert tensors_digest(groups, version=7) == expected.hexdigest()


@given(shapes=LAYOUTS, seed=st.integers(0, 100), version=st.integers(0, 2**40))
def test_run_digest_does_not_depend_on_any_order(shapes: dict[str, tuple[int, ...]], seed: int, version: int) -> None:
    rng = np.random.default_rng(seed)
    groups = {group: filled(shapes, seed=i) for i, group in enumerate(GROUPS)}
    shuffled = {
        group: {name: groups[group][name].clone() for name in rng.permutation(list(shapes)).tolist()}
        for group in rng.permutation(GROUPS).tolist()
    }
    assert tensors_digest(shuffled, version) == tensors_digest(groups, version)


@given(
    shapes=st.dictionaries(NAMES, SHAPES, min_size=1, max_size=4),
    group=st.sampled_from(GROUPS),
    index=st.integers(0, 10**6),
    change=st.sampled_from(["name", "dtype", "shape", "bit", "version", "group", "absence"]),
)
def test_run_digest_changes_with_anything_in_it(
    shapes: dict[str, tuple[int, ...]], group: str, index: int, change: str
) -> None:
    groups = {g: filled(shapes, seed=i) for i, g in enumerate(GROUPS)}
    version = 3
    before = tensors_digest(groups, version)
    name = list(shapes)[index % len(shapes)]
    tensor = groups[group][name]
    changed: dict[str, dict[str, Tensor]] = {g: dict(tensors) for g, tensors in groups.items()}
    if change == "name":
        changed[group][name + "'"] = changed[group].pop(name)
    elif change == "dtype":
        changed[group][name] = tensor.view(torch.int32)
    elif change == "shape":
        changed[group][name] = tensor[None]
    elif change == "bit":
        assume(tensor.numel() > 0)
        array = tensor.numpy().copy()
        array.reshape(-1).view(np.uint8)[index % array.nbytes] ^= 1 << index % 8
        changed[group][name] = torch.from_numpy(array)
    elif change == "group":
        changed["elsewhere"] = {name: changed[group].pop(name)}
    elif change == "absence":
        del changed[group][name]
    else:
        version += 1
    assert tensors_digest(changed, version) != before
