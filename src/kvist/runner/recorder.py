"""CUDA graphs of what a step starts: recorded once, replayed in one launch.

What is recorded reads and writes the same addresses in every replay. Called by the runner's graphs
of decode steps and of steps with prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recording:
    """A graph and where it leaves what it computes."""

    replay: Callable[[], Any]
    out: Tensor


class Recorder:
    """Makes recordings that share the memory of what they compute on the way.

    Args:
        device: where there are no CUDA graphs (Triton's interpreter), a replay runs it anew.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is recorded yet."""
        self.device = device
        self._memory: Any = None
        # One stream for all: memory is given back to the stream that it was taken on.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.inference_mode(False)
    @torch.no_grad()
    def record(self, run: Callable[[], Tensor]) -> Recording:
        """Run it once, for its kernels to be compiled, and record it."""
        if self._stream is None:
            out = run()

            def again() -> None:
                out.copy_(run())

            return Recording(again, out)
        stream, here = self._stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            run()
            try:
                recording = self._capture(run)
            except torch.OutOfMemoryError:
                # What torch keeps for later it gives back when memory is short, but not meanwhile.
                torch.cuda.empty_cache()
                recording = self._capture(run)
        here.wait_stream(stream)
        return recording

    def _capture(self, run: Callable[[], Tensor]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph, which collects garbage and empties caches first.
        graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
        try:
            out = run()
        finally:
            graph.capture_end()
        self._memory = graph.pool()
        return Recording(graph.replay, out)
