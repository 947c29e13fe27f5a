"""What distillation does for nano: fewer indexers, with and without the cross-layer loss, and new ones.

    python benchmarks/distillation.py runs/distillation        # three conversions on one thread, 15 minutes

The texts are the modules of the Python library whose names begin with a to f; CPython 3.11.7 gave the table in
docs/experiments.md. Each conversion is that of `indexshare share distill` with the options below; what was stopped goes
on, and what is there is only shown.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from indexshare.engine.resolve import packaged_model
from indexshare.model.config import GlmConfig
from indexshare.model.families import INDEX_KEYS
from indexshare.model.glm import GlmForCausalLM, assign_weights, weights_of
from indexshare.model.weights import load_model
from indexshare.share.distill import REPORT_FILE, IndexSizes, Schedule, distill_model
from indexshare.train import losses
from indexshare.train.corpus import library_root
from indexshare.train.export import export_model

COMMON = {"length": 1024, "batch_size": 1, "stride": 4, "held_out_rows": 4}
FEWER = Schedule(warmup_steps=150, sparse_steps=20, only_indexers=True, **COMMON)
NEW = Schedule(warmup_steps=200, sparse_steps=0, **COMMON)


def own_layers_only(config: GlmConfig, by_layer: Mapping[int, Tensor]) -> Tensor:
    """In place of `losses.index_loss`: no indexer knows of the layers that share its choice."""
    return torch.stack([loss for layer, loss in sorted(by_layer.items()) if config.is_full(layer)]).sum()


def dense_nano(directory: Path) -> Path:
    """nano without its indexers: a model of GLM-4.7-Flash's kind, with dense attention."""
    if not directory.exists():
        nano = load_model(packaged_model(), dtype=torch.float32)
        sizes: dict[str, Any] = dict.fromkeys(("index_n_heads", "index_head_dim", "index_topk"), 0)
        assert sizes.keys() <= INDEX_KEYS
        config = replace(nano.config, model_type="glm4_moe_lite", indexer_types=(), index_topk_pattern=None, **sizes)
        with torch.device("meta"):
            dense = GlmForCausalLM(config)
        assign_weights(dense, {name: weight for name, weight in weights_of(nano).items() if ".indexer." not in name})
        export_model(dense, packaged_model(), directory)
    return directory


def show(name: str, output: Path) -> None:
    """One conversion: its layers and losses, before and after."""
    report = json.loads((output / REPORT_FILE).read_bytes())
    before, after = report["before"], report["after"]
    print(f"\n{name}: {report['pattern']}, {report['num_tokens']:,} tokens")
    print("layer  indexer  KL before   after  recall before   after")
    for old, new in zip(before["layers"], after["layers"], strict=True):
        kl, recall = f"{old['kl']:9.3f} {new['kl']:7.3f}", f"{old['recall']:14.1%} {new['recall']:7.1%}"
        print(f"{old['layer']:5}  {old['indexer']:7}  {kl} {recall}")
    for key in ("dense_loss", "sparse_loss"):
        print(f"{key}: {before[key]:.3f} -> {after[key]:.3f} nats a token")


def main() -> None:
    """Run and show the three conversions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    torch.set_num_threads(1)
    texts = directory / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for file in library_root().glob("[a-f]*.py"):
        shutil.copyfile(file, texts / file.name)
    usual = losses.index_loss
    for name, loss in (("cross-layer", usual), ("own-layer", own_layers_only)):
        losses.index_loss = loss
        if not (directory / name).exists():
            distill_model("nano", [texts], directory / name, pattern="FSSSFSSS", schedule=FEWER)
        show(name, directory / name)
    losses.index_loss = usual
    if not (directory / "new").exists():
        source = str(dense_nano(directory / "dense-nano"))
        sizes = IndexSizes(num_heads=4, topk=256)
        distill_model(source, [texts], directory / "new", freq=4, sizes=sizes, schedule=NEW)
    show("new indexers", directory / "new")


if __name__ == "__main__":
    main()
