"""The server: the page, the clips of this run, and nothing else, behind `safety.guarded`."""

import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samplers.request import Job
from samplers.studio import safety
from samplers.studio.line import WARMING, Line, Stopped
from samplers.studio.make import Studio

CLIP = re.compile(r"[0-9a-f]{32}")
FILE = re.compile(r"(clip(\.sheet)?|key\d+)\.(mp4|png)")
MOST_UPLOAD = "64mb"


def settle_environment(folder: Path) -> None:
    """Says to gradio, before it is imported, that it tells nobody of its use and keeps uploads in a folder of ours."""
    (folder / "uploads").mkdir(mode=0o700)
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / "uploads"), "GRADIO_RUN_HISTORY": "False",
        "GRADIO_SHARE": "False", "GRADIO_SSR_MODE": "False", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
      ValueError: a host that is none of this machine's, or a port that is taken.
    """
    if ":" in host:
        raise ValueError(f"--host {host}: give an IPv4 address or a name")
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: give a number from 0 to 65535")
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ValueError(f"--host {host}, --port {port}: cannot listen there ({error.strerror or error}); give "
                         "another, or --port 0 for a free one") from error  # fmt: skip


def application(studio: Studio, line: Line, folder: Path, host: str, token: str | None) -> Any:
    """The ASGI application.

    Args:
      folder: of the run, with "uploads" and "clips" in it.
    """
    import fastapi
    import gradio as gr
    from fastapi.responses import FileResponse

    from samplers.studio import page, theme

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/clips/{clip}/{name}")
    def clip(clip: str, name: str) -> FileResponse:
        path = folder / "clips" / clip / name
        if not (CLIP.fullmatch(clip) and FILE.fullmatch(name) and path.is_file()):
            raise fastapi.HTTPException(404)
        return FileResponse(path, headers={"cache-control": "private, max-age=3600"})

    blocks, sliders = page.build(studio, line, folder)
    mounted = gr.mount_gradio_app(
        app, blocks, "/", server_name=host, footer_links=[], run_history=False, show_error=False,
        max_file_size=MOST_UPLOAD, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
        theme=theme.theme(), css=theme.css(sliders), head=theme.head(),
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )  # fmt: skip
    return safety.guarded(mounted, host, token)


def warm_up(studio: Studio, line: Line, job: Job) -> threading.Thread:
    """Makes a clip, of the page's first values, and looks into it, so that nobody waits for it later.

    Returns:
      The thread that follows it.
    """

    def work(ticket: Any) -> None:
        studio.make(job, ticket)
        if job.plan.config.dit.stream == "no":
            studio.look(job, None, None, ticket)

    def follow() -> None:
        try:
            for _ in line.follow(ticket):
                pass
        except Stopped:
            return
        except Exception as error:  # the first clip that is asked for will say the same on the page
            print(f"note: warm-up: {' '.join(str(error).split())}", flush=True)
        else:
            print("warm: the first clip will not wait for compilation", flush=True)

    ticket = line.join(WARMING, work)
    thread = threading.Thread(target=follow, name="warm-up", daemon=True)
    thread.start()
    return thread


def run(app: Any, sock: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until Ctrl-C, which is raised again at the end."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=2, access_log=False,
                            server_header=False)  # fmt: skip
    ready()
    uvicorn.Server(config).run(sockets=[sock])
