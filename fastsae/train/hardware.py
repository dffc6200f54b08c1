"""How fast machines are that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """The rates of one process's device, and of what connects it with others.

    Attributes:
        flops_16: Operations per second of products in 16 bits.
        flops_32: The same in float32, without TF32.
        memory_bandwidth: Bytes per second of its memory.
        link: Bytes per second that it sends to a process on the same machine.
        network: Bytes per second that it sends to another machine.
        per_machine: Processes on a machine.
        memory: Bytes of its memory; None where it is not known.
    """

    flops_16: float
    flops_32: float
    memory_bandwidth: float
    link: float
    network: float
    per_machine: int = 8
    memory: float | None = None


# From the makers' data sheets: dense products, NVLink in one direction, and one network card for each GPU, as in DGX machines
HARDWARE = {
    "a100": Hardware(312e12, 19.5e12, 2.04e12, 300e9, 25e9, memory=80e9),
    "h100": Hardware(989e12, 67e12, 3.35e12, 450e9, 50e9, memory=80e9),
    "h200": Hardware(989e12, 67e12, 4.8e12, 450e9, 50e9, memory=141e9),
}
