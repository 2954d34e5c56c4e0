"""The engines: what runs an op. :mod:`.protocol` says what one must provide, :mod:`.registry` names them."""
