"""Peaks of GPUs as data, with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Peak(NamedTuple):
    """What a GPU computes at most in the 16-bit type that it trains in, without structured sparsity."""

    tflops: float
    """10¹² operations per second, dense."""

    source: str
    """NVIDIA's document. Where it states figures with sparsity, they are halved here."""


PEAKS: Mapping[str, Peak] = {
    "V100": Peak(125.0, "V100 datasheet (2020), SXM2, float16"),
    "T4": Peak(65.0, "T4 datasheet (2019), float16"),
    "A10": Peak(125.0, "A10 datasheet (2022)"),
    "A10G": Peak(70.0, "AWS EC2 G5: NVIDIA A10G"),
    "A30": Peak(165.0, "A30 datasheet (2022)"),
    "A40": Peak(149.7, "A40 datasheet (2022)"),
    "RTX A6000": Peak(154.8, "RTX A6000 datasheet (2022)"),
    "A100": Peak(312.0, "A100 datasheet (2022)"),
    "A800": Peak(312.0, "A800 datasheet (2022)"),
    "RTX 3090": Peak(71.0, "GA102 whitepaper (2021), float32 accumulation"),
    "RTX 4090": Peak(165.2, "Ada whitepaper (2023), float32 accumulation"),
    "RTX 5090": Peak(209.5, "RTX Blackwell whitepaper (2025), float32 accumulation"),
    "L4": Peak(121.0, "L4 datasheet (2023)"),
    "L40": Peak(181.0, "L40 datasheet (2023)"),
    "L40S": Peak(362.0, "L40S datasheet (2023)"),
    "H20": Peak(148.0, "H20 datasheet (2023)"),
    "H100": Peak(989.4, "H100 datasheet (2023), SXM5"),
    "H100 PCIe": Peak(756.0, "H100 datasheet (2023), PCIe"),
    "H100 NVL": Peak(835.5, "H100 datasheet (2024), NVL"),
    "H800": Peak(989.4, "H800 datasheet (2023), SXM5"),
    "H200": Peak(989.4, "H200 datasheet (2024), SXM"),
    "H200 NVL": Peak(835.5, "H200 datasheet (2024), NVL"),
    "GH200": Peak(989.4, "GH200 datasheet (2024)"),
    "B200": Peak(2250.0, "DGX B200 datasheet (2024), an eighth of the system"),
    "GB200": Peak(2500.0, "GB200 NVL72 datasheet (2024), one of 72 GPUs"),
}
"""Words of the CUDA device name → peak; of several names that match, the longest counts."""


def peak_tflops(device_name: str) -> float | None:
    """Return the peak of a GPU by its CUDA device name, in 10¹² operations per second; `None` if it is unknown."""
    words = f" {device_name.replace('-', ' ').replace('/', ' ')} "
    found = [name for name in PEAKS if f" {name} " in words]
    return PEAKS[max(found, key=len)].tflops if found else None
