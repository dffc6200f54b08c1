"""Training on several processes: which features and which tokens each of them has, and what they send each other.

features  the group of processes that share an SAE: each holds other features of it, and all see the same tokens
data      the group of processes that hold the same features, and see different tokens
world     all processes of a run: groups of `features`, one after the other
share     processes share the features of an SAE where each of them holds some of them
part      what one process has of a tensor, of a batch, or of the dialogues; opposite: whole
placed    SAEs are placed where each is trained by one group of `features`, and not by all of them
"""

from fastsae.distributed.groups import Group, Traffic
from fastsae.distributed.mesh import Groups, groups_of
from fastsae.distributed.sharding import Sharding

__all__ = ["Group", "Groups", "Sharding", "Traffic", "groups_of"]
