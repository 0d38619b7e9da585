"""The web page with its protections taken off: what an attack has to succeed against, to show that it is one.

python -m tests.security.open_page --port N --controller URL [--middleware]

Without --middleware this is gradio's application as a plain mount gives it. With it, our middleware stands alone: what
gradio checks by itself is off. Either way the loopback address may be fetched from, which gradio refuses, since the
tests have no other.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="llava-open-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from gradio import processing_utils
        from starlette.routing import Mount

        from llava.serve.api.keys import Keys
        from llava.serve.gradio_web_server import build_app, build_parser
        from llava.serve.http_server import run_server

        words = [word for word in sys.argv[1:] if word != "--middleware"]
        args = build_parser().parse_args(words)
        whole = build_app(args, None, Path(folder), Keys([]))
        mounted = whole.app.app.app
        (blocks,) = [route.app.get_blocks() for route in mounted.routes if isinstance(route, Mount)]
        blocks.has_launched = blocks.is_running = False
        processing_utils.PUBLIC_HOSTNAME_WHITELIST.append("127.0.0.1")
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        run_server(whole if "--middleware" in sys.argv else mounted, args.host, args.port)


if __name__ == "__main__":
    main()
