"""What is installed: version, stubs, files, libraries, and the promises of the build scripts."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastdl
from fastdl import _C

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fastdl.__file__).parent
STUB = ast.parse((PACKAGE / "_C.pyi").read_text(encoding="utf-8"))
STUB_FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
STUB_CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
STUB_CONSTANTS = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **environment}
    )


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# --- version ---------------------------------------------------------------------------------------------------
def test_version_is_the_one_compiled_in():
    assert fastdl.__version__ == _C.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastdl.__version__)


def test_version_of_the_installed_distribution():
    try:
        installed = importlib.metadata.version("fastdl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastdl is imported from the source tree, not installed")
    assert installed == fastdl.__version__


# --- stubs -----------------------------------------------------------------------------------------------------
def test_stub_names_are_those_of_the_module():
    native = {name for name in dir(_C) if not name.startswith("_")} | {"__version__"}
    assert native == STUB_FUNCTIONS.keys() | STUB_CONSTANTS


def signature(function: ast.FunctionDef) -> list[tuple[str, str, bool]]:
    """(name, kind, required) of each parameter."""
    arguments = function.args
    positional = arguments.posonlyargs + arguments.args
    required = len(positional) - len(arguments.defaults)
    return [(a.arg, "positional", i < required) for i, a in enumerate(positional)] + [
        (a.arg, "keyword", default is None)
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]


@pytest.mark.parametrize("name", STUB_FUNCTIONS)
def test_stub_parameters_are_those_of_the_module(name):
    # pybind11 writes the signature as the first line of the docstring: name(a: object, *, b: int = 0) -> None
    native = ast.parse(f"def {getattr(_C, name).__doc__.splitlines()[0]}: ...").body[0]
    assert signature(native) == signature(STUB_FUNCTIONS[name])


def test_stub_dictionaries_have_the_keys_of_the_module():
    def keys(stub: str) -> set[str]:
        return {node.target.id for node in STUB_CLASSES[stub].body if isinstance(node, ast.AnnAssign)}

    for row in _C.kernels("gemm"):
        assert row.keys() == keys("KernelRow")
    assert _C.gemm_plan(8, 8, 8).keys() == keys("Plan")


# --- files and libraries ---------------------------------------------------------------------------------------
def test_typed_and_data_files_are_installed():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()
    for operation in ("gemm", "attention", "rnn", "conv"):
        assert (PACKAGE / "bench" / "shapes" / f"{operation}.toml").is_file()


def test_no_openmp_runtime_is_bundled():
    site = [path for folder in (PACKAGE, PACKAGE.parent / "fastdl.libs") for path in folder.rglob("*")]
    assert not [path for path in site if re.search(r"lib(g|i)?omp", path.name)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads an ELF file")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_libraries_are_named_by_soname_alone():
    dynamic = run("readelf", "-dW", _C.__file__)
    assert dynamic.returncode == 0, dynamic.stderr
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic.stdout))
    # torch's copy of libgomp.so.1, loaded first, answers for this name; a private or renamed one would be a second.
    assert {name for name in needed if "omp" in name} == ({"libgomp.so.1"} if _C.build_info()["openmp"] else set())
    assert not {name for name in needed if name.startswith(("libtorch", "libc10", "libpython"))}
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic.stdout)


# --- the build scripts -----------------------------------------------------------------------------------------
def test_torch_is_needed_to_run_and_not_to_build():
    project = pyproject()
    assert not [need for need in project["build-system"]["requires"] if re.match(r"torch\b", need)]
    assert "torch>=2.10" in project["project"]["dependencies"]


def test_compiler_flags_keep_the_promises():
    scripts = [ROOT / "CMakeLists.txt", *(ROOT / "cmake").glob("*.cmake")]
    flags = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    assert "-ffp-contract=off" in flags
    assert not re.search(r"-march=|-mtune=native|-ffast-math|-Ofast|-funsafe-math", flags)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.parametrize(
    ("setting", "succeeds", "says"),
    [
        ("AUTO", True, "no CUDA kernels"),
        ("OFF", True, "FASTDL_CUDA=OFF"),
        ("ON", False, "FASTDL_CUDA=ON"),
        ("maybe", False, "must be AUTO, ON or OFF, got `maybe`"),
    ],
)
@pytest.mark.parametrize("source", ["definition", "environment"])
def test_cuda_setting(setting, succeeds, says, source):
    script = str(ROOT / "cmake" / "cuda.cmake")
    if source == "definition":
        done = run("cmake", f"-DFASTDL_CUDA={setting}", "-P", script, FASTDL_CUDA="not read")
    else:
        done = run("cmake", "-P", script, FASTDL_CUDA=setting)
    assert (done.returncode == 0) == succeeds
    assert says in " ".join((done.stdout + done.stderr).split())


def test_cuda_reason_is_recorded():
    cuda = _C.build_info()["cuda"]
    assert not cuda["built"]
    assert cuda["reason"]


def test_every_environment_variable_is_documented():
    sources = [path for folder in ("csrc", "python", "cmake") for path in (ROOT / folder).rglob("*") if path.is_file()]
    read = set()
    for path in sources:
        if path.suffix in {".h", ".cc", ".py", ".cmake"}:
            text = path.read_text(encoding="utf-8")
            read |= set(re.findall(r"""(?:getenv\(|environ\S*[(\[]|ENV\{)["']?(FASTDL_\w+)""", text))
    assert {"FASTDL_ISA", "FASTDL_LOG", "FASTDL_CUDA"} <= read
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not {name for name in read if f"`{name}`" not in readme}


def test_readme_figures_are_those_of_the_recorded_results():
    done = run(sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--check")
    assert done.returncode == 0, done.stderr or "README.md: run python benchmarks/figures.py"
