"""Training in JAX, and its commands."""

from core.errors import quiet_imports

quiet_imports()
