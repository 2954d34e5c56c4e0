"""How a model's own forward becomes a plan of fused blocks, without running or patching anything.

source.py      the syntax tree of a function, proven to be what its compiled code was made from
pure.py        what a forward may call and still be proven pure
reading.py     reads of modules, objects and containers, each with the guard that makes it safe to rely on
guards.py      whether everything that was read is still the same
evaluator.py   walks a forward's syntax tree once with a symbol for each tensor, into a graph
fuser.py       finds the blocks in the graph
layout.py      keeps channels-last maps between blocks and hands stock strides to everything else
"""
