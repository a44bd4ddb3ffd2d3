"""The device mesh, and the one table: parameter path → PartitionSpec.

    data     copies of the weights, each with its part of the batch
    fsdp     splits the weights, and the batch further: less memory for more communication
    tensor   splits heads and widths within a layer: less latency

Modules know nothing of this. Weights are put on the mesh as they are loaded, the programs state
where their inputs and outputs live, and the compiler derives the rest. Adapters, value head and
optimizer state are small and replicated.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sarm_jax.errors import InputError
from sarm_jax.llama import LlamaConfig

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# Stacked layers have the layer as their first dimension. Each path matches exactly one row.
TABLE: tuple[tuple[str, P], ...] = (
    (r"(trunk\.)?embed_tokens", P("tensor", "fsdp")),
    (r"lm_head", P("tensor", "fsdp")),
    (r"(trunk\.)?layers\.attn\.[qkv]_proj\.kernel", P(None, "fsdp", "tensor")),
    (r"(trunk\.)?layers\.attn\.o_proj\.kernel", P(None, "tensor", "fsdp")),
    (r"(trunk\.)?layers\.mlp\.(gate|up)_proj\.kernel", P(None, "fsdp", "tensor")),
    (r"(trunk\.)?layers\.mlp\.down_proj\.kernel", P(None, "tensor", "fsdp")),
    (r"(trunk\.)?layers\.(input|post_attention)_layernorm\.scale", P()),
    (r"(trunk\.)?norm\.scale", P()),
    (r"sae\.encoder", P("fsdp", "tensor")),
    (r"sae\.decoder", P("tensor", "fsdp")),
    (r"sae\.(pre|latent)_bias", P()),
    (r"score", P()),
)
VOCABULARY = re.compile(r"(trunk\.)?(embed_tokens|lm_head)")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise InputError(f"mesh.{axis}={getattr(self, axis)}: must be at least 1")

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return self.data * self.fsdp * self.tensor

    @property
    def batch_parts(self) -> int:
        """Into how many parts the batch is split."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor}"

    def check_batch(self, rows: int, name: str) -> None:
        """Raises InputError where `rows` rows, called `name`, cannot be split evenly."""
        if rows % self.batch_parts:
            raise InputError(
                f"{name} = {rows} rows do not divide over data × fsdp = {self.batch_parts} devices "
                f"({self})"
            )

    def check_model(self, config: LlamaConfig) -> None:
        """Raises InputError where the heads cannot be split over `tensor`."""
        for name in ("num_attention_heads", "num_key_value_heads"):
            if getattr(config, name) % self.tensor:
                raise InputError(
                    f"mesh.tensor={self.tensor} does not divide {name}={getattr(config, name)}"
                )


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh over the first devices; None where one device is all it takes."""
    devices = jax.devices() if devices is None else devices
    if config.devices > len(devices):
        raise InputError(f"{config} takes {config.devices} devices; there are {len(devices)}")
    if config.devices == 1:
        return None
    grid = np.asarray(devices[: config.devices]).reshape(config.data, config.fsdp, config.tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """The row of `TABLE` for a parameter; InputError where the mesh does not divide its shape.

    A vocabulary that does not divide is not split over its rows.
    """
    rows = [spec for pattern, spec in TABLE if re.fullmatch(pattern, path)]
    if len(rows) != 1:
        raise ValueError(f"{path} matches {len(rows)} rows of the sharding table, expected 1")
    spec = rows[0]
    if VOCABULARY.fullmatch(path) and shape[0] % mesh.shape["tensor"]:
        spec = P(None, spec[1])
    for dimension, axis in enumerate(spec):
        if axis is not None and shape[dimension] % mesh.shape[axis]:
            raise InputError(
                f"mesh.{axis}={mesh.shape[axis]} does not divide dimension {dimension} of {path}, "
                f"whose shape is {tuple(shape)}"
            )
    return spec


@dataclasses.dataclass(frozen=True)
class Placement:
    """Puts arrays on a mesh; without one (a single device), leaves everything as it is."""

    mesh: Mesh | None = None

    @property
    def parts(self) -> int:
        """How many parts of a batch lie on devices of their own."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def parameter(self, path: str, array: np.ndarray) -> jax.Array:
        """A frozen parameter, straight from the host into its shards."""
        if self.mesh is None:
            return jax.device_put(array)
        return jax.device_put(array, self._at(partition_spec(path, array.shape, self.mesh)))

    def replicated(self, tree: Any) -> Any:
        """A copy on every device."""
        return tree if self.mesh is None else jax.device_put(tree, self._at(P()))

    def rows(self, tree: Any) -> Any:
        """Arrays split along their first dimension, or on every device where it does not divide."""
        if self.mesh is None:
            return tree
        return jax.tree.map(
            lambda x: jax.device_put(x, self._at(P() if x.shape[0] % self.parts else BATCH)), tree
        )

    def abstract(self, shape: Sequence[int], dtype: Any, spec: P) -> Any:
        """An array for compiling ahead, split like `spec`."""
        sharding = None if self.mesh is None else self._at(spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def abstract_layer(self, stacked: Any) -> Any:
        """One layer of an abstract array, split as the stack is."""
        spec = P() if self.mesh is None else P(*stacked.sharding.spec[1:])
        return self.abstract(stacked.shape[1:], stacked.dtype, spec)

    def abstract_parameter(self, path: str, shape: Sequence[int], dtype: Any) -> Any:
        """What `parameter` makes of such an array."""
        spec = P() if self.mesh is None else partition_spec(path, shape, self.mesh)
        return self.abstract(shape, dtype, spec)

    def abstract_replicated(self, tree: Any) -> Any:
        """What `replicated` makes of such a tree."""
        return jax.tree.map(lambda x: self.abstract(x.shape, x.dtype, P()), tree)

    def abstract_rows(self, shape: Sequence[int], dtype: Any) -> Any:
        """What `rows` makes of such an array."""
        return self.abstract(shape, dtype, P() if shape[0] % self.parts else BATCH)

    def keep_rows(self, tree: Any) -> Any:
        """Inside a program: arrays `[B, …]` stay split along the batch."""
        return self._constrain(tree, BATCH)

    def keep_replicated(self, tree: Any) -> Any:
        """Inside a program: arrays stay whole on every device."""
        return self._constrain(tree, P())

    def _constrain(self, tree: Any, spec: P) -> Any:
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self._at(spec))

    def _at(self, spec: P) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec)


ONE_DEVICE = Placement()
