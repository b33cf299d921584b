"""Catalogue of log events: `noun.past_verb`, each with the keys it carries. A test checks that no other is used."""

from __future__ import annotations

SERVICE_STARTED = "service.started"  # deployment, url, decoders, draft_version, buffer
SERVICE_READY = "service.ready"  # url, seconds
SERVICE_DRAINING = "service.draining"  # in_flight
SERVICE_STOPPED = "service.stopped"  # seconds
REQUEST_FINISHED = "request.finished"  # request_id, domain, tokens, rounds, mal, draft_version, finish_reason, seconds
REQUEST_REFUSED = "request.refused"  # status, code
REQUEST_FAILED = "request.failed"  # request_id, error
STATUS_FAILED = "status.failed"  # error
DECODER_LOST = "decoder.lost"  # decoder, error
KERNELS_COMPILED = "kernels.compiled"  # library, about
KERNELS_MISSING = "kernels.missing"  # error, remedy
GRAPHS_FAILED = "graphs.failed"  # error, remedy
DRIFT_DETECTED = "drift.detected"  # domain, before, after, direction
LEARNER_TICKED = "learner.ticked"  # reason, steps, loss, seconds, tokens_per_s, verdict
LEARNER_SKIPPED = "learner.skipped"  # reason
LEARNER_RESTARTED = "learner.restarted"  # reason, version
LEARNER_LOST = "learner.lost"  # error
CANDIDATE_PROMOTED = "candidate.promoted"  # version, gain, low, high
CANDIDATE_REJECTED = "candidate.rejected"  # reason, gain, low, high
DRAFT_SWAPPED = "draft.swapped"  # decoder, version, pause_s, bytes
DRAFT_SWAP_REFUSED = "draft.swap_refused"  # decoder, version, reason, error
DRAFT_ROLLED_BACK = "draft.rolled_back"  # version, refused, reason
DRAFT_ROLLBACK_FAILED = "draft.rollback_failed"  # refused, error
DRAFT_CONFIRMED = "draft.confirmed"  # version, reason, promise
WATCH_LOST = "watch.lost"  # error
DRAFT_INSTALLED = "draft.installed"  # upstream, version, pause_s, seconds, bytes
DRAFT_LOST = "draft.lost"  # upstream, version, reason
DRAFT_RESTORED = "draft.restored"  # upstream, version, reason
DRAFT_RESTORE_FAILED = "draft.restore_failed"  # upstream, version, reason, error
TRACES_AGED_OUT = "traces.aged_out"  # target_id, traces
BUFFER_UNAVAILABLE = "buffer.unavailable"  # error
TRENDS_UNAVAILABLE = "trends.unavailable"  # error
UPSTREAM_PROBED = "upstream.probed"  # version, k, top_logprobs, capture, reason
UPSTREAM_LOST = "upstream.lost"  # error
UPSTREAM_LEFT_OUT = "upstream.left_out"  # upstream, reason
UPSTREAM_UNREACHABLE = "upstream.unreachable"  # upstream, error
UPSTREAM_BROKE_OFF = "upstream.broke_off"  # error
PROXY_FAULTED = "proxy.faulted"  # where, error
TRACE_REFUSED = "trace.refused"  # request_id, reason
UPSTREAM_RESUMED = "upstream.resumed"  # upstream
PUBLISHER_OFF = "publisher.turned_off"  # reason
PUBLISHER_FAULTED = "publisher.faulted"  # error
DRAFT_PUBLISHED = "draft.published"  # version, seconds
DRAFT_PUBLISH_FAILED = "draft.publish_failed"  # version, error

CATALOGUE = frozenset(value for name, value in list(globals().items()) if name.isupper() and isinstance(value, str))
