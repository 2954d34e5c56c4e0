"""Prove what a module's own forward computes, and find its blocks, without running or patching anything.

The evaluator walks the forward's syntax tree into a graph. Each class below builds on the one after it:

- ``evaluator``: the entry: walks a function once, with a symbol for each tensor.
- ``statements``, ``expressions``: what each kind of statement and expression does.
- ``symbols``: the graph, and the arguments of its nodes.

They share

- ``source``: the syntax tree of a function, proven to be what its compiled code was made from.
- ``frames``, ``values``: the names of a function being walked, and what stands for the values that are not tensors.
- ``calls``: what a call means; ``builtin_calls``: calls of Python's own functions; ``access``: attributes, elements, iteration.
- ``pure``: what a forward may call and still be proven pure.
- ``reading``: reads of modules, objects and containers, each with a guard.
- ``guards``: the check that everything that was read is unchanged.

The graph is then rewritten for a forward plan (:mod:`lora_edge.nn.forward_plan`):

- ``find_blocks``: finds the blocks and replaces each by one call.
- ``layout``: keeps channels-last maps between blocks and gives stock strides to all other code, which ``stock_strides`` finds.
"""
