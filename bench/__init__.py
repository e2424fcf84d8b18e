"""What we measure ourselves and others by; one table per command."""

from core.extras import require_extra

TORCH = ("decode", "devices", "eval", "finetune", "ladder", "train", "train_mirror")
require_extra("torch", [f"bench.{name}" for name in TORCH])
require_extra("eval", ("bench.eval",))
