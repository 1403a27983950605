"""The shape of the house: who imports whom, what is installed where, what an import costs."""

import ast
import graphlib
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Collection
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKED = {".py", ".html", ".css", ".js"}
LEAVES = {"config", "errors", "weights"}  # what reference may use of stellar_fast
SOURCES = sorted(
    path
    for folder in ("stellar_fast", "kernels", "reference", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import in a file; level 0 is absolute."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


def test_kernels_and_reference_import_relatively_and_never_each_other():
    for folder in ("kernels", "reference"):
        for path in (ROOT / folder).rglob("*.py"):
            for level, name in imports(path):
                top = name.split(".")[0]
                assert level or top not in ("stellar_fast", "kernels", "reference"), (path, name)
                if level > len(path.relative_to(ROOT / folder).parts):
                    assert top in LEAVES, f"{path} imports stellar_fast.{name}"


def module_of(path: Path) -> str:
    """The dotted name that a source is imported by; benchmarks count as a package of that name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("kernels", "reference"):
        parts = ("stellar_fast", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, modules: Collection[str]) -> set[str]:
    """Which of `modules` a file imports, inside functions and for typing too."""
    own = module_of(path)
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            outer = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (outer, node.module)))
            names = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name in names:
            # benchmarks/ is on the path, and no package
            places = [f"{base}.{name}", base, f"benchmarks.{base}.{name}", f"benchmarks.{base}"]
            found |= set(next(([place] for place in places if place in modules), []))
    return found - {own}


def test_no_imports_go_in_a_circle():
    sources = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "tests"]
    modules = {module_of(path): path for path in sources}
    graph = {name: imported(path, modules) for name, path in modules.items()}
    assert graph["stellar_fast.engine.engine"] >= {"stellar_fast.engine.graphs"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_only_what_trains_takes_the_reference_model():
    users = {
        path.name
        for path in (ROOT / "stellar_fast").rglob("*.py")
        if any(level and name.split(".")[0] == "reference" for level, name in imports(path))
    }
    assert users == {"loading.py", "module.py", "pretrain.py"}


@pytest.mark.parametrize(
    ("module", "contract"),
    [("reference.ops", "Fp8Ops"), ("kernels", "Fp8Ops"), ("engine.torch_ops", "Ops")],
)
def test_namespaces_of_ops_keep_the_contract(module, contract):
    """Names, kinds, defaults and types of all arguments; what is returned may be narrower."""
    from stellar_fast.engine import ops

    namespace = importlib.import_module(f"stellar_fast.{module}")
    protocol = getattr(ops, contract)
    names = [name for name in dir(protocol) if not name.startswith("_")]
    assert "linear" in names
    for name in names:
        _, *expected = inspect.signature(getattr(protocol, name)).parameters.values()
        found = inspect.signature(getattr(namespace, name)).parameters.values()
        assert list(found) == expected, name
    functions = {
        name
        for name, found in vars(namespace).items()
        if inspect.isfunction(found) and found.__module__.startswith(namespace.__name__)
    }
    more = {"laid_out", "restore"} if module == "engine.torch_ops" else set()
    assert {name for name in functions if not name.startswith("_")} - more == set(names)


def test_tests_are_no_package():
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def run(*command: str, python: str = sys.executable, **environment: str) -> str:
    """Runs Python outside the repository and returns what it printed."""
    done = subprocess.run(
        [python, "-P", *command],
        cwd=Path(sys.prefix),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_top_level_kernels_or_reference_leaks():
    for name in ("kernels", "reference"):
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
        assert origin is None or ROOT not in Path(origin).parents, origin
    probe = (
        "from importlib.util import find_spec as f; print(f('kernels'), f('reference'),"
        "f('stellar_fast.kernels') is None, f('stellar_fast.reference') is None)"
    )
    found = run("-c", probe).split()
    assert found[-2:] == ["False", "False"]
    assert str(ROOT) not in " ".join(found)


def test_import_is_quick_and_brings_neither_torch_nor_triton():
    """Nor does `load` bring Triton, or initialise CUDA."""
    probe = (
        "import sys, time; start = time.process_time(); import stellar_fast;"
        "stellar_fast.list_models(); print(time.process_time() - start);"
        "print(sorted({'torch', 'triton', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules)));"
        "stellar_fast.load; import torch;"
        "print('triton' in sys.modules, torch.cuda.is_initialized())"
    )
    seconds, modules, loaded = run("-c", probe).splitlines()
    assert float(seconds) < 2
    assert modules == "[]"
    assert loaded == "False False"


def test_unknown_attributes_are_attribute_errors():
    import stellar_fast

    assert {"load", "load_stellar", "Engine", "list_models"} <= set(dir(stellar_fast))
    with pytest.raises(AttributeError, match="loda"):
        _ = stellar_fast.loda


@pytest.fixture(scope="module")
def distribution(tmp_path_factory) -> Path:
    """A folder with the sdist of this tree and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    return out


@pytest.mark.timeout(600)
def test_wheel_and_sdist_hold_the_same_packages(distribution):
    (wheel,), (sdist,) = distribution.glob("*.whl"), distribution.glob("*.tar.gz")
    shipped = zipfile.ZipFile(wheel).namelist()
    installed = {name for name in shipped if Path(name).suffix in PACKED}
    expected = {
        prefix + path.relative_to(ROOT / folder).as_posix()
        for folder, prefix in (
            ("stellar_fast", "stellar_fast/"),
            ("kernels", "stellar_fast/kernels/"),
            ("reference", "stellar_fast/reference/"),
        )
        for path in (ROOT / folder).rglob("*")
        if path.suffix in PACKED
    }
    assert installed == expected
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {"kernels/__init__.py", "reference/ops.py", "stellar_fast/engine/engine.py"} <= sources
    assert {"LICENSE", "README.md", "pyproject.toml"} <= sources


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_works_in_an_empty_environment(distribution, tmp_path):
    (wheel,) = distribution.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = str(tmp_path / "env" / "bin" / "python")
    site = run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", python=python)
    zipfile.ZipFile(wheel).extractall(site.strip())

    alone = "import stellar_fast as s; print(s.__file__); print(s.list_models()[0])"
    file, model = run("-c", alone, python=python).splitlines()
    assert file.startswith(str(tmp_path))
    assert model == "stellar-b16"

    # The dependencies of this environment, without its .pth files and so without an editable us.
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    dependencies = str(Path(found.origin).parents[1])
    if Path(dependencies, "stellar_fast").exists():
        pytest.fail(f"install the project editable: {dependencies} holds a copy of it")
    probe = (
        "import stellar_fast.kernels, stellar_fast.reference.ops as o, stellar_fast as s, sys;"
        "print(o.__file__); e = s.load('stellar-b16', weights='synthetic', device='cpu');"
        "import torch; print(tuple(e.encode(torch.zeros(1, 3, 32, 32))['cls'].shape));"
        "import importlib.util as u; print(u.find_spec('kernels'), u.find_spec('reference'))"
    )
    file, shape, leaks = run("-c", probe, python=python, PYTHONPATH=dependencies).splitlines()
    assert file.startswith(str(tmp_path))
    assert shape == "(1, 1, 768)"
    assert leaks == "None None"
