"""Benchmarks of several operations in one process, for tools/gpu_check: python tools/gpu_bench.py JOBS OUT END

JOBS: JSON, a list of {"operation", "weight", and settings of a benchmark}. OUT: a folder; job i leaves i.json there, or
i.error. END: seconds from now by which all are to be done; each job has its share. A job of which one is there is not
done again, and one that began and left neither (it hung, or crashed) counts as tried: i.begun. Exits 87 where nothing
can run on the GPU in this process any more.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("FASTDL_CUDA_UNVERIFIED", "1")  # before fastdl: it is read at import

from gpu_lost import leave_if_lost

from fastdl.bench import runner
from fastdl.bench.report import write_json
from fastdl.bench.settings import Settings

GRACE = 15  # seconds by which a job's last row may pass its share


def run(job: dict[str, Any], target: Path, seconds: float) -> None:
    options = {key: value for key, value in job.items() if key not in ("operation", "weight")}
    options["families"] = tuple(options.get("families", ()))
    options.setdefault("regimes", ("warm", "cold"))
    settings = Settings(limit=max(1.0, seconds), **options)
    document = runner.run(job["operation"], settings, lambda done, total, name: print(done, total, name, flush=True))
    write_json(document, str(target))


def main() -> None:
    jobs, out, end = json.loads(sys.argv[1]), Path(sys.argv[2]), time.monotonic() + float(sys.argv[3])
    todo = [i for i in range(len(jobs)) if not (out / f"{i}.begun").exists()]
    for place, index in enumerate(todo):
        share = jobs[index].get("weight", 1) / sum(jobs[i].get("weight", 1) for i in todo[place:])
        seconds = share * (end - time.monotonic())
        if seconds <= 0:
            break
        (out / f"{index}.begun").touch()
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True)
        try:
            run(jobs[index], out / f"{index}.json", seconds)
        except Exception as error:
            traceback.print_exc()
            (out / f"{index}.error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        faulthandler.cancel_dump_traceback_later()
        leave_if_lost()


if __name__ == "__main__":
    main()
