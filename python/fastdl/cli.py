"""The command `fastdl`: info, bench, verify, demo. Results go to standard output, progress to standard error."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastdl import _C
from fastdl import machine as this_machine
from fastdl._version import __version__
from fastdl.bench import accuracy, place, runner
from fastdl.bench import check as bars
from fastdl.bench import compare as comparison
from fastdl.bench.harness import REGIMES
from fastdl.bench.host import measure_host
from fastdl.bench.report import make_console, make_table, print_document, read_json, write_json
from fastdl.bench.settings import Settings
from fastdl.ops import cuda

_QUICK_SECONDS = 0.05

_json_option = click.option(
    "--json", "target", metavar="FILE", default="", help='Write the results as JSON; "-": to standard output, alone.'
)


def _results(target: str) -> Console:
    """Where tables go: standard output, unless JSON takes it."""
    return make_console(stderr=target == "-")


@contextmanager
def _progress(lines: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error; where that is no terminal, nothing, or a line a step with `lines`."""
    console = make_console(stderr=True)
    if not console.is_terminal:

        def line(done: int, total: int, name: str) -> None:
            if lines and name:
                console.print(f"[{done + 1}/{total}] {name}", markup=False, soft_wrap=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("", total=None)
        yield lambda done, total, name: display.update(task, completed=done, total=total, description=escape(name))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastdl")
def main() -> None:
    """Faster PyTorch models on the hardware you already have."""


# --- info ---------------------------------------------------------------------------------------------------------
def _bytes(size: int) -> str:
    for unit, factor in (("MB", 1 << 20), ("KB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:g} {unit}"
    return f"{size} bytes" if size else "unknown"


def _openmp_lines() -> Iterator[str]:
    runtimes = this_machine.openmp_runtimes()
    if runtimes is None:
        yield "unknown: this system does not show a process its memory map"
    elif not runtimes:
        yield "none loaded"
    else:
        yield from runtimes
        if len(runtimes) > 1:
            yield f"WARNING: {len(runtimes)} runtimes in one process compete for the processors; there should be one"


def _info_facts() -> Iterator[tuple[str, str]]:
    cpu, build, (threads, why) = _C.cpu_info(), _C.build_info(), _C.threads()
    cap = f", capped by FASTDL_ISA={cpu['isa_cap']}" if cpu["isa_cap"] else ""
    yield "fastdl", f"{__version__}, built by {build['compiler']}, OpenMP {'on' if build['openmp'] else 'off'}"
    yield "processor", f"{cpu['brand']} ({cpu['vendor']}), {cpu['cpus']} available"
    yield "caches", f"L1d {_bytes(cpu['l1d'])}, L2 {_bytes(cpu['l2'])}, L3 {_bytes(cpu['l3'])}"
    yield "levels in use", f"{cpu['isa']}{cap}"
    emulated = " (amx emulated: slow, for tests)" if build["amx_emulated"] else ""
    yield "levels supported", f"{', '.join(cpu['isa_supported'])}{emulated}"
    yield "levels compiled", f"{', '.join(build['isa_compiled'])}"
    for isa, reason in build["isa_missing"].items():
        yield f"no {isa}", reason
    yield "threads", f"{threads} ({why})"
    for line in _openmp_lines():
        yield "OpenMP runtime", line
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield from _cuda_facts()


def _cuda_facts() -> Iterator[tuple[str, str]]:
    module, why = cuda.load("_cuda")
    if module is None:
        yield "CUDA", f"not built: {_C.build_info()['cuda']['reason'] or why}"
    else:
        yield "CUDA", f"built by nvcc {module.nvcc} for {module.architectures}"
        yield "CUDA in use", "UNVERIFIED, on by FASTDL_CUDA_UNVERIFIED=1" if cuda.UNVERIFIED else f"off: {cuda.OFF}"
        gpus = this_machine.gpus()
        for gpu in gpus:
            reason = cuda.gpu_reason(gpu["index"]) or "can run them"
            facts = f"sm_{gpu['sm']}, {gpu['multiprocessors']} multiprocessors, L2 {_bytes(gpu['l2_bytes'])}"
            yield f"cuda:{gpu['index']}", f"{gpu['name']}, {facts}: {reason}"
        if not gpus:
            yield "GPUs", "none seen"
    if cuda.load("_twin")[0] is not None:
        yield "CUDA twin", "built: the CUDA kernels as host code, slow, for tests"


def _cuda_table() -> Table | None:
    """The CUDA kernels, every operation said to be unverified; None where there are none."""
    module = cuda.load("_cuda")[0] or cuda.load("_twin")[0]
    if module is None:
        return None
    state = "unverified: on" if cuda.UNVERIFIED else "unverified: off by default"
    table = make_table("CUDA kernels, never yet run on a GPU", ("operation", "state", "kernel"), ("dtype", "level"))
    for operation in runner.OPERATIONS:
        rows = cuda.kernels(operation, module)
        for row in rows:
            table.add_row(operation, state, row["name"], str(row.get("dtype", "")), str(row.get("isa", "")))
        if not rows:
            table.add_row(operation, "no CUDA kernels: torch runs it", "", "", "")
    return table


@main.command()
def info() -> None:
    """Say what fastdl found: levels, caches, OpenMP runtimes, torch, CUDA, kernels."""
    console = make_console()
    facts = list(_info_facts())
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.print(f"{name:<{width}}  {value}", markup=False, soft_wrap=True)
    console.print()
    table = make_table("Kernels", ("kernel", "isa", "dtype", "kind"), ("tile", "available"))
    for row in (row for operation in runner.OPERATIONS for row in _C.kernels(operation)):
        tile = f"{row['mr']}x{row['nr']}"
        available = "yes" if row["available"] else f"no: {row['reason']}"
        table.add_row(row["name"], row["isa"], row["dtype"], row["kind"], tile, escape(available))
    console.print(table)
    if (of_cuda := _cuda_table()) is not None:
        console.print()
        console.print(of_cuda)


# --- bench --------------------------------------------------------------------------------------------------------
@main.group()
def bench() -> None:
    """Measure this machine, and fastdl against torch on it."""


@bench.command("host")
@_json_option
@click.option("--quick", is_flag=True, help="Shorter probes.")
def bench_host(target: str, quick: bool) -> None:
    """Measure the machine's peaks: FMA, AMX, read bandwidth of every memory level."""
    rows = measure_host(0.02 if quick else 0.2)
    table = make_table(_C.cpu_info()["brand"], ("what", "level"), ("threads", "measured"))
    for row in rows:
        value = row["note"] if row["value"] is None else f"{row['value']:.4g} {row['unit']}"
        table.add_row(row["what"], row["level"], str(row["threads"]), value)
    _results(target).print(table)
    if target:
        write_json({"machine": this_machine.describe(), "peaks": rows}, target)


def _run_capped(isa: str) -> None:
    """Start this command again, in a process that holds fastdl and torch to a level, and end as it ends."""
    command = [sys.executable, "-m", "fastdl.cli", *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=this_machine.capped_environment(isa), check=False).returncode)


def _bench_operation(operation: str) -> click.Command:
    """`fastdl bench OPERATION`."""
    module = runner.OPERATIONS[operation]
    subject = (module.__doc__ or "").splitlines()[0].partition(": ")[2]

    @click.command(operation, help=f"Measure {operation} against torch: {subject}")
    @click.option("--dtype", default="float32", show_default=True)
    @click.option("--threads", type=click.IntRange(min=0), default=0, help="0: torch's default.")
    @click.option("--isa", type=click.Choice(this_machine.ISA_LEVELS), help="Hold fastdl and torch to a level.")
    @click.option("--device", type=click.Choice(place.PLACES), default="cpu", show_default=True)
    @click.option("--limit", type=click.FloatRange(min=0), default=0.0, help="Seconds after which no row begins.")
    @click.option("--frozen", is_flag=True, help="Weights packed beforehand, as fastdl.freeze does.")
    @click.option("--kernel", default="", help="Force a row of the kernel table.")
    @click.option("--family", "families", multiple=True, type=click.Choice(list(module.FAMILIES)))
    @click.option("--shapes", "--filter", default="", help="Only rows whose name contains this.")
    @click.option("--regime", "regimes", multiple=True, type=click.Choice(REGIMES), help="Beside warm; default: all.")
    @click.option("--seconds", type=click.FloatRange(min=0.001), default=Settings.seconds, show_default=True)
    @click.option("--quick", is_flag=True, help="Few rounds a row: a look, no figures to quote.")
    @_json_option
    def command(isa: str | None, regimes: tuple[str, ...], quick: bool, target: str, **options: Any) -> None:
        if isa and not this_machine.is_capped(isa):
            _run_capped(isa)
        options["seconds"] = _QUICK_SECONDS if quick else options["seconds"]
        chosen = tuple(regime for regime in REGIMES if regime in (regimes or REGIMES) or regime == "warm")
        settings = Settings(isa=isa or "", regimes=chosen, **options)
        try:
            with _progress(lines=True) as progress:
                document = runner.run(operation, settings, progress)
        except ValueError as error:
            raise click.ClickException(str(error)) from None
        print_document(document, _results(target))
        if target:
            write_json(document, target)
        if any(not row["check"]["passed"] for row in document["rows"]):
            sys.exit(1)

    return command


for _operation in runner.OPERATIONS:
    bench.add_command(_bench_operation(_operation))


_document = click.Path(exists=True, dir_okay=False, path_type=Path)


@bench.command("compare")
@click.argument("a", type=_document)
@click.argument("b", type=_document)
def bench_compare(a: Path, b: Path) -> None:
    """Say what changed from run A to run B, and whether it is more than noise."""
    try:
        comparison.print_comparison(read_json(a), read_json(b), make_console())
    except ValueError as error:
        raise click.ClickException(str(error)) from None


@bench.command("accuracy")
@click.option("--isa", type=click.Choice(this_machine.ISA_LEVELS), help="Hold fastdl and torch to a level.")
@_json_option
def bench_accuracy(isa: str | None, target: str) -> None:
    """Measure errors against float64 beside torch's; fail where one leaves its bound."""
    if isa and not this_machine.is_capped(isa):
        _run_capped(isa)
    try:
        document = accuracy.run()
    except AssertionError as error:
        raise click.ClickException(str(error)) from None
    accuracy.print_document(document, _results(target))
    if target:
        write_json(document, target)


@bench.command("check")
@click.option("--only", default="", metavar="PATTERN", help="Only bars whose name contains or matches this.")
@click.option("--bars", "path", type=_document, help="Default: benchmarks/bars.toml here or in a directory above.")
@_json_option
def bench_check(only: str, path: Path | None, target: str) -> None:
    """Measure every figure of bars.toml; fail where one is missing or unmet."""
    try:
        chosen = bars.load_bars(path or bars.find_bars(Path.cwd()), only)
    except (ValueError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from None

    def save(verdicts: list[bars.Verdict], documents: list[dict[str, Any]]) -> None:
        write_json({"bars": [bars.as_json(verdict) for verdict in verdicts], "runs": documents}, target)

    if target in ("", "-"):
        verdicts, documents = bars.check(chosen, bars.measure)
    else:
        verdicts, documents = bars.check(chosen, bars.measure, save)
    bars.print_verdicts(verdicts, _results(target))
    if target == "-":
        save(verdicts, documents)
    if not all(verdict.met for verdict in verdicts):
        sys.exit(1)


# --- verify, demo -------------------------------------------------------------------------------------------------
@main.command()
@click.option("--quick", is_flag=True, help="The smallest sizes only: seconds, even under emulation.")
@click.option(
    "--device",
    type=click.Choice(["all", *place.PLACES]),
    default="all",
    help="all: the CPU, and a GPU where its kernels are on.",
)
def verify(quick: bool, device: str) -> None:
    """Check every kernel against float64 on this machine, offline; fail where one is wrong."""
    from fastdl.verify import verify as run

    if device not in ("all", "cpu") and (why := place.unavailable(device)):
        raise click.ClickException(f"device {device}: {why}")
    devices = ("cpu", "cuda")[: 1 + (not place.unavailable("cuda"))] if device == "all" else (device,)

    console = make_console()
    with _progress() as progress:
        outcome = run(quick, progress, devices)
    table = make_table(f"{_C.cpu_info()['isa']}, {_C.threads()[0]} threads", ("subject",), ("checks", "failed"))
    for subject, count in outcome.checks.items():
        table.add_row(subject, str(count), str(sum(failure[0] == subject for failure in outcome.failures)))
    console.print(table)
    for kernel, reason in outcome.unavailable.items():
        console.print(f"not run: {kernel}: {reason}", markup=False, soft_wrap=True)
    for subject, what, why in outcome.failures[:20]:
        console.print(f"FAILED {subject}: {what}: {why}", markup=False, soft_wrap=True)
    console.print(f"{sum(outcome.checks.values())} checks, {len(outcome.failures)} failed")
    if not outcome.passed:
        sys.exit(1)


@main.command()
@click.option("--epochs", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@_json_option
def demo(epochs: int, seed: int, target: str) -> None:
    """Train a small network on handwritten digits, stock and optimised (extra: fastdl[demo])."""
    from fastdl.demo import train

    try:
        result = train(epochs, seed)
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from None
    console = _results(target)
    stock, optimised = result["stock"], result["optimised"]
    table = make_table("Loss", ("step",), ("stock", "optimised"))
    steps = result["steps"]
    for step in sorted({*range(min(steps, 5)), *range(0, steps, max(1, steps // 10)), steps - 1}):
        table.add_row(str(step + 1), f"{stock['losses'][step]:.6f}", f"{optimised['losses'][step]:.6f}")
    table.add_section()
    table.add_row("accuracy", f"{stock['accuracy']:.2%}", f"{optimised['accuracy']:.2%}")
    table.add_row("ms an epoch", *(f"{1e3 * statistics.median(run['seconds']):.2f}" for run in (stock, optimised)))
    table.add_row("seconds in all", *(f"{sum(run['seconds']):.2f}" for run in (stock, optimised)))
    console.print(table)
    ratio = statistics.median(a / b for a, b in zip(stock["seconds"], optimised["seconds"], strict=True))
    console.print(
        f"\n{steps} steps on {result['threads']} threads, an epoch of each in turn: "
        f"the optimised network took {1 / ratio:.2f} of the stock network's time.",
        soft_wrap=True,
    )
    verdict = "The same losses" if result["alike"] else "THE LOSSES DIFFER"
    console.print(
        f"{verdict}: the first ones by at most {result['first_difference']:.1e}, "
        f"the last epoch's mean by {result['final_difference']:.1e} (relative).",
        soft_wrap=True,
    )
    if target:
        write_json(result, target)


if __name__ == "__main__":
    main()
