"""Loading and saving checkpoints; every refusal of a hostile or broken directory. Interop is in test_interop.py."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from indexshare.errors import CheckpointError, ConfigError, IndexShareError, MemoryLimitError
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.recipes import tiny
from indexshare.model.weights import load_checkpoint, load_model, save_model
from indexshare.quant.fp8 import quantize_block

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
ROUTER_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def make_model(**changes: object) -> GlmForCausalLM:
    model = GlmForCausalLM(tiny(num_hidden_layers=3, index_topk_pattern="FFS", **changes))
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)  # norms and biases differ from their defaults too
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[GlmForCausalLM, Path]:
    model, directory = make_model(), tmp_path_factory.mktemp("saved")
    save_model(model, directory)
    return model, directory


@pytest.fixture
def directory(saved: tuple[GlmForCausalLM, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[1], tmp_path / "checkpoint"))


def assert_same_weights(first: GlmForCausalLM, second: GlmForCausalLM) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype
        assert torch.equal(tensor, states[1][name]), name


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrite the tensors of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def edit_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------------------------------
# what works


def test_round_trip_is_bit_equal(saved: tuple[GlmForCausalLM, Path]) -> None:
    model, directory = saved
    loaded, report = load_checkpoint(directory, dtype=torch.float32)
    assert_same_weights(model, loaded)
    assert loaded.config == model.config
    assert report.num_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert not (report.widened_fp8 or report.skipped_indexers or report.skipped_unexpected or report.mtp_absent)
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_files_have_released_names(saved: tuple[GlmForCausalLM, Path]) -> None:
    model, directory = saved
    tensors = load_file(directory / "model.safetensors")
    experts = "model.layers.1.mlp.experts."
    assert torch.equal(
        torch.cat((tensors[experts + "2.gate_proj.weight"], tensors[experts + "2.up_proj.weight"])),
        model.get_parameter(experts + "gate_up_proj")[2],
    )
    assert torch.equal(tensors[experts + "3.down_proj.weight"], model.get_parameter(experts + "down_proj")[3])
    assert not any("gate_up_proj" in name for name in tensors)
    assert "model.layers.3.eh_proj.weight" in tensors  # the MTP layer


def test_stacked_experts_are_read_too(directory: Path, saved: tuple[GlmForCausalLM, Path]) -> None:
    save_file(saved[0].state_dict(), directory / "model.safetensors")
    assert_same_weights(saved[0], load_model(directory, dtype=torch.float32))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_converted(directory: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    edit(directory, lambda tensors: tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()}))
    tensors = load_file(directory / "model.safetensors")
    model = load_model(directory, dtype=wanted)
    assert torch.equal(model.get_parameter(NORM), tensors[NORM].to(wanted))
    assert torch.equal(model.get_parameter(ROUTER_BIAS), tensors[ROUTER_BIAS].float())
    assert {parameter.dtype for name, parameter in model.named_parameters() if name[-5:] != "_bias"} == {wanted}


def test_shards_round_trip_and_replace_each_other(tmp_path: Path, saved: tuple[GlmForCausalLM, Path]) -> None:
    model, other = saved[0], make_model()
    kept = {"tokenizer.json", "model-backup.safetensors", "model-1-of-2.safetensors"}
    for name in kept:
        (tmp_path / name).write_text("kept")
    for source, limit in ((other, 10**9), (model, 100_000), (other, 50_000), (model, 10**9)):
        save_model(source, tmp_path, max_shard_bytes=limit)
        shards = [path for path in tmp_path.glob("*.safetensors") if path.name not in kept]
        assert (len(shards) > 1) == (tmp_path / INDEX).exists() == (limit < 10**9)
        assert all(path.stat().st_size < limit + 20_000 for path in shards)
        assert_same_weights(source, load_model(tmp_path, dtype=torch.float32))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"} | kept
    assert all((tmp_path / name).read_text() == "kept" for name in kept)


def test_an_interrupted_save_leaves_the_old_checkpoint(
    directory: Path, saved: tuple[GlmForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("indexshare.model.weights.save_file", full_disk)
    with pytest.raises(CheckpointError, match="no space left"):
        save_model(make_model(), directory)
    assert_same_weights(saved[0], load_model(directory, dtype=torch.float32))
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]


def test_a_save_interrupted_between_files_is_not_loaded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, moves = os.replace, []

    def replace_once(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == 2:
            raise OSError("power cut")
        genuine(source, target)

    monkeypatch.setattr("indexshare.model.weights.os.replace", replace_once)
    with pytest.raises(CheckpointError, match="power cut"):
        save_model(make_model(), directory, max_shard_bytes=100_000)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_model(directory)


def test_saving_below_a_file_is_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        save_model(make_model(), directory / "config.json" / "x")


def test_fp8_is_widened(directory: Path) -> None:
    expected: dict[str, Tensor] = {}

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            if tensor.dim() == 2 and "_proj" in name and "weights_proj" not in name:
                quantized = quantize_block(tensor)
                tensors[name], tensors[name + "_scale_inv"] = quantized.data, quantized.scales
                expected[name] = quantized.dequantize(torch.bfloat16)

    edit(directory, quantize)
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "modules_to_not_convert": ["wrong"]}
    edit_json(directory / "config.json", lambda config: config.update(quantization_config=fp8))
    model, report = load_checkpoint(directory, quant="none")
    assert set(report.widened_fp8) == expected.keys()
    assert model.config.quantization is None
    experts = "model.layers.1.mlp.experts."
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.3.eh_proj.weight"):
        assert torch.equal(model.get_parameter(name), expected[name])
    gate, up = (expected[f"{experts}1.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(model.get_parameter(experts + "gate_up_proj")[1], torch.cat((gate, up)))
    save_model(model, directory)  # what was widened is saved as it is now
    assert_same_weights(model, load_model(directory))


def test_an_index_pattern_skips_and_reports_indexers(directory: Path) -> None:
    model, report = load_checkpoint(directory, index_pattern="FSS", dtype=torch.float32)
    assert model.config.indexer_types == ("full", "shared", "shared")
    assert len(report.skipped_indexers) == 5
    assert all(name.startswith("model.layers.1.self_attn.indexer.") for name in report.skipped_indexers)
    with pytest.raises(CheckpointError, match=r"lacks 5 tensors .*layers\.2\.self_attn\.indexer"):
        load_model(directory, index_pattern="FFF")
    edit_json(directory / "config.json", lambda config: config.update(indexer_types=["full", "shared", "shared"]))
    with pytest.raises(CheckpointError, match=r"5 tensors .*without a place"):
        load_model(directory)


def test_a_checkpoint_without_its_mtp_layer_loads_without(directory: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    model, report = load_checkpoint(edit(directory, drop))
    assert report.mtp_absent
    assert model.config.num_nextn_predict_layers == 0
    assert len(model.model.layers) == 3


def test_a_config_replaces_the_file(directory: Path, saved: tuple[GlmForCausalLM, Path]) -> None:
    config = replace(saved[0].config, latent_norm_eps=1e-6)
    assert load_model(directory, config=config).config.latent_norm_eps == 1e-6
    assert load_model(directory, latent_norm_eps=1e-6).config.latent_norm_eps == 1e-6
    with pytest.raises(ConfigError, match="not both"):
        load_model(directory, config=config, index_pattern="FFF")


def test_tied_embeddings_share_one_tensor(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    save_model(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(tmp_path, dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_weights(model, loaded)


def test_the_cache_of_the_hub_is_read(directory: Path, tmp_path: Path, saved: tuple[GlmForCausalLM, Path]) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(directory.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert_same_weights(saved[0], load_model(snapshot, dtype=torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def test_missing_tensors_are_counted_and_listed(directory: Path) -> None:
    edit(directory, lambda tensors: [tensors.pop(name) for name in sorted(tensors)[4:12]])
    with pytest.raises(CheckpointError, match=r"lacks 8 tensors \(model\.layers.*, \.\.\.\)"):
        load_model(directory)


def test_unexpected_tensors_are_refused_or_reported(directory: Path) -> None:
    edit(directory, lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"1 tensor \(model\.extra\.weight\) without a place"):
        load_model(directory)
    _, report = load_checkpoint(directory, strict=False)
    assert report.skipped_unexpected == ("model.extra.weight",)


def test_unknown_config_keys_are_refused_or_warned_of(directory: Path) -> None:
    edit_json(directory / "config.json", lambda config: config.update(mystery=1))
    with pytest.raises(ConfigError, match="mystery"):
        load_model(directory)
    with pytest.warns(UserWarning, match="mystery"):
        load_model(directory, strict=False)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (NORM, torch.ones(63), r"has shape \[63\]; config.json asks for \[64\]"),
        (NORM, torch.ones(64, 1), r"has shape \[64, 1\]"),
        (NORM, torch.ones(64, dtype=torch.int32), "int32; weights must be"),
        (NORM, torch.ones(64, dtype=torch.float64), "float64; weights must be"),
        (NORM, torch.ones(64).to(torch.float8_e4m3fn), "matrices in F8_E4M3"),
        ("lm_head.weight", torch.ones(256, 64).to(torch.float8_e5m2), "float8_e5m2; weights must be"),
        ("lm_head.weight", torch.ones(256, 64).to(torch.float8_e4m3fn), "needs a _scale_inv sibling.*found none"),
        ("lm_head.weight_scale_inv", torch.ones(2, 1), "without a place"),
    ],
)
def test_wrong_tensors_are_refused(directory: Path, name: str, tensor: Tensor, message: str) -> None:
    edit(directory, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(CheckpointError, match=message):
        load_model(directory)


@pytest.mark.parametrize("scale", [torch.ones(1, 1), torch.ones(2, 1).bfloat16(), torch.ones(2)])
def test_wrong_scales_are_refused(directory: Path, scale: Tensor) -> None:
    changes = {"lm_head.weight": torch.ones(256, 64).to(torch.float8_e4m3fn), "lm_head.weight_scale_inv": scale}
    edit(directory, lambda tensors: tensors.update(changes))
    with pytest.raises(CheckpointError, match=r"float32 \[2, 1\]"):
        load_model(directory)


def test_a_truncated_file_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    for size in (path.stat().st_size - 1, 5000, 8, 7, 0):
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match="truncated"):
            load_model(directory)


def test_weights_that_do_not_fit_are_refused_with_the_numbers(
    directory: Path, saved: tuple[GlmForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(tensor.nbytes for tensor in saved[0].state_dict().values())
    monkeypatch.setattr("indexshare.runtime.available_memory_bytes", lambda device: needed)
    load_model(directory, dtype=torch.float32)
    monkeypatch.setattr("indexshare.runtime.available_memory_bytes", lambda device: needed - 1)
    message = f"need {needed:,} bytes as float32, but only {needed - 1:,} bytes are available on cpu.*indexshare plan"
    with pytest.raises(MemoryLimitError, match=message):
        load_model(directory, dtype=torch.float32)
    load_model(directory, dtype=torch.bfloat16)
    assert load_model(directory, dtype=torch.float32, device="meta").lm_head.weight.is_meta  # takes no memory


def test_every_check_comes_before_any_data(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object) -> None:
        raise AssertionError("data was read or allocated before the plan was complete")

    edit(directory, lambda tensors: tensors.update({"zzz": torch.ones(1)}))
    monkeypatch.setattr("indexshare.model.safetensors_header.StoredTensor.read_into", forbidden)
    monkeypatch.setattr("indexshare.model.placement.Placement.allocate", forbidden)
    with pytest.raises(CheckpointError, match="zzz"):
        load_model(directory)


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation_internal"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_names_code_is_refused(directory: Path, key: str, nested: bool) -> None:
    evil: dict[str, object] = {key: {"AutoConfig": "evil.EvilConfig"}}
    edit_json(directory / "config.json", lambda config: config.update({"a": [{"b": evil}]} if nested else evil))
    (directory / "evil.py").write_text("raise SystemExit('executed')")
    for arguments in ({}, {"config": tiny()}, {"strict": False}):
        with pytest.raises(CheckpointError, match=f"{key}, which names code"):
            load_model(directory, **arguments)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "x.pkl"])
def test_pickles_are_never_opened(directory: Path, name: str) -> None:
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match=f"pickles \\({name}\\)"):
        load_model(directory)


def test_absent_files_are_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        load_model(tmp_path / "absent")
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_model(directory)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_model(directory)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 100_000, '{"a": NaN}', "\x00"])
def test_malformed_configs_are_refused(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 2**40},
        {"n_routed_experts": 2**62},
        {"vocab_size": 10**18},
        {"num_hidden_layers": 10**9, "indexer_types": None, "mlp_layer_types": None, "index_topk_pattern": None},
    ],
)
def test_absurd_sizes_are_refused_before_a_model_is_built(directory: Path, changes: dict[str, object]) -> None:
    edit_json(directory / "config.json", lambda config: config.update(changes))
    with pytest.raises(CheckpointError, match=r"config\.json (describes|has)"):
        load_model(directory)


def test_an_unknown_dtype_is_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not torch\.int8"):
        load_model(directory, dtype=torch.int8)


# ---------------------------------------------------------------------------------------------------------------------
# shards and links


@pytest.fixture
def sharded(tmp_path: Path, saved: tuple[GlmForCausalLM, Path]) -> Path:
    save_model(saved[0], tmp_path / "sharded", max_shard_bytes=400_000)
    return tmp_path / "sharded"


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "",
        "..\\model.safetensors",
        "a\x00.safetensors",
        "\ud800.safetensors",
        "model.bin",
        "config.json/../x.safetensors",
        "a" * 5000 + ".safetensors",
    ],
)
def test_shards_outside_of_the_directory_are_refused(sharded: Path, name: str) -> None:
    save_file({NORM: torch.ones(64)}, sharded.parent / "model.safetensors")
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({NORM: name}))
    with pytest.raises(CheckpointError, match="is not the plain name of a"):
        load_model(sharded)


def test_links_out_of_the_directory_are_refused(sharded: Path, directory: Path) -> None:
    for root, name in ((sharded, "model-00001-of-00003.safetensors"), (directory, "model.safetensors")):
        outside = (root / name).rename(root.parent / f"outside-{name}")
        (root / name).symlink_to(outside)
        with pytest.raises(CheckpointError, match="link to a file outside"):
            load_model(root)
        (root / name).unlink()
        (root / name).symlink_to(name)  # a link to itself
        with pytest.raises(CheckpointError, match="missing or not a regular file"):
            load_model(root)
        (root / name).unlink()
        os.mkfifo(root / name)
        with pytest.raises(CheckpointError, match="missing or not a regular file"):
            load_model(root)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded: Path) -> None:
    genuine = (sharded / INDEX).read_text()
    moves: list[tuple[Callable[[dict[str, object]], object], str]] = [
        (lambda index: index.pop("weight_map"), "needs a weight_map"),
        (lambda index: index.update(weight_map=[]), "needs a weight_map"),
        (lambda index: index["weight_map"].update({NORM: 5}), "needs a weight_map"),
        (lambda index: index["weight_map"].pop(NORM), "which model.safetensors.index.json places in None"),
        (lambda index: index["weight_map"].update({NORM: "model-00001-of-00003.safetensors"}), "places in"),
        (lambda index: index["weight_map"].update({"extra": "model-00001-of-00003.safetensors"}), "first 'extra'"),
        (lambda index: index["weight_map"].update({NORM: "absent.safetensors"}), "is missing"),
    ]
    for change, message in moves:
        (sharded / INDEX).write_text(genuine)
        edit_json(sharded / INDEX, change)
        with pytest.raises(CheckpointError, match=message):
            load_model(sharded)


def test_two_kinds_of_weights_are_refused(sharded: Path, directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", sharded)
    with pytest.raises(CheckpointError, match="remove the stale one"):
        load_model(sharded)


@settings(max_examples=40)
@given(data=st.data())
def test_damage_loads_or_is_refused(saved: tuple[GlmForCausalLM, Path], data: st.DataObject) -> None:
    """Bits flipped in the header of the weights or in config.json; the data is left alone."""
    damaged = saved[1].with_name("damaged")
    damaged.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        content = bytearray((saved[1] / name).read_bytes())
        end = 8 + int.from_bytes(content[:8], "little") if name == "model.safetensors" else len(content)
        for _ in range(data.draw(st.integers(0, 2))):
            content[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
        (damaged / name).write_bytes(content)
    try:
        model = load_model(damaged, dtype=torch.float32)
    except IndexShareError:
        return
    assert all(not parameter.isnan().any() for parameter in model.parameters())
