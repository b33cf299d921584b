"""The accept rule is exact: what comes out follows the target. Statistical tests at fixed seeds, p > 0.01."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from adaptd.decoding.request import SamplingParams
from adaptd.decoding.sampling import RowParams, inverse_cdf, warp
from adaptd.decoding.verify import verify_greedy, verify_sampled

VOCAB, K, DRAWS = 8, 3, 60_000

SETTINGS = {
    "plain": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.6),
    "hot": SamplingParams(temperature=1.7),
    "top_k": SamplingParams(temperature=0.9, top_k=4),
    "top_p": SamplingParams(temperature=1.2, top_p=0.8),
    "both": SamplingParams(temperature=0.8, top_k=6, top_p=0.95),
}


def distributions(params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    p_logits = torch.randn(1, K + 1, VOCAB, generator=generator)
    q_logits = p_logits[:, :K] + torch.randn(1, K, VOCAB, generator=generator)
    rows = RowParams.build([params], VOCAB, torch.device("cpu"))
    return warp(p_logits, rows)[0], warp(q_logits, rows)[0]


def play(p: torch.Tensor, q: torch.Tensor, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """DRAWS independent rounds; returns emitted tokens [DRAWS, K+1] (-1 behind the end) and accepted counts."""
    uniforms = torch.rand(DRAWS, 2 * K + 1, generator=torch.Generator().manual_seed(seed))
    proposals = torch.stack([inverse_cdf(q[i].expand(DRAWS, -1).contiguous(), uniforms[:, i]) for i in range(K)], 1)
    rows = (DRAWS, -1, -1)
    n_accepted, final = verify_sampled(p.expand(rows), q.expand(rows), proposals, uniforms[:, K:])
    tokens = torch.cat((proposals, final[:, None]), 1).scatter(1, n_accepted[:, None], final[:, None])
    tokens[torch.arange(K + 1) > n_accepted[:, None]] = -1
    return tokens.numpy(), n_accepted.numpy()


def p_value(tokens: np.ndarray, expected: torch.Tensor) -> float:
    counts = np.bincount(tokens, minlength=VOCAB)
    likely = expected.numpy() > 0
    assert counts[~likely].sum() == 0, "a token the target never gives came out"
    weights = expected.double().numpy()[likely]
    return float(chisquare(counts[likely], weights / weights.sum() * len(tokens)).pvalue)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_emitted_position_follows_the_target_over_a_vocabulary_of_8(name: str) -> None:
    p, q = distributions(SETTINGS[name])
    tokens, n_accepted = play(p, q, seed=5)
    assert 0.1 < (n_accepted / K).mean() < 0.9, "the test needs rejections and acceptances"
    for position in range(K + 1):
        reached = tokens[:, position][tokens[:, position] >= 0]
        assert len(reached) >= 2_000
        assert p_value(reached, p[position]) > 0.01


def test_acceptance_at_the_first_depth_is_the_overlap_of_the_two_distributions() -> None:
    """Design section 3: beta = sum of min(p, q)."""
    p, q = distributions(SETTINGS["plain"])
    _, n_accepted = play(p, q, seed=6)
    overlap = float(torch.minimum(p[0], q[0]).sum())
    assert (n_accepted >= 1).mean() == pytest.approx(overlap, abs=4 * np.sqrt(overlap * (1 - overlap) / DRAWS))


def test_the_chi_square_would_notice_a_correction_drawn_from_p_instead_of_the_residual() -> None:
    """The test above can fail: this is the commonest mistake, and it is caught."""
    p, q = distributions(SETTINGS["plain"])
    tokens, n_accepted = play(p, q, seed=5)
    wrong = inverse_cdf(
        p[0].expand(DRAWS, -1).contiguous(), torch.rand(DRAWS, generator=torch.Generator().manual_seed(9))
    )
    first = np.where(n_accepted == 0, wrong.numpy(), tokens[:, 0])
    assert p_value(first, p[0]) < 1e-6


def test_a_draft_equal_to_the_target_is_always_accepted() -> None:
    p, _ = distributions(SETTINGS["top_p"])
    _, n_accepted = play(p, p[:K], seed=7)
    assert (n_accepted == K).all()


def test_a_draft_without_overlap_is_never_accepted_and_the_target_still_followed() -> None:
    p = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0]).expand(K + 1, -1)
    q = torch.tensor([0.0, 0.0, 0.0, 0.2, 0.2, 0.2, 0.2, 0.2]).expand(K, -1)
    tokens, n_accepted = play(p, q, seed=8)
    assert (n_accepted == 0).all()
    assert p_value(tokens[:, 0], p[0]) > 0.01


def test_greedy_accepts_the_common_prefix_and_adds_the_targets_token() -> None:
    best = torch.tensor([[4, 5, 6, 7], [4, 5, 6, 7], [4, 5, 6, 7]])
    proposals = torch.tensor([[4, 5, 6], [4, 0, 6], [0, 5, 6]])
    n_accepted, final = verify_greedy(best, proposals)
    assert n_accepted.tolist() == [3, 1, 0]
    assert final.tolist() == [7, 5, 4]
