"""What we measure ourselves and others by; one table per command."""

from core.extras import require_extra

require_extra("torch", ("bench.decode", "bench.train", "bench.train_mirror"))
require_extra("eval", ("bench.eval",))
