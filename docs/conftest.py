"""Runs every Python block of the manual; a page's blocks share their names, as a reader would."""

from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"]).pytest()
collect_ignore_glob = ["*.py", "_build", "_generated"]
