"""Human activity recognition: the data sets, the backbones and the adaptation that is the main job of the project."""
