"""Who may include whom, and that no instruction-set unit leaks a body that a linker could pick for a lesser machine."""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PYTHON = ROOT / "python" / "fastdl"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cc", ".cu", ".cuh", ".inc"))
ISA_UNITS = [p for p in SOURCES if re.search(r"(^|_)(scalar|avx2|avx512|avx512bf16|amx)\.cc$", p.name)]
CUDA_SOURCES = [p for p in SOURCES if p.suffix in (".cu", ".cuh") or "cuda" in p.relative_to(CSRC).parts[:-1]]
PYTHON_LAYERS = ["ops", "nn", "optimize"]
PYTHON_LAYERED = sorted(
    p for p in PYTHON.rglob("*.py") if p.relative_to(PYTHON).parts[0].removesuffix(".py") in PYTHON_LAYERS
)

# Each layer and the layers it may include, itself apart: conv, attention and rnn never include each other.
OPERATIONS = {"conv", "attention", "rnn"}
BELOW = {
    "base": set(),
    "simd": {"base"},
    "ptx": {"base"},
    "gemm": {"base", "simd", "ptx"},
    **{op: {"base", "simd", "ptx", "gemm"} for op in OPERATIONS},
    "bind": {"base", "simd", "ptx", "gemm", *OPERATIONS},
}
# Of the standard library, an instruction-set unit may see only what has no inline function bodies of its own.
ISA_SYSTEM_HEADERS = {"cstdint", "cstddef", "immintrin.h"}

pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="no source tree")


def name(path):
    return str(path.relative_to(CSRC)) if path.is_relative_to(CSRC) else path.name


def includes(path):
    """(quoted, system) include names of a file."""
    found = re.findall(r'^\s*#\s*include\s*(["<])([^">]+)[">]', path.read_text(), re.MULTILINE)
    return [n for mark, n in found if mark == '"'], [n for mark, n in found if mark == "<"]


def closure(path):
    """The file and every csrc header that it includes, directly or not."""
    seen, todo = set(), [path]
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += [CSRC / n for n in includes(file)[0]]
    return seen


def test_there_is_something_to_check():
    assert len(SOURCES) > 20 and len(ISA_UNITS) >= 3 and len(PYTHON_LAYERED) > 5


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_includes_point_down(path):
    layer = path.relative_to(CSRC).parts[0]
    for included in includes(path)[0]:
        assert (CSRC / included).is_file(), f"{included}: write includes from csrc/"
        assert Path(included).parts[0] in BELOW[layer] | {layer}, f"{layer} must not include {included}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_python_is_known_to_bind_only_and_torch_to_none(path):
    everything = [n for names in includes(path) for n in names]
    assert not [n for n in everything if re.match(r"(torch|ATen|c10|caffe2)/", n)]
    if path.relative_to(CSRC).parts[0] != "bind":
        assert not [n for n in everything if re.match(r"pybind11/|Python\.h|nanobind/", n)]


@pytest.mark.parametrize("path", ISA_UNITS, ids=name)
def test_instruction_set_units_see_little(path):
    """base/types.h, simd, and kernel headers of their own operation or of gemm; no standard containers."""
    operation = path.relative_to(CSRC).parts[0]
    for file in closure(path):
        relative = file.relative_to(CSRC)
        kernel_header = relative.parts[0] in (operation, "gemm") and relative.name.startswith("kernel")
        assert file == path or relative == Path("base/types.h") or relative.parts[0] == "simd" or kernel_header, (
            relative
        )
        assert set(includes(file)[1]) <= ISA_SYSTEM_HEADERS, relative


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_cpu_and_cuda_do_not_include_each_other(path):
    side = {"cpu": "cuda", "cuda": "cpu"}
    for other in side.keys() & set(path.relative_to(CSRC).parts[:-1]):
        assert not [n for n in includes(path)[0] if side[other] in Path(n).parts[:-1]]


@pytest.mark.parametrize("path", CUDA_SOURCES, ids=name)
def test_cuda_is_spoken_in_ptx_only(path):
    """Everything else calls the functions of csrc/ptx, each of which has its twin: no intrinsic, no assembly, no
    CUDA header, no atomic (a sum in no fixed order)."""
    text = re.sub(r"//[^\n]*", "", path.read_text())
    assert not re.findall(r"\batomic\w+", text)
    if path.relative_to(CSRC).parts[0] != "ptx":
        assert not [n for n in includes(path)[1] if re.match(r"cuda|cooperative_groups|mma\.h|cub/|cute/|cutlass/", n)]
        spoken = (
            r"\basm\b|\b(?:threadIdx|blockIdx|blockDim|gridDim)\b|\b__(?:global|device|shared|host|sync|shfl|ld|st)\w*"
        )
        assert not re.findall(spoken, text)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix != ".inc"], ids=name)
def test_nothing_waits_for_the_gpu_or_allocates_on_it(path):
    """No call that waits, allocates, copies, or makes a stream: launches are asynchronous, on torch's stream, and can
    be captured. The attribute of large shared memory has one home, which sets it to the most a block may have."""
    text = re.sub(r"//[^\n]*", "", path.read_text())
    forbidden = r"\bcuda(?:Malloc|Free|Memcpy|Event|Stream[A-Z]|DeviceSynchronize|DeviceReset|Graph|HostAlloc)\w*|<<<"
    assert not re.findall(forbidden, text)
    assert not re.findall(r"\bcudaFuncSet\w+", text) or path.relative_to(CSRC) == Path("ptx/launch.h")


@pytest.mark.parametrize("path", PYTHON_LAYERED, ids=lambda p: str(p.relative_to(PYTHON)))
def test_python_layers_point_down(path):
    """ops <- nn <- optimize: nothing imports what stands on it."""
    layer = path.relative_to(PYTHON).parts[0].removesuffix(".py")
    above = PYTHON_LAYERS[PYTHON_LAYERS.index(layer) + 1 :]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert not [n for n in imported if n.startswith("fastdl.") and n.split(".")[1] in above]


# --- symbols ----------------------------------------------------------------------------------------------------------
def escaping_symbols(obj, level):
    """Symbols of an object file that other units could use in place of their own: weak ones, or outside the level."""
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", str(obj)], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines()]
    assert any(text.startswith(f"fastdl::{level}::") for _, text in symbols), "no kernel in here"
    return [
        (kind, text)
        for kind, text in symbols
        if kind in "WwVvu" or (kind.isupper() and not text.startswith(f"fastdl::{level}::"))
        # The compiler's own: the reference to its exception personality, AddressSanitizer's mark of a global.
        if not text.startswith(("DW.ref.", "__odr_asan."))
    ]


def level_of(path):
    return re.search(r"(scalar|avx2|avx512|avx512bf16|amx)\.cc", path.name)[1]


def flags_of(level):
    """The level's compiler flags, as cmake/isa.cmake gives them."""
    if level == "scalar":
        return []
    text = (ROOT / "cmake" / "isa.cmake").read_text()
    words = re.search(rf"set\(FASTDL_FLAGS_{level} ([^)]*)\)", text)[1].split()
    return [
        flag
        for word in words
        for flag in (flags_of(re.search(r"FLAGS_(\w+)", word)[1]) if word.startswith("${") else [word])
    ]


COMPILER = os.environ.get("CXX") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(not (COMPILER and shutil.which("nm")), reason="needs a C++ compiler and nm")


@needs_compiler
@pytest.mark.parametrize("path", ISA_UNITS, ids=name)
def test_no_symbol_escapes_an_unoptimised_unit(path, tmp_path):
    """-O0 inlines nothing: every inline function that an optimised build hides shows here.

    Sanitizer builds are checked through FASTDL_BUILD_DIR (tests/sanitize.sh).
    """
    obj = tmp_path / "unit.o"
    command = [COMPILER, "-std=c++17", f"-I{CSRC}", *flags_of(level_of(path)), "-O0", "-c", str(path), "-o", str(obj)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and re.search(r"unrecognized|unknown|not supported", done.stderr):
        pytest.skip(f"this compiler cannot build {level_of(path)}")
    assert done.returncode == 0, done.stderr
    assert escaping_symbols(obj, level_of(path)) == []


@pytest.mark.skipif("FASTDL_BUILD_DIR" not in os.environ, reason="FASTDL_BUILD_DIR names no CMake build directory")
@pytest.mark.parametrize("path", ISA_UNITS, ids=name)
def test_no_symbol_escapes_the_built_unit(path):
    objects = list(Path(os.environ["FASTDL_BUILD_DIR"]).rglob(f"{name(path)}.o"))
    assert len(objects) == 1, objects
    assert escaping_symbols(objects[0], level_of(path)) == []


def test_the_module_exports_no_kernels():
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    from fastdl import _C

    command = ["nm", "-C", "-D", "--defined-only", _C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    exported = {line.split(maxsplit=2)[2] for line in listing.splitlines()}
    assert "PyInit__C" in exported
    assert not [symbol for symbol in exported if symbol.startswith("fastdl::")]


@pytest.mark.parametrize("path", PYTHON_LAYERED, ids=lambda p: str(p.relative_to(PYTHON)))
def test_saved_tensors_are_read_once_and_by_backward(path):
    """torch's non-reentrant checkpoints refuse a second reading: helpers are given what backward has read."""
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    for function in functions:
        reads = [n for n in ast.walk(function) if isinstance(n, ast.Attribute) and n.attr == "saved_tensors"]
        assert not reads or (len(reads) == 1 and function.name in ("backward", "_gradients")), function.name
