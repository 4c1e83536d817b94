from __future__ import annotations

import pytest

from sft_lightning.estimation.devices import PEAKS, peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Some GPU A1000", None),
        ("TITAN V", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_cuda_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_every_peak_names_its_source() -> None:
    assert all(peak.tflops > 0 and peak.source for peak in PEAKS.values())
