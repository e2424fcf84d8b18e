"""An update of a run made again: compiled, layer by layer, and as a branch with something changed."""
