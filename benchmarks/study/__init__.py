"""The study: every method on every person left out, its rows, tables, text and picture.

To run it: problems.py and digits.py (what is adapted to), stages.py (which runs), measure.py (one run), rows.py (the files),
command.py (``python -m benchmarks.study``). To report it: summary.py (what the rows say of each method), studies.py (several
files), tables.py, comparisons.py, equal.py with claims.py (all methods at equal trained count), page.py, picture.py and
report.py (``python -m benchmarks.study.report``, ``make results``).
"""

from lora_edge.environment.extras import require

NEEDS = {"sklearn": "scikit-learn", "scipy": "scipy", "pandas": "pandas", "matplotlib": "matplotlib"}


def check_requirements() -> None:
    """Raise RuntimeError, in one line, where a package that the study needs is missing."""
    require("the study", NEEDS, "study")
