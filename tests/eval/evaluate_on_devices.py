"""Run by test_batching.py in a process of 8 devices: evaluate_on_devices.py RUN DATA EXPECTED."""

import json
import sys
from pathlib import Path

import numpy as np

from tests.checks import require
from tests.eval.conftest import evaluate

run, data, expected = map(Path, sys.argv[1:])
found = evaluate(run, data)
for task, rows in json.loads(expected.read_text()).items():
    for one, eight in zip(rows, found.questions[task], strict=True):
        logprobs = [row.get("logprobs", row.get("logprob")) for row in (one, eight)]
        # Other batches, so another order of summation: a few roundings of 2e-6 a token.
        np.testing.assert_allclose(*logprobs, rtol=1e-6, atol=2e-4)
        if "acc" in one and task != "truthfulqa_mc2":
            require(one["acc"] == eight["acc"], task, one, eight)
backend = found.model.backend_model
require(backend.mesh.size == backend.n_devices == 8, backend.mesh, backend.n_devices)
print(f"{backend.n_devices} devices")
