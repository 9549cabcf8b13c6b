"""Time BiSM steps: both packages beside the same work by hand and beside ``higher``; write docs/performance.md.

    python tests/benchmarks/performance.py                        all tables and the figure, about an hour
    python tests/benchmarks/performance.py --part steps --models checkerboard

Every contender is a process of its own, so that its time to the first step and its peak memory are its own. They take
turns, round by round, while the others sleep: a machine that slows down slows down all, and a ratio is the median of
the rounds' own ratios. What is measured is kept in ``--output`` as JSON; the page is made from it.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "examples"), str(HERE)]
BATCH = 100

# contender: its yardsticks
RATIOS = {
    "pyro_bism, eager": ("torch by hand, eager", "higher"),
    "pyro_bism, jit=True": ("torch by hand, compiled", "higher"),
    "numpyro_bism, run": ("JAX by hand, scan", "higher"),
}
CONVOLUTIONS = """## Convolutions in JAX

On CPUs, XLA has fast code for convolutions with channels last and brings others to that form, but not those in the body
of a loop. `numpyro_bism` rewrites what it compiles, so that it is faster than the same step in a plain `lax.scan`; what
is left are gradients of gradients, which are slow in any form. Milliseconds, batch 100, {}:"""
MOMENT_DECAY = """## Memory

Megabytes of a step's own, and in brackets the process's peak, which has the compiler's size in it, however small the
model is. K = N = 5:"""
STRATEGIES = [
    "Detached()",
    "Unrolled(5)",
    "Unrolled(5, memory='recompute')",
    "Implicit(num_steps=5)",
    "Amortized()",
    "Penalty(100)",
    "Covariance(2)",
]
TITLES = {
    "checkerboard": "Checkerboard, Gaussian-Bernoulli RBM of 2 x 4 units",
    "rbm": "Gaussian-Bernoulli RBM of 560 x 400 units",
    "conv": "Convolutional, 1 x 32 x 32, 16 channels, 50 latents",
}
# Gaussian-Bernoulli RBMs
UNITS = {"rbm / 2": "280 x 200", "rbm": "560 x 400", "rbm x 2": "1120 x 800", "rbm x 4": "2240 x 1600"}
SIZES = {**UNITS, "conv": "convolutional, 16 channels", "conv x 4": "convolutional, 64 channels"}


def work(job: dict) -> None:
    """A contender's process: takes as many steps as it is told, and answers with seconds and loss."""
    from contenders import CONTENDERS
    from models import MODELS

    model = MODELS[job["model"]]
    x = model.data(job["batch"])
    start = time.perf_counter()
    steps = CONTENDERS[job["contender"]](model, x, job["K"], job["N"], job["strategy"])
    loss = steps(job["steps"] if job["scans"] else 1)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    busy = sum(u.ru_utime + u.ru_stime for u in used)
    print(json.dumps({"seconds": time.perf_counter() - start, "busy": busy, "loss": loss}), flush=True)
    for line in sys.stdin:
        if line.startswith("memory"):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            own = [own_memory(lambda: steps(job["steps"])) for _ in range(5)]
            print(json.dumps({"peak": peak, "own": None if None in own else median(own)}), flush=True)
            continue
        start = time.perf_counter()
        loss = steps(int(line))
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)


def own_memory(run: Callable[[], Any]) -> float | None:
    """Megabytes that ``run`` holds at its height beyond what lies there before and after it; None but on Linux."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def resident(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for the next step is the step's own
    before = resident("VmRSS")
    reset.write_text("5")  # the high-water mark starts anew
    run()
    return resident("VmHWM") - before


@dataclass
class Worker:
    job: dict
    times: list[float] = field(default_factory=list)
    loss: float = 0.0

    def __post_init__(self):
        command = [sys.executable, __file__, "--work", json.dumps(self.job)]
        self.cache = tempfile.TemporaryDirectory()  # nothing is compiled yet when it starts
        caches = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TMPDIR"), self.cache.name)  # the latter for its headers
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", **caches}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        first = self._answer()
        self.first, self.busy = first["seconds"], first["busy"]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.job} failed:\n{self.process.stderr.read()[-3000:]}")
        return json.loads(line)

    def ask(self, what: str) -> dict:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self._answer()

    def round(self) -> None:
        found = self.ask(self.job["steps"])
        self.times.append(found["seconds"] / self.job["steps"])
        self.loss = found["loss"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.cache.cleanup()


def job(model: str, contender: str, strategy: str = "Unrolled(5)", K: int = 5, N: int = 5, batch: int = BATCH) -> dict:
    slow = "eager" in contender or contender == "higher"
    steps = {"checkerboard": 20 if slow else 200, "conv": 2 if slow else 4, "conv x 4": 1}.get(model, 5 if slow else 10)
    if contender in ("JAX by hand, scan", "numpyro_bism, run") and model == "checkerboard":
        steps = 1000
    scans = "JAX" in contender or "numpyro" in contender
    return {
        "model": model,
        "contender": contender,
        "strategy": strategy,
        "K": K,
        "N": N,
        "batch": batch,
        "steps": steps,
        "scans": scans,
    }


def measure(jobs: list[dict], rounds: int, label: str) -> list[dict]:
    """Medians, and all rounds; the contenders take turns."""
    workers = []
    try:
        for each in tqdm(jobs, desc=f"{label}: first steps", leave=False):
            workers.append(Worker(each))
        for n in tqdm(range(rounds + 1), desc=f"{label}: rounds", leave=False):
            for worker in workers:
                worker.round()
            if n == 0:  # not counted
                for worker in workers:
                    worker.times.clear()
        return [
            {
                **w.job,
                "ms": [1e3 * t for t in w.times],
                "first": w.first,
                "busy": w.busy,
                "loss": w.loss,
                **w.ask("memory"),
            }
            for w in workers
        ]
    finally:
        for worker in workers:
            worker.close()


def ratio(found: list[dict], contender: str, yardstick: str) -> float | None:
    rows = {row["contender"]: row["ms"] for row in found}
    if contender not in rows or yardstick not in rows:
        return None
    return median(a / b for a, b in zip(rows[contender], rows[yardstick], strict=True))


# The parts


def steps(args: argparse.Namespace) -> dict:
    """K = N = 5, all contenders."""
    from contenders import CONTENDERS

    return {model: measure([job(model, name) for name in CONTENDERS], args.rounds, model) for model in args.models}


def strategies(args: argparse.Namespace) -> list[dict]:
    """All strategies on the large RBM, both packages compiled. ``Exact`` is none for relaxed latents."""
    jobs = [job("rbm", name, s) for name in ("pyro_bism, jit=True", "numpyro_bism, run") for s in args.strategies]
    return [row for each in jobs for row in measure([each], args.rounds, f"{each['contender']} {each['strategy']}")]


def growth(args: argparse.Namespace) -> list[dict]:
    """K, N, batch and the numbers of units, one at a time, on the large RBM."""
    settings = [("rbm", K, 5, BATCH) for K in (1, 5, 10)] + [("rbm", 5, N, BATCH) for N in (1, 10)]
    settings += [("rbm", 5, 5, 2 * BATCH), ("rbm", 5, 5, 4 * BATCH), ("rbm / 2", 5, 5, BATCH), ("rbm x 2", 5, 5, BATCH)]
    found = []
    for model, K, N, batch in settings:
        names = ("pyro_bism, jit=True", "torch by hand, compiled", "numpyro_bism, run", "JAX by hand, scan")
        jobs = [job(model, name, f"Unrolled({N})", K, N, batch) for name in names]
        found += measure(jobs, args.rounds, f"{model} K={K} N={N} batch={batch}")
    return found


def convolutions(args: argparse.Namespace) -> list[dict]:
    """The convolutional model's two convolutions and their gradients by themselves, in torch and in JAX."""
    command = [sys.executable, str(HERE / "convolutions.py"), str(BATCH), str(args.rounds)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory(args: argparse.Namespace) -> dict:
    """What a step holds, by size; and an unrolled one by N and by ``memory=``."""
    names = ("higher", "pyro_bism, eager", "pyro_bism, jit=True", "numpyro_bism, run")
    sizes = [row for name in names for m in SIZES for row in measure([job(m, name)], 0, f"{name} {m}")]
    command = [sys.executable, str(HERE / "memory.py")]
    unrolled = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {"sizes": sizes, "unrolled": unrolled}


PARTS = {
    "steps": steps,
    "convolutions": convolutions,
    "strategies": strategies,
    "memory": memory,
    "growth": growth,
}


# The page


def machine() -> str:
    name = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    import jax
    import torch

    versions = f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, JAX {jax.__version__}"
    return f"{name}, {versions}"


def cores() -> str:
    num = len(os.sched_getaffinity(0))
    return f"{num} core{'s' * (num > 1)}"


def number(x: float | None, spec: str = ".2f") -> str:
    return "" if x is None else format(x, spec)


def step_table(found: list[dict]) -> list[str]:
    lines = [
        "| | ms a step | to its like by hand | to `higher` | first step, s | processor, s | own, MB | peak, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        name = row["contender"]
        like, other = RATIOS.get(name, (None, "higher"))
        cells = [
            name,
            number(median(row["ms"]), ".3g"),
            number(ratio(found, name, like) if like else None),
            number(ratio(found, name, other) if name != other else None, ".3f"),
            number(row["first"], ".1f"),
            number(row["busy"], ".1f"),
            number(row["own"], ".0f"),
            number(row["peak"], ".0f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def strategy_table(found: list[dict]) -> list[str]:
    lines = ["| | `pyro_bism`, jit: ms | first, s | own, MB | `numpyro_bism`: ms | first, s | own, MB |"]
    lines += ["|---" * 7 + "|"]
    for name in STRATEGIES:
        rows = [row for row in found if row["strategy"] == name]
        cells = [f"{median(r['ms']):.3g} | {r['first']:.1f} | {r['own']:.0f}" for r in rows]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def growth_table(found: list[dict]) -> list[str]:
    names = list(dict.fromkeys(row["contender"] for row in found))
    lines = ["| units | K | N | batch | " + " | ".join(names) + " | Pyro | NumPyro |", "|---" * (6 + len(names)) + "|"]
    for setting in dict.fromkeys((row["model"], row["K"], row["N"], row["batch"]) for row in found):
        rows = [row for row in found if (row["model"], row["K"], row["N"], row["batch"]) == setting]
        cells = [format(median(row["ms"]), ".3g") for row in rows]
        cells += [number(ratio(rows, name, RATIOS[name][0])) for name in RATIOS if "eager" not in name]
        lines.append("| " + " | ".join([UNITS[setting[0]], *map(str, setting[1:]), *cells]) + " |")
    lines += [
        "",
        "The last two columns are the packages' ratios to their likes by hand. Milliseconds that one more costs",
    ]
    lines += ["(least squares over the rows above), and in brackets how far a row is from that line at most:", ""]
    lines += ["| | inner step (K) | unrolled step (N) | 100 examples |", "|---|---|---|---|"]
    fixed = {"model": "rbm", "K": 5, "N": 5, "batch": BATCH}
    for name in names:
        rows = [row for row in found if row["contender"] == name]
        cells = []
        for which in ("K", "N", "batch"):
            others = {key: value for key, value in fixed.items() if key != which}
            points = [(r[which], median(r["ms"])) for r in rows if all(r[k] == v for k, v in others.items())]
            at, ms = (np.array(values, float) for values in zip(*points, strict=True))
            line = np.polyfit(at, ms, 1)
            off = np.abs(ms / np.polyval(line, at) - 1).max()
            cells.append(f"{line[0] * (BATCH if which == 'batch' else 1):.3g} ({off:.0%})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def memory_table(found: list[dict], row_of: Callable, column_of: Callable) -> list[str]:
    cells = {(row_of(x), column_of(x)): f"{x['own']:.0f} ({x['peak']:.0f})" for x in found}
    rows, columns = dict.fromkeys(row for row, _ in cells), dict.fromkeys(column for _, column in cells)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    return lines + ["| " + " | ".join([row, *(cells[row, column] for column in columns)]) + " |" for row in rows]


def convolution_table(found: list[dict]) -> list[str]:
    lines = ["| | torch | JAX, alone | JAX, in a loop | in `numpyro_bism`'s loop |", "|---|---|---|---|---|"]
    for row in found:
        cells = [format(row[name], ".3g") for name in ("torch", "alone", "loop", "compiled")]
        lines.append(f"| {row['what']} | " + " | ".join(cells) + " |")
    return lines


def picture(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 3.2), layout="constrained", squeeze=False)
    for axis, (model, rows) in zip(axes[0], found.items(), strict=True):
        names = [row["contender"] for row in rows][::-1]
        values = [median(row["ms"]) for row in rows][::-1]
        colours = ["C0" if "bism" in name else "0.7" for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [format(v, ".3g") for v in values], padding=3, fontsize=8)
        axis.set(title=TITLES[model], xscale="log", xlabel="milliseconds a step")
        axis.set_xlim(min(values) / 2, max(values) * 3)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.title.set_fontsize(9)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def page(found: dict, path: Path) -> None:
    lines = [
        "# How fast a step is",
        "",
        f"Made by `make bench` on {found['machine']}.",
        f"Batch {BATCH}, K = N = 5, denoising, Adam at both levels, float32, unless a table says otherwise. Every",
        "figure is a median of rounds in which the contenders take turns, each in a process of its",
        "own; *first step* is from the start of the set-up, imports of the framework among it, to the end of that step",
        "(of the first compiled run, for JAX), with nothing compiled before; *processor* is the computing time in it,",
        "compilers' included, which other load on the machine lengthens less; *own* memory is what steps hold",
        "at their height beyond what lies in the process between them, and *peak* is the whole process's, libraries",
        "and compiler included. `higher` is the paper's algorithm in plain torch, unrolled with that package as its",
        "authors did.",
    ]
    if "steps" in found:
        lines += ["", "![Milliseconds a step](images/performance.png)"]
        lines += ["", f"The three tables that follow: {found['measured']['steps']}."]
        for model, rows in found["steps"].items():
            lines += ["", f"## {TITLES[model]}", "", *step_table(rows)]
        picture(found["steps"], path.parent / "images" / "performance.png")
    if "convolutions" in found:
        lines += ["", CONVOLUTIONS.format(found["measured"]["convolutions"])]
        lines += ["", *convolution_table(found["convolutions"])]
    if "strategies" in found:
        lines += [
            "",
            f"## Hypergradients: {TITLES['rbm']}, K = 5",
            "",
            f"Without turns, {found['measured']['strategies']}.",
        ]
        lines += ["", *strategy_table(found["strategies"])]
    if "memory" in found:
        lines += ["", MOMENT_DECAY, ""]
        lines += memory_table(found["memory"]["sizes"], lambda x: x["contender"], lambda x: SIZES[x["model"]])
        lines += ["", "560 x 400 units, K = 1, `Unrolled(N, memory=...)`, Pyro without `jit`:", ""]
        lines += memory_table(
            found["memory"]["unrolled"], lambda x: f"`{x['host']}_bism`, {x['memory']!r}", lambda x: f"N = {x['N']}"
        )
    if "growth" in found:
        lines += ["", "## Growth: Gaussian-Bernoulli RBM", "", f"Milliseconds a step, {found['measured']['growth']}."]
        lines += ["", *growth_table(found["growth"])]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("build"))
    parser.add_argument("--page", type=Path, default=HERE.parents[1] / "docs" / "performance.md")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(json.loads(args.work))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / "performance.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    found["machine"] = machine()
    for name in args.part:
        part = PARTS[name](args)
        if name == "strategies":  # those measured before stay
            part = [row for row in found.get(name, []) if row["strategy"] not in args.strategies] + part
        found[name] = found.get(name, {}) | part if isinstance(part, dict) else part
        found.setdefault("measured", {})[name] = f"{cores()}, {args.rounds} rounds"
        kept.write_text(json.dumps(found, indent=1))
        page(found, args.page)
        if name == "steps":
            for model, rows in part.items():
                print("\n".join(["", TITLES[model], "", *step_table(rows)]))
    print(f"\nwritten to {args.page}")


if __name__ == "__main__":
    main()
