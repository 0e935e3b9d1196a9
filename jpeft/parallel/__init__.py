"""Fine-tuning on many devices: meshes, where arrays lie, what waits in the host's memory, and what a pod will need."""

from jpeft.parallel.layout import Layout, shard, shard_params
from jpeft.parallel.mesh import make_mesh, parse_mesh

__all__ = ["Layout", "make_mesh", "parse_mesh", "shard", "shard_params"]
