"""``python -m benchmarks.study.report [ROWS.csv ...]``: the study's tables, its page, the README's part and the picture.

Prints the tables of :mod:`benchmarks.study.tables` as Markdown. With ``--write FOLDER``, as ``make results`` runs it, writes
docs/results.md, docs/study.png, docs/methods.png and the part of README.md between its marks, all in that folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora_edge.files.output import make_folder, write_text

from .. import RESULTS
from . import check_requirements


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.report", description=__doc__.split("\n")[0])
    parser.add_argument("rows", type=Path, nargs="*", help="files that benchmarks.study wrote; default: the committed ones")
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="a clone: write its docs/results.md, docs/study.png, README.md"
    )
    options = parser.parse_args()
    try:
        check_requirements()
        from .equal import equal_rows
        from .methods_page import methods_part
        from .page import all_tables, readme_part, results_page
        from .picture import draw, draw_equal
        from .studies import committed, read_studies
        from .text import replace_between_marks

        studies = read_studies(options.rows or committed(RESULTS / "cpu"))
        if options.write is None:
            print(all_tables(studies))
            return 0
        readme, docs = options.write / "README.md", options.write / "docs"
        page = results_page(studies)
        text = replace_between_marks(readme.read_text(encoding="utf-8"), readme_part(studies))
        make_folder(docs, "give another --write")
        equal, methods_page = equal_rows(studies), docs / "methods.md"
        if methods_page.is_file():
            whole = replace_between_marks(methods_page.read_text(encoding="utf-8"), methods_part(equal))
            write_text(methods_page, whole)
        write_text(docs / "results.md", page)
        write_text(readme, text)
        draw(studies, docs / "study.png")
        if equal.names:
            draw_equal(equal, docs / "methods.png")
    except (ValueError, RuntimeError, OSError) as error:
        print(f"study_report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
