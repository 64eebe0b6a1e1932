"""Standard benchmarks of base and tuned model, by EleutherAI's lm-evaluation-harness: did the fine-tuning cost what the base model knew?

    python -m tools.benchmark --tasks gsm8k arc_easy             tasks of the harness; their data is downloaded by it
    python -m tools.benchmark --tasks mine --include my_tasks    a task file of one's own
    python -m tools.benchmark --tasks gsm8k --limit 50           the first 50 documents, to try it out

Needs `pip install -r requirements-benchmark.txt`. Base model, chat template and device are those of params.yaml, the adapter is models/adapter.
Writes metrics/benchmark.json with the hashes of what it ran on: a file that no stage reads or writes. `dvc metrics diff HEAD --targets
metrics/benchmark.json` compares it with the committed one.
"""

import argparse
import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import params
from qlora.core.dvc_lock import md5_of
from qlora.core.errors import InputError, MachineError
from qlora.core.hashing import sha256_of
from qlora.delivery.ownership import require_replaceable, write_own_json
from qlora.params import Params
from qlora.runtime import command

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

ADAPTER = Path("models/adapter")
MANIFESTS = Path("models/base")
REPORT = Path("metrics/benchmark.json")
REQUIREMENTS = "requirements-benchmark.txt"


def benchmark(values: Params, arguments: argparse.Namespace) -> dict[str, Any]:
    """The harness's results for the base model and for the base model with the adapter.

    Raises:
        InputError: an unknown task, or base model or adapter are not what they should be.
        MachineError: the harness is not installed, or can't get a task's data.
    """
    tasks = _task_manager(arguments)
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - seconds that --help need not take

    from qlora.model import adapter, device, loading  # noqa: PLC0415
    from qlora.model.base import open_base_model  # noqa: PLC0415

    place = device.set_up_device(values.hardware, deterministic=False)
    manifest = MANIFESTS / f"{values.base_model.name}.json"
    base = open_base_model(values, MANIFESTS)
    tokenizer = base.template.tokenizer
    model: Any = loading.load_model(values.base_model, base.folder, place, progress=values.runtime.progress)
    found = {}
    for side in ("base", "tuned"):
        if side == "tuned":
            model = adapter.load_adapter(model, ADAPTER, values.base_model.name)
        harness = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=arguments.batch_size)
        found[side] = _results(harness, tasks, arguments)
    numbers = {side: {task: _numbers(result) for task, result in results["results"].items()} for side, results in found.items()}
    return {
        **numbers,
        "delta": {
            task: {name: row[name] - numbers["base"][task][name] for name in row if "stderr" not in name} for task, row in numbers["tuned"].items()
        },
        "ran_on": {
            "base_model": {"name": values.base_model.name, "manifest_sha256": sha256_of(manifest), **values.base_model.model_dump()},
            "adapter": {"dvc_md5": md5_of(ADAPTER), "sha256": {path.name: sha256_of(path) for path in sorted(ADAPTER.iterdir())}},
            "documents_sha256": {task: _hash_of(samples) for task, samples in found["tuned"]["samples"].items()},
            "task_versions": found["tuned"]["versions"],
            "documents": {task: counts["effective"] for task, counts in found["tuned"]["n-samples"].items()},
            "num_fewshot": found["tuned"]["n-shot"],
            "chat_template": not arguments.plain,
            "lm_eval": found["tuned"]["lm_eval_version"],
        },
    }


def _task_manager(arguments: argparse.Namespace) -> "TaskManager":
    try:
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise MachineError("benchmark-harness", f"{error.name} is not installed: pip install -r {REQUIREMENTS}") from None
    if arguments.include and not arguments.include.is_dir():
        raise InputError("benchmark-task", f"--include {arguments.include} is not a folder of task files")
    tasks = TaskManager(include_path=arguments.include)
    unknown = [name for name in arguments.tasks if not tasks.match_tasks([name])]
    if unknown:
        raise InputError("benchmark-task", f"the harness knows no task {unknown[0]!r}: `lm_eval ls tasks` lists them, --include DIR adds your own")
    return tasks


def _results(harness: "HFLM", tasks: "TaskManager", arguments: argparse.Namespace) -> dict[str, Any]:
    from lm_eval import simple_evaluate  # noqa: PLC0415

    try:
        results: dict[str, Any] = simple_evaluate(
            harness,
            tasks=arguments.tasks,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            apply_chat_template=not arguments.plain,
            fewshot_as_multiturn=not arguments.plain,
            task_manager=tasks,
        )
    except ImportError as error:
        raise MachineError(
            "benchmark-harness", f"{', '.join(arguments.tasks)} needs the package {error.name}: pip install 'lm_eval[TASK]', as the harness says"
        ) from None
    except (ConnectionError, FileNotFoundError) as error:
        raise MachineError("benchmark-data", f"the data of {', '.join(arguments.tasks)} can't be had: {error}") from None
    return results


def _hash_of(samples: list[dict[str, Any]]) -> str:
    """Over the harness's own hashes of every prompt and expected answer."""
    lines = sorted(f"{sample['doc_id']} {sample['prompt_hash']} {sample['target_hash']}" for sample in samples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    """Metrics by name; the harness writes `acc,none` for a metric without a filter."""
    named = {name.removesuffix(",none").replace(",", "_"): value for name, value in result.items()}
    return {name: float(value) for name, value in named.items() if isinstance(value, int | float) and name != "sample_len"}


def table(record: dict[str, Any]) -> str:
    """One line per task and metric."""
    rows = [("", "base", "tuned", "difference", "standard error")]
    for task, row in record["delta"].items():
        for name, delta in row.items():
            base, tuned = (record[side][task] for side in ("base", "tuned"))
            error = tuned.get(f"{name}_stderr")
            rows.append((f"{task} {name}", f"{base[name]:.4f}", f"{tuned[name]:.4f}", f"{delta:+.4f}", f"{error:.4f}" if error is not None else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--include", type=Path, help="folder with task files of one's own")
    parser.add_argument("--limit", type=command.positive_int, help="documents of each task; only to try it out")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question, in place of the task's own number")
    parser.add_argument("--batch-size", type=command.positive_int, default=8)
    parser.add_argument("--plain", action="store_true", help="ask without the chat template")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    require_replaceable(REPORT, own=True)
    record = benchmark(params.load(Path("params.yaml")), arguments)
    write_own_json(REPORT, record)
    command.say(table(record))
    command.say(f"\n{REPORT}: written")


if __name__ == "__main__":
    command.run(main)
