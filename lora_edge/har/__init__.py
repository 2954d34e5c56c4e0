"""Human activity recognition: the data sets, the backbones and the main job, which adapts a source model to one person."""
