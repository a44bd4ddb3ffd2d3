"""The device mesh, and the one table: parameter path → PartitionSpec.

    data     copies of the weights, each with its share of the batch
    fsdp     splits the weights, and the batch further: less memory for more communication
    tensor   splits heads and widths within a layer: less latency

Modules hold almost no sharding annotations. Weights are put on the mesh as they are loaded,
programs state the sharding of their inputs and outputs, and the compiler derives the rest. There
are four exceptions. The fused attention kernel needs queries, keys and values split alike, along
rows and heads only (`constrain_heads`). Decoding uses a copy of the weights in another layout,
which is split like the weights (`sarm_jax.sampling.fused_layers`). Sums along the vocabulary are
gathered when a token is drawn (`sarm_jax.sampling.generate`). In training each device finds the
largest latents of its own rows (`map_rows`). Adapters, value head and optimizer
state are small and replicated.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey

from sarm_jax.io.errors import InputError
from sarm_jax.parallel.devices import find_devices

# A function that reads a region of an array; every slice has a start and a stop.
Read = Callable[[tuple[slice, ...]], np.ndarray]

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# The first dimension of stacked layers is the layer. Each path matches exactly one row.
TABLE: tuple[tuple[str, P], ...] = (
    (r"(trunk\.)?embed_tokens", P("tensor", "fsdp")),
    (r"lm_head", P("tensor", "fsdp")),
    (r"(trunk\.)?layers\.attn\.[qkv]_proj\.kernel", P(None, "fsdp", "tensor")),
    (r"(trunk\.)?layers\.attn\.[qkv]_proj\.bias", P(None, "tensor")),
    (r"(trunk\.)?layers\.attn\.[qk]_norm\.scale", P()),
    (r"(trunk\.)?layers\.attn\.o_proj\.kernel", P(None, "tensor", "fsdp")),
    (r"(trunk\.)?layers\.mlp\.(gate|up)_proj\.kernel", P(None, "fsdp", "tensor")),
    (r"(trunk\.)?layers\.mlp\.down_proj\.kernel", P(None, "tensor", "fsdp")),
    (r"(trunk\.)?layers\.(input|post_attention)_layernorm\.scale", P()),
    (r"(trunk\.)?norm\.scale", P()),
    (r"sae\.encoder", P("fsdp", "tensor")),
    (r"sae\.decoder", P("tensor", "fsdp")),
    (r"sae\.(pre_bias|latent_bias|threshold)", P()),
    (r"score(_bias)?", P()),
)
VOCABULARY = re.compile(r"(trunk\.)?(embed_tokens|lm_head)")


class HeadCounts(Protocol):
    """The fields of a model config that decide whether a mesh fits."""

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis of the mesh."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise InputError(f"mesh.{axis}={getattr(self, axis)}: must be at least 1")

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return self.data * self.fsdp * self.tensor

    @property
    def batch_parts(self) -> int:
        """The number of parts that a batch is split into."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor}"

    def check_batch(self, rows: int, name: str) -> None:
        """Raises InputError if `rows` rows, the value of option `name`, cannot be split evenly."""
        if rows % self.batch_parts:
            raise InputError(
                f"{name} = {rows} rows do not divide over data × fsdp = {self.batch_parts} devices "
                f"({self})"
            )

    def check_model(self, config: HeadCounts) -> None:
        """Raises InputError if the heads cannot be split over `tensor`."""
        for name in ("num_attention_heads", "num_key_value_heads"):
            if getattr(config, name) % self.tensor:
                raise InputError(
                    f"mesh.tensor={self.tensor} does not divide {name}={getattr(config, name)}"
                )


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """Makes the mesh over the first devices; returns None if it has a single device.

    Args:
        config: the size of each axis.
        devices: the devices to choose from; by default all devices of the run.

    Raises:
        InputError: there are too few devices, or several processes have devices to spare.
    """
    devices = find_devices() if devices is None else devices
    if config.devices > len(devices):
        raise InputError(f"{config} takes {config.devices} devices; there are {len(devices)}")
    if jax.process_count() > 1 and config.devices < len(devices):
        raise InputError(
            f"{config} takes {config.devices} devices; over {jax.process_count()} processes it has "
            f"to take all {len(devices)}"
        )
    if config.devices == 1:
        return None
    grid = np.asarray(devices[: config.devices]).reshape(config.data, config.fsdp, config.tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """Looks up the row of `TABLE` for a parameter.

    Raises:
        InputError: an axis of the mesh does not divide the parameter's shape.
    """
    rows = [spec for pattern, spec in TABLE if re.fullmatch(pattern, path)]
    if len(rows) != 1:
        raise ValueError(f"{path} matches {len(rows)} rows of the sharding table, expected 1")
    spec = rows[0]
    for dimension, axis in enumerate(spec):
        if axis is not None and shape[dimension] % mesh.shape[axis]:
            raise InputError(
                f"mesh.{axis}={mesh.shape[axis]} does not divide dimension {dimension} of {path}, "
                f"whose shape is {tuple(shape)}"
            )
    return spec


def padded_shape(path: str, shape: Sequence[int], mesh: Mesh) -> tuple[int, ...]:
    """Returns the shape of a parameter on the mesh.

    A vocabulary is padded with rows of zeros until `tensor` divides it.
    """
    rows, *other_dimensions = shape
    if VOCABULARY.fullmatch(path):
        rows += -rows % mesh.shape["tensor"]
    return (rows, *other_dimensions)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Puts arrays on a mesh. On a single device there is no mesh, and arrays stay as they are."""

    mesh: Mesh | None = None

    @property
    def parts(self) -> int:
        """The number of parts of a batch that lie on different devices."""
        return self.size("data") * self.size("fsdp")

    def size(self, axis: str) -> int:
        """Returns the number of devices along an axis of the mesh."""
        return 1 if self.mesh is None else self.mesh.shape[axis]

    def parameter(self, path: str, array: np.ndarray) -> jax.Array:
        """Puts a frozen parameter that the host holds on the mesh, as `load` does."""
        return self.load(path, array.shape, array.dtype, array.__getitem__)

    def load(self, path: str, shape: Sequence[int], dtype: Any, read: Read) -> jax.Array:
        """Reads a frozen parameter straight into its shards; the host holds one shard at a time.

        A process reads only its own shards. A vocabulary is padded, see `padded_shape`.

        Args:
            path: the dotted path of the parameter.
            shape: its shape without padding.
            dtype: its dtype.
            read: reads any region of it.
        """
        if self.mesh is None:
            array = read(tuple(slice(0, size) for size in shape))
            return jax.block_until_ready(jax.device_put(array))
        padded = padded_shape(path, shape, self.mesh)
        sharding = self._at(partition_spec(path, padded, self.mesh))
        return _read_shards(padded, sharding, partial(_read_padded, shape, dtype, read))

    def parameters(self, tree: Any) -> Any:
        """Puts the parameters of a module where `load` puts them; on the mesh they are padded."""
        if self.mesh is None:
            return tree
        return jax.tree.map(self.trained, parameter_paths(tree), tree)

    def trained(self, path: str, array: Any) -> Any:
        """Puts an array of the shape of a parameter, such as its moment, where `load` puts it."""
        return array if self.mesh is None else _put(array, self._of_parameter(path, array.shape))

    def replicated(self, tree: Any) -> Any:
        """Puts a copy of every array on every device."""
        return tree if self.mesh is None else jax.tree.map(lambda x: _put(x, self._at(P())), tree)

    def rows(self, tree: Any, dimension: int = 0) -> Any:
        """Splits arrays along a dimension, the first one; replicates those that do not divide."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: _put(x, self._at(self._rows(x.shape, dimension))), tree)

    def read_rows(self, shape: Sequence[int], read: Read, dimension: int = 0) -> Any:
        """Reads what `rows` would split; a process reads only the shards of its own devices.

        Without a mesh the result is the host array.
        """
        if self.mesh is None:
            return read(tuple(slice(0, size) for size in shape))
        return _read_shards(shape, self._at(self._rows(shape, dimension)), read)

    def abstract(self, shape: Sequence[int], dtype: Any, spec: P) -> Any:
        """Describes an array that is split like `spec`, for compiling ahead of time."""
        sharding = None if self.mesh is None else self._at(spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def abstract_parameter(self, path: str, shape: Sequence[int], dtype: Any) -> Any:
        """Describes what `load` returns for such an array."""
        if self.mesh is None:
            return self.abstract(shape, dtype, P())
        shape = padded_shape(path, shape, self.mesh)
        return self.abstract(shape, dtype, partition_spec(path, shape, self.mesh))

    def abstract_parameters(self, tree: Any, dtype: Any = None) -> Any:
        """Describes what `parameters` returns for a module's parameters, padded, in a dtype."""
        return jax.tree.map(
            lambda path, x: self.abstract_parameter(path, x.shape, dtype or x.dtype),
            parameter_paths(tree),
            tree,
        )

    def abstract_replicated(self, tree: Any) -> Any:
        """Describes what `replicated` returns for such a tree."""
        return jax.tree.map(lambda x: self.abstract(x.shape, x.dtype, P()), tree)

    def abstract_rows(self, shape: Sequence[int], dtype: Any, dimension: int = 0) -> Any:
        """Describes what `rows` returns for such an array."""
        return self.abstract(shape, dtype, self._rows(shape, dimension))

    def constrain_parameters(self, tree: Any) -> Any:
        """Constrains parameters inside a program to the sharding that `parameters` gives them."""
        if self.mesh is None:
            return tree
        shardings = jax.tree.map(
            lambda path, x: self._of_parameter(path, x.shape), parameter_paths(tree), tree
        )
        return jax.lax.with_sharding_constraint(tree, shardings)

    def constrain_rows(self, tree: Any) -> Any:
        """Constrains arrays inside a program to the sharding that `rows` gives them."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: self.constrain(x, self._rows(x.shape)), tree)

    def map_rows(self, function: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
        """Applies a function of rows inside a program, on each device to the rows it has.

        If the rows do not divide, the whole array is passed.
        """
        if self.mesh is None or len(array) % self.parts:
            return function(array)
        return jax.shard_map(function, mesh=self.mesh, in_specs=BATCH, out_specs=BATCH)(array)

    def constrain_heads(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Constrains arrays `[B, T, heads, H]` in a program to a split along B and heads only."""
        if self.mesh is None:
            return arrays
        rows = None if len(arrays[0]) % self.parts else BATCH[0]
        return self.constrain(arrays, P(rows, None, "tensor"))

    def constrain_replicated(self, tree: Any) -> Any:
        """Constrains arrays inside a program to be replicated."""
        return self.constrain(tree, P())

    def constrain(self, tree: Any, spec: P) -> Any:
        """Constrains arrays inside a program to be split like `spec`."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self._at(spec))

    def _of_parameter(self, path: str, shape: Sequence[int]) -> NamedSharding:
        assert self.mesh is not None
        return self._at(partition_spec(path, shape, self.mesh))

    def _rows(self, shape: Sequence[int], dimension: int = 0) -> P:
        return P() if shape[dimension] % self.parts else P(*dimension * [None], *BATCH)

    def _at(self, spec: P) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec)


def parameter_paths(tree: Any) -> Any:
    """Returns the tree of a module's parameters with their dotted paths in place of arrays."""

    def path_of(keys, _):
        return ".".join(str(key.key) for key in keys if isinstance(key, DictKey))

    return jax.tree_util.tree_map_with_path(path_of, tree)


def put_like(array: np.ndarray, like: Any) -> Any:
    """Puts a host array on the devices of `like`; returns it unchanged if `like` is a host array.

    If `like` is not committed to its devices, the result is not either: a program would be compiled
    again for a committed argument.
    """
    if not isinstance(like, jax.Array):
        return array
    return _put(array, like.sharding) if like.committed else jax.device_put(array)


def _put(x: Any, sharding: Sharding) -> jax.Array:
    """Puts `x` on the mesh; every process puts its own shards of a host array there."""
    on_mesh = isinstance(x, jax.Array) and not x.is_fully_addressable
    if on_mesh or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def _read_shards(shape: Sequence[int], sharding: Sharding, read: Read) -> jax.Array:
    """Reads each region that a device of this process has, once, and puts it there."""
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        pairs = zip(index or (), shape, strict=True)
        bounds = tuple((s.indices(size)[0], s.indices(size)[1]) for s, size in pairs)
        devices.setdefault(bounds, []).append(device)
    shards = []
    for region, copies in devices.items():
        piece = read(tuple(slice(*bounds) for bounds in region))
        shards += jax.block_until_ready([jax.device_put(piece, device) for device in copies])
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, shards)


def _read_padded(
    shape: Sequence[int], dtype: Any, read: Read, region: tuple[slice, ...]
) -> np.ndarray:
    """Reads a region, with zeros in rows beyond `shape`."""
    rows, *columns = region
    if rows.stop <= shape[0]:
        return read(region)
    piece = np.zeros([s.stop - s.start for s in region], dtype)
    if rows.start < shape[0]:
        piece[: shape[0] - rows.start] = read((slice(rows.start, shape[0]), *columns))
    return piece


ONE_DEVICE = Placement()
