"""Which frozen suffix a layer adapts in: the directions that its update may use, and at which rank.

- ``weight``: suffixes from the TT-SVD of a weight (the paper's), of a gradient or of other rows; their norms.
- ``inputs``: the principal directions of what a layer reads.
- ``gradient``: the leading directions of the weight gradient.
- ``samples``: the few target samples that ``inputs`` and ``gradient`` use.
- ``budget``: ranks for a budget of trained parameters.
- ``choose``: puts these together for ``adapt``.
"""
