"""The parts of adapting a model in place and undoing it, behind ``adapt``, ``merge``, ``disabled`` and the adapter file.

- ``adapted``: finds the adapted models in a module; the state that ``adapt`` stores on each.
- ``selection``: which convolutions are adapted, and which layers are left alone and why.
- ``head``: which module is the classifier.
- ``ties``: convolutions that share a weight.
- ``base_state``: the base model's own values, its fingerprint, and what has changed since; ``rounding``: changes by rounding.
- ``protect``: other tools cannot silently remove an adapted layer.
- ``idle_cores``: warns about cores that get no gradient.
- ``pooled_statistics``: BatchNorm statistics over many batches, for ``calibrate_bn``.
- ``batch_statistics``: whether a batch is large enough for BatchNorm.
"""
