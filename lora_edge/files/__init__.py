"""Files: what one is, reading it safely, and writing it completely or not at all.

- ``output``: folders to write to, and files that replace the old one only when complete.
- ``file_kind``: what a file is, from its bytes, for error messages.
- ``safetensors_file``: safetensors files.
- ``state_file``: a state dict from a safetensors or ``torch.save`` file.
"""
