"""Evaluation as the field does it: a package of its own extra, so that training needs none of it."""

import importlib.util
import sys

# While `python -m eval.run` imports this package, argv[0] is "-m".
if sys.argv[:1] == ["-m"] and not importlib.util.find_spec("lm_eval"):
    print(
        "error: this command needs lm-eval: pip install -c constraints.txt -e '.[eval]'",
        file=sys.stderr,
    )
    sys.exit(2)
