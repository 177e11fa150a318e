"""What is installed: version, stubs, files, libraries, and the promises of the build scripts."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fastdl
from fastdl import _C
from fastdl.ops import cuda

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fastdl.__file__).parent
STUBS = {
    name: ast.parse((PACKAGE / f"{name}.pyi").read_text(encoding="utf-8")).body for name in ("_C", "_cuda", "_twin")
}
STUBS["_twin"] = STUBS["_cuda"] + STUBS["_twin"]  # it imports all of the other
STUB_FUNCTIONS = {name: {x.name: x for x in body if isinstance(x, ast.FunctionDef)} for name, body in STUBS.items()}
STUB_CLASSES = {x.name: x for x in STUBS["_C"] + STUBS["_cuda"] if isinstance(x, ast.ClassDef)}


def run(*command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **environment}, cwd=cwd
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
def native_module(name: str) -> ModuleType:
    if name == "_C":
        return _C
    module, why = cuda.load(name)
    if module is None:
        pytest.skip(why)
    return module


@pytest.mark.parametrize("module", STUBS)
def test_stub_names_are_those_of_the_module(module):
    native = {name for name in dir(native_module(module)) if not name.startswith("_")} | {"__version__"}
    constants = {node.target.id for node in STUBS[module] if isinstance(node, ast.AnnAssign)}
    assert native == STUB_FUNCTIONS[module].keys() | constants


def signature(function: ast.FunctionDef) -> list[tuple[str, str, bool]]:
    """(name, kind, required) of each parameter."""
    arguments = function.args
    positional = arguments.posonlyargs + arguments.args
    required = len(positional) - len(arguments.defaults)
    return [(a.arg, "positional", i < required) for i, a in enumerate(positional)] + [
        (a.arg, "keyword", default is None)
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, found in STUB_FUNCTIONS.items() for name in found])
def test_stub_parameters_are_those_of_the_module(module, name):
    # pybind11 writes the signature as the first line of the docstring: name(a: object, *, b: int = 0) -> None
    written = getattr(native_module(module), name).__doc__.splitlines()[0]
    native = ast.parse(f"def {written}: ...").body[0]
    assert signature(native) == signature(STUB_FUNCTIONS[module][name])


def test_stub_dictionaries_have_the_keys_of_the_module():
    def keys(stub: str) -> set[str]:
        return {node.target.id for node in STUB_CLASSES[stub].body if isinstance(node, ast.AnnAssign)}

    for row in _C.kernels("gemm"):
        assert row.keys() == keys("KernelRow")
    assert _C.gemm_plan(8, 8, 8).keys() == keys("Plan")
    for name in ("_cuda", "_twin"):
        if cuda.load(name)[0] is not None:
            assert cuda.load(name)[0].gpu_named("sm80").keys() == keys("GpuInfo")


# --- files and libraries ---------------------------------------------------------------------------------------
def test_typed_and_data_files_are_installed():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()
    assert (PACKAGE / "_cuda.pyi").is_file()
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
        ("AUTO", True, "CUDA: FALSE no nvcc was found"),  # a script has no generator to try one with
        ("OFF", True, "FASTDL_CUDA=OFF"),
        ("ON", False, "FASTDL_CUDA=ON"),
        ("maybe", False, "must be AUTO, ON or OFF, got `maybe`"),
    ],
)
@pytest.mark.parametrize("source", ["definition", "environment"])
def test_cuda_setting(setting, succeeds, says, source, tmp_path):
    script = str(ROOT / "cmake" / "cuda.cmake")
    if source == "definition":
        done = run("cmake", f"-DFASTDL_CUDA={setting}", "-P", script, cwd=tmp_path, FASTDL_CUDA="not read")
    else:
        done = run("cmake", "-P", script, cwd=tmp_path, FASTDL_CUDA=setting)
    assert (done.returncode == 0) == succeeds
    assert says in " ".join((done.stdout + done.stderr).split())


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.parametrize(("code", "succeeds"), [("80", True), ("80;90", True), ("75", False), ("sm_90", False)])
def test_cuda_code_setting(code, succeeds, tmp_path):
    script = str(ROOT / "cmake" / "cuda.cmake")
    done = run("cmake", "-DFASTDL_CUDA=OFF", f"-DFASTDL_CUDA_CODE={code}", "-P", script, cwd=tmp_path)
    assert (done.returncode == 0) == succeeds
    assert (
        succeeds
        or f"FASTDL_CUDA_CODE must list compute capabilities from 80 on, as `80;90`, got `{code}`"
        in " ".join(done.stderr.split())
    )


def test_cuda_reason_is_recorded():
    recorded = _C.build_info()["cuda"]
    assert recorded["built"] != bool(recorded["reason"])


def test_every_environment_variable_is_documented():
    sources = [path for folder in ("csrc", "python", "cmake") for path in (ROOT / folder).rglob("*") if path.is_file()]
    read = set()
    for path in sources:
        if path.suffix in {".h", ".cc", ".cu", ".cuh", ".py", ".cmake"}:
            text = path.read_text(encoding="utf-8")
            read |= set(re.findall(r"""(?:getenv\(|environ\S*[(\[]|ENV\{)["']?(FASTDL_\w+)""", text))
    assert {"FASTDL_ISA", "FASTDL_LOG", "FASTDL_CUDA"} <= read
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not {name for name in read if f"`{name}`" not in readme}


def test_readme_figures_are_those_of_the_recorded_results():
    done = run(sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--check")
    assert done.returncode == 0, done.stderr or "README.md: run python benchmarks/figures.py"
