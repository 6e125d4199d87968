"""Meshes from text and from what a model needs, and where parameters go on them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from toprovar_jax.distributed.choosing import bytes_per_device, mesh_for
from toprovar_jax.distributed.mesh import MeshSpec, automatic_mesh, make_mesh, parse_mesh
from toprovar_jax.distributed.parts import TENSOR, Split, TensorParts, spread_over_tensor, whole
from toprovar_jax.distributed.rules import Cut, ParameterShardings, cut_of
from toprovar_jax.errors import UserInputError
from toprovar_jax.memory_options import ON_DEVICE, MemoryOptions
from toprovar_jax.placement import columns_apart
from toprovar_jax.presets import PRESETS

EIGHT = make_mesh(MeshSpec(2, 2, 2))


@pytest.mark.parametrize(
    ("text", "devices", "wanted"),
    [
        ("data=8,tensor=4", 32, MeshSpec(8, 1, 4)),
        ("tensor=4", 32, MeshSpec(8, 1, 4)),
        (" fsdp = 2 , tensor=2", 8, MeshSpec(2, 2, 2)),
        ("data=1", 1, MeshSpec()),
    ],
)
def test_a_short_text_is_a_mesh_of_all_devices(text, devices, wanted):
    assert parse_mesh(text, devices) == wanted
    assert parse_mesh(str(wanted), devices) == wanted


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data", "for example data=8,tensor=4"),
        ("data=0", "for example data=8,tensor=4"),
        ("data=2.5", "for example data=8,tensor=4"),
        ("model=4", "mesh axis 'model'"),
        ("data=2,data=4", "must name data once"),
        ("data=3,tensor=2", "mesh 'data=3,tensor=2' of 6 devices: must be of 8"),
        ("tensor=3", "mesh 'tensor=3' of 6 devices: must be of 8"),
        ("tensor=16", "mesh 'tensor=16' of 16 devices: must be of 8"),
    ],
)
def test_a_text_that_is_no_mesh_of_these_devices_is_refused_in_one_line(text, says):
    with pytest.raises(UserInputError, match=says.replace("(", r"\(")) as caught:
        parse_mesh(text, 8)
    assert "\n" not in str(caught.value)


def test_a_mesh_has_as_many_copies_as_fit():
    needed = {1: 40, 2: 22, 4: 13, 7: 9, 14: 7, 28: 6}.__getitem__
    assert automatic_mesh(8, 28, needed, 100) == MeshSpec(8, 1, 1)
    assert automatic_mesh(8, 28, needed, 30) == MeshSpec(4, 1, 2)
    assert automatic_mesh(8, 28, needed, 16) == MeshSpec(2, 1, 4)
    assert automatic_mesh(14, 28, needed, 8) == MeshSpec(1, 1, 14)
    assert automatic_mesh(8, 28, needed, None) == MeshSpec(8, 1, 1)
    with pytest.raises(UserInputError, match="too few"):
        automatic_mesh(8, 28, needed, 10)


def test_the_large_model_shares_small_chips_and_the_small_one_does_not():
    memory = MemoryOptions(text_encoder="on_demand")
    chip = {
        (name, tensor): bytes_per_device(PRESETS[name].with_precision("fast"), memory, tensor) / 1e9
        for name in ("infinity-2b", "infinity-8b")
        for tensor in (1, 4)
    }
    assert chip["infinity-2b", 1] < 0.9 * 16 < chip["infinity-8b", 1]
    assert chip["infinity-8b", 4] < 0.9 * 16
    assert chip["infinity-8b", 4] > chip["infinity-8b", 1] / 4


def test_automatic_is_copies_where_memory_is_unknown():
    assert dict(mesh_for("auto", PRESETS["infinity-2b"], ON_DEVICE).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


def test_a_number_is_no_mesh():
    with pytest.raises(UserInputError, match="mesh 8: must be text or a mesh"):
        mesh_for(8, PRESETS["infinity-2b"], ON_DEVICE)


def test_a_foreign_mesh_is_refused():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(UserInputError, match="must have the axes data, fsdp, tensor"):
        mesh_for(mesh, PRESETS["infinity-2b"], ON_DEVICE)


@pytest.mark.parametrize(
    ("path", "shape", "spec", "cut"),
    [
        ("transformer.layers.self_attention.qkv.kernel", (4, 8, 24), P(None, ("fsdp",), ("tensor",)), (-2, ("fsdp",))),
        ("transformer.layers.self_attention.out.kernel", (4, 8, 8), P(None, ("tensor",), ("fsdp",)), (-1, ("fsdp",))),
        ("transformer.layers.self_attention.log_scale", (4, 2), P(None, ("tensor",)), None),
        ("transformer.layers.cross_attention.query.kernel", (4, 8, 8), P(None, ("fsdp",), None), (-2, ("fsdp",))),
        (
            "transformer.layers.cross_attention.key_value.kernel",
            (4, 8, 16),
            P(None, ("fsdp", "tensor"), None),
            (-2, ("fsdp", "tensor")),
        ),
        ("transformer.shared_modulation.kernel", (8, 48), P(("fsdp", "tensor"), None), (-2, ("fsdp", "tensor"))),
        ("transformer.shared_modulation.kernel", (6, 48), P(("fsdp",), None), (-2, ("fsdp",))),
        ("transformer.layers.modulation", (4, 6, 8), P(None, None, None), None),
        ("text_encoder.layers.attention.query", (4, 8, 8), P(None, ("fsdp", "tensor"), None), (-2, ("fsdp", "tensor"))),
        ("text_encoder.relative_bias", (32, 4), P(None, None), None),
        (
            "image_tokenizer.decoder.conv_in.kernel",
            (3, 3, 8, 16),
            P(None, None, None, ("fsdp", "tensor")),
            (-1, ("fsdp", "tensor")),
        ),
    ],
)
def test_parameters_lie_as_the_table_says(path, shape, spec, cut):
    sharding = ParameterShardings(EIGHT)(path, shape)
    assert sharding.spec == spec
    described = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    assert cut_of(path, described) == (Cut() if cut is None else Cut(*cut))


def test_matrices_side_by_side_are_each_cut_by_heads():
    columns = np.arange(12)[None]
    apart = columns_apart(columns, (3, 2))
    assert apart.tolist() == [[0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]]
    assert ParameterShardings(EIGHT).fused("transformer.layers.self_attention.qkv.kernel") == 3
    assert ParameterShardings(EIGHT).fused("transformer.layers.feed_forward.up.kernel") == 1


def over_tensor(function, *arrays):
    return jax.shard_map(function, mesh=EIGHT, in_specs=P(), out_specs=P(), check_vma=False)(*arrays)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_sums_scattered_over_tokens_and_gathered_again_are_sums(length):
    parts, x = TensorParts(2), np.arange(2 * length * 3, dtype=np.float32).reshape(2, length, 3)

    def exchange(x):
        partial = x * (1.0 + jax.lax.axis_index(TENSOR).astype(np.float32))
        share = parts.scattered_sum(partial) + parts.own_tokens(x)
        assert share.shape == (2, -(-length // 2), 3)
        return parts.all_tokens(share, length)

    np.testing.assert_array_equal(over_tensor(exchange, x), 4 * x)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_rows_are_spread_and_all_get_all_results(batch):
    rows = np.arange(batch * 2, dtype=np.float32).reshape(batch, 2)
    widths = []

    def spread(rows):
        return spread_over_tensor(lambda own: widths.append(own[0].shape[0]) or own[0] + 1, (rows,), 2)

    np.testing.assert_array_equal(over_tensor(spread, rows), rows + 1)
    assert set(widths) == {-(-batch // 2)}


def test_a_parameter_in_parts_is_gathered_along_its_axis():
    kernel = np.arange(24, dtype=np.float32).reshape(4, 6)

    def gather(part):
        return whole(Split(part, -2, ("fsdp", "tensor")))

    specs = {"in_specs": P(("fsdp", "tensor")), "out_specs": P()}
    got = jax.shard_map(gather, mesh=EIGHT, check_vma=False, **specs)(kernel)
    np.testing.assert_array_equal(got, kernel)
