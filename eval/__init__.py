"""Evaluation as the field does it: a package of its own extra, so that training needs none of it."""

from core.extras import require_extra

require_extra("eval")
