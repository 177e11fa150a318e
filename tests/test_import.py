"""What importing fastdl demands and says: torch first and new enough, a native module of the same version."""

import shutil
from pathlib import Path

import pytest

import fastdl
from fastdl import _C


def test_versions_agree():
    assert fastdl.__version__ == _C.__version__


def test_public_names():
    assert set(fastdl.__all__) <= set(dir(fastdl))
    for name in ("optimize", "restore", "freeze", "unfreeze", "explain"):
        assert callable(getattr(fastdl, name))


def test_torch_is_imported_before_the_native_module(run_python):
    out = run_python(
        "-c", "import sys, fastdl; names = list(sys.modules); print(names.index('torch'), names.index('fastdl._C'))"
    )
    torch_at, native_at = map(int, out.split())
    assert torch_at < native_at


def test_import_is_light(run_python):
    out = run_python(
        "-c", "import sys, fastdl; print([m for m in ('torch._dynamo', 'rich', 'click') if m in sys.modules])"
    )
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    "spoil",
    ["torch.__version__ = '2.9.1+cpu'", "del torch.Tensor.__dlpack_c_exchange_api__"],
    ids=["version", "no_api"],
)
def test_old_torch_is_an_import_error(run_python, spoil):
    code = f"""
import torch
{spoil}
try:
    import fastdl
except ImportError as error:
    print(error)
"""
    out = run_python("-c", code)
    assert "needs torch >= 2.10" in out
    assert "pip install --upgrade torch" in out


def test_stale_native_module_is_an_import_error(run_python, tmp_path):
    package = tmp_path / "fastdl"
    shutil.copytree(Path(fastdl.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    if not list(package.glob("_C.*")):  # an editable install keeps it elsewhere
        shutil.copy(_C.__file__, package)
    (package / "_version.py").write_text('__version__ = "9.9.9"\n')
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
try:
    import fastdl
except ImportError as error:
    print(error)
"""
    out = run_python("-c", code)
    assert "9.9.9" in out
    assert fastdl.__version__ in out
    assert "stale" in out
    assert "--force-reinstall" in out
