"""Programs that replace NVIDIA's on a machine without a GPU: `nvidia-smi`, and MPS's daemon and server.

They behave as the manual pages describe: the daemon runs in the background, has a socket and a file with its process id in
CUDA_MPS_PIPE_DIRECTORY, starts a server process on request, and the same program, given commands on its standard input,
exits with 1 where no daemon answers. Killed with SIGKILL, the daemon leaves its socket and its server behind.
"""

import sys
from pathlib import Path

H200 = (
    "0, GPU-11111111-2222-3333-4444-555555555555, NVIDIA H200, 580.159.03, Default, Disabled, 9.0"
)
SECOND = (
    "1, GPU-11111111-2222-3333-4444-666666666666, NVIDIA H200, 580.159.03, Default, Disabled, 9.0"
)

CONTROL = """\
import os, signal, socket, subprocess, sys
from pathlib import Path

pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/nowhere"))
logs = Path(os.environ.get("CUDA_MPS_LOG_DIRECTORY", pipes))


def serve():
    listening = socket.socket(socket.AF_UNIX)
    os.chdir(pipes)
    Path("control").unlink(missing_ok=True)
    listening.bind("control")
    listening.listen()
    Path("nvidia-cuda-mps-control.pid").write_text(str(os.getpid()))
    servers = []
    while True:
        client, _ = listening.accept()
        with client:
            words = client.recv(1000).decode().split()
            servers = [one for one in servers if one.poll() is None]
            answer = ""
            if words[:1] == ["start_server"] and os.environ.get("FAKE_SERVER") == "fails":
                (logs / "server.log").write_text("no shared memory\\n")
            elif words[:1] == ["start_server"] and not servers:
                program = Path(sys.argv[0]).with_name("nvidia-cuda-mps-server")
                servers.append(subprocess.Popen([sys.executable, "-S", "-E", program]))
            elif words[:1] == ["get_server_list"]:
                answer = "".join(f"{one.pid}\\n" for one in servers)
            elif words[:1] == ["get_server_status"]:
                status = Path("status")
                answer = status.read_text() if status.exists() else "ACTIVE\\n"
            elif words[:1] == ["quit"]:
                for one in servers:
                    one.kill()
                    one.wait()
                Path("control").unlink()
                os._exit(0)
            client.sendall(answer.encode() or b"\\n")


if sys.argv[1:] == ["-d"]:
    if os.environ.get("FAKE_DAEMON") == "fails":
        sys.exit(1)
    if os.fork():
        os._exit(0)
    os.setsid()
    (logs / "visible").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    with (pipes.parent / "starts").open("a") as starts:
        starts.write("started\\n")
    serve()
commands = sys.stdin.read()
try:
    os.chdir(pipes)
    asking = socket.socket(socket.AF_UNIX)
    asking.connect("control")
    asking.sendall(commands.encode())
    sys.stdout.write(asking.recv(1000).decode().lstrip("\\n"))
except OSError:
    sys.stdout.write("Cannot find MPS control daemon process\\n")
    sys.exit(1)
"""

SERVER = """\
import signal
signal.pause()
"""

SMI = """\
import os, sys
if any(word.startswith("--query-gpu") for word in sys.argv):
    print(os.environ["FAKE_GPUS"])
else:
    print(os.environ.get("FAKE_APPS", ""))
"""


def write_programs(folder: Path, *, mps: bool = True) -> Path:
    """Write the programs to `folder`, to be put on PATH; `mps=False`: nvidia-smi alone."""
    folder.mkdir(parents=True, exist_ok=True)
    programs = {"nvidia-smi": SMI}
    if mps:
        programs |= {"nvidia-cuda-mps-control": CONTROL, "nvidia-cuda-mps-server": SERVER}
    for name, text in programs.items():
        path = folder / name
        path.write_text(f"#!{sys.executable} -SE\n{text}")
        path.chmod(0o755)
    return folder


def environment(folder: Path, place: Path, **more: str) -> dict[str, str]:
    """Return the variables of a process that finds the programs in `folder`, with its own place for temporary files."""
    place.mkdir(parents=True, exist_ok=True)
    path = f"{folder}:/usr/bin:/bin"
    return {"PATH": path, "TMPDIR": str(place), "FAKE_GPUS": H200, **more}
