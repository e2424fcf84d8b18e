"""A trace by PyTorch's profiler, for Perfetto, and the operations in it."""

from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from core.run.profiling import Operation


class Trace:
    """Of what runs between its making and `stop`."""

    def __init__(self, folder: Path, device: torch.device):
        self._folder, self._on_gpu = folder, device.type == "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        gpu = [ProfilerActivity.CUDA] if self._on_gpu else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._profile.start()

    def stop(self) -> list[Operation]:
        """Writes trace.json.gz; gives the kernels of a GPU, or the operations of a CPU."""
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._folder / "trace.json.gz"))
        kind = DeviceType.CUDA if self._on_gpu else DeviceType.CPU
        found = []
        for event in self._profile.key_averages():
            if event.device_type == kind:
                spent = event.self_device_time_total if self._on_gpu else event.self_cpu_time_total
                found.append(Operation(event.key, event.count, spent / 1e6))
        return found
