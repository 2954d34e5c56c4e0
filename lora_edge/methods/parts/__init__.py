"""What methods are made of.

- ``backbone``: freeze and unfreeze the model, move BatchNorm's statistics to the target.
- ``facts``: what is learnt of the base before training: dense gradients, second moments, live channels.
- ``channel_pairs``: convolutions whose channels only one other convolution reads.
- ``factors``, ``hadamard``, ``quantisation``: singular vectors, the Walsh-Hadamard transform, rounding to few bits.
"""
