"""Training on several processes: which features and which tokens each of them has, and what they send each other."""

from fastsae.distributed.groups import Group, Traffic
from fastsae.distributed.mesh import Groups, groups_of
from fastsae.distributed.sharding import Sharding

__all__ = ["Group", "Groups", "Sharding", "Traffic", "groups_of"]
