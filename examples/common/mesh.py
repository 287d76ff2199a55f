"""Where parameters and batches lie on a mesh of devices: data, fsdp and tensor parallel."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Inputs and outputs of each matrix; what ends a block splits its inputs, so that a block needs one
# sum over `tensor`.
SPECS: dict[str, tuple[str | None, str | None]] = {
    "o_proj": ("tensor", "fsdp"),
    "down_proj": ("tensor", "fsdp"),
    "embed_tokens": ("tensor", "fsdp"),
}
OTHERS = ("fsdp", "tensor")


def parse(text: str) -> Mesh:
    """The mesh that `data=2,fsdp=2,tensor=2` asks for; axes left out have one device."""
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh takes data=N,fsdp=N,tensor=N with each N at least 1, got {text!r}"
            )
        sizes[name] = int(size)
    if math.prod(sizes.values()) != jax.device_count():
        raise ValueError(
            f"--mesh {text} is for {math.prod(sizes.values())} devices, there are"
            f" {jax.device_count()}"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_shardings(mesh: Mesh, params: Any) -> Any:
    """Matrices over `fsdp` and `tensor` along their last two axes, all else on every device."""

    def sharding(path, x):
        entries: list[str | None] = [None] * x.ndim
        if x.ndim > 1 and not path_has(path, "norm"):
            axes = next((SPECS[name] for name in SPECS if path_has(path, name)), OTHERS)
            # An axis that the devices do not divide stays whole.
            entries[-2:] = [
                a if a is not None and size % mesh.shape[a] == 0 else None
                for a, size in zip(axes, x.shape[-2:], strict=True)
            ]
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree.map_with_path(sharding, params)


def path_has(path: jax.tree_util.KeyPath, name: str) -> bool:
    """Whether a component of the path contains the name."""
    return name in jax.tree_util.keystr(path, simple=True, separator="/")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Windows over all devices that do not share a matrix's outputs."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
