"""The Ray side of the daemon: start or join a cluster, place the actors, hand out handles."""

from __future__ import annotations

import logging
import os
from typing import Any

# Ray reports usage over the network unless told otherwise; a sidecar must not.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray gives its workers a niceness of 15: whatever else runs on the machine would come before the requests of a decoder.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from adaptd.actors.decoder import DecoderActor
from adaptd.actors.learner import LearnerActor
from adaptd.config import Config

_OBJECT_STORE_BYTES = 100 * 2**20
#: Requests and calls that one decoder actor may serve at once; the loop's own queue is what refuses.
_DECODER_CONCURRENCY = 1000
_PLACEMENT_TIMEOUT_S = 60.0


class Cluster:
    """Owns the Ray connection and the actors' lifetimes."""

    def __init__(self, config: Config, *, log_to_driver: bool = True) -> None:
        self._config = config
        #: None where somebody else decodes.
        self._decoders = config.engine.decoders if config.engine.kind == "native" else 0
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": log_to_driver}
        if config.ray.address == "local":
            # Shares are fractions, so a machine with one core can still place every actor.
            cpus = self._decoders * config.ray.decoder_cpus + config.ray.learner_cpus
            options |= {
                "address": "local",
                "num_cpus": max(os.cpu_count() or 1, int(cpus + 1)),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
        else:
            options["address"] = config.ray.address
        ray.init(**options)
        bundles = [self._resources("decoder") for _ in range(self._decoders)] + [self._resources("learner")]
        self._group = placement_group(bundles, strategy=config.ray.placement)
        if not self._group.wait(_PLACEMENT_TIMEOUT_S):
            ray.shutdown()
            raise RuntimeError(
                f"the Ray cluster cannot place {len(bundles)} actors ({bundles}): lower ray.*_cpus or ray.*_gpus, or add nodes"
            )

    def _resources(self, role: str) -> dict[str, float]:
        cpus, gpus = getattr(self._config.ray, f"{role}_cpus"), getattr(self._config.ray, f"{role}_gpus")
        return {k: v for k, v in (("CPU", cpus), ("GPU", gpus)) if v} or {"CPU": 0.01}

    def _options(self, role: str, bundle: int) -> dict[str, Any]:
        resources = self._resources(role)
        return {
            "num_cpus": resources.get("CPU", 0),
            "num_gpus": resources.get("GPU", 0),
            "max_restarts": -1,
            "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
        }

    def decoders(self, buffer_url: str) -> list[Any]:
        """Start the decoder actors; returns their handles."""
        actor = ray.remote(DecoderActor)
        return [
            actor.options(max_concurrency=_DECODER_CONCURRENCY, **self._options("decoder", i)).remote(
                self._config, i, buffer_url
            )
            for i in range(self._decoders)
        ]

    def learner_again(self, learner: Any, config: Config, buffer_url: str) -> Any:
        """End a learner and start one of another configuration in its place: what it had published is in the store."""
        ray.kill(learner)
        self._config = config
        return self.learner(buffer_url)

    def learner(self, buffer_url: str) -> Any:
        """Start the learner actor; returns its handle."""
        actor = ray.remote(concurrency_groups={"control": 2})(LearnerActor)  # type: ignore[call-overload]
        return actor.options(**self._options("learner", self._decoders)).remote(self._config, buffer_url)

    def close(self) -> None:
        """Kill the actors and leave the cluster."""
        remove_placement_group(self._group)
        ray.shutdown()
