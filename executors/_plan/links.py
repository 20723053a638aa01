"""What links between GPUs carry in a second, in each direction.

Data sheets of NVLink give both directions together; half of it is one direction. Networks have one adapter a GPU, and
name bits in one direction. What is here are raw rates: none allows for headers of packets, and none is measured.
"""

from __future__ import annotations

from typing import NamedTuple

GB, GBIT = 1e9, 1e9 / 8


class Link(NamedTuple):
    """A link of one GPU.

    Attributes:
        name: as it is asked for.
        title: as it is sold.
        rate: bytes in a second, in each direction.
        source: of the figure.
    """

    name: str
    title: str
    rate: float
    source: str


_ADAPTER = (
    "NVIDIA MLNX_OFED 5.9 release notes for DGX H100 (ConnectX-7: InfiniBand up to NDR, Ethernet up to 400GbE); "
    "one adapter of 400 Gb/s for each GPU: README of DeepEP (about 50 GB/s), MLCommons inference v4.1, "
    "H200-SXM-141GBx8"
)
INSIDE = {
    link.name: link
    for link in (
        Link("nvlink3", "NVLink 3 (A100)", 300 * GB, "A100 data sheet (600 GB/s in both directions); from memory"),
        Link(
            "nvlink4",
            "NVLink 4 (H100, H200)",
            450 * GB,
            "NVIDIA blog, Introducing NVIDIA HGX H100 (900 GB/s in both directions, between any two of eight at once); "
            "MLCommons inference v4.1, H200-SXM-141GBx8 (18 links, 900 GB/s)",
        ),
        Link(
            "nvlink5",
            "NVLink 5 (B200)",
            900 * GB,
            "NVIDIA, NVLink and NVLink Switch (18 links of 100 GB/s, 1.8 TB/s in both directions)",
        ),
    )
}
ACROSS = {
    link.name: link
    for link in (
        Link("infiniband-ndr", "InfiniBand NDR, 400 Gb/s", 400 * GBIT, _ADAPTER),
        Link("ethernet-400g", "Ethernet, 400 Gb/s", 400 * GBIT, _ADAPTER),
        Link("ethernet-100g", "Ethernet, 100 Gb/s", 100 * GBIT, "the name says it (IEEE 802.3, 100GBASE)"),
    )
}
