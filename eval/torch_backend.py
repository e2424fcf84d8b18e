"""Scoring with the PyTorch mirror: a copy of the model on every device, batches dealt out in turn."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from core.sampling import Sampling
from eval.batching import BUDGET, CPU_BUDGET, Batch, Scores, chunks
from port_torch.model import Decoder
from port_torch.sampling import stream

CHUNK = 2048  # positions whose logits are held at once per device


class TorchBackend:
    """Models of port_torch.model, one per device."""

    compiled = False
    n_devices = 1  # that a batch is split over: each device works on batches of its own

    def __init__(self, models: list[Decoder]):
        """models: the same on every device to be used."""
        self.models = models
        self.context = models[0].config.context
        self.budget = CPU_BUDGET if models[0].embed.weight.device.type == "cpu" else BUDGET
        self._turn = itertools.cycle(models)

    def describe(self) -> str:
        """What computes, for the user."""
        device = self.models[0].embed.weight.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return f"PyTorch on {len(self.models)} x {name}"

    @torch.inference_mode()
    def start(self, batch: Batch) -> Any:
        """See `eval.batching.Backend`. Work on a GPU is queued; this does not wait for it."""
        model = next(self._turn)
        device = model.embed.weight.device
        tokens, place, target = (
            torch.from_numpy(array).to(device, torch.long)
            for array in (batch.tokens, batch.place, batch.target)
        )
        hidden = model(tokens).flatten(0, 1)
        parts = []
        for part in chunks(len(place), CHUNK):
            scores = model.logits(hidden[place[part]])
            picked = scores.gather(1, target[part, None])[:, 0]
            parts.append((picked - scores.logsumexp(-1), scores.argmax(-1) == target[part]))
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def finish(self, started: Any) -> Scores:
        """See `eval.batching.Backend`."""
        return Scores(*(column.cpu().numpy() for column in started))

    def stream(
        self, prompts: list[list[int]], sampling: Sampling, max_new_tokens: int, eos: int | None
    ) -> Iterator[list[int | None]]:
        """See `eval.batching.Backend`."""
        return stream(self.models[0], prompts, sampling, max_new_tokens, eos)
