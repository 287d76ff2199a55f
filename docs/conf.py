"""How `make docs` builds the manual."""

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "benchmarks")]

import benchmark_tables

import sumo_optax
from sumo_optax._plan import PRESETS, parse_mesh, plan

project = "sumo_optax"
author = "the sumo_optax authors"
copyright = author
release = sumo_optax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas render without a network
]
exclude_patterns = ["_build", "_generated"]
nitpicky = True  # a reference to nothing is a warning, and warnings are errors

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88  # longer ones have a line for each argument
autodoc_default_options = {"exclude-members": "__new__, __init__"}
# Names of types that have no page here, and private ones.
nitpick_ignore_regex = [("py:.*", r"(?!sumo_optax\.(?!_)).*")]

html_theme = "furo"
project_file = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())
repository = project_file["project"]["urls"]["Repository"]
if "/OWNER/" not in repository:  # it is known
    html_theme_options = {
        "source_repository": f"{repository}/",
        "source_branch": "main",
        "source_directory": "docs/",
    }
html_title = f"sumo_optax {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]


PLANS = {
    "plan_one_device": ("", "float32"),
    "plan_fsdp": ("fsdp=8", "bfloat16"),
    "plan_fsdp_tensor": ("fsdp=4,tensor=2", "bfloat16"),
}


def write_generated(app):
    """What pages include: tables of the benchmarks' records and of the planner."""
    folder = DOCS / "_generated"
    benchmark_tables.write(folder)
    for name, (mesh, dtype) in PLANS.items():
        sizes = parse_mesh(mesh) if mesh else {}
        planned = plan("7b", PRESETS["7b"], rank=1024, mesh=sizes, dtype=dtype)
        (folder / f"{name}.txt").write_text(f"{planned}\n")


def setup(app):
    app.connect("builder-inited", write_generated)
