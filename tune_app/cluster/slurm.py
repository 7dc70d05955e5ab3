"""A study as a Slurm batch job: the script's text.

One node is the common case and needs no Ray head: the study starts its own Ray there. With several nodes each of
them runs one Ray node, with a token, ports and a temporary folder that belong to this job alone, because Slurm may place
two jobs of one user on the same node. A cancelled or preempted job is killed KillWait (30 s by default) after SIGTERM,
whether its script has reached its end or not: so a job of one node has no file of its own, and one of several nodes
removes its files when the signal comes.

`ray symmetric-run` is used on nodes that the job has for itself only: it refuses to start where another Ray runs, and
ends with `ray stop`, which ends every Ray of the user on the node.
"""

import re
import shlex
from dataclasses import dataclass

from trainables.data.storage import is_url
from tune_app.cluster.submit import SPEC_FILE, cluster_place, spec_text
from tune_app.study.asked import Asked
from tune_app.study.errors import SpecError
from tune_app.study.files import job_name
from tune_app.study.spec import StudySpec

LEAD_S = 300
"""Most seconds before the time limit at which Slurm sends the signal; it may come up to 60 s earlier (sbatch, --signal)."""
CLOSING = 5
"""The driver must be done when 1/CLOSING of these seconds is left."""
TIME = re.compile(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]{2}))?(?::([0-9]{2}))?")
NAME = re.compile(r"[A-Za-z0-9_.,+-]+")


@dataclass(frozen=True)
class Allocation:
    """The resources that a batch job asks for."""

    nodes: int = 1
    gpus: int = 1
    """GPUs of a node."""
    cpus: int = 8
    """CPUs of a node."""
    memory_gib: int = 32
    """Memory of a node."""
    time: str = "24:00:00"
    """Time limit as Slurm writes it; the job is put back into the queue before it ends."""
    partition: str | None = None
    account: str | None = None
    exclusive: bool = False
    """Whether the nodes are for this job alone."""
    image: str | None = None
    """Apptainer image with medtune in it; None: medtune is on the nodes' PATH, after `setup`."""
    mount: str | None = None
    """Folder that the container sees as well."""
    setup: str | None = None
    """Line of shell before anything else, such as `source /shared/venv/bin/activate`."""
    symmetric: bool = False
    """Whether the Ray there has `ray symmetric-run` (2.49 or later)."""


def slurm_script(spec: StudySpec | Asked, study: str, given: Allocation) -> str:
    """Return the batch script that runs `spec` in the folder or URL `study`, and continues a study that is there already.

    Before the time limit Slurm sends a signal: trials finish their epochs, the driver writes everything, and the job is
    put back into the queue. The same happens when the job is preempted or loses a node. Raises SpecError for a place
    that not every node sees, and for values that Slurm would not take.
    """
    study = cluster_place(study)
    _check(given)
    parts = [
        _directives(study, given),
        _head(study, given),
        _single(spec) if given.nodes == 1 else _several(spec, given),
        _tail(study),
    ]
    return "\n".join(parts)


def _check(given: Allocation) -> None:
    problems = []
    if seconds_of(given.time) < 60:
        problems.append(
            f"--time {given.time}: write minutes, HH:MM:SS or D-HH:MM:SS, a minute at least"
        )
    for option, value in (("partition", given.partition), ("account", given.account)):
        if value is not None and not NAME.fullmatch(value):
            problems.append(f"--{option} {value!r}: letters, digits and _ . , + - only")
    if problems:
        raise SpecError(problems)


def seconds_of(time: str) -> int:
    """Return a time limit as Slurm writes it in seconds; -1 where it is none (sbatch, --time)."""
    found = TIME.fullmatch(time)
    if found is None:
        return -1
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is None and found[4] is None:  # MM[:SS]
        return first * 60 + second
    return ((days * 24 + first) * 60 + second) * 60 + third  # D-HH[:MM[:SS]], HH:MM:SS


def lead_of(given: Allocation) -> int:
    """Return how many seconds before its time limit the job gets a signal."""
    return min(LEAD_S, seconds_of(given.time) // 4)


def _directives(study: str, given: Allocation) -> str:
    name = job_name(study)
    options = [
        f"job-name={name}",
        f"nodes={given.nodes}",
        "ntasks-per-node=1",
        f"cpus-per-task={given.cpus}",
        f"mem={given.memory_gib}G",
        *([f"gres=gpu:{given.gpus}"] if given.gpus else []),
        f"time={given.time}",
        *([f"partition={given.partition}"] if given.partition else []),
        *([f"account={given.account}"] if given.account else []),
        *(["exclusive"] if given.exclusive else []),
        "output=%x-%j.log",
        "open-mode=append",
        "requeue",
        f"signal=B:USR1@{lead_of(given)}",
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# medtune: {study}",
            "# Submit with sbatch; submitting it again continues the study. `scancel` ends it, `medtune results` reads it.",
            *(f"#SBATCH --{option}" for option in options),
            "",
        ]
    )


REMOVES_LEFT = (
    'find /tmp -maxdepth 1 -user "$(id -u)" -name "medtune-$SLURM_JOB_ID-*" {}-exec rm -rf {{}} +'
)
"""What an earlier start of the job left on a node where it was killed."""

OF_SEVERAL = f"""\
tidy() {{
  [ -n "$token" ] && rm -f "$token"
  rm -rf "$work"
}}
finish() {{
  [ -n "$ray" ] && kill "$ray" 2>/dev/null
  tidy
}}
ray= token=
{REMOVES_LEFT.format("")}
work=$(mktemp -d "/tmp/medtune-$SLURM_JOB_ID-XXXX") || exit 1   # a short path: sockets are below it
export work
trap finish EXIT
"""


def _head(study: str, given: Allocation) -> str:
    lead = lead_of(given)
    run = "run=()"
    if given.image:
        seen = [word for folder in filter(None, [given.mount]) for word in ("--bind", folder)]
        gpu = ["--nv"] if given.gpus else []
        run = f"run=({shlex.join(['apptainer', 'exec', *gpu, *seen, given.image])})"
    several = given.nodes > 1
    return f"""\
{given.setup or "# No --setup was given: medtune is on the PATH."}
set -u
export MEDTUNE_USR1_GRACE_S={lead - lead // CLOSING}
export PYTHONSAFEPATH=1   # a copy.py in the folder of the submission must not be taken for Python's
unset RAY_ADDRESS
umask 077
study={shlex.quote(study)}
{run}
driver= code=1 again=
{OF_SEVERAL if several else ""}leave() {{   # the driver has its trials finish their epochs, and ends with code 75
  asked=1
  [ -n "$driver" ] && kill "-$1" "$driver" 2>/dev/null
}}
trap 'again=1; leave USR1' USR1   # before the time limit
trap 'leave TERM{"; tidy" if several else ""}' TERM   # preempted, and Slurm puts the job back into the queue, or cancelled
rows() {{ {"echo 0" if is_url(study) else 'cat "$study/epochs.jsonl" 2>/dev/null | wc -l'}; }}
before=$(rows)
"""


def _single(spec: StudySpec | Asked) -> str:
    return f"""\
"${{run[@]}}" medtune run - --out "$study" --resume --address local <<'STUDY' &
{spec_text(spec)}STUDY
driver=$! waited=$!
"""


RAY_OPTIONS = (
    '--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus={gpus} --disable-usage-stats --min-worker-port=0 --max-worker-port=0 '
    "--dashboard-agent-listen-port=0 --dashboard-agent-grpc-port=0"
)


def _several(spec: StudySpec | Asked, given: Allocation) -> str:
    options = RAY_OPTIONS.format(gpus=given.gpus)
    begin = f"""\
cat > "$work/{SPEC_FILE}" <<'STUDY'
{spec_text(spec)}STUDY
"""
    begin += """\
token="$HOME/.medtune-$SLURM_JOB_ID.token"   # the nodes' shared home; its owner's alone
head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n' > "$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"
port=$((10000 + SLURM_JOB_ID % 500 * 20)) nodes=$SLURM_JOB_NUM_NODES
ip=$("${run[@]}" python3 -P -c 'import ray.util; print(ray.util.get_node_ip_address())') || exit 1
export port ip
"""
    if given.exclusive and given.symmetric:
        return f"""\
{begin}export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" "${{run[@]}}" ray symmetric-run --address "$ip:$port" \\
  --min-nodes "$nodes" {options} --include-dashboard=false \\
  -- bash -c 'echo $$ > "$1/driver"; exec medtune run "$1/{SPEC_FILE}" --out "$2" --resume --address "$3"' \\
  medtune "$work" "$study" "$ip:$port" &
waited=$!
until [ -s "$work/driver" ] || ! kill -0 "$waited" 2>/dev/null; do sleep 1; done
driver=$(cat "$work/driver" 2>/dev/null)
"""
    return f"""\
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" "${{run[@]}}" bash -c '
  {REMOVES_LEFT.format('! -path "$work" ')}
  [ -d "$work" ] || mkdir -m 700 "$work" || exit 1
  [ -O "$work" ] && mkdir "$work/node$SLURM_PROCID" || exit 1
  if [ "$SLURM_PROCID" = 0 ]; then
    set -- --head --port="$port" --ray-client-server-port=$((port + 1)) --include-dashboard=false --node-ip-address="$ip"
  else
    until (: < "/dev/tcp/$ip/$port") 2>/dev/null; do sleep 1; done
    set -- --address="$ip:$port"
  fi
  ray start "$@" --block --temp-dir="$work/node$SLURM_PROCID" \\
    {options} &
  trap "kill $!; rm -rf $work/node$SLURM_PROCID" TERM
  wait $!
  wait $!
  rm -rf "$work/node$SLURM_PROCID"
  rmdir "$work" 2>/dev/null
' > "$work/ray.log" 2>&1 &
ray=$!
"${{run[@]}}" python3 -P -m tune_app.cluster.nodes "$ip:$port" "$nodes" || {{ cat "$work/ray.log"; exit 1; }}
"${{run[@]}}" medtune run "$work/{SPEC_FILE}" --out "$study" --resume --address "$ip:$port" &
driver=$! waited=$!
""".replace("srun", f"{begin}srun", 1)


def _tail(study: str) -> str:
    progress = (
        ""
        if is_url(study)
        else """\
  if [ "$(rows)" -le "$before" ]; then
    echo "no epoch was finished within the time limit: raise it, and submit again" >&2
    exit 1
  fi
"""
    )
    return f"""\
while :; do   # a signal ends `wait` before the driver has ended
  asked=
  wait "$waited"
  now=$?
  [ "$now" -ne 127 ] && code=$now
  [ -n "$asked" ] || break
done
if [ -n "$again" ] && [ "$code" -ne 0 ] && [ "$code" -ne 1 ] && [ "$code" -ne 3 ]; then
{progress}  echo "time limit: the study continues when job $SLURM_JOB_ID runs again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
