"""PyTorch and Hugging Face: a package of its own extra, so that training needs neither."""

import importlib.util
import sys

# While `python -m port_torch.convert` imports this package, argv[0] is "-m".
if sys.argv[:1] == ["-m"] and not all(
    map(importlib.util.find_spec, ("torch", "safetensors", "transformers"))
):
    print(
        "error: this command needs PyTorch, safetensors and transformers: "
        "pip install -c constraints.txt -e '.[torch]'",
        file=sys.stderr,
    )
    sys.exit(2)
