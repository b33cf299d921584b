"""Whether a server can take drafts at all: asked before the first publication, not found out by one that fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptd.sidecar.checks import Expected, check_config
from adaptd.sidecar.client import UpstreamRefused, VllmClient

#: Findings (`adaptd.sidecar.checks`) without which no update arrives.
NEEDED = frozenset({"speculation", "draft kind", "draft vocabulary", "plugin", "draft folder", "development routes"})


async def why_unable(client: VllmClient, k: int, scope: Mapping[str, Any]) -> str:
    """Why this server cannot take drafts of this scope, with the remedy; empty if it can.

    Raises:
      UpstreamUnavailable: it does not answer.
    """
    try:
        await client.weight_version()
        config = await client.config()
    except UpstreamRefused as error:
        if error.status in (404, 405):
            return "the server has no development routes: start it with VLLM_SERVER_DEV_MODE=1, on loopback only"
        return str(error)
    for finding in check_config(config, Expected(k=k, scope=scope)):
        if finding.state == "failed" and finding.name in NEEDED:
            return f"{finding.found}: {finding.remedy}"
    return ""
