"""vLLM with a draft model, run by vLLM's own Python: one request of a batch a line in, its time a line out.

Needs nothing of adaptd. Arguments: one JSON object (`target`, `draft`, `k`, `dtype`, `batch`, `max_length`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Serve requests from standard input until it is closed."""
    about = json.loads(sys.argv[1])
    # What vLLM prints belongs to its log; standard output carries answers only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    speculative = {"method": "draft_model", "model": about["draft"], "num_speculative_tokens": about["k"]}
    llm: Any = LLM(
        model=about["target"],
        dtype=about["dtype"],
        max_model_len=about["max_length"],
        max_num_seqs=about["batch"],
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=speculative,
    )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    rounds = 0
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        params = SamplingParams(temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True)
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        before, rounds = rounds, counts.get("vllm:spec_decode_num_drafts", 0)
        answer = {
            "seconds": seconds,
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "rounds": rounds - before,
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
