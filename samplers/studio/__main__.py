"""`python -m samplers.studio`: a page in the browser to make clips on; see docs/studio.md."""

import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from typing import Any

from samplers import flags
from samplers.command import BAD_INPUT, INTERRUPTED
from samplers.studio.options import MODEL, parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    p = parser()
    options = vars(p.parse_args(arguments))
    try:
        _serve(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"{p.prog}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _serve(options: dict[str, Any]) -> None:
    """Serves until Ctrl-C. ValueError for whatever is wrong."""
    if find_spec("gradio") is None:
        raise ValueError("the studio needs gradio: pip install 'wanjax[studio]'")
    from samplers.studio import safety, serve
    from wanjax.tokenizer import PromptCut
    from wanjax.writing import terminate_as_interrupt

    token = safety.token_of(options["host"], options["token"])
    note = flags.settle()
    if note:
        print(f"note: {note}", file=sys.stderr)
    sock = serve.listen(options["host"], options["port"])
    with sock, terminate_as_interrupt(), safety.own_folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCut)  # said under the clip, in one line
        _open(options, folder, sock, token)


def _open(options: dict[str, Any], folder: Path, sock: socket, token: str | None) -> None:
    """Opens the model's folder and serves the page."""
    from samplers import cache
    from samplers.studio import serve
    from samplers.studio.line import Line
    from samplers.studio.make import Studio

    if options["compile_cache"]:
        cache.enable()
    (folder / "clips").mkdir(mode=0o700)
    studio = Studio({name: options[name] for name in MODEL}, folder / "clips")
    job = studio.first()  # whatever is wrong with devices or memory is told before there is a page
    serve.settle_environment(folder)
    line = Line()
    try:
        app = serve.application(studio, line, folder, options["host"], token)
        if options["warm_up"]:
            serve.warm_up(studio, line, job)
        host, port = sock.getsockname()[:2]
        shown = "127.0.0.1" if host == "0.0.0.0" else host
        address = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
        serve.run(app, sock, lambda: print(f"open {address}   (Ctrl-C ends it)", flush=True))
    finally:
        line.close()


if __name__ == "__main__":
    sys.exit(main())
