"""GLM-5.2: one file from config to logits, for training and inference alike. Parameters carry checkpoint names.

Shape legend: T new tokens of all sequences, D hidden, H heads, N nope, P rope, V value, C latent, W = C + P,
Q = N + P, J index heads, I index head size, K selected keys, E experts, F expert width.
Sources: released config and tensors of GLM-5.2; GLM-5 (arXiv 2602.15763) for MLA, DSA and MTP; IndexCache
(arXiv 2603.12201) for sharing. `docs/indexshare.md` has the mathematics.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from indexshare import runtime
from indexshare.kernels import index_loss, ops
from indexshare.kernels.formats import QuantizedWeight
from indexshare.kernels.packed import PackedWeight
from indexshare.kernels.pool import Pool
from indexshare.kernels.registry import composite
from indexshare.model.batch import ForwardBatch, IndexerOutput, Selection
from indexshare.model.config import GlmConfig
from indexshare.model.routing import is_glm_router, route_in_groups

INDEX_KEY_NORM_EPS = 1e-6
EXPANDED_MIN_TOKENS = 64
MASKED_MAX_CONTEXT = 4096  # in training: up to about here a mask is faster than gathering (docs/experiments.md)


class RopeTable:
    """cos and sin [T, P/2] of one forward pass, shared by all layers."""

    def __init__(self, positions: Tensor, config: GlmConfig, dtype: torch.dtype) -> None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rope_dim, scaling = config.qk_rope_head_dim, config.rope_scaling
        if scaling is None:
            self.cos, self.sin = ops.rope_table(positions, rope_dim, config.rope_theta, wide)
            return
        frequencies = torch.tensor(scaling.frequencies(rope_dim, config.rope_theta), dtype=torch.float64)
        angles = positions.double()[:, None] * frequencies.to(positions.device)
        self.cos = (angles.cos() * scaling.table_scale).to(wide)
        self.sin = (angles.sin() * scaling.table_scale).to(wide)

    def apply(self, x: Tensor, interleaved: bool) -> Tensor:
        return ops.rope(x, self.cos, self.sin, interleaved)


class Linear(nn.Module):
    """A weight [out, in]; in a quantised model `assign_weights` puts a QuantizedWeight in its place."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        output = ops.linear(x, self.weight)
        return output if self.bias is None else output + self.bias


class Embedding(nn.Module):
    """One row [D] for each token id."""

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, dim))

    def forward(self, token_ids: Tensor) -> Tensor:
        return nn.functional.embedding(token_ids, self.weight)


class RMSNorm(nn.Module):
    """See `ops.rms_norm`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """See `ops.layer_norm`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Indexer(nn.Module):
    """The lightning indexer: its rotary dims come first, its key norm is a LayerNorm, its scores are fp32."""

    def __init__(self, config: GlmConfig) -> None:
        super().__init__()
        assert config.q_lora_rank is not None, "checked by the configuration"
        self.config = config
        self.wq_b = Linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim)
        self.wk = Linear(config.hidden_size, config.index_head_dim)
        self.k_norm = LayerNorm(config.index_head_dim, INDEX_KEY_NORM_EPS)
        self.weights_proj = Linear(config.hidden_size, config.index_n_heads)

    def forward(self, x_TD: Tensor, query_latent: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor, Tensor]:
        """-> query [T, J, I], head weights [T, J] in fp32, key [T, I]. No gradient flows back into the inputs."""
        x_TD, query_latent = x_TD.detach(), query_latent.detach()
        config = self.config
        query_TJI = self.wq_b(query_latent).view(-1, config.index_n_heads, config.index_head_dim)
        key_TI = self.k_norm(self.wk(x_TD))
        wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        with torch.autocast(x_TD.device.type, enabled=False):
            weights_TJ = ops.linear(x_TD.to(wide), self.weights_proj.weight.to(wide)) * config.index_n_heads**-0.5
        return self._rotate(query_TJI, rope), weights_TJ, self._rotate(key_TI, rope)

    def _rotate(self, x: Tensor, rope: RopeTable) -> Tensor:
        rotary = self.config.qk_rope_head_dim
        turned = rope.apply(x[..., :rotary], self.config.indexer_rope_interleave)
        return torch.cat((turned, x[..., rotary:]), dim=-1)


class Attention(nn.Module):
    """Multi-head latent attention over the selected keys, with an indexer in full layers; in a model without indexers
    over all visible keys."""

    def __init__(self, config: GlmConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        heads, bias = config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank, bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, config.latent_dim, bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.latent_norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size, bias)
        self.indexer = Indexer(config) if config.is_full(layer) else None
        self.scale = config.attention_scale

    def forward(
        self, x_TD: Tensor, selected: Selection | None, batch: ForwardBatch, rope: RopeTable
    ) -> tuple[Tensor, Selection]:
        config = self.config
        if config.q_lora_rank is None:
            query_latent, query_THQ = None, self.q_proj(x_TD)
        else:
            query_latent = self.q_a_layernorm(self.q_a_proj(x_TD))
            query_THQ = self.q_b_proj(query_latent)
        query_THQ = query_THQ.view(-1, config.num_attention_heads, config.qk_head_dim)
        nope, rotary = query_THQ.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        query_THQ = torch.cat((nope, rope.apply(rotary, config.rope_interleave)), dim=-1)

        latents = self._keys(x_TD, selected, batch, rope)
        chooses = self.indexer is not None or not config.has_indexers
        if chooses and not batch.query_only:
            selected = self._select(x_TD, query_latent, batch, rope)
            if batch.cache is None:
                assert isinstance(latents, Tensor), "training has no cache"
                selected = selected._replace(latents=latents)
        assert selected is not None, "the first layer is full, so that there is a selection to hand on"
        if batch.index_queries is not None:
            assert isinstance(latents, Tensor), "training has no cache"
            self._add_index_loss(query_THQ, latents, selected, batch)
        return self.o_proj(self._attend(query_THQ, latents, selected, batch).flatten(1)), selected

    def _keys(self, x_TD: Tensor, selected: Selection | None, batch: ForwardBatch, rope: RopeTable) -> Pool:
        """What this layer attends to, its new rows written; for a query-only batch what the first draft step wrote."""
        config, pool = self.config, batch.cache.latents[self.layer] if batch.cache else None
        if batch.query_only:
            keys = selected.latents if pool is None and selected is not None else pool
            assert keys is not None, "later draft steps come after a first one"
            return keys
        latent, key_rope = self.kv_a_proj_with_mqa(x_TD).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        row_TW = torch.cat((self.kv_a_layernorm(latent), rope.apply(key_rope, config.rope_interleave)), dim=-1)
        return _write(batch, pool, row_TW)

    def _select(self, x_TD: Tensor, query_latent: Tensor | None, batch: ForwardBatch, rope: RopeTable) -> Selection:
        """Runs the indexer: writes its key, chooses the rows. With at most top-k keys, or in dense mode, all."""
        if self.indexer is None:
            return Selection(None)
        assert query_latent is not None, "checked by the configuration"
        needs_all = batch.attention == "dense" or batch.layout.max_context <= self.config.index_topk
        if needs_all and batch.cache is None and batch.index_queries is None and batch.gather is None:
            return Selection(None)
        query_TJI, weights_TJ, key_TI = self.indexer(x_TD, query_latent, rope)
        keys = _write(batch, batch.cache.index_keys[self.layer] if batch.cache else None, key_TI)
        rows = masks = indexer = None
        if not needs_all:
            rows = self._choose(query_TJI, weights_TJ, keys, batch)
            if batch.layout.page_table is None and batch.layout.max_context <= MASKED_MAX_CONTEXT:
                masks = ops.selection_masks(rows, batch.layout)
        if batch.trace is not None:
            batch.trace.selections[self.layer] = rows
        if batch.index_queries is not None:
            assert isinstance(keys, Tensor), "training has no cache"
            asked = _asked_tokens(batch)
            indexer = IndexerOutput(query_TJI[asked], weights_TJ[asked], keys)
        return Selection(rows, masks, indexer)

    @torch.no_grad()
    def _choose(self, query_TJI: Tensor, weights_TJ: Tensor, keys: Pool, batch: ForwardBatch) -> Tensor:
        """The rows with the highest scores, int32 [T, K]; of a layer that runs again those of the first time."""
        kept = None if batch.trace is None else batch.trace.kept_choices
        if kept is not None and self.layer in kept:
            return kept[self.layer]
        rows = ops.index_select(query_TJI, weights_TJ, keys, batch.layout, self.config.index_topk)
        if kept is not None:
            kept[self.layer] = rows
        return rows

    def _attend(self, query_THQ: Tensor, latents: Pool, selected: Selection, batch: ForwardBatch) -> Tensor:
        """-> [T, H, V]. Absorbed over selected rows; expanded in training and where many queries attend to all keys."""
        config = self.config
        kv_b = self.kv_b()
        rows = selected.rows
        is_expanded = batch.cache is None
        is_expanded = is_expanded or (batch.layout.num_tokens >= EXPANDED_MIN_TOKENS and self._may_expand(batch))
        if selected.masks is not None or (rows is None and is_expanded):
            return ops.mla_expanded(query_THQ, latents, kv_b, batch.layout, self.scale, selected.masks)
        query_THW = self._absorb(query_THQ)
        if rows is None:
            attended = ops.mla_dense(query_THW, latents, batch.layout, self.scale, config.kv_lora_rank)
        else:
            attended = ops.mla_sparse(query_THW, latents, rows, self.scale, config.kv_lora_rank)
        return torch.einsum("thc,hvc->thv", attended, kv_b[:, config.qk_nope_head_dim :])

    def _may_expand(self, batch: ForwardBatch) -> bool:
        """Whether keys and values of a whole context may lie expanded in memory. With indexers the context is at most
        top-k keys, or a session has counted them (dense attention); without, they must fit half of the workspace."""
        config = self.config
        width = 2 * config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim  # as in `ops.mla_expanded`
        num_bytes = batch.layout.max_context * config.num_attention_heads * width * self.kv_b_proj.weight.itemsize
        return config.has_indexers or num_bytes <= runtime.settings().workspace_bytes // 2

    def kv_b(self) -> Tensor:
        """kv_b_proj as [H, N + V, C]. It is never quantised: it is small, and absorption uses it in two directions."""
        return self.kv_b_proj.weight.view(self.config.num_attention_heads, -1, self.config.kv_lora_rank)

    def _absorb(self, query_THQ: Tensor) -> Tensor:
        """Moves the nope part of the query into the latent space: [T, H, N + P] -> [T, H, C + P]."""
        nope, rotary = query_THQ.split((self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), dim=-1)
        absorbed = torch.einsum("thn,hnc->thc", nope, self.kv_b()[:, : self.config.qk_nope_head_dim])
        return torch.cat((absorbed, rotary), dim=-1)

    def _add_index_loss(self, query_THQ: Tensor, latents: Tensor, selected: Selection, batch: ForwardBatch) -> None:
        """KL of this layer's attention against the indexer it uses, its own or that of a layer before it.

        A shared layer needs no scores for that, only what they are made of (multi-layer distillation, IndexCache).
        """
        assert batch.trace is not None and batch.index_queries is not None and selected.indexer is not None
        asked = _asked_tokens(batch)
        with torch.no_grad():
            query_nHW = self._absorb(query_THQ[asked])
        rows = selected.rows if batch.index_target == "selected" else None
        runs_again = batch.trace.kept_choices is not None
        batch.trace.index_losses[self.layer] = index_loss.indexer_loss(
            *selected.indexer,
            query_nHW,
            latents,
            batch.layout,
            batch.index_queries,
            None if rows is None else rows[asked],
            self.scale,
            batch.trace.kept_losses[self.layer] if runs_again else None,
        )


def _asked_tokens(batch: ForwardBatch) -> Tensor:
    """int64 [n]: places in the flat batch of the tokens over which the indexers' loss is taken."""
    assert batch.index_queries is not None
    starts = batch.layout.sequence_starts[:-1]
    return torch.cat([start + asked for start, asked in zip(starts, batch.index_queries, strict=True)])


def _write(batch: ForwardBatch, pool: Pool | None, rows: Tensor) -> Pool:
    """Puts this step's rows into the layer's pool and returns the pool; in training the rows are the pool."""
    if pool is None:
        return rows if batch.gather is None else batch.gather(rows)
    ops.cache_write(pool, batch.layout.new_rows.to(pool.device), rows)
    return pool


class Mlp(nn.Module):
    """down(silu(gate x) * up x): the dense layers and the shared experts."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Router(nn.Module):
    """Scores of the experts; the bias is moved by the training loop, not by gradients."""

    def __init__(self, config: GlmConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        has_bias = config.topk_method == "noaux_tc"
        bias = nn.Parameter(torch.zeros(config.n_routed_experts), requires_grad=False) if has_bias else None
        self.register_parameter("e_score_correction_bias", bias)


class Experts(nn.Module):
    """All routed experts of a layer, stacked; gate rows before up rows. Quantised as in `Linear`."""

    def __init__(self, config: GlmConfig) -> None:
        super().__init__()
        count, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))
        self.dispatch: Callable[..., Tensor] = ops.moe_experts  # replaced where experts lie on several ranks

    def forward(self, x_TD: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """See `ops.moe_experts`."""
        return self.dispatch(x_TD, experts, gates, self.gate_up_proj, self.down_proj)


class MixtureOfExperts(nn.Module):
    """A few routed experts for each token, and one that sees every token."""

    def __init__(self, config: GlmConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = Mlp(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x_TD: Tensor, batch: ForwardBatch) -> Tensor:
        config = self.config
        weight, bias = self.gate.weight, self.gate.e_score_correction_bias
        if is_glm_router(config) and bias is not None:
            chosen = (config.num_experts_per_tok, config.norm_topk_prob, config.routed_scaling_factor)
            experts, gates = ops.moe_route(x_TD, weight, bias, *chosen)
        else:
            experts, gates = route_in_groups(x_TD, weight, bias, config)
        if batch.trace is not None:
            batch.trace.expert_counts[self.layer] = experts.flatten().bincount(minlength=config.n_routed_experts)
            if batch.trace.watch_router is not None:
                batch.trace.watch_router(self, x_TD)
        return self.experts(x_TD, experts, gates) + self.shared_experts(x_TD)


class DecoderLayer(nn.Module):
    """Attention, then experts or a dense MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: GlmConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = layer >= config.num_hidden_layers or config.mlp_layer_types[layer] == "sparse"
        self.mlp: Mlp | MixtureOfExperts = (
            MixtureOfExperts(config, layer) if sparse else Mlp(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self, hidden_TD: Tensor, selected: Selection | None, batch: ForwardBatch, rope: RopeTable
    ) -> tuple[Tensor, Selection]:
        attended, selected = self.self_attn(self.input_layernorm(hidden_TD), selected, batch, rope)
        hidden_TD = hidden_TD + attended
        normed = self.post_attention_layernorm(hidden_TD)
        output = self.mlp(normed, batch) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(normed)
        return hidden_TD + output, selected


@dataclass(slots=True, eq=False)
class LayerStack:
    """Layers that run one after the other, and what stands before and after them.

    embedding: None where hidden states come in (MTP). packed: the weights as a twin of `run_layers` reads them.
    """

    config: GlmConfig
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: Linear
    embedding: Embedding | None = None
    packed: Any = None


class StackOutput(NamedTuple):
    """hidden [T, D] after the norm, the last selection, fp32 logits [n, vocabulary] after the last n tokens."""

    hidden: Tensor
    selected: Selection
    logits: Tensor | None


@composite
def run_layers(
    stack: LayerStack, inputs: Tensor, selected: Selection | None, batch: ForwardBatch, num_logits: int
) -> StackOutput:
    """Token ids int64 [T], or hidden states [T, D], through all layers. IndexShare is the value `selected` of the loop.

    A full layer replaces it, a shared layer passes it on.
    """
    hidden = inputs if stack.embedding is None else stack.embedding(inputs)
    rope = RopeTable(batch.positions, stack.config, hidden.dtype)
    runs_again = batch.trace is not None and batch.trace.kept_choices is not None
    for layer in stack.layers:
        run = _rerun_backward(layer) if runs_again else layer
        hidden, selected = run(hidden, selected, batch, rope)
    assert selected is not None
    hidden = stack.norm(hidden)
    return StackOutput(hidden, selected, _logits(stack.head, hidden[-num_logits:]) if num_logits > 0 else None)


def _rerun_backward(layer: DecoderLayer) -> Callable[..., tuple[Tensor, Selection]]:
    """The layer, keeping its inputs and what it chose; all else is computed again on the way back."""
    return lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)


def _logits(head: Linear, hidden: Tensor) -> Tensor:
    logits = head(hidden)
    return logits if logits.dtype == torch.float64 else logits.float()


class SharedHead(nn.Module):
    """The norm before the borrowed output matrix."""

    def __init__(self, config: GlmConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MtpLayer(DecoderLayer):
    """Multi-token prediction: one more decoder layer with its own indexer; embedding and head are borrowed."""

    def __init__(self, config: GlmConfig) -> None:
        super().__init__(config, config.num_hidden_layers)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)


class GlmModel(nn.Module):
    """Everything under `model.` in a checkpoint."""

    def __init__(self, config: GlmConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        layers: list[nn.Module] = [DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        layers += [MtpLayer(config)] * config.num_nextn_predict_layers
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class GlmForCausalLM(nn.Module):
    """The whole model. Build it under `torch.device("meta")` to load weights into it."""

    def __init__(self, config: GlmConfig) -> None:
        super().__init__()
        self.config = config
        self.model = GlmModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        layers: tuple[Any, ...] = tuple(self.model.layers)
        main, mtp = layers[: config.num_hidden_layers], layers[config.num_hidden_layers :]
        self.stack = LayerStack(config, main, self.model.norm, self.lm_head, self.model.embed_tokens)
        self.mtp_stack = LayerStack(config, mtp, mtp[0].shared_head.norm, self.lm_head) if mtp else None

    def forward(self, batch: ForwardBatch) -> Tensor:
        """token ids -> hidden [T, D] after the final norm."""
        return run_layers(self.stack, batch.token_ids, None, batch, 0).hidden

    def next_logits(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """token ids -> hidden [T, D] after the final norm, and fp32 logits [vocabulary] after the last token."""
        hidden, _, logits = run_layers(self.stack, batch.token_ids, None, batch, 1)
        assert logits is not None
        return hidden, logits[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] after its norm -> fp32 logits [..., vocabulary]."""
        return _logits(self.lm_head, hidden)

    def mtp(
        self, hidden: Tensor, next_token_ids: Tensor, batch: ForwardBatch, selected: Selection | None = None
    ) -> tuple[Tensor, Selection]:
        """Hidden states that predict the token after the next.

        hidden [T, D] after `model.norm` (in later draft steps: the result of the step before), next_token_ids [T]
        -> [T, D] after shared_head.norm, for `logits`, and the selection. Embedding first, hidden second in eh_proj.
        Later draft steps give `selected`, the choice of the first, and a query-only batch: a draft sees neither itself
        nor other drafted tokens (IndexShare for MTP, GLM-5.2 blog).
        """
        assert self.mtp_stack is not None, "this checkpoint has no MTP layer"
        layer = self.mtp_stack.layers[0]
        assert isinstance(layer, MtpLayer)
        joined = torch.cat((layer.enorm(self.model.embed_tokens(next_token_ids)), layer.hnorm(hidden)), dim=-1)
        output = run_layers(self.mtp_stack, layer.eh_proj(joined), selected, batch, 0)
        return output.hidden, output.selected

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal weights of initializer_range; outputs into the residual stream shrink with depth. Norms become one."""
        for (_, parameter), (_, value) in zip(self.named_parameters(), self.random_weights(seed), strict=True):
            parameter.copy_(value)

    def random_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """What `init_weights` sets, by name, one after the other on the CPU; also of a model on "meta"."""
        shapes = {name: parameter.shape for name, parameter in self.named_parameters()}  # those of now
        return _random_weights(shapes, self.config, seed)


def _random_weights(shapes: Mapping[str, torch.Size], config: GlmConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    depth_scale = (2 * config.num_hidden_layers) ** -0.5
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape)
        elif name.endswith("bias"):
            yield name, torch.zeros(shape)
        else:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
            spread = config.initializer_range * (depth_scale if into_residual else 1.0)
            yield name, torch.randn(shape, generator=generator) * spread


def weights_of(module: nn.Module) -> dict[str, ops.Weight]:
    """What `state_dict` gives, and quantised or packed weights where they replaced parameters; no copies."""
    weights: dict[str, ops.Weight] = dict(module.state_dict(keep_vars=True))
    for place, part in module.named_modules():
        found = {name: value for name, value in vars(part).items() if isinstance(value, QuantizedWeight | PackedWeight)}
        weights |= {f"{place}.{name}" if place else name: value for name, value in found.items()}
    return weights


def assign_weights(module: nn.Module, weights: Mapping[str, ops.Weight]) -> None:
    """Give a module all its weights, by name, without copies: the inverse of `weights_of`."""
    plain: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if isinstance(weight, Tensor):
            plain[name] = weight
        else:
            place, _, attribute = name.rpartition(".")
            part = module.get_submodule(place)
            assert weight.shape == tuple(getattr(part, attribute).shape), name
            delattr(part, attribute)  # a parameter, which nn.Module would not let another type replace
            setattr(part, attribute, weight)
    module.load_state_dict(plain, assign=True)
