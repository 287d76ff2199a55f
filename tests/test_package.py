"""What a package index and a type checker see."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sumo_optax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PROJECT["project"]["urls"]["Repository"]
TEXTS = ("*.toml", "*.md", "*.cff", "notebooks/*.py", "notebooks/*.ipynb", "docs/*.py", "docs/*.md")


def test_the_repository_has_one_address():
    """`make repository` sets it everywhere."""
    address = re.compile(r"https://[\w.-]+/[\w.-]+/sumo[-_]optax\b")
    found = {
        (match, str(path.relative_to(ROOT)))
        for pattern in TEXTS
        for path in ROOT.glob(pattern)
        for match in address.findall(path.read_text())
    }
    assert {match for match, _ in found} == {REPOSITORY}
    assert sum(name.startswith("notebooks/") for _, name in found) == 8


@pytest.mark.skipif(shutil.which("git") is None, reason="the program asks git for its files")
def test_one_program_sets_the_address(tmp_path):
    files = {
        "pyproject.toml": f'[project.urls]\nRepository = "{REPOSITORY}"\nIssues = "{REPOSITORY}"\n',
        "notebooks/a.py": f'REPOSITORY = "{REPOSITORY}"\n',
        "other.md": "nothing\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    program = shutil.copytree(ROOT / ".ci", tmp_path / ".ci") / "repository.py"
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    new = "https://example.org/some/place"
    subprocess.run([sys.executable, program, new], check=True)
    for name, text in files.items():
        assert (tmp_path / name).read_text() == text.replace(REPOSITORY, new)
    result = subprocess.run([sys.executable, program, "place"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("error: URL must be an address")


def test_links_of_the_readme_work_on_an_index():
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (ROOT / "README.md").read_text() + '\n![a picture](docs/a.svg) <img src="docs/b.svg">\n'
    relative = re.findall(r"(?<!!)\[[^]]*\]\((?!https?:)([^)#]+)\)", text)
    assert len(relative) > 5 and all((ROOT / path).exists() for path in relative)
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    targets = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text)
    assert targets and all("".join(target).startswith(("https://", "#")) for target in targets)
    for kind, path in (("blob", relative[0]), ("raw", "docs/a.svg"), ("raw", "docs/b.svg")):
        assert f"{REPOSITORY}/{kind}/v$HFPR_VERSION/{path}" in text


def test_classifiers_are_the_pythons_that_are_tested():
    tested = re.findall(r'python: "(3\.\d+)"', (ROOT / ".github/workflows/ci.yml").read_text())
    prefix = "Programming Language :: Python :: 3."
    named = {
        int(x.removeprefix(prefix))
        for x in PROJECT["project"]["classifiers"]
        if x.startswith(prefix)
    }
    oldest, newest = (int(version.removeprefix("3.")) for version in sorted(tested))
    assert named == set(range(oldest, newest + 1))
    assert PROJECT["project"]["requires-python"] == f">=3.{oldest}"


def test_the_source_distribution_can_test_itself():
    """All that tests read is in it; hatchling adds pyproject.toml by itself."""
    held = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    assert all((ROOT / name).exists() for name in held)
    texts = (path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    read = {
        name
        for text in texts
        for name in re.findall(r'(?:ROOT|parents\[\d\])\)? / "([^"/]+)', text)
    }
    assert {"README.md", "docs", "notebooks"} < read
    assert read <= {*held, "pyproject.toml"}


def test_no_function_is_longer_than_60_lines():
    """Its docstring does not count."""
    for path in (*(ROOT / "sumo_optax").glob("*.py"), *(ROOT / "examples").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                doc = len((ast.get_docstring(node, clean=False) or "").splitlines())
                length = node.end_lineno - node.lineno + 1 - doc
                assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"


FUNCTIONS = [x for x in vars(sumo_optax).values() if inspect.isfunction(inspect.unwrap(x))]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda x: x.__name__)
def test_every_argument_is_documented_once_and_in_order(function):
    doc = inspect.getdoc(function)
    if "\nArgs:\n" not in doc:
        assert "are those of :func:" in doc, "of another function"
        return
    listed = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
    names = re.findall(r"(?m)^  (\w[\w, ]*): ", listed)
    documented = [name for group in names for name in group.split(", ")]
    assert documented == list(inspect.signature(function).parameters)


def test_a_mistyped_argument_names_the_function_that_was_called():
    with pytest.raises(TypeError, match=r"^sumo\(\) got an unexpected .* 'momentun'"):
        sumo_optax.sumo(1e-2, momentun=0.9)
    with pytest.raises(TypeError, match=r"^scale_by_mofasgd\(\) got an unexpected .* 'seeds'"):
        sumo_optax.scale_by_mofasgd(4, seeds=1)


@pytest.mark.slow
def test_a_type_checker_sees_signatures(tmp_path):
    """From outside the checkout, by what is installed."""
    (tmp_path / "pyrefly.toml").write_text(f"python-interpreter-path = {sys.executable!r}\n")
    (tmp_path / "right.py").write_text("import sumo_optax\n\nsumo_optax.sumo(1e-2, momentum=0.9)\n")
    (tmp_path / "wrong.py").write_text("import sumo_optax\n\nsumo_optax.sumo(1e-2, momentun=0.9)\n")
    command = [str(Path(sys.executable).with_name("pyrefly")), "check", "--output-format=min-text"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in result.stdout.splitlines() if "ERROR" in line]
    assert len(errors) == 1 and "wrong.py" in errors[0] and "momentun" in errors[0], result
