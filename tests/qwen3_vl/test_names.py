"""The table of names: any part of a parameter is made from those parts of tensors and no others."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from p2r_jax.qwen3_vl.names import Parameter

# path, inputs, shape of one layer, shape at Hugging Face
KINDS = {
    "kernel of several outputs": (1, (6, 3, 4, 2), (24, 6)),
    "kernel of several inputs": (2, (3, 4, 5), (5, 12)),
    "square kernel": (1, (6, 6), (6, 6)),
    "bias of several axes": (0, (3, 4, 2), (24,)),
    "table": (0, (7, 5), (7, 5)),
    "scale": (0, (9,), (9,)),
}


def make(kind: str, layers: int) -> tuple[Parameter, np.ndarray, dict[str, np.ndarray]]:
    """A parameter, its value, and the tensors that it is made of."""
    inputs, shape, hf_shape = KINDS[kind]
    names = tuple(f"layer {i}" for i in range(max(layers, 1)))
    parameter = Parameter(kind, names, bool(layers), inputs, shape, hf_shape)
    value = np.random.default_rng(0).normal(size=(len(names), *shape)).astype(np.float32)
    tensors = {name: parameter.to_hf(v) for name, v in zip(names, value, strict=True)}
    return parameter, value if layers else value[0], tensors


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_have_the_shape_and_order_of_hugging_face(kind):
    parameter, value, tensors = make(kind, 0)
    (tensor,) = tensors.values()
    assert tensor.shape == parameter.hf_shape
    expected = value.ravel()
    if parameter.inputs:
        expected = value.reshape(parameter.hf_shape[::-1]).T.ravel()
    np.testing.assert_array_equal(tensor.ravel(), expected)


@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_part_is_made_of_as_many_numbers_as_it_holds(kind, layers, data):
    parameter, value, tensors = make(kind, layers)
    index = []
    for size in value.shape:
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        whole = start == 0 and stop == size and data.draw(st.booleans())
        index.append(slice(None) if whole else slice(start, stop))
    index = tuple(index)
    count = 0

    def read(name, part):
        nonlocal count
        out = tensors[name][part]
        count += out.size
        return out

    out = np.empty(value[index].shape, np.float32)
    parameter.read(index, out, read)
    np.testing.assert_array_equal(out, value[index])
    assert count == out.size


def test_a_part_of_the_patch_embedding_reads_whole_rows():
    """At Hugging Face it has five axes: (width, channel, frame, row, column)."""
    parameter = Parameter("patch_embed", ("w",), False, 1, (12, 6), (6, 3, 1, 2, 2))
    value = np.arange(72, dtype=np.float32).reshape(12, 6)
    tensor = parameter.to_hf(value)
    np.testing.assert_array_equal(tensor.reshape(6, 12), value.T)
    out = np.empty((4, 3), np.float32)
    parameter.read((slice(2, 6), slice(1, 4)), out, lambda name, part: tensor[part])
    np.testing.assert_array_equal(out, value[2:6, 1:4])
