"""Compare data preparation, from raw JSONL to token store and plan, with `tokenizers`, TRL and LLaMA-Factory.

    python benchmarks/data.py [--rows 50000] [--repeats 3] [--only tokenizers ours packing trl llamafactory]

All get the same Alpaca-like rows of real English (`peers/rows.py`), the Qwen2.5 tokenizer and its chat format, on two
cores. Each measurement runs in a fresh process with empty caches; imports are not timed, and the best of `--repeats`
counts. Each peer has its own environment (`peers/environments.py`), which the first run creates. A peer prepares the
rows with 0 and 2 worker processes, packed and unpacked, and is compared by its fastest variant. If the numbers of
tokens are not all equal, the benchmark stops.

The timing favours the peers. Ours covers everything from the raw rows to the plan, including the token store; that of
the peers covers reading and preparing, for TRL from rows in its own format; that of `encode_batch_fast` covers only the
call. Loading the tokenizer is never timed. `command_seconds`, `cached_seconds` and `fixed_seconds` (sixteen rows) cover
the whole command.
The environment variable SFT_REAL_DATA names the folder with the real texts and the tokenizer.
Results are written to `benchmarks/results/` with hardware and versions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE / "peers"))

from environments import PEERS, environment  # noqa: E402
from job import SYSTEM, Answer, Job  # noqa: E402
from processes import empty_folder, fastest, measure, use_two_cores  # noqa: E402
from real_data import REAL_DATA, require_real_data  # noqa: E402
from results import write_results  # noqa: E402
from rows import alpaca_like  # noqa: E402
from table import show  # noqa: E402

TOKENIZER = REAL_DATA / "tokenizer" / "qwen2.5"
MAX_LENGTH = 2048
"""Tokens per packed row."""

FEW_ROWS = 16
"""Number of rows that shows the memory which does not depend on it, mainly the tokenizer's."""

NUM_PACKED = 1_000_000
"""Number of examples that `best_fit` packs."""

PARTS = ("tokenizers", "packing", "ours", *PEERS)


class Benchmark:
    """Writes rows to a folder, and measures on them.

    Args:
        folder: Folder for the rows.
        num_rows: Number of rows; memory is also measured on four times as many.
        repeats: Repetitions of each measurement.
        seed: Random seed of the rows.
    """

    def __init__(self, folder: Path, num_rows: int, repeats: int, seed: int) -> None:
        self.folder, self.repeats, self.seed = folder, repeats, seed
        self.rows, self.more_rows, self.few_rows = (folder / f"{name}.jsonl" for name in ("rows", "more", "few"))
        lines = [
            json.dumps(row, ensure_ascii=False) + "\n"
            for row in itertools.islice(alpaca_like(REAL_DATA, seed), 4 * num_rows)
        ]
        for file, number in ((self.rows, num_rows), (self.more_rows, 4 * num_rows), (self.few_rows, FEW_ROWS)):
            file.write_text("".join(lines[:number]), encoding="utf-8")

    def best(self, script: str, job: Job, python: Path | None = None) -> Answer:
        """Return the fastest of the repetitions.

        Args:
            script: A script in `peers/`.
            job: Its job.
            python: Python of the environment; default: ours.
        """
        return fastest(measure(script, job, python=python) for _ in range(self.repeats))

    @property
    def _job(self) -> Job:
        return {"rows": str(self.rows), "tokenizer": str(TOKENIZER), "max_length": MAX_LENGTH}

    def tokenizers(self) -> Answer:
        """Measure `encode_batch_fast` alone; the faster of two ways to call it counts."""
        return fastest(self.best("run_tokenizers.py", {**self._job, "at_once": size}) for size in (0, 1000))

    def packing(self) -> Answer:
        """Measure `best_fit`."""
        return self.best("run_packing.py", {"num": NUM_PACKED, "max_length": MAX_LENGTH, "seed": self.seed})

    def ours(self) -> Answer:
        """Measure `prepare` without and with a token store, and its memory for few, all and more rows."""
        pairs = [self._cold_and_cached(self.rows) for _ in range(self.repeats)]
        cold, cached = fastest(pair[0] for pair in pairs), fastest(pair[1] for pair in pairs)
        few, more = self._cold_and_cached(self.few_rows)[0], self._cold_and_cached(self.more_rows)[0]
        peaks = [max(pair[0]["peak_bytes_above_imports"] for pair in pairs), more["peak_bytes_above_imports"]]
        tokens = [cold["tokens"], more["tokens"]]
        return {
            **cold,
            "cached_seconds": cached["command_seconds"],
            "fixed_seconds": few["command_seconds"],
            "peak_bytes": {str(few["tokens"]): few["peak_bytes_above_imports"], **_by_tokens(tokens, peaks)},
            "bytes_per_token": _by_tokens(tokens, [peak / num for peak, num in zip(peaks, tokens, strict=True)]),
            "bytes_per_further_token": (peaks[1] - peaks[0]) / (tokens[1] - tokens[0]),
        }

    def _cold_and_cached(self, rows: Path) -> tuple[Answer, Answer]:
        with empty_folder() as folder:
            config = folder / "prepare.yaml"
            config.write_text(_config(rows, folder / "stores"))
            cold, cached = (measure("run_ours.py", {"config": str(config)}) for _ in range(2))
        if not cold["built"] or cached["built"]:
            raise SystemExit("prepare: the first run did not build the token store, or the second did not find it")
        return cold, cached

    def peer(self, name: str, python: Path) -> list[Answer]:
        """Measure all variants of a peer, and return them with the fastest first.

        Args:
            name: A key of `PEERS`.
            python: Python of its environment.
        """
        answers = []
        for variant, packing, workers in itertools.product(PEERS[name].variants, (True, False), (0, 2)):
            way = {**variant, "packing": packing, "workers": workers}
            answers.append({**way, **self.best(f"run_{name}.py", {**self._job, **way}, python)})
        return sorted(answers, key=lambda answer: float(answer["seconds"]))


def _by_tokens(tokens: list[int], values: list[float]) -> dict[str, float]:
    return {str(number): value for number, value in zip(tokens, values, strict=True)}


def _config(rows: Path, stores: Path) -> str:
    """Return the configuration of `prepare`; JSON is YAML."""
    source = {"path": str(rows), "format": "alpaca"}
    data = {"sources": {"alpaca": source}, "template": "qwen", "max_length": MAX_LENGTH, "store_dir": str(stores)}
    model = {"model_name_or_path": str(TOKENIZER), "tokenizer_name_or_path": str(TOKENIZER)}
    return json.dumps({"task": "sft", "model": model, "data": data}, indent=2)


def check_same_tokens(result: dict[str, Any]) -> None:
    """Check that all variants made the same number of tokens.

    Raises:
        SystemExit: If they did not; their speeds cannot be compared then.
    """
    counts: dict[str, int] = {name: result[name]["tokens"] for name in ("tokenizers", "ours") if name in result}
    for name in PEERS:
        for answer in result.get(name, []):
            counts[f"{name}, packing {answer['packing']}, {answer['workers']} workers"] = answer["tokens"]
    if len(set(counts.values())) > 1:
        raise SystemExit(f"different numbers of tokens from the same rows (system message {SYSTEM!r}): {counts}")


def compare(result: dict[str, Any]) -> dict[str, float]:
    """Return how many times as fast ours is as each peer; for `encode_batch_fast`, at most about 1."""
    if "ours" not in result:
        return {}
    others: dict[str, Answer] = {"tokenizers": result["tokenizers"]} if "tokenizers" in result else {}
    others |= {name: result[name][0] for name in PEERS if name in result}
    return {name: round(other["seconds"] / result["ours"]["seconds"], 3) for name, other in others.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts that the command line names."""
    pythons = {name: environment(PEERS[name], args.envs) for name in PEERS if name in args.only}
    use_two_cores()
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "num_rows": args.rows,
        "seed": args.seed,
        "repeats": args.repeats,
        "max_length": MAX_LENGTH,
    }
    with empty_folder() as folder:
        benchmark = Benchmark(folder, args.rows, args.repeats, args.seed)
        result["bytes_of_rows"] = benchmark.rows.stat().st_size
        for name in args.only:
            print(f"measuring {name} …", flush=True)
            result[name] = benchmark.peer(name, pythons[name]) if name in PEERS else getattr(benchmark, name)()
    check_same_tokens(result)
    return {**result, "times_as_fast_as": compare(result)}


def main() -> None:
    """Measure, write the results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="Number of rows to prepare.")
    parser.add_argument("--repeats", type=int, default=3, help="Repetitions of each measurement; the best counts.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed of the rows.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="What to measure.")
    parser.add_argument("--envs", type=Path, default=_HERE.parent / ".bench-envs", help="Environments of the peers.")
    args = parser.parse_args()
    require_real_data("tokenizer/qwen2.5")
    result = run(args)
    write_results(f"data_cpu_{result['num_rows']}", **result)
    show(result, list(PEERS))


if __name__ == "__main__":
    main()
