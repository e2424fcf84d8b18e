"""What every part shares: no part of it imports another package of ours, nor PyTorch."""

from core.errors import quiet_imports

quiet_imports()
