"""How much memory a device has left."""

from pathlib import Path

import torch


def available_memory(device: torch.device) -> int:
    """Bytes that could be allocated now: free on a GPU, available on a host.

    A container's own limit (cgroup v2) counts where it is below the machine's.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _meminfo("MemAvailable") or 4 << 30  # no /proc (macOS): a modest guess
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def _meminfo(name: str) -> int | None:
    """A field of /proc/meminfo in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[name].split()[0]) * 1024 if name in fields else None
