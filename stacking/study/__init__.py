"""Studies: many runs of training, and what they say together."""
