"""Errors of the daemon, each with the exit code its command ends with.

    AdaptdError (1)
    |- ConfigError (78)            a setting is unknown, of the wrong type or out of range
    |- VocabularyMismatch (78)     target and draft do not share one vocabulary
    |- StateDirError (78)          state_dir cannot be created or written
    |- LogRefused (1)              a log that cannot be replayed; names file, line, rule and remedy
    |- RequestRefused (1)          a request that cannot be served; carries the HTTP status and the OpenAI error type
    |  |- ContextLengthExceeded    prompt and answer do not fit the context (400)
    |  |- UnknownModel             (404)
    |  |- BufferAway               Redis does not answer (503, retryable)
    |  `- Overloaded               the queue is full (503, retryable)
    |- DecoderStopped (75)         the decoder that held the request died or is closing; retry (503)
    |- DaemonUnavailable (69)      no daemon answers at the address
    |- UpstreamUnavailable (69)    the inference server does not answer
    `- PublishFailed (1)           a version did not get into the inference server; carries the reason's slug

Leaf packages have their own trees: `buffers.errors.ReplayError`, `checkpoints.errors.CheckpointError`.
"""

from __future__ import annotations


class AdaptdError(Exception):
    """Base of every expected failure; the command line prints its message in one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(AdaptdError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 78


class VocabularyMismatch(AdaptdError):
    """Target and draft do not share one vocabulary, so a draft token would mean another word to the target."""

    exit_code = 78


class StateDirError(AdaptdError):
    """`state_dir` cannot be created or written."""

    exit_code = 78


class LogRefused(AdaptdError):
    """A log that cannot be replayed; the message names file, line, rule and remedy, and never text of the log."""


class RequestRefused(AdaptdError):
    """A request that cannot be served as sent; `status` is the HTTP status, `type` and `code` the OpenAI error fields."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None
    #: Seconds after which a retry makes sense, for the Retry-After header; None where a retry cannot help.
    retry_after_s: int | None = None


class ContextLengthExceeded(RequestRefused):
    """Prompt and answer do not fit the context of the models."""

    code = "context_length_exceeded"


class UnknownModel(RequestRefused):
    """The request names a model that this daemon does not serve."""

    status = 404
    code = "model_not_found"


class VersionQuarantined(RequestRefused):
    """A draft version that live traffic refused, or that was learned from one, was to be promoted."""

    status = 409
    code = "version_quarantined"


class Overloaded(RequestRefused):
    """The queue is full or the daemon is draining; the client should retry."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"
    retry_after_s = 1


class BufferAway(RequestRefused):
    """Redis does not answer, and what was asked for is there; the client should retry."""

    exit_code = 75
    status = 503
    type = "server_error"
    code = "buffer_unavailable"
    retry_after_s = 5


class DecoderStopped(RequestRefused):
    """The decoder that held the request died or is closing before the answer was complete; the client should retry."""

    exit_code = 75
    status = 503
    type = "server_error"
    code = "decoder_stopped"
    retry_after_s = 1


class DaemonUnavailable(AdaptdError):
    """No daemon answers at the configured address."""

    exit_code = 69


class UpstreamUnavailable(AdaptdError):
    """The inference server that adaptd stands beside does not answer, or not in time."""

    exit_code = 69


class PublishFailed(AdaptdError):
    """A version did not get into, or did not stay in, the inference server; `reason` is one slug for the counter.

    unsupported     the server offers no way to update its draft
    refused         the server turned the update down; its draft is as it was
    checkpoint      the version cannot be read, folded or written
    target_changed  the target's weights are not what they were: outputs may differ; nothing is published any more
    acceptance      acceptance on the probe prompts is not what the gate promised
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
