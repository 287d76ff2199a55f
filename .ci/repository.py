"""Sets the repository's address, wherever it stands, to the one given.

python .ci/repository.py https://github.com/you/sumo-optax
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNKNOWN = "https://github.com/OWNER/sumo-optax"


def address() -> str:
    """That in pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["urls"]["Repository"]


def main(new: str) -> None:
    """Replaces the address in every file that git knows, but for notebooks and this one."""
    if not re.fullmatch(r"https://[\w.-]+/[\w./-]*[\w-]", new):
        sys.exit(f"error: URL must be an address such as {UNKNOWN}, got {new!r}")
    old = address()
    command = ["git", "grep", "-lIF", old, "--", ":!*.ipynb", ":!.ci"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in found.stdout.splitlines():
        path = ROOT / name
        path.write_text(path.read_text().replace(old, new))


if __name__ == "__main__":
    main(*sys.argv[1:])
