"""What every part shares: no part of it imports another package of ours, nor PyTorch."""

from core.errors import open_missing_streams, quiet_imports
from core.extras import BASE, require_extra

open_missing_streams()
quiet_imports()
require_extra(BASE)
