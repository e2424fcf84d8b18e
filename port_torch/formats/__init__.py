"""The formats that weights are imported from, one module each.

A module has NAME, which the lineage of what is imported keeps; `recognizes(path)`, which only looks at what
is there; and `read(path, ...)`, which gives an `Imported` or raises a UserError.
"""
