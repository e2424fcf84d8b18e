"""One file for each kernel: schema, plain PyTorch, fake, what allocates for it, autograd.

Importing the package declares every op, `torch.ops.mtlm.NAME`.
"""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
