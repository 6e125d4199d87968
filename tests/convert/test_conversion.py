"""Conversion: the same weights arrive, in little memory, and the folder is whole or not there."""

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from convert import conversion, orbax_writer, streaming, target
from convert.conversion import convert, make_plan
from convert.orbax_writer import nested, open_array, write_checkpoint
from convert.recognise import TRANSFORMER, parameter_shapes
from convert.safetensors_io import open_safetensors, save_safetensors
from toprovar_jax.errors import UserInputError
from toprovar_jax.loading import load_model

from ..tiny_model import CARD, write_tiny_model

NETWORKS = ("transformer", "image_tokenizer", "text_encoder")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A model folder of safetensors files, in bfloat16."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def exact_originals(originals, tmp_path_factory):
    """The same in float32, with numbers that bfloat16 does not have."""
    folder = shutil.copytree(originals, tmp_path_factory.mktemp("models") / "exact")
    for name in NETWORKS:
        tensors = {
            key: read().astype(np.float32) * 1.001
            for key, read in open_safetensors(originals / f"{name}.safetensors").items()
        }
        save_safetensors(folder / f"{name}.safetensors", tensors, {})
    return folder


def plan_of(folder, *networks, **options):
    options = {"model": str(folder / "model.json")} | options
    return make_plan([folder / f"{name}.safetensors" for name in networks or NETWORKS], {}, **options)


@pytest.fixture(scope="module")
def converted(exact_originals, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "tiny"
    assert convert(plan_of(exact_originals), out, verified=True) == sum(
        len(open_safetensors(exact_originals / f"{name}.safetensors")) for name in NETWORKS
    )
    return out


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "copy")


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def everywhere(name, shape):
    """Split over eight devices along the last axis that can be split so."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    axis = max((i for i, size in enumerate(shape) if size % 8 == 0), default=None)
    return NamedSharding(mesh, PartitionSpec(*("x" if i == axis else None for i in range(len(shape)))))


def test_a_converted_model_loads_in_fast_precision_as_its_files_do(exact_originals, converted):
    """Bit for bit, although it holds matrices in bfloat16: they would be rounded at loading."""
    theirs, ours = (load_model(folder, precision="fast") for folder in (exact_originals, converted))
    assert ours.card == theirs.card
    assert ours.tokenizer.vocab_size == theirs.tokenizer.vocab_size
    assert_equal(ours.networks, theirs.networks)


def test_parameters_go_straight_into_shardings_from_either_kind_of_folder(exact_originals, converted):
    plain = load_model(exact_originals, precision="fast").networks
    for folder in (exact_originals, converted):
        loaded = load_model(folder, precision="fast", shardings=everywhere).networks
        assert_equal(loaded, plain)
        kernel = loaded.transformer.layers.feed_forward.up.kernel.get_value()
        assert len(kernel.sharding.device_set) == 8
        assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_float32_keeps_every_bit(exact_originals, tmp_path):
    convert(plan_of(exact_originals, dtype="float32"), tmp_path / "out")
    theirs, ours = (load_model(f, precision="exact", with_encoder=True) for f in (exact_originals, tmp_path / "out"))
    assert_equal(ours.networks, theirs.networks)


def test_any_orbax_reader_restores_the_checkpoints_also_into_shardings(converted):
    loaded = load_model(converted, precision="fast").networks.transformer
    expected = np.asarray(loaded.layers.feed_forward.up.kernel.get_value())
    shapes = parameter_shapes(TRANSFORMER, CARD.transformer)
    abstract = nested(
        {name: jax.ShapeDtypeStruct(s, np.float32, sharding=everywhere(name, s)) for name, s in shapes.items()}
    )
    with ocp.StandardCheckpointer() as checkpointer:
        plain = checkpointer.restore(converted / "transformer")
        spread = checkpointer.restore(converted / "transformer", abstract)
    kernel = plain["layers"]["feed_forward"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel, expected)
    assert (kernel.dtype, plain["start"].dtype) == (BFLOAT16, np.float32)
    kernel = spread["layers"]["feed_forward"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel, expected.astype(np.float32))
    assert len(kernel.sharding.device_set) == 8


def test_files_in_bfloat16_are_not_widened(originals):
    arrays = plan_of(originals).arrays()
    assert {array.dtype for network in arrays.values() for array in network.values()} == {BFLOAT16}


def test_the_record_says_what_came_from_what(exact_originals, converted):
    fields = json.loads((converted / "model.json").read_text())
    path = exact_originals / "transformer.safetensors"
    entry = fields["conversion"]["parts"]["transformer"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry["files"] == [{"name": path.name, "bytes": path.stat().st_size, "sha256": digest}]
    assert (entry["dtype"], entry["tensors"]) == ("bfloat16", len(open_safetensors(path)))
    assert entry["tool"].startswith("toprovar_jax ")
    assert (fields["name"], fields["conversion"]["models"]) == (CARD.name, [CARD.name])


def test_several_conversions_fill_one_folder(exact_originals, converted, tmp_path):
    out = tmp_path / "out"
    for name in NETWORKS:
        convert(plan_of(exact_originals, name), out)
    assert sorted(path.name for path in out.iterdir()) == sorted([*NETWORKS, "model.json", "tokenizer.json"])
    assert_equal(*(load_model(folder, precision="fast").networks for folder in (out, converted)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_network_that_is_there_is_replaced_only_by_force(originals, copy):
    before = {path: path.stat().st_ino for path in (copy / "transformer").rglob("*")}
    with pytest.raises(UserInputError, match=r"has image_tokenizer already; replace it with --force"):
        convert(plan_of(originals, "image_tokenizer"), copy)
    convert(plan_of(originals, "image_tokenizer"), copy, force=True)
    assert {
        path: path.stat().st_ino for path in (copy / "transformer").rglob("*") if path.is_file()
    }.items() <= before.items()
    theirs = load_model(originals, precision="exact", with_encoder=True).networks.image_tokenizer
    assert_equal(load_model(copy, precision="exact", with_encoder=True).networks.image_tokenizer, theirs)


def test_a_folder_of_something_else_is_left_alone(exact_originals, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(UserInputError, match="was not made by convert"):
            convert(plan_of(exact_originals, "text_encoder"), tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_networks_that_do_not_belong_together_are_refused(exact_originals, copy, tmp_path):
    other = dataclasses.replace(CARD, name="other", transformer=dataclasses.replace(CARD.transformer, num_layers=1))
    cards = {CARD.name: CARD, "other": other}
    tensors = {name: read() for name, read in open_safetensors(exact_originals / "transformer.safetensors").items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.1.")}
    save_safetensors(tmp_path / "shallow.safetensors", tensors, {})
    plan = make_plan([tmp_path / "shallow.safetensors"], cards)
    assert plan.models == ("other",)
    with pytest.raises(UserInputError, match="folder's model tiny: is not other"):
        convert(dataclasses.replace(plan, cards={"other": other}), copy, force=True)
    with pytest.raises(UserInputError, match="are both a transformer"):
        make_plan([tmp_path / "shallow.safetensors", exact_originals / "transformer.safetensors"], cards)


def test_numbers_that_are_not_finite_are_named_and_nothing_is_left(exact_originals, tmp_path):
    folder = shutil.copytree(exact_originals, tmp_path / "spoilt")
    tensors = {name: read().copy() for name, read in open_safetensors(folder / "transformer.safetensors").items()}
    tensors["blocks.1.ffn.fc2.weight"][3, 5] = np.nan
    save_safetensors(folder / "transformer.safetensors", tensors, {})
    with pytest.raises(UserInputError, match=r"not finite in blocks\.1\.ffn\.fc2\.weight;"):
        convert(plan_of(folder, "transformer"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt"]


def test_a_difference_is_found_and_nothing_is_left(exact_originals, tmp_path, monkeypatch):
    def spoil(path, arrays):
        write_checkpoint(path, arrays)
        stored = open_array(path, "level_embedding")
        orbax_writer.ts.open(stored.spec(), open=True, write=True).result()[1, 2].write(np.float32(9)).result()

    monkeypatch.setattr(conversion, "write_checkpoint", spoil)
    with pytest.raises(streaming.DifferenceError, match=r"does not hold lvl_embed\.weight"):
        convert(plan_of(exact_originals, "transformer"), tmp_path / "out", verified=True)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_one_line(copy):
    shutil.rmtree(copy / "text_encoder" / "ocdbt.process_0")
    with pytest.raises(UserInputError, match=r"text_encoder: cannot give embedding \(") as caught:
        load_model(copy, precision="fast")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_size_is_one_line(copy):
    fields = json.loads((copy / "model.json").read_text())
    fields["transformer"]["text_length"] += 1
    (copy / "model.json").write_text(json.dumps(fields))
    with pytest.raises(
        UserInputError, match=r"has text\.unconditional of shape \(12, 128\), the model needs \(13, 128\)"
    ):
        load_model(copy, precision="fast")


# What a conversion that died leaves, and the next one.


def test_the_next_conversion_clears_what_a_dead_one_left(exact_originals, tmp_path):
    (tmp_path / ".out.unfinished" / "transformer").mkdir(parents=True)
    (tmp_path / ".out.lock").touch()
    convert(plan_of(exact_originals, "text_encoder"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_set_aside_in_the_moment_of_death_comes_back(exact_originals, copy):
    copy.rename(copy.parent / ".copy.replaced")
    with pytest.raises(UserInputError, match="has transformer already"):
        convert(plan_of(exact_originals, "transformer"), copy)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    load_model(copy, precision="fast")


def test_two_processes_do_not_convert_into_one_folder(exact_originals, tmp_path):
    with (
        target.building(tmp_path / "out", ["transformer"], force=False),
        pytest.raises(UserInputError, match="by another process"),
    ):
        convert(plan_of(exact_originals, "transformer"), tmp_path / "out")


_SLOW = """
import sys, time
from pathlib import Path
from convert import conversion
from convert.conversion import convert, make_plan

def arrays(network, dtype, progress, streamed=conversion.streamed_arrays):
    def slow(nbytes):
        print("piece", flush=True)
        time.sleep(0.01)
    return streamed(network, dtype, slow)

conversion.streamed_arrays = arrays
folder = Path(sys.argv[1])
plan = make_plan([folder / "transformer.safetensors"], {}, model=str(folder / "model.json"))
convert(plan, Path(sys.argv[2]))
"""


def test_a_killed_conversion_leaves_nothing_under_the_targets_name(exact_originals, tmp_path):
    command = [sys.executable, "-c", _SLOW, str(exact_originals), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(9):
            assert process.stdout.readline() == "piece\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.unfinished").is_dir()
    convert(plan_of(exact_originals, "transformer"), tmp_path / "out", verified=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_room_on_the_disk_is_said_before_anything_is_written(exact_originals, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserInputError, match="are free there"):
        conversion.check_plan(plan_of(exact_originals, "transformer"), tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_networks_in_one_file_are_refused(exact_originals, tmp_path):
    tensors = {}
    for name in ("transformer", "image_tokenizer"):
        file = open_safetensors(exact_originals / f"{name}.safetensors")
        tensors |= {key: np.array(read()) for key, read in file.items()}
    save_safetensors(tmp_path / "both.safetensors", tensors, {})
    with pytest.raises(UserInputError, match=r"holds a .* and a .* save each into a file of its own"):
        make_plan([tmp_path / "both.safetensors"], {CARD.name: CARD})
