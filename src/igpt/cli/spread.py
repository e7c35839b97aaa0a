"""The options of commands whose work several machines can share."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from igpt.cli.parser import Options
from igpt.errors import InputError

if TYPE_CHECKING:
    from igpt.data.ray_pool import RayCluster


class SpreadOptions(Options):
    """The options of commands whose work several machines can share."""

    engine: Literal["local", "ray"] = Field(
        "local", description="where the work is done: on this machine, or on a Ray cluster"
    )
    address: str | None = Field(
        None,
        description="HOST:PORT of the Ray cluster, or auto for the one that this machine is part "
        "of; by default $RAY_ADDRESS, or Ray is started on this machine",
    )
    shard: str | None = Field(
        None, description="i/n makes only the i-th of n parts, OUT.i-of-n, for n machines"
    )
    merge: bool = Field(False, description="verify the parts of OUT and merge them")

    def cluster(self) -> "RayCluster | None":
        """Return the Ray cluster of --engine ray.

        Raises:
            InputError: the flags cannot be combined.
        """
        from igpt.data.ray_pool import RayCluster

        if self.shard and self.merge:
            raise InputError("--shard makes one part and --merge merges all; give one of them")
        if self.engine == "local":
            if self.address:
                raise InputError("--address is of a Ray cluster; add --engine ray")
            return None
        if self.shard or self.merge:
            raise InputError(
                "--engine ray does the work in one command; leave --shard and --merge out"
            )
        return RayCluster(self.address)
