"""Each token has one text, and a report works where the engine does not say what was rejected."""

import numpy as np

from adaptd.models import load
from adaptd.models.vocabulary import token_texts
from adaptd.report.rejections import collect
from adaptd.report.token_groups import TokenGroups
from buffers.synthetic import synthetic_trace


def test_every_token_has_one_text_and_none_have_none() -> None:
    texts = token_texts(load.load_tokenizer(load.resolve("pocket", "draft")))
    assert texts([]) == []
    assert len(texts([0, 300, 300])) == 3
    assert texts([1155]) == [" causes"]


def test_traces_that_do_not_name_what_was_rejected_are_counted() -> None:
    texts = token_texts(load.load_tokenizer(load.resolve("pocket", "draft")))
    trace = synthetic_trace(
        np.random.default_rng(0),
        vocabulary=500,
        rejected=np.full(48, -1, np.int32),
        rejected_at=np.empty(0, np.int32),
        draft_topk_ids=np.empty((0, 1), np.uint32),
        draft_topk_logprobs=np.empty((0, 1), np.float16),
    )
    found = collect([trace], lambda _: 0).values(TokenGroups(texts, {}), texts)
    assert found["top_proposed"] == []
    assert sum(row["rejected"] for row in found["top_wanted"]) > 0
    nothing = collect([], lambda _: 0).values(TokenGroups(texts, {}), texts)
    assert (nothing["top_wanted"], nothing["all"]["test"]["pairs"]) == ([], 0)
