"""Names of slices, and what is wrong with those that do not exist."""

from __future__ import annotations

import pytest

from p2r_jax.config import MeshConfig
from p2r_jax.plan.chips import CHIPS, Slice


@pytest.mark.parametrize(
    "name, chip, topology",
    [
        ("v5e:4x4", "v5e", "4x4"),
        ("v5e-16", "v5e", "4x4"),
        ("V6E-64", "v6e", "8x8"),
        ("v5p-8", "v5p", "2x2x1"),  # two cores a chip
        ("v5p:2x2x2", "v5p", "2x2x2"),
        ("h100:8", "h100", "8"),
        ("h100-16", "h100", "16"),
    ],
)
def test_slices_by_either_name(name, chip, topology):
    where = Slice.parse(name)
    assert (where.chip, where.topology) == (CHIPS[chip], topology)


@pytest.mark.parametrize(
    "name, slices, message",
    [
        ("v4-8", 1, "chips: v5e, v5p, v6e, h100"),
        ("v5e", 1, "name chips and shape"),
        ("v5e-12", 1, "known are v5e-4, v5e-8"),
        ("v5p-4", 1, "known are v5p-8, v5p-16"),
        ("h100:12", 1, "as eights"),
        ("h100:8", 2, "give the number of all GPUs"),
    ],
)
def test_what_does_not_exist_is_refused(name, slices, message):
    with pytest.raises(ValueError, match=message):
        Slice.parse(name, slices)


class TestMeshes:
    @pytest.fixture(autouse=True)
    def compiler(self):
        pytest.importorskip("libtpu", reason="no TPU compiler (libtpu) in this environment")

    def test_chips_of_all_slices_count(self):
        mesh = Slice.parse("v5e:2x2", slices=2).mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        assert mesh.size == 8
        of = [[d.slice_index for d in part.flat] for part in mesh.devices]
        assert of == [[0] * 4, [1] * 4]  # only `data` crosses the data-centre network

    def test_a_mesh_that_does_not_fit_names_the_sizes(self):
        with pytest.raises(ValueError, match=r"does not fit\s+4 device"):
            Slice.parse("v5e:2x2").mesh(MeshConfig(data=1, fsdp=3, tensor=1))

    def test_a_topology_that_the_compiler_does_not_know_is_named(self):
        with pytest.raises(ValueError, match="v5e:5x5"):
            Slice.parse("v5e:5x5").mesh(MeshConfig())
