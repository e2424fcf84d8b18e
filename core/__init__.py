"""What every part shares: no part of it imports another package of ours, nor PyTorch."""

from core.errors import quiet_imports
from core.extras import BASE, require_extra

quiet_imports()
require_extra(BASE)
