"""What the package runs on: torch, the compiled extension, optional packages, the machine.

- ``torch_version``: the oldest torch that is supported, checked at import.
- ``torch_private``: names of torch that are private or too new, each with a fallback.
- ``extension``: the compiled extension ``lora_edge._C``.
- ``extras``: optional packages.
- ``machine``: what figures were measured on.
"""
