"""How a process computes: device, threads, determinism, and the fingerprint of what decides its bits."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from cluster.errors import ConfigError

WORKSPACE = ":4096:8"
"""cuBLAS workspace with which its matrix products are deterministic."""


def prepare(device: str, threads: int) -> torch.device:
    """Make this process compute deterministically; call before anything touches CUDA.

    One thread count for every worker: another one gives other bits. On CUDA: deterministic algorithms only (an
    operation that has none is refused by name), no cuDNN benchmarking, no TF32.

    Raises:
        ConfigError: ``cuda`` is asked for and there is none.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device cuda: this worker sees no CUDA device; use --device cpu or --device auto")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")


@cache
def _cpu() -> str:
    """CPU model and vector instruction sets, as the kernel names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.processor()} {platform.machine()}"
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = [flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "amx", "fma", "sse4"))]
    keys = ("vendor_id", "cpu family", "model", "model name")
    return " ".join([fields.get(key, "") for key in keys] + sorted(flags))


def fingerprint_detail(device: torch.device) -> dict[str, str]:
    """The class of hardware and software within which the same work gives the same bits, in words."""
    detail = {
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        detail["gpu"] = torch.cuda.get_device_name(device)
        detail["cuda"] = f"{torch.version.cuda} cudnn {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    return detail


def fingerprint(detail: Mapping[str, str]) -> str:
    """A short name of a fingerprint: the first 16 hex digits of its SHA-256."""
    text = "\n".join(f"{name}={detail[name]}" for name in sorted(detail))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
