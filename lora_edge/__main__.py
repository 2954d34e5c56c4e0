"""``python -m lora_edge`` is the ``lora-edge`` command."""

import sys

from lora_edge.cli import main

sys.exit(main())
