"""The modules of an adapted model: adapted convolutions, lean layers around them, and forwards that run with fused blocks.

- ``layers``: ``LoRAEdgeConv1d/2d/3d``, convolutions with a trained core beside their frozen weight.
- ``reparametrised``: convolutions whose weight is computed, for the LoRA-like methods.
- ``lean``: activations, max-pools, dropout and convolutions that save little or nothing for backward.
- ``frozen_bn``: BatchNorm that stays on its running statistics; ``frozen_trial`` tries whether a subclass of BatchNorm does.
- ``bn_statistics``: BatchNorm's running statistics, and the base model's own values of them.
- ``fuser``: proves what a module's forward computes and finds its blocks.
- ``forward_plan``: how a module's forward runs with fused blocks; ``fused_block``: runs one block.
- ``blocks``: re-classes a model's modules so that they run forward plans.
- ``fused_weight_cache``: fused weights for inference, with the checks of ``staleness``, kept in a ``per_module`` table.
- ``training_flags``: evaluation mode that leaves the training flags as they were.

Everything here builds on :mod:`lora_edge.ops`; ``layers`` computes a new layer's suffix with :mod:`lora_edge.subspaces.weight`.
"""
