"""What is installed, what imports what, and that `kernels/` never passes for Hugging Face's package of that name."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from bare import ABSENT, environment_without, execute, python_path

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "sgtm").rglob("*.py"), *(ROOT / "kernels" / "sgtm_kernels").rglob("*.py")])


def python(code: str, **environ: str) -> str:
    """Output of `python -c CODE` in the repository root, which puts the root first on the path."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_installed_kernels_package_wins_over_our_folder(tmp_path):
    """A folder without __init__.py yields to any real package on the path, even a later one; with one it would not."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    path = python("import kernels; print(kernels.__file__)", PYTHONPATH=python_path(tmp_path))
    assert path == str(tmp_path / "kernels" / "__init__.py")


def test_no_code_of_ours_is_importable_as_kernels(tmp_path):
    spec = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    assert not python(spec).startswith(str(ROOT / "kernels"))
    elsewhere = subprocess.run([sys.executable, "-c", spec], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not elsewhere.stdout.startswith(str(ROOT))


def test_the_module_runs_in_the_folder_that_holds_the_clone(tmp_path):
    """Python takes a folder of that name on its path for the package, before an editable installation."""
    (tmp_path / "sgtm").symlink_to(ROOT)
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", str(ROOT))]
    environ = os.environ | {"PYTHONPATH": python_path(*path)}
    command = [sys.executable, "-m", "sgtm", "config", "debug"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("name: debug"), done.stderr


def test_transformers_imports_models_from_the_repository_root():
    code = (
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "from importlib.metadata import packages_distributions as names\n"
        "print(is_kernels_available() and 'kernels' not in names())"
    )
    assert python(code) == "False"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names of the files in the wheel, built from a copy so that no earlier build leaks in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("sgtm", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "benchmarks", "kernels"):  # a bare find_packages() would take these
        (source / name).mkdir(exist_ok=True)
        (source / name / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(pip, cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_wheel_holds_our_two_packages_only(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sgtm", "sgtm_kernels"}


def test_wheel_holds_every_file_of_ours(wheel):
    """Catches a folder without __init__.py and a template or preset left out: both run from a checkout only."""
    packages = (ROOT / "sgtm", ROOT / "kernels" / "sgtm_kernels")
    files = [path for package in packages for path in package.rglob("*") if path.is_file()]
    ours = {str(path.relative_to(ROOT)).removeprefix("kernels/") for path in files if "__pycache__" not in path.parts}
    assert {"sgtm/config/presets/quickstart.yaml", "sgtm_kernels/plan.py"} <= ours
    assert ours - wheel == set()


def imports(path: Path) -> set[str]:
    """Top-level names of the packages that a module imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_only_the_distributed_folder_imports_deepspeed():
    importers = {path.relative_to(ROOT).parts[:2] for path in SOURCES if "deepspeed" in imports(path)}
    assert importers == {("sgtm", "distributed")}


def test_evaluation_and_export_do_not_import_deepspeed():
    assert python("import sgtm.run.evaluate, sgtm.hf.export, sys; print('deepspeed' in sys.modules)") == "False"


def test_model_masks_and_optimizer_import_without_the_packages_of_a_run(tmp_path):
    """What benchmarks/steps.py uses on a machine with little but torch and transformers."""
    masking = [path.stem for path in (ROOT / "sgtm" / "masking").glob("[!_]*.py")]
    modules = ["model.transformer", "data.batch", "distributed.optim", "distributed.segments"]
    imports = "import " + ", ".join(f"sgtm.{module}" for module in modules + [f"masking.{name}" for name in masking])
    bare = environment_without(set(ABSENT) - {"sgtm"}, tmp_path)
    done = execute([sys.executable, "-c", imports], bare)
    assert done.returncode == 0, done.stderr
    assert "pydantic" in execute([sys.executable, "-c", "import sgtm.config"], bare).stderr


def test_a_version_of_deepspeed_without_a_name_that_we_replace_is_refused():
    code = (
        "from types import SimpleNamespace as N\nfrom sgtm.distributed.takeover import replace\n"
        "module = N(a=1); replace(module, 'a', 2); ops = {'a': 1}; replace(ops, 'a', 2); print(module.a, ops['a'])\n"
        "for owner in (N(), {}):\n"
        "    try: replace(owner, 'a', 2)\n"
        "    except RuntimeError as error: print('has no a in' in str(error))"
    )
    assert python(code).splitlines() == ["2 2", "True", "True"]


def test_kernels_depend_on_torch_alone():
    allowed = {*sys.stdlib_module_names, "torch", "triton", "sgtm_kernels"}
    modules = [path for path in SOURCES if path.is_relative_to(ROOT / "kernels")]
    foreign = {str(path.relative_to(ROOT)): imports(path) - allowed for path in modules}
    assert len(foreign) > 10
    optional = {"kernels/sgtm_kernels/attention/public.py": {"flash_attn"}}  # inside functions: below it is absent
    assert {path: names for path, names in foreign.items() if names} == optional


def test_kernels_import_without_triton():
    code = (
        "import sys; sys.modules['triton'] = sys.modules['flash_attn'] = None\nimport sgtm_kernels.linear, "
        "sgtm_kernels.attention.public, sgtm_kernels.mlp, sgtm_kernels.triton_common.tuning, "
        "sgtm_kernels.tools.shapes, sgtm_kernels.tools.timing"
    )
    python(code)


def test_no_requirement_is_listed_twice():
    names = re.findall(r'^ +"([a-z0-9-]+)>=', (ROOT / "setup.py").read_text("utf-8"), re.MULTILINE)
    assert len(names) > 10 and len(names) == len(set(names))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_git_ignores_no_file_of_ours():
    """A rule of .gitignore for a build folder also hits a source folder of that name. Rules count for tracked files
    too: the next file beside them would be left out."""
    files = [*SOURCES, *(ROOT / "tests").rglob("test_*.py")]
    listed = "\n".join(str(path.relative_to(ROOT)) for path in files)
    git = ["git", "check-ignore", "--no-index", "--stdin"]
    done = subprocess.run(git, cwd=ROOT, input=listed, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")  # 1: none is ignored


def test_no_file_is_a_drawer():
    """No file over 400 lines, none whose name says nothing."""
    drawers = [path.name for path in SOURCES if path.stem in ("utils", "helpers", "misc", "common", "manager")]
    long = {path.name: n for path in SOURCES if (n := len(path.read_text("utf-8").splitlines())) > 400}
    assert (drawers, long) == ([], {})
