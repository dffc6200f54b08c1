"""The half of an SAE that knows of other processes: which features are here, and whose ops compute with all of them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

import fastsae_kernels as kernels
from fastsae.distributed import Sharding, groups_of

DRAWN_ROWS = 4096  # rows of initial weights that are drawn together where a process keeps some of them


class SharedFeatures(nn.Module):
    """A module whose features one process holds, or several, each of them a part.

    Attributes:
        sharding: Which features this process holds; None where no other process takes part.
    """

    architecture: ClassVar[str]
    d_in: int
    d_sae: int
    k: int | None
    W_dec: Any
    b_dec: Any
    sharding: Sharding | None

    def _share_over(self, mesh: Any) -> int:
        """Takes a mesh of processes, or None; returns how many features this process is to hold."""
        self.sharding = None
        if mesh is None:
            return self.d_sae
        sharding = Sharding(self.d_sae, groups_of(mesh))
        self.use_sharding(sharding)
        return sharding.end - sharding.start

    def use_sharding(self, sharding: Sharding) -> None:
        """Lets the ops compute with the features of all processes; the parameters must be this process's parts.

        Raises:
            ValueError: The SAE has a `k` beside its threshold, for which one process must hold all features.
        """
        if sharding.is_shared:
            self._check_shardable()
        self.sharding = sharding

    def _check_shardable(self) -> None:
        if self.k is not None:
            raise ValueError(
                f"k: expected None where processes share the features of a {self.architecture} SAE, got {self.k}; topk and "
                "batchtopk SAEs can be shared"
            )

    @property
    def d_shard(self) -> int:
        """Number of features that this process holds: `d_sae`, unless several processes share them."""
        return int(self.W_dec.shape[0])

    @property
    def _is_shared(self) -> bool:
        """Whether other processes hold some of the features."""
        return self.sharding is not None and self.sharding.is_shared

    @property
    def _ops(self) -> Any:
        """What runs autoencode, encode and decode: the kernels alone, or `Sharding` where there are several processes."""
        return self.sharding or kernels

    def _pre_bias(self) -> Tensor:
        """`b_dec` where it is subtracted from x; its gradient is then summed over the processes that share the features."""
        b_dec: Tensor = self.b_dec
        return b_dec if self.sharding is None else self.sharding.share(b_dec)

    def _draw_decoder_(self) -> None:
        """Draws the rows of all features in order, and keeps this process's: on a CPU any number of processes draws the same."""
        if self.sharding is None:
            nn.init.kaiming_uniform_(self.W_dec, a=5**0.5)
            return
        first, end = self.sharding.start, self.sharding.end
        for start in range(0, self.d_sae, DRAWN_ROWS):
            rows = self.W_dec.new_empty(min(DRAWN_ROWS, self.d_sae - start), self.d_in)
            nn.init.kaiming_uniform_(rows, a=5**0.5)
            low, high = max(first, start), min(end, start + len(rows))
            if low < high:
                self.W_dec[low - first : high - first] = rows[low - start : high - start]
