"""What a device can do, as far as a choice hangs on it: attention kernels, eight-bit arithmetic, its peak."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

EXACT_ATTENTION = frozenset(
    {
        "flash",
        "flash_hub",
        "flash_4_hub",
        "flash_varlen",
        "flash_varlen_hub",
        "_flash_3",
        "_flash_3_hub",
        "_flash_3_varlen_hub",
        "_flash_varlen_3",
        "aiter_fa2_hub",
        "flex",
        "native",
        "_native_cudnn",
        "_native_efficient",
        "_native_flash",
        "_native_math",
        "xformers",
    }
)
"""Back ends that compute the same attention in another order: pixels differ by rounding, as among batch sizes."""

FP8_FROM = (8, 9)
"""First compute capability with matrix units for eight-bit floats (Ada, then Hopper)."""


@dataclass(frozen=True, slots=True)
class Peak:
    """Dense matrix products, without sparsity, accumulated in fp32.

    Attributes:
        half: TFLOP/s in bf16 and fp16.
        fp8: TFLOP/s in fp8; None where the device has no units for it.
    """

    half: float
    fp8: float | None = None


PEAKS: Mapping[str, Peak] = {
    # NVIDIA's data sheets; they print twice as much where they count sparsity
    "B200": Peak(2250.0, 4500.0),
    "H200": Peak(989.4, 1978.9),
    "H100 NVL": Peak(835.0, 1670.0),
    "H100 PCIe": Peak(756.0, 1513.0),
    "H100": Peak(989.4, 1978.9),
    "H800": Peak(989.4, 1978.9),
    "GH200": Peak(989.4, 1978.9),
    "L40S": Peak(362.05, 733.0),
    "L40": Peak(181.05, 362.0),
    "L4": Peak(121.0, 242.5),
    "A100": Peak(312.0),
    "A800": Peak(312.0),
    "A40": Peak(149.7),
    "A30": Peak(165.0),
    "A10": Peak(125.0),
    "RTX 6000 Ada": Peak(364.2, 728.5),
    "RTX 5090": Peak(209.5, 419.0),
    "RTX 4090": Peak(165.2, 330.3),
    "RTX 3090": Peak(71.0),
    "T4": Peak(65.0),
    "V100": Peak(125.0),
}
"""Peaks by what the device's name holds as whole words; the longest match counts."""


def peak_of(name: str) -> Peak | None:
    """The peak of a device by its name (``NVIDIA H100 80GB HBM3``); None for one that is not in the table."""
    words = f" {' '.join(re.findall(r'[A-Za-z0-9]+', name))} "
    matches = [key for key in PEAKS if f" {key} " in words]
    return PEAKS[max(matches, key=len)] if matches else None


def compute_capability(torch: Any, device: str) -> tuple[int, int] | None:
    """CUDA's number for what a device can do, such as (9, 0) for Hopper; None for other devices."""
    if not device.startswith("cuda") or getattr(torch.version, "hip", None):
        return None
    return torch.cuda.get_device_capability(device)


def attention_candidates(capability: tuple[int, int] | None) -> tuple[str, ...]:
    """Names of attention back ends to try, best first; ``native`` is last and works everywhere.

    Kernels that would have to be downloaded are not among them. Before Hopper torch's own choice is already the best
    that is installed.

    Args:
        capability: the device's.
    """
    if capability is None or capability < (9, 0):
        return ("native",)
    if capability < (10, 0) and importlib.util.find_spec("flash_attn_interface") is not None:
        return ("_flash_3", "_native_cudnn", "native")
    return ("_native_cudnn", "native")


def has_fp8(capability: tuple[int, int] | None) -> bool:
    """Whether the device multiplies eight-bit floats and torchao, which makes use of it, is installed."""
    return capability is not None and capability >= FP8_FROM and importlib.util.find_spec("torchao") is not None


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16 (AMX or AVX-512 on x86, BF16 on Arm); False where nothing tells."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().lower().split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16", "bf16"})


def usable_cpus() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def be_deterministic(torch: Any) -> Callable[[], None]:
    """Choose deterministic kernels where there are any; returns what undoes it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False

    def restore() -> None:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark

    return restore
