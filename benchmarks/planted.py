"""Models in which certain layers may share by construction, so that a search for a pattern has a right answer.

The first GROUP_DIM entries of the residual stream hold the token's embedding, nothing is ever written there, and query
latents and indexers read only them. Layers with equal weights for both then choose equal keys, whatever the layers
before them did. Each F of the planted pattern draws new weights, and the S after it copy them. Attention is large, so
that other keys mean another answer; the targets are the answers of the model with all its indexers.
"""

from dataclasses import replace

import torch

from indexshare.kernels.layout import KeyLayout
from indexshare.model import recipes
from indexshare.model.glm import GlmForCausalLM
from indexshare.share.calibration import CalibrationRow, forward_batch

GROUP_DIM = 24


@torch.no_grad()
def planted_model(pattern: str, seed: int, spread: float = 0.0, **changes: object) -> GlmForCausalLM:
    """A model with an indexer in every layer, in which exactly the S layers of `pattern` may share. fp32.

    spread: how far the weights of S layers may lie from those they copy, as a share of theirs; each layer draws its own
    share up to that. Then no layer shares for nothing, and the best pattern is not known.
    """
    config = recipes.tiny(
        num_hidden_layers=len(pattern),
        index_topk_pattern="F" * len(pattern),
        num_nextn_predict_layers=0,
        first_k_dense_replace=len(pattern),
        **changes,
    )
    model = GlmForCausalLM(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    model.model.embed_tokens.weight.copy_(torch.randn(config.vocab_size, config.hidden_size, generator=generator))
    model.lm_head.weight.copy_(torch.randn(config.vocab_size, config.hidden_size, generator=generator) * 0.4)
    leader = None
    for letter, layer in zip(pattern, model.stack.layers, strict=True):
        attention = layer.self_attn
        indexer = attention.indexer
        assert indexer is not None
        attention.o_proj.weight.copy_(torch.randn(attention.o_proj.weight.shape, generator=generator) * 0.4)
        for matrix in (attention.o_proj.weight, layer.mlp.down_proj.weight):
            matrix[:GROUP_DIM] = 0.0
        for matrix in (attention.kv_a_proj_with_mqa.weight, attention.kv_b_proj.weight):
            matrix.copy_(torch.randn(matrix.shape, generator=generator) * matrix.shape[1] ** -0.5)
        for matrix in (attention.q_a_proj.weight, indexer.wk.weight, indexer.weights_proj.weight):
            matrix.copy_(torch.randn(matrix.shape, generator=generator))
            matrix[:, GROUP_DIM:] = 0.0
        indexer.wq_b.weight.copy_(torch.randn(indexer.wq_b.weight.shape, generator=generator))
        if letter == "S":
            assert leader is not None
            share = spread * float(torch.rand((), generator=generator))
            pairs = [(attention.q_a_proj.weight, leader.q_a_proj.weight)]
            pairs += zip(indexer.parameters(), leader.indexer.parameters(), strict=True)
            for own, copied in pairs:
                own.copy_((1 - share**2) ** 0.5 * copied + share * own if own.ndim == 2 else copied)
        else:
            leader = attention
    return model.requires_grad_(False).eval()


@torch.inference_mode()
def own_answers(model: GlmForCausalLM, num_rows: int, length: int, seed: int) -> tuple[CalibrationRow, ...]:
    """Rows of random tokens; the targets are what the model finds most probable with all its indexers."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        token_ids = torch.randint(0, model.config.vocab_size, (length,), generator=generator)
        row = CalibrationRow(
            token_ids=token_ids,
            targets=token_ids,
            positions=torch.arange(length),
            layout=KeyLayout.packed((0, length)),
        )
        rows.append(replace(row, targets=model.logits(model(forward_batch(model, row))).argmax(-1)))
    return tuple(rows)
