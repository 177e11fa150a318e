"""What the host twin cannot show of kernels whose blocks speak through memory: the instructions that nvcc makes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
OPTIONS = ("-std=c++17", "-O3", "-DFASTDL_TWIN=0", "-arch=compute_80", "--expt-relaxed-constexpr")
pytestmark = pytest.mark.skipif(not NVCC, reason="no nvcc")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """name -> the instructions of a kernel, of lstm, gru and rnn in bfloat16; resident ones end in Lb1."""
    out = tmp_path_factory.mktemp("ptx") / "bf16.ptx"
    source = ROOT / "csrc" / "rnn" / "cuda" / "bf16.cu"
    subprocess.run([NVCC, *OPTIONS, "-I", ROOT / "csrc", "-ptx", source, "-o", out], check=True)
    found = {}
    for part in out.read_text().split(".entry ")[1:]:
        name = re.sub(r"EEEvNS_\d+\w+Args.*", "", part.partition("(")[0])
        lines = (re.sub(r"^(@!?%p\d+)?\s*", "", line.strip()) for line in part.splitlines())
        found[name] = [line for line in lines if re.match(r"[a-z]", line)]
    return {k: v for k, v in found.items() if "forward" in k or "backward" in k}


def starting(instructions, prefix):
    return [i for i, line in enumerate(instructions) if line.startswith(prefix)]


def test_blocks_meet_and_see_what_others_wrote(kernels):
    resident = {name: lines for name, lines in kernels.items() if name.endswith("Lb1")}
    assert len(resident) == 5 and len(kernels) == 10
    for lines in resident.values():
        ordered = " ".join(line.split()[0] for line in lines if line.startswith(("atom.", "ld.acquire.", "bar.sync")))
        # A barrier of the block, one thread's arrival and its wait for the others', and another one.
        meeting = r"bar.sync atom.add.acq_rel.gpu.global.u32( ld.acquire.gpu.global.u32)+(?= bar.sync)"
        assert "atom." not in re.sub(meeting, "", ordered) and re.search(meeting, ordered), ordered
        assert starting(lines, "ld.shared.v4")  # W
    for name in kernels.keys() - resident.keys():
        assert not starting(kernels[name], "atom.") and not starting(kernels[name], "ld.acquire")


def test_loads_pass_the_cache_that_others_do_not_write(kernels):
    for name, lines in kernels.items():
        assert starting(lines, "ld.global.cg.v4.u32"), name  # h, or gradients of gates
        assert not starting(lines, "ld.global.nc"), name
        # No address of unknown space, no memory of a thread's own.
        assert not any(re.match(r"(ld|st)\.(v\d|[bufs]\d|local)", line) for line in lines), name
