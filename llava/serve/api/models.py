"""/v1/models: which models can be asked, and what is said of one that isn't there."""

from typing import Any

from llava.serve.client import ServingClient
from llava.serve.protocol import ErrorType, ServeError


def model_entry(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llava"}


async def find_model(client: ServingClient, name: str) -> str:
    """`name`, if it can be asked.

    Raises:
        ServeError: NO_MODEL; NO_WORKER if no model at all is ready.
    """
    models = await client.models()
    if name in models:
        return name
    if models:
        raise ServeError(ErrorType.NO_MODEL, f"The model {name!r} doesn't exist. Known: {', '.join(sorted(models))}.")
    raise ServeError(ErrorType.NO_WORKER, f"No worker is ready for the model {name!r}.")


async def unknown_model(client: ServingClient, name: str, error: ServeError) -> ServeError:
    """`error`, or that the model doesn't exist where that is why there was no worker: then asking again is no use."""
    if error.error_type is not ErrorType.NO_WORKER:
        return error
    try:
        await find_model(client, name)
    except ServeError as found:
        return found
    return error
