"""`python -m train_tpu.inspect RUN`: the layers of a run over its updates, and what looks unhealthy."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from core import cli
from core.errors import UserError, run_command
from core.folders import require_place
from core.run.folder import newest_manifest, require_run
from core.run.heat_maps import plot_heat_maps
from core.run.symptoms import find_symptoms
from core.run.watching import read_watched

PICTURE = "watch.png"  # in the run folder


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """Draw what --watch-every measured of the layers of a run, of either engine, and name what looks
    unhealthy, with the rule and the figures. The run may still be training."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    out: Path | None = None
    """Where the picture goes, a .png. Default: watch.png in the run folder."""


def main() -> int:
    """The command; 0 when the picture is drawn."""
    config = cli.parse(InspectConfig, prog="python -m train_tpu.inspect")
    run, out = config.run, config.out or config.run / PICTURE
    require_run(run)
    if out.suffix != ".png" or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: give the name of a .png in a folder that exists")
    require_place(out.parent)
    watched = read_watched(run)
    manifest = newest_manifest(run)
    grown = manifest.last_growth if manifest else None
    symptoms = find_symptoms(watched, grown)
    first, last, n = watched.steps[0], watched.steps[-1], len(watched.steps)
    unhealthy = sorted({symptom.name for symptom in symptoms})
    title = f"{run.name}: updates {first} to {last}{': ' * bool(unhealthy)}{', '.join(unhealthy)}"
    plot_heat_maps(watched, title, out, grown["step"] if grown else None)
    print(f"{n} watched updates of {run}, {first} to {last}, {len(watched.names) - 2} layers: {out}")
    for symptom in symptoms:
        print(symptom)
    if not symptoms:
        print("nothing looks unhealthy")
    return 0


if __name__ == "__main__":
    run_command(main)
