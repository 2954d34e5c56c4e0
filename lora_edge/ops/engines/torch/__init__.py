"""The torch engine: the ops in plain torch, on every device, with gradients to every tensor."""
