"""Headers and paths on their way through the proxy. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

RawHeaders = Sequence[tuple[bytes, bytes]]

#: Of one connection only (RFC 9110, section 7.6.1); lengths and hosts are made anew for the next connection.
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
#: Ours: for the proxy, not for the server.
_OURS = b"x-adaptd-"
#: Names of domains and tenants become keys in Redis and labels in metrics.
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}")

#: First segments of the routes that vLLM has only in development mode, or that change what the server is or does. Its API
#: key guards /v1, /v2, /inference and /cohere alone (engines.md), so a proxy that passed these would open them to whoever
#: reaches the proxy.
_DEVELOPMENT = frozenset(
    {
        "abort_requests",
        "collective_rpc",
        "fault_tolerance",
        "finish_weight_update",
        "get_world_size",
        "init_weight_transfer_engine",
        "is_paused",
        "is_sleeping",
        "is_scaling_elastic_ep",
        "kv_event_sources",
        "pause",
        "release_kv_cache_memory",
        "reset_encoder_cache",
        "reset_mm_cache",
        "reset_prefix_cache",
        "resume",
        "scale_elastic_ep",
        "server_info",
        "shutdown_weight_transfer_engine",
        "sleep",
        "start_draft_weight_update",
        "start_profile",
        "start_weight_update",
        "stop_profile",
        "update_weight_version",
        "update_weights",
        "wake_up",
        "weight_checker",
        "weight_info",
    }
)


def is_development_route(path: str) -> bool:
    """Whether `path`, decoded and relative to the server's root, is one of vLLM's unguarded routes."""
    return next((part for part in path.split("/") if part), "") in _DEVELOPMENT


def to_server(headers: RawHeaders, *, plain: bool) -> list[tuple[bytes, bytes]]:
    """Request headers for the server, without host and length.

    Args:
      plain: ask for an answer without content encoding, because it will be read.
    """
    drop = {b"host", b"content-length", *_named_by_connection(headers)} | ({b"accept-encoding"} if plain else set())
    kept = [(n, v) for n, v in _end_to_end(headers) if n.lower() not in drop and not n.lower().startswith(_OURS)]
    return [*kept, (b"accept-encoding", b"identity")] if plain else kept


def to_client(headers: RawHeaders, *, rewritten: bool) -> list[tuple[bytes, bytes]]:
    """Response headers for the client.

    Args:
      rewritten: the body has another length than the server said.
    """
    drop = _named_by_connection(headers) | ({b"content-length"} if rewritten else set())
    return [(n, v) for n, v in _end_to_end(headers) if n.lower() not in drop]


def _end_to_end(headers: RawHeaders) -> Iterable[tuple[bytes, bytes]]:
    return ((name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP)


def _named_by_connection(headers: RawHeaders) -> set[bytes]:
    """Further headers that the sender declared hop-by-hop."""
    values = [value for name, value in headers if name.lower() == b"connection"]
    return {part.strip().lower() for value in values for part in value.split(b",")} - {b"close", b""}


@dataclass(frozen=True, slots=True)
class Labels:
    """What the x-adaptd headers of a request say. One outside its rule is dropped: the proxy refuses no request."""

    domain: str = "default"
    tenant: str = ""
    store: bool = True

    @staticmethod
    def of(headers: RawHeaders) -> Labels:
        """Read the headers; any value of x-adaptd-no-store but 0 and false opts out."""
        found = {n.lower(): v.decode("latin-1").strip() for n, v in headers if n.lower().startswith(_OURS)}
        domain, tenant = (found.get(_OURS + name, "") for name in (b"domain", b"tenant"))
        return Labels(
            domain if _LABEL.fullmatch(domain) else "default",
            tenant if _LABEL.fullmatch(tenant) else "",
            found.get(_OURS + b"no-store", "0").lower() in ("0", "false"),
        )
