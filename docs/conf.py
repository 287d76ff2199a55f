"""How `make docs` builds the manual."""

import os
import shutil
import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "benchmarks")]

import benchmark_tables
import jax
import optax
from sphinx.util.typing import stringify_annotation

import sumo_optax
from sumo_optax import presets
from sumo_optax._plan import PRESETS, parse_mesh, plan

project = "sumo_optax"
author = "the sumo_optax authors"
copyright = author
release = sumo_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas render without a network
]
exclude_patterns = ["_build", "_generated"]
nitpicky = True  # a reference to nothing is a warning, and warnings are errors

# Notebooks are kept without outputs; here they run, once until they change.
nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_merge_streams = True
# A kernel that does not warn, at every start, that its messages are not encrypted.
os.environ["JUPYTER_PATH"] = str(DOCS / "jupyter")

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


def presets_table():
    rows = ["| preset | arguments |", "| --- | --- |"]
    for name, arguments in vars(presets).items():
        if name.isupper():
            listed = ", ".join(f"`{key}={value!r}`" for key, value in arguments.items())
            rows.append(f"| {{data}}`~sumo_optax.presets.{name}` | {listed} |")
    return "\n".join(rows)


def write_generated(app):
    """Tables of the benchmarks' records, of the planner and of the presets; the notebooks."""
    gallery = DOCS / "gallery"
    gallery.mkdir(exist_ok=True)
    for notebook in (DOCS.parent / "notebooks").glob("*.ipynb"):
        shutil.copy2(notebook, gallery)
    folder = DOCS / "_generated"
    benchmark_tables.write(folder)
    (folder / "presets.md").write_text(presets_table())
    for name, (mesh, dtype) in PLANS.items():
        sizes = parse_mesh(mesh) if mesh else {}
        planned = plan("7b", PRESETS["7b"], rank=1024, mesh=sizes, dtype=dtype)
        (folder / f"{name}.txt").write_text(f"{planned}\n")


# Types that Sphinx writes out in full, under the names that the code has for them.
NAMES_OF_TYPES = {
    str(stringify_annotation(kind, "smart")): f"~{name}"
    for kind, name in (
        (optax.ScalarOrSchedule, "optax.ScalarOrSchedule"),
        (jax.typing.ArrayLike, "jax.typing.ArrayLike"),
        (jax.typing.DTypeLike, "jax.typing.DTypeLike"),
    )
}


def name_types(app, what, name, obj, options, signature, returns):
    for written_out, short in NAMES_OF_TYPES.items():
        signature = signature and signature.replace(written_out, short)
        returns = returns and returns.replace(written_out, short)
    return signature, returns


def setup(app):
    app.connect("builder-inited", write_generated)
    app.connect("autodoc-process-signature", name_types)
