"""The part of adaptd that runs inside the vLLM server: entry point `adaptd` of the group `vllm.general_plugins`.

vLLM calls `register` once or more in every process it starts. It makes the weight-transfer backend `adaptd_disk` known:

    VLLM_SERVER_DEV_MODE=1 vllm serve TARGET --weight-transfer-config '{"backend": "adaptd_disk"}' ...

The server's environment has other versions of torch and transformers than the daemon's and none of adaptd's
dependencies (install with `pip install --no-deps adaptd`). So this module imports nothing, and the two behind it,
`vllm_update` and `vllm_backend`, only what vLLM itself ships.
"""

from __future__ import annotations

#: Name of the backend in `--weight-transfer-config`.
BACKEND = "adaptd_disk"


def register() -> None:
    """Make the backend known to vLLM; harmless when called again, or where vLLM is absent or has no such seam."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, "adaptd.sidecar.vllm_backend", "DiskWeightTransferEngine")
    except ValueError:
        # Already registered: a process may load its plugins more than once.
        return
