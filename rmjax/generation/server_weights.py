"""New weights for a model that a server has open already.

Both servers read them from a directory, which they must see, and forget the keys and values that
they kept of earlier prompts, which are those of other weights.
"""

from pathlib import Path
from typing import Any

from rmjax.errors import UserError, shortened
from rmjax.generation.http_json import JsonServer

_WHAT = "the new weights"


def load_into_vllm(server: JsonServer, directory: Path) -> None:
    """By `reload_weights`, which vLLM's workers have.

    The routes are there only if the server was started with VLLM_SERVER_DEV_MODE=1; they let
    whoever reaches the server do as much. Source: `vllm/entrypoints/serve/dev/rpc/api_router.py`,
    `vllm/model_executor/model_loader/reload/inplace.py` of vLLM 0.33.

    Raises:
      UserError: it cannot, or says that it did not.
    """
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
    try:
        server.post("/collective_rpc", body, _WHAT)
        reset = server.post("/reset_prefix_cache", {}, "what is kept of prompts")
    except UserError as error:
        raise UserError(
            f"{error}. vLLM must be started with VLLM_SERVER_DEV_MODE=1 in its environment, and "
            f"must see {directory}"
        ) from error
    _check(reset.get("success"), reset, server)


def load_into_sglang(server: JsonServer, directory: Path) -> None:
    """By SGLang's `/update_weights_from_disk`; `sglang/srt/entrypoints/http_server.py` of 0.5.10.

    Raises:
      UserError: it cannot, or says that it did not.
    """
    body = {"model_path": str(directory), "flush_cache": True}
    reply = server.post("/update_weights_from_disk", body, _WHAT)
    _check(reply.get("success"), reply, server)


def _check(success: Any, reply: dict[str, Any], server: JsonServer) -> None:
    if success is not True:
        raise UserError(
            f"{server.url} did not load {_WHAT}: it replies {shortened(repr(reply), 300)}"
        )
