"""What a loop over stacked layers takes on a device, from its program alone."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.ahead_of_time import compile_for
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.model.layer_scan import scan_layers
from toprovar_jax.model.layers import Linear
from toprovar_jax.placement import Placement, describe

DEPTH, WIDTH, INNER, TOKENS = 16, 512, 2048, 256


class Stack(nnx.Module):
    """Feed-forward layers as a transformer's blocks have them."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(keys: nnx.Rngs) -> nnx.List[Linear]:
            options = {"model_width": WIDTH, "precision": "fast", "rngs": keys}
            return nnx.List([Linear(WIDTH, INNER, **options), Linear(INNER, WIDTH, **options)])

        self.layers = create(rngs.split(DEPTH))

    def __call__(self, x: jax.Array, start: int, stop: int) -> jax.Array:
        def body(x, layer, index, own):
            up, down = layer
            return x + down(jax.nn.gelu(up(x))), None

        return scan_layers(body, x, self.layers, start, stop, DEPTH)[0]


def check_stack_memory(mesh: Mesh, memory: MemoryOptions, layers: tuple[int, int]) -> None:
    """Compiles a loop over ``layers`` for the mesh's device and looks at where its stack is.

    Args:
      mesh: of one device that is only described.
      memory: how the stack is kept.
      layers: the range.
    """

    def everywhere(path: str, shape: tuple[int, ...]) -> NamedSharding:
        # Devices that are only described do not all list their memories; a mesh of none does not ask them.
        return NamedSharding(mesh.abstract_mesh if memory.stream_blocks else mesh, PartitionSpec())

    stack = describe(
        nnx.eval_shape(lambda: Stack(nnx.Rngs(0))),
        Placement("transformer", everywhere, memory),
        lambda target: np.dtype(jnp.bfloat16 if target.endswith("kernel") else jnp.float32),
    )
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    function = jax.jit(lambda stack, x: stack(x, *layers))
    sizes = compile_for(mesh, function, stack, x).memory_analysis()
    assert sizes is not None

    layer = 2 * WIDTH * INNER * (1 if memory.quantization else 2)
    on_host = DEPTH * layer if memory.stream_blocks else 0
    everything = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in (*jax.tree.leaves(stack), x))
    assert sizes.host_argument_size_in_bytes == on_host
    assert abs(sizes.argument_size_in_bytes - (everything - on_host)) < 64 << 10
    # A few layers, fetched or converted, of the sixteen; the rest are activations.
    few = 4 * 2 * WIDTH * INNER * 2
    assert sizes.temp_size_in_bytes < few + 8 * TOKENS * INNER
    assert sizes.host_temp_size_in_bytes < 64 << 10
