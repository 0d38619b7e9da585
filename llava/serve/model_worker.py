"""A worker: one model on one machine, answering for the controller.

SIGTERM lets running answers finish; what waits or comes new is sent elsewhere.

python -m llava.serve.model_worker --model-path CHECKPOINT --controller http://localhost:21001
"""

import logging
import os
from typing import Any
from urllib.parse import urlsplit

from llava.commandline import ArgumentParser, run
from llava.errors import LlavaError
from llava.folders import model_name
from llava.serve.protocol import check_address
from llava.serve.request_models import MOST_SPEED, ModelCard
from llava.serve.secret import add_secret_flags, secret_from_args
from llava.serve.transport.hosts import LOOPBACK, Hosts, add_host_flags
from llava.serve.transport.middleware import MAX_BODY_BYTES
from llava.serve.transport.server import port_number, require_serving

logger = logging.getLogger(__name__)

KEY_VARIABLE = "LLAVA_UPSTREAM_API_KEY"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of this machine's")
    parser.add_argument("--port", type=port_number, default=21002, help="port to listen on")
    parser.add_argument(
        "--worker-address", "--worker", help="where others reach this worker; by default this machine and --port"
    )
    parser.add_argument(
        "--controller-address", "--controller", default="http://localhost:21001", help="whom to tell of the model"
    )
    parser.add_argument("--no-register", action="store_true", help="don't tell any controller")
    model = parser.add_argument_group("model")
    model.add_argument("--model-path", help="a checkpoint's folder, or a hub id")
    model.add_argument("--model-base", help="what a LoRA or projector folder was trained over")
    model.add_argument("--model-name", help="the name that clients ask for; by default the folder's")
    model.add_argument("--conv-mode", "--conv-template", help="prompt template in place of the checkpoint's")
    model.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default the best there is")
    model.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="by default float32 on the CPU")
    model.add_argument("--num-gpus", type=int, default=1, help="spread the model over the GPUs if more than 1")
    upstream = parser.add_argument_group("model on an OpenAI-compatible server (vLLM, SGLang, transformers serve)")
    upstream.add_argument("--api-base", help="its address with /v1, in place of --model-path")
    upstream.add_argument("--api-model", help=f"the name it knows the model by; its key comes from {KEY_VARIABLE}")
    parser.add_bool("--load-8bit", help="quantize to 8 bits while loading")
    parser.add_bool("--load-4bit", help="quantize to 4 bits while loading")
    parser.add_bool("--multi-modal", help="accepted for old scripts and ignored: the checkpoint says so itself")
    parser.add_bool("--keep-aspect-ratio", help="keep the image's shape, as v1.0's flag (image_aspect_ratio keep)")
    load = parser.add_argument_group("load")
    load.add_argument("--limit-model-concurrency", type=int, default=32, help="answers made at the same time")
    load.add_argument("--max-queue", type=int, default=256, help="requests that may wait; more are told to come again")
    load.add_argument(
        "--cache-mb",
        type=int,
        help="memory for keys and values of running answers; a quarter as much for those of earlier questions, and for "
        "features of images (512 at most); by default half of what is free",
    )
    load.add_argument("--request-timeout", type=float, default=300.0, help="seconds for a whole answer")
    load.add_argument(
        "--stream-interval",
        type=float,
        default=0.04,
        help="seconds between two chunks of a stream; 1 and more are the old flag's tokens, about 0.02 s each",
    )
    load.add_argument("--drain-seconds", type=int, default=60, help="time for running answers after SIGTERM")
    load.add_argument("--max-body-bytes", type=int, default=MAX_BODY_BYTES, help="largest request that is read")
    load.add_argument(
        "--speed", type=float, default=1.0, help="share of requests relative to other workers of the same model"
    )
    add_host_flags(parser)
    add_secret_flags(parser)
    return parser


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    require_serving()
    from llava.serve.worker.app import run_serving

    secret = secret_from_args(args)
    if args.multi_modal:
        logger.warning("--multi-modal is ignored: the checkpoint says so itself")
    if not 0 <= args.speed <= MOST_SPEED:
        raise LlavaError(f"--speed {args.speed}: give a number from 0 to {MOST_SPEED:.0f}")
    address = check_address(args.worker_address or f"http://localhost:{args.port}")
    if urlsplit(address).hostname not in LOOPBACK and args.host == "127.0.0.1":
        logger.warning("--worker-address names another machine, but --host 127.0.0.1 listens on this one alone")
    backend, card = _load(args)
    run_serving(_serve(args, backend, card, secret, address))


async def _serve(args, backend, card: ModelCard, secret: str | None, address: str) -> None:
    from llava.serve.worker.app import WorkerApp, serve
    from llava.serve.worker.heartbeat import Membership

    name = args.model_name or model_name(args.model_path or args.api_model)
    interval = args.stream_interval if args.stream_interval < 1 else 0.02 * args.stream_interval
    worker = WorkerApp(
        backend,
        [name],
        secret,
        speed=args.speed,
        interval=interval,
        timeout=args.request_timeout,
        max_body=args.max_body_bytes,
        hosts=Hosts.from_args(args, urlsplit(address).hostname),
        card=card,
    )
    member = None if args.no_register else Membership(args.controller_address, address, worker.status, secret)
    logger.info("serving %s on port %d", name, args.port)
    await serve(worker, args.host, args.port, member, args.drain_seconds)


def _load(args) -> tuple[Any, ModelCard]:
    """(the backend, what is told of its model)."""
    if bool(args.model_path) == bool(args.api_base and args.api_model):
        raise LlavaError("give --model-path (a checkpoint), or --api-base and --api-model (a server)")
    if args.api_base:
        return _connect(args), ModelCard(language_model=f"{model_name(args.api_model)}, on a server of another make")
    from llava.model.weights.locate import locate_model

    folder = locate_model(args.model_path)  # before torch is imported, which takes seconds
    import torch

    from llava.generation import Engine
    from llava.model import load_pretrained_model
    from llava.serve.worker.card import card_of
    from llava.serve.worker.engine_backend import EngineBackend

    if args.num_gpus > torch.cuda.device_count() and args.num_gpus > 1:
        logger.warning("--num-gpus %d: there are %d; the model goes there", args.num_gpus, torch.cuda.device_count())
    loaded = load_pretrained_model(
        folder,
        args.model_base,
        device=args.device,
        dtype=args.dtype,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        device_map="auto" if args.num_gpus > 1 else None,
        conversation_template=args.conv_mode,
    )
    if args.keep_aspect_ratio:
        loaded.model.config.image_aspect_ratio = "keep"
    engine = Engine(
        loaded,
        max_batch_size=args.limit_model_concurrency,
        max_waiting=args.max_queue,
        cache_bytes=None if args.cache_mb is None else args.cache_mb << 20,
    )
    return EngineBackend(engine), card_of(args.model_path, loaded.model)


def _connect(args):
    from llava.serve.worker.upstream_backend import UpstreamBackend

    return UpstreamBackend(
        args.api_base,
        args.api_model,
        os.environ.get(KEY_VARIABLE),
        args.limit_model_concurrency,
        args.max_queue,
        args.request_timeout,
    )


if __name__ == "__main__":
    run(main)
