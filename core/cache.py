"""Where is kept what can be made again."""

import os
from pathlib import Path

VARIABLE = "MTLM_CACHE"
CACHE = Path(os.environ.get(VARIABLE, Path.home() / ".cache" / "mtlm"))
"""Prepared text, compiled programs, kernels."""
