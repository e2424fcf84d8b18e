"""Evaluation as the field does it: a package of its own extra, so that training needs none of it."""

import importlib.util
import os
import sys

# While `python -m eval.run` imports this package, argv[0] is "-m".
if sys.argv[:1] == ["-m"] and not importlib.util.find_spec("lm_eval"):
    print(
        "error: this command needs lm-eval: pip install -c constraints.txt -e '.[eval]'",
        file=sys.stderr,
    )
    sys.exit(2)

# Before lm-eval is imported: progress is told once, by eval.progress.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
