"""How a process computes: device, threads, determinism, and the fingerprint of what decides its bits."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from cluster.errors import ConfigError

WORKSPACE = ":4096:8"
"""cuBLAS workspace with which its matrix products are deterministic."""

MALLOC_OPTIONS = {-4: 0, -1: 2**31 - 1, -2: 64 << 20}
"""glibc's M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD: map no tensor singly, give no memory back, grow by 64 MiB."""

ARM_FIELDS = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features")


def prepare(device: str, threads: int) -> torch.device:
    """Make this process compute deterministically; call before anything touches CUDA.

    One thread count for every worker: another one gives other bits. On CUDA: deterministic algorithms only (an
    operation that has none is refused by name), no cuDNN benchmarking, no TF32.

    Raises:
        ConfigError: ``cuda`` is asked for and there is none.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.set_num_threads(threads)
    _keep_freed_memory()
    torch.use_deterministic_algorithms(True)
    # Deterministic mode would fill every new tensor with NaN first: for finding bugs, at a cost in every operation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device cuda: this worker sees no CUDA device; use --device cpu or --device auto")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensors instead of returning it to the kernel.

    Every large temporary would otherwise be mapped and zeroed page by page: 10–30 % of an inner loop's time. Other C
    libraries have no such knob and need none of this.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in MALLOC_OPTIONS.items():
            libc.mallopt(option, value)


@cache
def _cpu() -> str:
    """CPU model and vector instruction sets, as the kernel names them."""
    try:
        return cpu_name(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        return f"{platform.processor()} {platform.machine()}"


def cpu_name(cpuinfo: str) -> str:
    """Model and vector instruction sets of the first CPU in the text of ``/proc/cpuinfo``."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "flags" not in fields:  # Arm names its CPUs by other fields
        return " ".join(f"{key} {fields[key]}" for key in ARM_FIELDS if key in fields)
    flags = [flag for flag in fields["flags"].split() if flag.startswith(("avx", "amx", "fma", "sse4"))]
    keys = ("vendor_id", "cpu family", "model", "model name")
    return " ".join([fields.get(key, "") for key in keys] + sorted(flags))


def versions() -> dict[str, str]:
    """What must be of one version on all nodes; torch has a place in the fingerprint besides."""
    return {name: version(name) for name in ("metafleet", "ray", "torch")}


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
