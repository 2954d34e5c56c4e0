"""Runs the ``lora-edge`` command as ``python -m lora_edge``."""

import sys

from lora_edge.cli import main

sys.exit(main())
