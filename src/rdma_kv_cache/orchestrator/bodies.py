# SPDX-License-Identifier: Apache-2.0
"""The client's request body, and the bodies of the two legs made from it."""

from __future__ import annotations

import json
from typing import Any

from rdma_kv_cache.orchestrator.errors import ApiError

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"

_BYTES_PER_TOKEN = 4
Body = dict[str, Any]


def parse_body(raw: bytes) -> Body:
    """Return the request as an object, without any transfer parameters the client put in.

    Where KV goes is the router's business. vLLM also takes them from `vllm_xargs`.
    Raises ApiError 400.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_json", "the body is not a JSON object")
    body.pop("kv_transfer_params", None)
    extra = body.get("vllm_xargs")
    if isinstance(extra, dict):
        extra.pop("kv_transfer_params", None)
    return body


def is_one_sequence(body: Body) -> bool:
    """Whether the request is one prompt with one answer, so that one transfer id serves it.

    `n`, `best_of`, beam search and several prompts become several requests inside vLLM;
    `echo` and `prompt_logprobs` need the prompt computed where the answer is made.
    """
    if body.get("n") not in (None, 1) or body.get("best_of") not in (None, 1):
        return False
    if body.get("use_beam_search") or body.get("echo") or body.get("prompt_embeds") is not None:
        return False
    if body.get("prompt_logprobs") is not None:
        return False
    prompt = body.get("prompt")
    is_batch = isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt)
    return not (is_batch and len(body["prompt"]) > 1)


def estimate_tokens(body: Body) -> int:
    """Return the prompt's length in tokens: exact for token ids, else UTF-8 bytes / 4."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list):
        return len(prompt)
    if isinstance(prompt, str):
        return _bytes(prompt) // _BYTES_PER_TOKEN
    return sum(map(_text_bytes, _items(body.get("messages")))) // _BYTES_PER_TOKEN


def prefill_body(body: Body, path: str, transfer_id: str) -> Body:
    """Return the prefill leg: one token, not streamed, its KV wanted by another engine."""
    leg = {**body, "max_tokens": 1, "stream": False, "n": 1}
    if path == CHAT:
        leg["max_completion_tokens"] = 1
    leg.pop("stream_options", None)
    leg.pop("min_tokens", None)
    leg["kv_transfer_params"] = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "transfer_id": transfer_id,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    return leg


def decode_body(body: Body, transfer_id: str, prefill_engine: str) -> Body:
    """Return the decode leg: the client's request, its KV coming from `prefill_engine`."""
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_request_id": transfer_id,
        "remote_engine_id": prefill_engine,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    return {**body, "kv_transfer_params": params}


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text_bytes(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return _bytes(content)
    parts = [part.get("text") for part in _items(content) if isinstance(part, dict)]
    return sum(_bytes(text) for text in parts if isinstance(text, str))


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
