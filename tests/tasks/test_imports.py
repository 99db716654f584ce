"""Who may import whom: the table of the design, read off the syntax tree, and what is loaded."""

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("flows", "tasks", "models", "storage")

ALLOWED = {
    "flows": {
        "flows",
        "tasks",
        "models",
        "storage",
        "prefect",
        "pydantic",
        "typer",
        "rich",
        "yaml",
    },
    "tasks": {
        *("tasks", "models", "storage", "prefect", "torch", "torchvision", "numpy", "pyarrow"),
        *("webdataset", "PIL", "simplejpeg", "pydantic"),
    },
    "models": {"models", "torch", "torchvision", "numpy", "safetensors", "pydantic"},
    "storage": {"storage", "fsspec", "s3fs", "pyarrow", "numpy", "pydantic"},
}

REPORT_ONLY = {"matplotlib", "jinja2"}  # for the files of the report, tasks/report*.py

# One line for each exception to the table, with its reason; a new one is a decision.
EXCEPTIONS = {
    # The engines that an extra installs, imported when one is asked for.
    "flows/engines.py": {"dask", "distributed", "prefect_dask", "prefect_ray", "ray"},
    "flows/machine_checks.py": {"packaging"},  # whether what is installed is what we ask for
    "flows/prefect_checks.py": {"httpx"},  # asks a server without Prefect's retries
    "flows/store_checks.py": {"botocore"},  # where credentials come from, as s3fs will find them
    "flows/server.py": {"httpx"},  # asks our own Prefect server whether it is up
    "tasks/checkpointing.py": {"safetensors"},  # a checkpoint's tensors become bytes here
    "tasks/digits.py": {"sklearn"},  # the demo's images, imported when they are made
    "tasks/importing.py": {"yaml"},  # an architecture written on the command line
    # Trackers that an extra installs, imported when one is written to.
    "tasks/tracker_mlflow.py": {"mlflow"},
    "tasks/tracker_tensorboard.py": {"tensorboard"},
}


def sources(package):
    return sorted((REPOSITORY / package).rglob("*.py"))


def imported_packages(path):
    """Top-level names of everything that is not of the standard library, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_the_design_allows(package):
    assert sources(package)
    for path in sources(package):
        name = path.relative_to(REPOSITORY).as_posix()
        allowed = ALLOWED[package] | EXCEPTIONS.get(name, set())
        if name.startswith("tasks/report"):
            allowed |= REPORT_ONLY
        extra = imported_packages(path) - allowed
        assert not extra, f"{name} imports {sorted(extra)}"


def test_every_exception_is_still_needed():
    for name, allowed in EXCEPTIONS.items():
        path = REPOSITORY / name
        assert path.is_file(), f"{name} is gone: remove its exception"
        assert allowed <= imported_packages(path), f"{name} no longer imports {sorted(allowed)}"


def test_stage_bodies_know_nothing_of_prefect():
    # The wrappers of the stages and their live progress are the edge.
    edge = {"stages.py", "live_progress.py"}
    with_prefect = {p.name for p in sources("tasks") if "prefect" in imported_packages(p)}
    assert with_prefect <= edge


@pytest.mark.parametrize("package", ["flows", "tasks"])
def test_importing_a_part_imports_nothing_else(package):
    assert (REPOSITORY / package / "__init__.py").read_text() == ""


@pytest.mark.parametrize("package", ["flows", "tasks"])
def test_no_file_shadows_the_standard_library_or_a_package(package):
    installed = set(importlib.metadata.packages_distributions())
    taken = set(sys.stdlib_module_names) | installed | set(PACKAGES)
    names = {path.stem for path in sources(package)} - {"__init__"}
    assert not names & (taken - {"tests"})


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_are_those_of_this_repository(package):
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin) == REPOSITORY / package / "__init__.py"


def modules_after(statement):
    """Top-level names in sys.modules of a fresh interpreter that ran the statement."""
    script = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(result.stdout.split())


def test_storage_loads_no_torch():
    modules = ", ".join(
        f"storage.{path.stem}" for path in sources("storage") if path.stem != "__init__"
    )
    assert "storage.store" in modules
    assert "storage.corpus" in modules
    loaded = modules_after(f"import {modules}")
    assert "storage" in loaded
    assert not loaded & {
        "torch",
        "torchvision",
        "webdataset",
        "prefect",
        "models",
        "tasks",
        "flows",
    }


def test_worker_launcher_and_config_load_no_prefect():
    # A worker starts on every attempt, and a config is read before a server is there.
    workers = "tasks.worker, tasks.launching, tasks.label_worker, tasks.label_processes"
    loaded = modules_after(f"import {workers}, tasks.policies, flows.loading")
    assert {"torch", "tasks", "models", "storage"} <= loaded
    assert not loaded & {"prefect", "sklearn", "matplotlib", "webdataset"}


def test_workers_of_a_selection_load_neither_torch_nor_prefect():
    # They start while a selection reads records; torch alone takes longer than that.
    loaded = modules_after("import tasks.selection_worker")
    assert {"numpy", "pyarrow", "models", "storage"} <= loaded
    assert not loaded & {"torch", "torchvision", "PIL", "prefect", "flows"}


def test_a_run_is_there_without_the_compiler():
    # sympy comes with torch's compiler alone, whose import takes longer than that of torch.
    loaded = modules_after("import flows.running, tasks.worker, tasks.label_worker")
    assert {"torch", "torchvision", "prefect"} <= loaded
    assert "sympy" not in loaded


def test_no_package_is_below_the_tests():
    # With --import-mode=importlib an __init__.py would make two modules of one file.
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))
