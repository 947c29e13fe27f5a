"""The stages of the shipped model (`make nano`). Its card says which of them it has seen, and how they were run."""

from dataclasses import replace

from indexshare.model import recipes as model_recipes
from indexshare.train.phases import Phase, TrainRecipe


def nano() -> TrainRecipe:
    """The first stage: 6.4 million supervised tokens, an hour and a half on two cores.

    Dense attention on short rows first, because it is cheapest; then the indexers learn from dense attention while the
    model goes on (the warm-up of DSA); then everything with the keys that the indexers choose, on long documents. There
    the indexers' loss is over all visible keys: over the selected ones alone they would not learn what they miss.
    The shipped weights come from a loss that was the sum over the layers an indexer serves, now it is their mean:
    Muon and AdamW take the same step for a multiple of a gradient, so that only the gradient clip sees the difference.
    """
    sparse = Phase(
        name="sparse",
        num_steps=200,
        attention="sparse",
        index_loss_weight=1.0,
        mtp_loss_weight=0.1,
        sequence_length=16_384,
        batch_size=1,
        index_stride=64,
        index_target="visible",
        learning_rate_scale=2.0,
        data={"code": 0.25, "retrieval": 0.6, "repeats": 0.03},
    )
    return TrainRecipe(
        name="nano",
        model=model_recipes.nano(),
        phases=(
            Phase(name="dense", num_steps=600, attention="dense", trains="model", sequence_length=1024, batch_size=4),
            Phase(
                name="warm-up",
                num_steps=150,
                attention="dense",
                index_loss_weight=1.0,
                mtp_loss_weight=0.1,
                sequence_length=1024,
                batch_size=4,
            ),
            sparse,
            replace(
                sparse, name="longer", num_steps=40, sequence_length=32_768, index_stride=128, learning_rate_scale=4.0
            ),
        ),
        seed=2026,
        learning_rate_muon=5e-3,
        learning_rate_adamw=3e-3,
        warmup_steps=60,
        min_lr_ratio=0.02,
        bias_update_rate=0.005,
        precision="bf16",
        checkpoint_every=100,
        log_every=10,
        data={
            "code": 0.45,
            "retrieval": 0.35,
            "repeats": 0.1,
            "position_skips": 0.5,
            "max_position": 1_048_576,
            "induction_start": 1,
        },
    )


def nano_long() -> TrainRecipe:
    """The second stage: tool calls, then rows of 65,536 and 131,072 tokens, most of them one or
    two documents, and an end on short rows that leaves the indexers as they are.

    The rate falls over all steps, which are of very unequal size: the long rows make up for that by their scale.
    """
    short = Phase(
        name="tools",
        num_steps=250,
        attention="sparse",
        index_loss_weight=1.0,
        mtp_loss_weight=0.1,
        sequence_length=2048,
        batch_size=2,
        index_stride=16,
        index_target="visible",
        learning_rate_scale=1.5,
        data={"code": 0.4, "retrieval": 0.15, "repeats": 0.05},
    )
    long = Phase(
        name="64K",
        num_steps=23,
        attention="sparse",
        index_loss_weight=1.0,
        mtp_loss_weight=0.1,
        sequence_length=65_536,
        batch_size=1,
        index_stride=256,
        index_target="visible",
        recompute=True,
        learning_rate_scale=2.0,
        data={"min_document": 49_152},
    )
    longest = replace(
        long,
        name="128K",
        num_steps=100,
        sequence_length=131_072,
        index_stride=512,
        learning_rate_scale=3.0,
        data={"code": 0.15, "retrieval": 0.8, "min_document": 49_152, "document_weight": 0.25, "position_skips": 0.0},
    )
    return TrainRecipe(
        name="nano-long",
        model=model_recipes.nano(),
        phases=(
            short,
            long,
            longest,
            replace(
                longest,
                name="128K, falling",
                num_steps=14,
                learning_rate_scale=1.2,
                data={**longest.data, "code": 0.3, "retrieval": 0.65},
            ),
            replace(
                short,
                name="end",
                num_steps=43,
                trains="model",
                index_loss_weight=0.0,
                learning_rate_scale=0.5,
                data={"code": 0.6, "retrieval": 0.15, "repeats": 0.0},
            ),
        ),
        seed=2027,
        learning_rate_muon=8e-4,
        learning_rate_adamw=5e-4,
        warmup_steps=20,
        min_lr_ratio=0.02,
        bias_update_rate=0.002,
        precision="bf16",
        checkpoint_every=3,
        log_every=1,
        data={
            "start": "runs/nano/model",
            "code": 0.2,
            "retrieval": 0.7,
            "repeats": 0.02,
            "position_skips": 0.5,
            "max_position": 1_048_576,
        },
    )


def nano_longest() -> TrainRecipe:
    """The third stage: rows of 131,072 tokens whose facts are far away, without the MTP layer,
    which learns again at the end."""
    second = nano_long()
    rows, end = second.phases[2], second.phases[-1]
    far = {**rows.data, "code": 0.1, "retrieval": 0.9, "repeats": 0.0, "min_document": 98_304}
    return replace(
        second,
        name="nano-longest",
        phases=(
            replace(rows, num_steps=120, mtp_loss_weight=0.0, learning_rate_scale=1.0, data=far),
            replace(end, num_steps=60, mtp_loss_weight=0.3),
        ),
        seed=2028,
        learning_rate_muon=5e-4,
        learning_rate_adamw=3e-4,
        warmup_steps=6,
        data={**second.data, "start": "runs/nano-long/model"},
    )
