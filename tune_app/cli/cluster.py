"""The commands around a Ray cluster: `medtune submit`, `medtune jobs`, `medtune doctor`."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from trainables.checkpoints import naming_a_full_disk
from tune_app.cli.common import CacheOption, elsewhere, out, to_stderr, to_stdout

app = typer.Typer()
jobs_app = typer.Typer(
    help="Jobs on a Ray cluster: list, logs, stop, status.", no_args_is_help=True
)

ServerOption = Annotated[
    str | None,
    typer.Option(
        "--address", help="Job server; default: RAY_API_SERVER_ADDRESS, then http://127.0.0.1:8265."
    ),
]
OpenOption = Annotated[
    bool, typer.Option("--allow-open", help="Even to a network where no token is asked for.")
]
JobArgument = Annotated[
    str, typer.Argument(help="Id of the job, or the study's folder: its latest job.")
]


CommandOption = Annotated[
    list[str],
    typer.Argument(help="After --: `run study.yaml --out FOLDER ...`, ablate, confirm, resume."),
]
SENT = ("run", "ablate", "confirm", "resume")
"""Commands that a cluster runs; the others would run here."""
PipOption = Annotated[
    bool,
    typer.Option(
        "--pip/--no-pip",
        help="Install this machine's versions there, where others are installed.",
    ),
]
FollowOption = Annotated[
    bool, typer.Option("--follow/--detach", help="Show the log until the job ends.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")
]
KuberayOption = Annotated[
    Path | None,
    typer.Option(
        "--kuberay", metavar="FILE", help="Write a KubeRay manifest instead; - for stdout."
    ),
]
ImageOption = Annotated[
    str | None, typer.Option("--image", help="Container image with medtune, for the manifest.")
]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=1, help="GPU nodes at most, in the manifest.")
]
MountOption = Annotated[
    str, typer.Option("--mount", help="Folder that all nodes share, in the manifest.")
]
GpusOfNodeOption = Annotated[
    int, typer.Option("--gpus", min=0, help="GPUs of a node, in manifest and batch script.")
]
CpusOption = Annotated[
    int | None, typer.Option("--cpus", min=1, help="CPUs of a node there; default: 8 per GPU.")
]
MemoryOption = Annotated[
    int | None, typer.Option("--memory", min=1, help="GiB of a node there; default: 32 per GPU.")
]
RetriesOption = Annotated[
    int,
    typer.Option(
        "--retries", min=0, help="New clusters that KubeRay starts when the job has failed."
    ),
]
SlurmOption = Annotated[
    Path | None,
    typer.Option(
        "--slurm", metavar="FILE", help="Write a Slurm batch script instead; - for stdout."
    ),
]
NodesOption = Annotated[int, typer.Option("--nodes", min=1, help="Nodes of the Slurm job.")]
TimeOption = Annotated[
    str, typer.Option("--time", help="Time limit of the Slurm job, which is requeued before it.")
]
PartitionOption = Annotated[str | None, typer.Option("--partition", help="Of the Slurm job.")]
AccountOption = Annotated[str | None, typer.Option("--account", help="Of the Slurm job.")]
ExclusiveOption = Annotated[
    bool, typer.Option("--exclusive", help="Whole nodes for the Slurm job alone.")
]
SetupOption = Annotated[
    str | None,
    typer.Option(
        "--setup", help="First line of the Slurm job, such as `source venv/bin/activate`."
    ),
]


@app.command()
def submit(
    context: typer.Context,
    command: CommandOption,
    address: ServerOption = None,
    pip: PipOption = True,
    follow: FollowOption = True,
    dry_run: DryRunOption = False,
    allow_open: OpenOption = False,
    kuberay: KuberayOption = None,
    image: ImageOption = None,
    workers: WorkersOption = 4,
    gpus: GpusOfNodeOption = 1,
    cpus: CpusOption = None,
    memory: MemoryOption = None,
    mount: MountOption = "/shared",
    retries: RetriesOption = 0,
    slurm: SlurmOption = None,
    nodes: NodesOption = 1,
    time_limit: TimeOption = "24:00:00",
    partition: PartitionOption = None,
    account: AccountOption = None,
    exclusive: ExclusiveOption = False,
    setup: SetupOption = None,
) -> None:
    """Run a study on a Ray cluster: send code and spec, follow the log, return its exit code. Ctrl-C detaches.

    Submitting the same study again resumes it, or follows it while it runs. Paths are those that the cluster's
    nodes see; no data is sent.
    """
    from tune_app.cluster.kubernetes import Cluster, kuberay_manifest
    from tune_app.cluster.slurm import Allocation, slurm_script
    from tune_app.cluster.submit import build_submission

    verb = next((word for word in command if not word.startswith("-")), None)
    if verb is not None and verb not in SENT:
        raise typer.BadParameter(f"{verb} is not sent to a cluster: one of {', '.join(SENT)}")
    share = max(1, gpus)
    node: dict[str, Any] = {
        "gpus": gpus,
        "cpus": cpus or 8 * share,
        "memory_gib": memory or 32 * share,
    }

    of_slurm: dict[str, Any] = {"nodes": nodes, "time": time_limit, "partition": partition}
    of_slurm |= {"account": account, "exclusive": exclusive, "setup": setup, "image": image}
    of_slurm |= {"mount": mount if image else None, "symmetric": _has_symmetric_run()}

    def send(what: Any, root: Path, retry_failed: bool) -> int:
        place = _place(root)
        if slurm or kuberay:
            _refuse_retries(retry_failed)
        if slurm:
            _write_text(slurm, slurm_script(what, place, Allocation(**node, **of_slurm)))
            return 0
        if kuberay:
            cluster = Cluster(**node, max_workers=workers, mount=mount, retries=retries)
            cluster = replace(cluster, image=image) if image else cluster
            _write_text(kuberay, kuberay_manifest(what, place, cluster))
            return 0
        if dry_run:
            print(
                build_submission(what, place, pip=pip, retry_failed=retry_failed).dry_run(), end=""
            )
            return 0
        return _send(
            what,
            place,
            address,
            pip=pip,
            follow=follow,
            allow_open=allow_open,
            retry_failed=retry_failed,
        )

    token = elsewhere.set(send)
    try:
        # The command itself is parsed and checked here and now: a typo costs no trip to the cluster.
        context.find_root().command.main(args=list(command), prog_name="medtune")
    finally:
        elsewhere.reset(token)


def _refuse_retries(retry_failed: bool) -> None:
    if retry_failed:
        raise typer.BadParameter(
            "--retry-failed is for one job: a file would have each of its starts do that"
        )


def _has_symmetric_run() -> bool:
    """Whether the Ray installed here has `ray symmetric-run`; asked without loading Ray."""
    ray = find_spec("ray")
    places = ray.submodule_search_locations if ray is not None else None
    return any((Path(place) / "scripts" / "symmetric_run.py").is_file() for place in places or ())


def _place(root: Path) -> str:
    from tune_app.cluster.submit import cluster_place

    return cluster_place(str(root))


def _send(
    what: Any,
    place: str,
    address: str | None,
    *,
    pip: bool,
    follow: bool,
    allow_open: bool,
    retry_failed: bool,
) -> int:
    from tune_app.cluster.jobs import ENDED, Jobs
    from tune_app.cluster.submit import build_submission, refuse_other_settings

    jobs = Jobs(address, allow_open=allow_open)
    earlier = jobs.of_study(place)
    running = [job for job in earlier if str(job.status.value) not in ENDED]
    if running:
        job_id = running[-1].submission_id
        refuse_other_settings(what, job_id, running[-1].metadata or {})
        to_stderr(f"{place} is running already, as {job_id}: nothing is sent")
    else:
        ids = [job.submission_id for job in earlier]
        submission = build_submission(what, place, earlier=ids, pip=pip, retry_failed=retry_failed)
        job_id = submission.submission_id
        to_stderr(f"sending {submission.size_line()} to {jobs.url}")
        jobs.send(submission)
        to_stderr(f"job: {job_id}")
    if not follow:
        print(job_id)
        return 0
    return _follow(jobs, job_id)


def _follow(jobs: Any, job_id: str) -> int:
    try:
        code = int(jobs.follow(job_id, _show))
    except KeyboardInterrupt:
        to_stderr(
            f"\ndetached; the job continues. See it: medtune jobs logs {job_id} --follow; stop it: medtune jobs stop {job_id}"
        )
        return 130
    job = jobs.find(job_id)
    if code:
        # Ray's message of a driver that ran repeats the end of its log, which has been shown.
        ran = job.driver_exit_code is not None
        why = f"exit code {job.driver_exit_code}" if ran else job.message
        to_stderr(f"{job_id} {job.status.value.lower()}: {why}")
    return code


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_text(path: Path, text: str) -> None:
    if str(path) == "-":
        print(text, end="")
        return
    with naming_a_full_disk(path):
        path.write_text(text, encoding="utf-8")
    to_stderr(str(path))


@app.command()
def fetch(
    study: Annotated[
        str, typer.Argument(help="URL of a study in object storage, such as s3://bucket/study.")
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to copy it to.")],
) -> None:
    """Copy a study from object storage, checkpoints and all: to export a model from it, or to resume it here."""
    from tune_app.study.copies import fetch_study

    number = fetch_study(study, folder)
    to_stdout(f"{folder}: {number} files")


# Doctor ----------------------------------------------------------------------------------------------------------------


@app.command()
def doctor(
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="Job server (http://...), or a Ray cluster (auto, host:port); none: this machine.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Table that every node should see.")
    ] = None,
    out_folder: Annotated[
        str | None, typer.Option("--out", help="Study that every node should be able to write.")
    ] = None,
    cache: CacheOption = None,
    allow_open: OpenOption = False,
) -> None:
    """Look for what could keep studies from running: versions, GPUs, memory, disk, ports, clocks, data, storage.

    Exit code 1 when something must be mended; what only should be looked at does not count.
    """
    if address and address.startswith(("http://", "https://")):
        from tune_app.cluster.jobs import Jobs
        from tune_app.cluster.submit import build_task

        given = {"--data": data, "--out": out_folder, "--cache": cache and str(cache)}
        words = [word for name, value in given.items() if value for word in (name, str(value))]
        jobs = Jobs(address, allow_open=allow_open)
        task = build_task(["doctor", "--address", "auto", *words])
        jobs.send(task)
        raise typer.Exit(_follow(jobs, task.submission_id))
    from tune_app.cluster.doctor import diagnose_cluster, diagnose_machine
    from tune_app.driver.ray_access import cluster_address

    if address and (cluster := cluster_address(address)):
        found = diagnose_cluster(cluster, data, out_folder, cache)
    else:
        found = diagnose_machine(data, out_folder, cache)
    _print_findings(found)
    raise typer.Exit(int(any(finding.state == "bad" for finding in found)))


def _print_findings(found: Sequence[Any]) -> None:
    """Print a table of findings for each node."""
    signs = {"good": "ok", "look": "look", "bad": "BAD"}
    styles = {"good": "green", "look": "yellow", "bad": "red"}
    for node in dict.fromkeys(finding.node for finding in found):
        out.print(node, markup=False, style="bold")
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for finding in (one for one in found if one.node == node):
            told = finding.said + (f": {finding.remedy}" if finding.remedy else "")
            sign = Text(f"  {signs[finding.state]}", style=styles[finding.state])
            table.add_row(sign, finding.what, Text(told))
        out.print(table)


# Jobs ------------------------------------------------------------------------------------------------------------------


@jobs_app.command("list")
def jobs_list(
    address: ServerOption = None,
    every: Annotated[bool, typer.Option("--all", help="Jobs that are not medtune's, too.")] = False,
    output: Annotated[
        Literal["table", "json"], typer.Option("--format", help="table or json.")
    ] = "table",
    allow_open: OpenOption = False,
) -> None:
    """List the cluster's studies, oldest first."""
    from tune_app.cluster.jobs import Jobs

    rows = [_row(job) for job in Jobs(address, allow_open=allow_open).all()]
    rows = [row for row in rows if every or row["study"]]
    if output == "json":
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "state", "started", "minutes", "exit"):
        table.add_column(
            name, justify="right" if name in ("minutes", "exit") else "left", no_wrap=name != "job"
        )
    for row in rows:
        table.add_row(*_cells(row))
    out.print(table if rows else "no jobs", soft_wrap=not rows)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    start = row["started"]
    began = time.strftime("%m-%d %H:%M", time.localtime(start)) if start else "-"
    minutes = f"{row['seconds'] / 60:.1f}" if row["seconds"] is not None else "-"
    code = "-" if row["exit"] is None else str(row["exit"])
    return row["job"], row["state"], began, minutes, code


@jobs_app.command("status")
def jobs_status(
    job: JobArgument, address: ServerOption = None, allow_open: OpenOption = False
) -> None:
    """Show one job as JSON: state, study, exit code, where its driver runs, what went wrong."""
    from tune_app.cluster.jobs import Jobs

    found = Jobs(address, allow_open=allow_open).find(job)
    print(
        json.dumps(
            _row(found) | {"message": found.message, "entrypoint": found.entrypoint}, indent=1
        )
    )


@jobs_app.command("logs")
def jobs_logs(
    job: JobArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow until the job ends; returns its code.")
    ] = False,
    address: ServerOption = None,
    allow_open: OpenOption = False,
) -> None:
    """Show the output of a job."""
    from tune_app.cluster.jobs import Jobs

    jobs = Jobs(address, allow_open=allow_open)
    found = jobs.find(job)
    if follow:
        raise typer.Exit(_follow(jobs, found.submission_id))
    _show(jobs.log(found.submission_id))


@jobs_app.command("stop")
def jobs_stop(
    job: JobArgument, address: ServerOption = None, allow_open: OpenOption = False
) -> None:
    """End a job as Ctrl-C would: its study is closed, and submitting it again resumes it."""
    from tune_app.cluster.jobs import Jobs

    jobs = Jobs(address, allow_open=allow_open)
    found = jobs.find(job)
    to_stdout(f"{found.submission_id} {jobs.stop(found.submission_id).lower()}")


def _row(job: Any) -> dict[str, Any]:
    end = job.end_time or time.time() * 1000
    return {
        "job": job.submission_id,
        "study": (job.metadata or {}).get("medtune_study"),
        "state": job.status.value.lower(),
        "started": job.start_time and job.start_time / 1000,
        "seconds": job.start_time and round((end - job.start_time) / 1000, 1),
        "exit": job.driver_exit_code,
    }
