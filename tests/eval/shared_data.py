"""The full sets, which lie beside the repository where the project is worked on, and nowhere else."""

from pathlib import Path

import pytest

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "arc").is_dir(), reason=f"needs the full evaluation sets, which are not in {DATA}"
)
