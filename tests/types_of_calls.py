"""Every call in the tests checks the types in its signature, and the shapes where there are any."""

from pathlib import Path

import beartype
import beartype.claw
import jaxtyping

ROOT = Path(__file__).parents[1]
# An int will do for a float, as Python has it.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
TYPES = beartype.BeartypeConf(is_pep484_tower=True, claw_is_pep526=False)


def check_types() -> None:
    """From here on what is imported of core, and of the packages on it that compute, checks its calls.

    Shapes are checked in files that have them in their signatures: jaxtyping binds the arguments of a call
    anew and looks at them twice, which takes some 20 times as long as beartype alone.
    """
    shaped = [path for path in ROOT.glob("core/**/*.py") if "from jaxtyping import" in path.read_text()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in shaped]
    beartype.claw.beartype_package("core", conf=TYPES)
    jaxtyping.install_import_hook(
        [*names, "stacking.transform", "train_tpu.step", "train_tpu.optimizer"], CHECKER
    )
    import core.chat
    import core.config
    import core.data.examples
    import core.leaves

    core.leaves.ModelConfig = core.config.ModelConfig  # which their hints name without importing it
    core.data.examples.ChatFormat = core.chat.ChatFormat
