"""How tools/gpu_check runs its steps: each in its share of the time, in processes that can be ended, all recorded.

Nothing here waits for a process longer than its time: output goes to a file, not through a pipe that a grandchild may
hold, and what outlives its kill (a process stuck in a driver) is left behind.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

KEPT = 4000  # characters of an output in the JSON
LOGGED = 200_000  # and in the log, of each command


class Failed(Exception):
    """A step failed, for this reason."""


class Skipped(Exception):
    """A step has nothing to run with."""


class Stopped(BaseException):
    """The run is to end now: a signal came."""


def tail(text: str, count: int) -> str:
    return text if len(text) <= count else f"[...]{text[-count:]}"


def last_line(text: str) -> str:
    """Of an output: mostly what went wrong."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")[:300]


class Check:
    """The steps of one run, and what they leave behind in `out`: gpu_check.json, written anew whenever something is
    known, and gpu_check.log."""

    def __init__(self, out: Path, scratch: Path, seconds: float) -> None:
        self.out, self.scratch = out, scratch
        self.end = self.step_end = time.monotonic() + seconds
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("FASTDL_")}
        self.document: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "steps": [],
        }
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.RLock()
        out.mkdir(parents=True, exist_ok=True)
        self._log = (out / "gpu_check.log").open("w", encoding="utf-8")
        self.save()

    # --- what is left behind ------------------------------------------------------------------------------------
    def save(self) -> None:
        """Replaces gpu_check.json as a whole: a run that is killed meanwhile leaves the last one."""
        with self._lock:
            text = json.dumps(self.document, indent=1) + "\n"
            target = self.out / "gpu_check.json"
            partial = target.with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(target)

    def log(self, text: str) -> None:
        with self._lock:
            print(text, file=self._log, flush=True)

    def close(self) -> None:
        self.stop()
        self._log.close()

    # --- processes ----------------------------------------------------------------------------------------------
    def left(self) -> float:
        """Seconds left to this step."""
        return self.step_end - time.monotonic()

    def execute(
        self,
        *command: str,
        seconds: float = math.inf,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> tuple[int | None, str]:
        """(exit status, or None where its time was up and it was killed; output, both streams)."""
        limit = min(seconds, self.left())
        if limit <= 1:
            raise Failed("no time left")
        with tempfile.TemporaryFile(dir=self.scratch) as file:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**self.environment, **(environment or {})},
                    cwd=cwd or self.scratch,
                )
            except OSError as error:
                raise Failed(f"{command[0]} cannot be run: {error}") from None
            with self._lock:
                self._running.add(process)
            status: int | None = None
            start = time.monotonic()
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                pass
            finally:
                end(process)  # what it started ends with it, also where it ended by itself
                with self._lock:
                    self._running.discard(process)
                file.seek(0)
                output = file.read().decode(errors="replace")
                ended = "killed: no time left" if status is None else f"exit status {status}"
                seconds = time.monotonic() - start
                self.log(f"$ {' '.join(command)}\n{tail(output, LOGGED)}\n({ended}, {seconds:.1f} s)")
        return status, output

    def run(self, *command: str, **options: Any) -> str:
        """The command's output; Failed where it exits nonzero or its time is up."""
        start = time.monotonic()
        status, output = self.execute(*command, **options)
        if status is None:
            raise Failed(f"no end within {time.monotonic() - start:.0f} s\n{tail(output, KEPT)}")
        if status:
            raise Failed(f"exit status {status}: {last_line(output)}\n{tail(output, KEPT)}")
        return output

    def stop(self) -> None:
        """Ends what runs."""
        self.end = self.step_end = time.monotonic()
        with self._lock:
            running = list(self._running)
        for process in running:
            end(process)

    # --- steps --------------------------------------------------------------------------------------------------
    def steps(self, table: list[tuple[str, float, Callable[[Check], Any]]]) -> None:
        """Runs the steps in order. Each gets its weight's share of the time that is left, so that what one leaves goes
        to the later ones."""
        for index, (name, weight, function) in enumerate(table):
            left = self.end - time.monotonic()
            self.step(name, left * weight / sum(weight for _, weight, _ in table[index:]), function)

    def step(self, name: str, seconds: float, function: Callable[[Check], Any]) -> None:
        """Runs one step in at most this time; records what it returns, or why not."""
        print(f"== {name}", flush=True)
        self.log(f"\n=== {name}: at most {seconds:.0f} s")
        start = time.monotonic()
        self.step_end = min(self.end, start + seconds)
        row: dict[str, Any] = {"name": name, "status": "stopped", "why": "", "result": None}
        self.document["steps"].append(row)
        self.save()
        try:
            row["result"] = function(self)
            row["status"] = "passed"
        except Skipped as why:
            row |= {"status": "skipped", "why": str(why)}
        except Failed as why:
            row |= {"status": "failed", "why": str(why)}
        except Exception as error:  # a defect of this script must not end the run either
            row |= {"status": "failed", "why": f"{type(error).__name__}: {error}"}
        finally:
            row["seconds"] = round(time.monotonic() - start, 1)
            self.save()
        print(f"   {row['status']} in {row['seconds']} s {' '.join(row['why'].splitlines()[:1])}", flush=True)

    def failed(self) -> bool:
        return any(row["status"] in ("failed", "stopped") for row in self.document["steps"])

    def summary(self) -> str:
        lines = [f"\n{'step':<12} {'status':<8} {'seconds':>8}"]
        for row in self.document["steps"]:
            first = row["why"].splitlines()[0] if row["why"] else ""
            lines.append(f"{row['name']:<12} {row['status']:<8} {row['seconds']:>8}  {first}")
        return "\n".join([*lines, str(self.out / "gpu_check.json")])


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and all of its session; one that cannot be killed is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGINT raise Stopped inside it, and are ignored from then on: what is known is written."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def ignore() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    def stop(number: int, _: Any) -> None:
        ignore()
        raise Stopped(signal.Signals(number).name)

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        ignore()


def processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 2
