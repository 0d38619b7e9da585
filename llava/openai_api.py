"""The one client of OpenAI, Azure OpenAI and every compatible server, for work of hours against a paid API.

`run_jobs` sends many chat requests with bounded concurrency, retries what can be retried, keeps to rate limits and
a cost limit, and puts every finished item on disk at once, so that a killed run asks again only for what was in
flight. Settings come from environment variables or flags (`add_api_flags`). The parts are in `llava.openai_client`.
"""

from llava.openai_client.jobs import ChatJob, ChatResult, RunSummary, describe_dry_run, print_dry_run
from llava.openai_client.run import run_jobs
from llava.openai_client.settings import ApiSettings, add_api_flags, settings_from_args

__all__ = [
    "ApiSettings",
    "ChatJob",
    "ChatResult",
    "RunSummary",
    "add_api_flags",
    "describe_dry_run",
    "print_dry_run",
    "run_jobs",
    "settings_from_args",
]
