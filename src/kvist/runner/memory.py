"""How much memory a device has left."""

from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int:
    """Bytes that could be allocated now: free on a GPU, available on a host.

    A container's own limit (cgroup v2) counts where it is below the machine's. Files that the
    kernel keeps only as long as nobody wants the room count as free, as they do in MemAvailable.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _meminfo("MemAvailable") or 4 << 30  # no /proc (macOS): a modest guess
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used -= int(stat["inactive_file"])
        return free if limit == "max" else min(free, max(0, int(limit) - used))
    except (OSError, ValueError, KeyError):
        return free


def _meminfo(name: str) -> int | None:
    """A field of /proc/meminfo in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[name].split()[0]) * 1024 if name in fields else None
