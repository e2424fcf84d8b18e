"""Growing a trained model in depth."""

from core.errors import quiet_imports

quiet_imports()
