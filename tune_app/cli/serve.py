"""The commands of the service: `medtune serve`, and `medtune bench serve`."""

import json
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from tune_app.cli.bench import bench_app
from tune_app.cli.common import AddressOption, to_stderr

app = typer.Typer()


@app.command()
def serve(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder or URL (s3://bucket/studies) whose studies are shown; new ones are put there."
        ),
    ] = Path("studies"),
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for every network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8321,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Further host name it goes by; may be repeated."),
    ] = None,
    private: Annotated[
        bool,
        typer.Option("--private", help="Reading takes the token as well, on this machine, too."),
    ] = False,
    data_root: Annotated[
        list[str] | None,
        typer.Option(
            "--data-root",
            help="Folder or URL; a study started from the page reads nothing outside it. May be repeated.",
        ),
    ] = None,
    address: AddressOption = None,
) -> None:
    """Serve a live page over the studies of a folder or bucket: watch, compare, start, stop. MEDTUNE_TOKEN sets its token."""
    from tune_app.serve.connections import LogLimit
    from tune_app.serve.server import serve as run

    for handler in logging.getLogger().handlers:
        handler.addFilter(LogLimit())
    run(
        folder,
        host=host,
        port=port,
        token=os.environ.get("MEDTUNE_TOKEN") or None,
        names=allow_host or (),
        private=private,
        address=address,
        data_roots=data_root or (),
        say=to_stderr,
    )


@bench_app.command("serve")
def bench_serve_command(
    viewers: Annotated[
        int, typer.Option("--viewers", min=1, help="Pages that are open at the same time.")
    ] = 50,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="Of each of the two runs.")
    ] = 20.0,
    trials: Annotated[int, typer.Option("--trials", min=2)] = 1000,
    epochs: Annotated[int, typer.Option("--epochs", min=24)] = 60,
    search: Annotated[
        int,
        typer.Option(
            "--search",
            min=0,
            help="Times to run a real small search, alone and watched, instead.",
        ),
    ] = 0,
) -> None:
    """Time the service: rows of a running study to many viewers, its processor time, and the writer's own pace."""
    from tune_app.bench.serve import bench_serve, bench_watched_search

    if search:
        print(
            json.dumps(bench_watched_search(viewers=viewers, turns=search, say=to_stderr), indent=1)
        )
        return
    print(
        json.dumps(
            bench_serve(
                viewers=viewers, seconds=seconds, trials=trials, epochs=epochs, say=to_stderr
            ),
            indent=1,
        )
    )
