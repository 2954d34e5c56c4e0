"""How a model's own forward becomes a plan of fused blocks, without running or patching anything.

- ``source``: the syntax tree of a function, proven to be what its compiled code was made from.
- ``pure``: what a forward may call and still be proven pure.
- ``reading``: reads of modules, objects and containers, each with the guard that makes it safe to rely on.
- ``guards``: whether everything that was read is still the same.
- ``evaluator``: walks a forward's syntax tree once with a symbol for each tensor, into a graph. It builds on ``statements``,
  ``expressions``, ``symbols``, ``frames`` and ``values``, in this order.
- ``calls``: what a call means; ``built_in``: a call of Python's own functions; ``items``: attributes, elements and iteration.
- ``fuser``: finds the blocks in the graph.
- ``layout``: keeps channels-last maps between blocks and hands stock strides to everything else; ``stock`` finds these.
- ``head``: which linear layer is the classifier.
"""
