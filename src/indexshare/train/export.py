"""From a training run to a model directory that `indexshare`, transformers and other engines read."""

import json
import shutil
from importlib import resources
from pathlib import Path

import torch

from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import save_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
OWN_FILES = ("chat_template.jinja", "generation_config.json")  # kept where the tokenizer's model has its own


def export_model(model: GlmForCausalLM, tokenizer_directory: Path, directory: Path) -> Path:
    """Writes config, BF16 weights (router biases stay fp32), tokenizer, chat template and generation settings.

    Turns `model` into BF16 in place. Returns `directory`.
    """
    biases = {name: bias.clone() for name, bias in model.named_parameters() if name.endswith("e_score_correction_bias")}
    model.to(dtype=torch.bfloat16)
    for name, bias in biases.items():
        model.get_parameter(name).data = bias
    save_model(model, directory)
    for name in TOKENIZER_FILES:
        if (tokenizer_directory / name).is_file():
            shutil.copyfile(tokenizer_directory / name, directory / name)
    template = resources.files("indexshare") / "chat" / "glm52.jinja"
    (directory / "chat_template.jinja").write_bytes(template.read_bytes())
    config = model.config
    generation = {"do_sample": False, "eos_token_id": list(config.eos_token_id), "pad_token_id": config.pad_token_id}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    for name in OWN_FILES:
        if (tokenizer_directory / name).is_file():
            shutil.copyfile(tokenizer_directory / name, directory / name)
    return directory
