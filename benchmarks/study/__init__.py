"""The study: every method on every person left out, its rows, tables, text and picture.

problems.py, digits.py (what is adapted to), stages.py (which runs), measure.py (one run), rows.py (the files), command.py (runs
what is missing); summary.py (what the rows say of each method), tables.py, text.py, picture.py, report.py (writes all of it).
"""

from lora_edge.environment.extras import require

NEEDS = {"sklearn": "scikit-learn", "scipy": "scipy", "pandas": "pandas", "matplotlib": "matplotlib"}


def check_requirements() -> None:
    """Raise RuntimeError, in one line, where a package that the study needs is missing."""
    require("the study", NEEDS, "study")
