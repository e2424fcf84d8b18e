"""The guard's limits where the mixture of a run's data changes.

Another mixture has losses of another level. The guard's window holds those of the mixture before, and would
take the first updates of a phase for spikes; so for some updates only values that are not finite are refused.
By then the window holds both levels, and so a wide spread.
"""

import dataclasses
from typing import Any

from core.data.mixture import phases_of
from core.run.guard import EARLY, GuardConfig


def phase_limits(guard: GuardConfig, data: dict[str, Any], first: int, batch: int) -> GuardConfig:
    """The guard's limits for the batch whose first sequence has the index `first`.

    data: what a manifest or config.json says of the run's data.
    """
    later = phases_of(data)[1:]
    new = any(phase.first < first + batch <= phase.first + EARLY * batch for phase in later)
    return dataclasses.replace(guard, sigma=0.0) if new else guard
