"""What top-k and top-p keep equals what audiocraft keeps."""

from __future__ import annotations

import numpy as np
import torch

from handler.lm.sampling import keep_top_k, keep_top_p
from tests.parity.models import GOLDENS, max_difference


def test_top_k_and_top_p_keep_what_audiocraft_keeps() -> None:
    golden = np.load(GOLDENS / "text_mono" / "gen_sampled.npz")
    probabilities = (torch.from_numpy(golden["fn_logits"]) / 0.8).softmax(-1)  # [B, K, card]
    assert max_difference(probabilities, golden["fn_probs_temp08"]) < 1e-7
    kept = probabilities * keep_top_k(probabilities, torch.tensor([20, 20]), 20)
    assert max_difference(kept / kept.sum(-1, keepdim=True), golden["fn_topk20_probs"]) < 1e-6
    kept = probabilities * keep_top_p(probabilities, torch.tensor([0.9, 0.9]))
    kept = (kept / kept.sum(-1, keepdim=True)).sort(dim=-1, descending=True).values
    assert max_difference(kept, golden["fn_topp09_sorted_probs"]) < 1e-6
