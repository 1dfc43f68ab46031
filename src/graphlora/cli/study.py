"""`graphlora study`: compare methods over tasks and seeds with one command that can be stopped and started."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from graphlora.cli.parsing import make_parser
from graphlora.errors import GraphLoraError

DESCRIPTION = """\
Compare methods. A study is a YAML file that names models, tasks, variants and seeds under one policy for
data, optimizer, budget and selection; docs/study.md explains it. Shipped studies go by their names.

  plan     the runs, which of them are missing, and an estimate of time and memory
  run      do what is missing: one JSON record per run under OUTPUT/STUDY; stop it at any time, and the
           same command goes on; several of them, on several hosts too, share the work
  status   what is done, running, failed and missing
  report   tables and figures of the records (graphlora report has more options)

shipped studies: {studies}"""
EXAMPLE = """
graphlora study plan table1 --model meta-llama/Meta-Llama-3-8B
graphlora study run smoke --model HuggingFaceTB/SmolLM2-135M-Instruct
graphlora study run my_study.yaml --only graphlora lora --seeds 0,1 --set max_steps=50 graphlora.r=4
graphlora study run table1 --model models/SmolLM2-135M-Instruct --data_dir data --workers 4 --devices 0,1
graphlora study status table1
graphlora study report table1
"""


def build_parser() -> ArgumentParser:
    """Parser of the command."""
    from graphlora.study.spec import shipped_studies

    usage = "graphlora study {plan,run,status,report} STUDY [options]"
    parser = make_parser(usage, DESCRIPTION.format(studies=", ".join(shipped_studies())), EXAMPLE)
    parser.add_argument(
        "action", type=Literal["plan", "run", "status", "report"], help="what to do, see above"
    )
    parser.add_argument("study", type=str, help="YAML file, or the name of a shipped study")
    changes = parser.add_argument_group("In place of the study's own")
    names = {"type": str, "nargs": "+", "default": None}
    changes.add_argument("--model", **names, help="base models: hub ids, directories, or NAME=DIRECTORY")
    changes.add_argument("--task", **names, help="tasks or data files")
    changes.add_argument("--data_dir", type=str | None, default=None, help="folder with the tasks' files")
    changes.add_argument("--seeds", type=str | None, default=None, help="seeds, as in 0,1,2")
    changes.add_argument("--only", **names, help="variants to look at; the others are left alone")
    changes.add_argument(
        "--set", **names, help="policy options as KEY=VALUE, or of one variant: VARIANT.KEY=VALUE"
    )
    running = parser.add_argument_group("Running")
    running.add_argument("--output", type=str, default="results", help="folder of the results")
    running.add_argument("--workers", type=int, default=1, help="processes per device")
    running.add_argument(
        "--devices", type=str | None, default=None, help="CUDA devices, as in 0,1 (left out: those visible)"
    )
    running.add_argument("--retry_failed", action="store_true", help="do runs that failed again")
    running.add_argument(
        "--engine",
        type=Literal["local", "ray"],
        default="local",
        help="ray: on a Ray cluster (graphlora[ray])",
    )
    running.add_argument(
        "--ray_address",
        type=str | None,
        default=None,
        help="Ray cluster, as in auto (left out: this machine)",
    )
    return parser


def run(arguments: Namespace) -> None:
    """Plan, run, look at or report a study."""
    from graphlora.study.plan import make_runs
    from graphlora.study.records import study_folder
    from graphlora.study.spec import load_spec

    spec = load_spec(arguments.study, _overrides(arguments))
    if arguments.action == "report":
        return _report(spec.study, arguments.output)
    runs, folder = make_runs(spec), study_folder(arguments.output, spec.study)
    if arguments.action == "run":
        return _run(spec, runs, folder, arguments)
    from graphlora.study.runner import visible_devices
    from graphlora.study.status import check_adapters, find_status, plan_text, status_text

    if arguments.action == "plan":
        check_adapters(spec, runs)
    slots = arguments.workers * len(_listed(arguments.devices) or visible_devices())
    text = plan_text if arguments.action == "plan" else status_text
    print(text(spec, find_status(runs, folder), folder, slots))
    return None


def _run(spec: Any, runs: Any, folder: Any, arguments: Namespace) -> None:
    from graphlora.study.plan import missing_data
    from graphlora.study.runner import run_study
    from graphlora.study.status import check_adapters

    missing = [run for run in runs if not folder.is_done(run)]
    if missing:
        check_adapters(spec, missing)
        missing_data(missing)
    print(f"{spec.study}: {len(missing)} of {len(runs)} runs to do; records in {folder.path}", flush=True)
    options: dict[str, Any] = {"retry_failed": arguments.retry_failed, "tell": _tell}
    if arguments.engine == "ray":
        from graphlora.study.ray_engine import run_on_ray

        failed = run_on_ray(runs, folder, workers=arguments.workers, address=arguments.ray_address, **options)
    else:
        devices = _listed(arguments.devices)
        failed = run_study(runs, folder, workers=arguments.workers, devices=devices, **options)
    if failed:
        raise GraphLoraError(
            f"{failed} of {len(runs)} runs failed; see why with: graphlora study status, "
            "and do them again with --retry-failed"
        )
    print(f"all {len(runs)} runs are done; next: graphlora study report {arguments.study}{_where(arguments)}")


def _report(study: str, results: str) -> None:
    from graphlora.cli import report

    report.run(report.build_parser().parse_args([results, "--study", study]))


def _overrides(arguments: Namespace) -> Any:
    from graphlora.study.spec import Overrides

    return Overrides(
        models=tuple(arguments.model or ()),
        tasks=tuple(arguments.task or ()),
        data_dir=arguments.data_dir,
        settings=tuple(arguments.set or ()),
        only=tuple(arguments.only or ()),
        seeds=_seeds(arguments.seeds),
    )


def _seeds(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _listed(text) or ())
    except ValueError as error:
        raise GraphLoraError(f"--seeds is {text!r}; give whole numbers, as in 0,1,2") from error


def _listed(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",") if part.strip()] if text is not None else None


def _where(arguments: Namespace) -> str:
    return "" if arguments.output == "results" else f" --output {arguments.output}"


def _tell(line: str) -> None:
    print(line, flush=True)
