"""PyTorch and Hugging Face: a package of its own extra, so that training needs neither."""

from core.extras import require_extra

require_extra("torch")
