# SPDX-License-Identifier: Apache-2.0
"""The API key of the service."""

from __future__ import annotations

import hmac
import secrets

from rdma_kv_cache.orchestrator.errors import ApiError


def resolve_key(setting: str) -> str | None:
    """Return the key for `orchestrator.api_key`: random for `auto`, None (no check) for `none`."""
    if setting == "auto":
        return "rkv-" + secrets.token_urlsafe(32)
    return None if setting == "none" else setting


def check_key(authorization: str | None, key: str | None) -> None:
    """Check an Authorization header against `key`. Raises ApiError 401."""
    if key is None:
        return
    scheme, _, token = (authorization or "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else ""
    # Header bytes outside UTF-8 arrive as surrogates; compare_digest wants bytes for non-ASCII.
    if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode()):
        raise ApiError(
            401,
            "invalid_api_key",
            "missing or wrong API key: send 'Authorization: Bearer KEY' with the key of this "
            "run (file api.key in the run folder)",
        )
