"""The mesh, and the two tables that map the axes of arrays to axes of the mesh.

Arrays name their axes by meaning ("embed", "heads"). The tables are strict: an unknown name, a mesh
axis used twice in one array, or a size that does not divide is an error. Replicating in silence
would only show as missing memory.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rmjax.errors import UserError

MeshAxes = str | tuple[str, ...] | None

# Parameters: sharded over fsdp along the residual stream, over tensor along heads, mlp and vocab.
# Devices that share a row through context would hold the same parameters: they share those too.
PARAMETER_AXES: dict[str, MeshAxes] = {
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "context"),
    "norm": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "attribute": None,
    "rank": None,
    "threshold": None,
}

# Activations: rows over data and fsdp, tokens of a row over context, features over tensor.
ACTIVATION_AXES: dict[str, MeshAxes] = {
    "row": ("data", "fsdp"),
    "length": "context",
    "sample": None,
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "attribute": None,
    "rank": None,
    "microbatch": None,
    # Of what generation keeps: layers, rows that share prompts, places of a prompt or a row's own.
    "layers": None,
    "member": None,
    "place": None,
    # Of logits: as the product gives them, and where tokens are drawn, rows and vocabulary.
    "vocab": "tensor",
    "drawn": ("data", "fsdp", "tensor"),
    "choice": None,
}


@dataclasses.dataclass
class MeshConfig:
    """The number of devices along each axis; one of them may be -1: all devices that are left.

    `data` replicates the parameters and is the only axis for slow networks. `fsdp` shards
    parameters and optimizer state. `context` shards the tokens of a row, and parameters as `fsdp`
    does. `tensor` shards heads, mlp and vocabulary, and so cannot exceed the kv heads.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


def parse_mesh(text: str) -> MeshConfig:
    """A mesh from a command line: `fsdp:4,tensor:2`.

    Raises:
      UserError: it is none.
    """
    try:
        sizes = {name: int(size) for name, size in (part.split(":") for part in text.split(","))}
        return MeshConfig(**sizes)
    except (ValueError, TypeError) as error:
        axes = ", ".join(field.name for field in dataclasses.fields(MeshConfig))
        raise UserError(f"--mesh={text}: expected AXIS:SIZE,... of {axes}") from error


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """Resolves -1; raises `UserError` unless the sizes multiply to `devices`."""
    sizes = dataclasses.asdict(config)
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {sizes}: sizes must be positive, and at most one may be -1")
    if free and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
        raise UserError(
            f"mesh {sizes} does not use the {devices} devices there are: choose sizes that "
            "multiply to their number; -1 is whatever is left"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all of them if not given), with automatic sharding.

    Neighbours on the mesh are neighbours on the torus, along `tensor` the closest. The network
    between TPU slices is slow, so only `data` may cross it. GPU hosts are not slices in this sense:
    sharding over them is common, and their devices follow each other host by host.

    Raises:
      UserError: the sizes do not multiply to the devices, or `data` is not a multiple of the
        number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(config, len(devices))
    shape = tuple(sizes.values())
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"})
    if slices > 1:
        if sizes["data"] % slices:
            raise UserError(
                f"mesh {sizes}: there are {slices} slices, and only `data` may cross the slow "
                f"network between them: set --config.mesh.data to a multiple of {slices}"
            )
        placed = mesh_utils.create_hybrid_device_mesh(
            (sizes["data"] // slices, *shape[1:]),
            (slices, 1, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of `config` on `devices` devices that need not exist."""
    sizes = mesh_shape(config, devices)
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh with the tables applied to it. Frozen and hashable, so a jit cache sees it."""

    mesh: Mesh | AbstractMesh

    def parameter(self, axes: Sequence[str]) -> NamedSharding:
        """The sharding of a parameter whose axes are named `axes`."""
        return NamedSharding(self.mesh, _spec(axes, PARAMETER_AXES, "parameter"))

    def activation(self, axes: Sequence[str]) -> NamedSharding:
        """The sharding of an activation or an input whose axes are named `axes`."""
        return NamedSharding(self.mesh, _spec(axes, ACTIVATION_AXES, "activation"))

    def constrain(self, x: jax.Array, axes: Sequence[str]) -> jax.Array:
        """Tells the compiler how `x` is sharded; the numbers do not change."""
        if x.ndim != len(axes):
            raise ValueError(f"array of shape {x.shape} has axes named {tuple(axes)}")
        return jax.lax.with_sharding_constraint(x, self.activation(axes))

    @property
    def replicated(self) -> NamedSharding:
        """A whole copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def row_shards(self) -> int:
        """The number of parts that the rows of a batch are split into."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]


def _spec(axes: Sequence[str], table: dict[str, MeshAxes], what: str) -> PartitionSpec:
    unknown = [axis for axis in axes if axis not in table]
    if unknown:
        raise ValueError(f"{what} axis {unknown[0]!r} is not in the table; known: {sorted(table)}")
    entries = [table[axis] for axis in axes]
    used = [m for e in entries if e is not None for m in ((e,) if isinstance(e, str) else e)]
    twice = {m for m in used if used.count(m) > 1}
    if twice:
        raise ValueError(f"{what} with axes {tuple(axes)} uses mesh axis {twice.pop()!r} twice")
    return PartitionSpec(*entries)


def check_divisible(name: str, shape: Sequence[int], sharding: NamedSharding) -> None:
    """Raises a `UserError` with array, axis and sizes if an axis does not divide over the mesh."""
    for axis, (size, entry) in enumerate(zip(shape, sharding.spec)):
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        names = tuple(name for name in names if sharding.mesh.shape[name] > 1)
        parts = int(np.prod([sharding.mesh.shape[n] for n in names]))
        if size % parts:
            raise UserError(
                f"{name}: axis {axis} has size {size}, which does not divide over mesh axis "
                f"{' x '.join(names)} = {parts}; choose a size of {' or '.join(names)} that "
                f"divides {size}"
            )


def local_bytes(tree: Any) -> int:
    """Bytes of arrays on one device, from shapes and shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def put(batch: Any, axes: Any, sharding: Sharding) -> Any:
    """Puts numpy arrays on the mesh; each process only the shards of its own devices."""

    def place(array: np.ndarray, names: tuple[str, ...]) -> jax.Array:
        return jax.make_array_from_callback(
            np.shape(array), sharding.activation(names), lambda index: np.asarray(array)[index]
        )

    return jax.tree.map(place, batch, axes, is_leaf=lambda x: isinstance(x, np.ndarray))
