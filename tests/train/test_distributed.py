"""Training on several processes (gloo) is training on one: losses, checkpoints, signals."""

import json
import os
import socket
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train.distributed_run import run

from indexshare.errors import ConfigError
from indexshare.model.recipes import glm_5_2, tiny
from indexshare.train.distributed import Mesh
from indexshare.train.pipeline import check_stages, choose_stages
from indexshare.train.plan import CLUSTERS, make_train_plan

PROGRAM = Path(__file__).with_name("distributed_run.py")
SOURCES = Path(__file__).parents[2] / "src"
TOLERANCE = 1e-5
LOSSES = ("loss", "lm", "mtp", "index_kl")
NUM_STEPS = 8
MESHES: dict[str, dict[str, int]] = {"dp": {}, "ep": {"ep": 2}, "cp": {"cp": 2}, "pp": {"pp": 2}}


def run_ranks(num_ranks: int, jobs: list[dict[str, Any]], seconds: float = 300) -> None:
    """What torchrun does, without a process of its own: ranks find each other through the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    python_path = os.pathsep.join((str(SOURCES), os.environ.get("PYTHONPATH", "")))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(jobs, default=str)],
            env={**os.environ, **common, "PYTHONPATH": python_path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert not any(process.returncode for process in ranks), "\n".join(errors)


def read_log(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def assert_same_run(directory: Path, reference: Path) -> None:
    found, expected = read_log(directory), read_log(reference)
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    assert [record["tokens"] for record in found] == [record["tokens"] for record in expected]
    for record, wanted in zip(found, expected, strict=True):
        for name in LOSSES:
            assert abs(record[name] - wanted[name]) < TOLERANCE, (record["step"], name, record[name], wanted[name])
        assert record["expert_imbalance"] == wanted["expert_imbalance"]
        # the mean over ranks, whose rows have about as many drafts each
        assert record["mtp_acceptance"] == pytest.approx(wanted["mtp_acceptance"], abs=2e-3)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one")
    run({"output": directory, "num_steps": NUM_STEPS})
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two processes: sharded, with experts, tokens or layers apart, stopped by a signal, stopped halfway."""
    directory = tmp_path_factory.mktemp("two")
    jobs: list[dict[str, Any]] = [
        {"output": directory / "dp", "meta": True},
        {"output": directory / "ep", "ep": 2},
        {"output": directory / "cp", "cp": 2, "recompute": True},
        {"output": directory / "pp", "pp": 2, "meta": True, "recompute": True},
        {"output": directory / "signal", "signal": 2},
        {"output": directory / "nan", "ep": 2, "nan": 3},
        {"output": directory / "nan-pp", "pp": 2, "nan": 3},
        {"output": directory / "update", "update": 4},
        {"output": directory / "half", "ep": 2, "max_steps": NUM_STEPS // 2},
        {"output": directory / "half-pp", "pp": 2, "max_steps": NUM_STEPS // 2},
        *({"output": directory / f"refused-{what}", "nan": 0, "refused": what} for what in ("state", "mark", "shards")),
    ]
    jobs += [
        {"output": directory / f"count-{name}-{again}", "num_steps": 1, "count": True, "recompute": again, **mesh}
        for name, mesh in MESHES.items()
        for again in (False, True)
    ]
    run_ranks(2, [{"num_steps": NUM_STEPS, **job} for job in jobs])
    return directory


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_have_the_losses_of_one(two: Path, one: Path, mesh: str) -> None:
    assert_same_run(two / mesh, one)
    found, expected = load_file(two / mesh / "whole"), load_file(one / "whole")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=TOLERANCE, rtol=0.0)


def test_each_rank_holds_half_of_the_parameters(two: Path, one: Path) -> None:
    shards = [json.loads((two / "dp" / f"rank-{rank}.json").read_text())["shard_numbers"] for rank in range(2)]
    checkpoint = next((one / "checkpoints").glob("step-*8"))
    weights = load_file(checkpoint / "model.safetensors")
    total = sum(weight.numel() for name, weight in weights.items() if "e_score_correction_bias" not in name)
    assert sum(shards) == total
    assert max(shards) < 0.51 * total


def test_a_signal_to_one_rank_stops_all_after_the_same_step(two: Path) -> None:
    reports = [json.loads((two / "signal" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [(report["stopped"], report["step"]) for report in reports] == [("signal", 3)] * 2
    assert (two / "signal" / "checkpoints" / "step-00000003" / "state.json").is_file()


@pytest.mark.parametrize("name", ["nan", "nan-pp"])
def test_a_fault_on_one_rank_rolls_all_back(two: Path, tmp_path: Path, name: str) -> None:
    with pytest.warns(UserWarning, match="the loss is nan"):
        run({"output": tmp_path, "num_steps": NUM_STEPS, "nan": 3})
    assert [record.get("skipped", "")[:11] for record in read_log(two / name)] == [
        "",
        "",
        "",
        "the loss is",
        "",
        "",
        "",
        "",
    ]
    for record, wanted in zip(read_log(two / name), read_log(tmp_path), strict=True):
        assert record.get("loss", 0.0) == pytest.approx(wanted.get("loss", 0.0), abs=TOLERANCE)


def test_an_update_that_breaks_the_weights_of_one_rank_rolls_all_back(two: Path) -> None:
    records = read_log(two / "update")
    reasons = {record["step"]: record["skipped"] for record in records if "skipped" in record}
    assert reasons == {4: "the update made values that are not finite in the part of another process"}
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    assert all(torch.isfinite(weight).all() for weight in load_file(two / "update" / "whole").values())


@pytest.mark.parametrize("what", ["state", "mark", "shards"])
def test_a_full_disk_of_one_rank_ends_the_run_on_all(two: Path, what: str) -> None:
    errors = [(two / f"refused-{what}" / f"error-{rank}").read_text() for rank in range(2)]
    assert any("no space left" in error for error in errors)
    for error in errors:
        assert "could not be written to" in error
        assert "make room and run again" in error.lower()


@pytest.mark.parametrize("name", ["half", "half-pp"])
def test_saved_on_two_ranks_and_continued_by_one(two: Path, one: Path, name: str) -> None:
    assert len(list((two / name / "checkpoints").glob("step-00000004/shard-*.safetensors"))) == 2
    run({"output": two / name, "num_steps": NUM_STEPS})
    assert_same_run(two / name, one)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MESHES)
def test_the_plan_has_the_bytes_that_are_sent_and_held(two: Path, name: str, recompute: bool) -> None:
    directory = two / f"count-{name}-{recompute}"
    reports = [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(2)]
    config, mesh = tiny(vocab_size=64), Mesh.of(2, **MESHES[name])
    plan = make_train_plan(
        config,
        "tiny",
        mesh,
        CLUSTERS["h100"],
        length=32,
        rows=4 // mesh.num_batches,
        precision="fp32",
        recompute=recompute,
    )
    for collective in ("all-gather", "reduce-scatter", "all-to-all"):
        planned = sum(part.payload_bytes for part in plan.volumes if part.ranks > 1 and collective in part.name)
        counted = sum(report["payloads"].get(collective, 0) for report in reports) / 2
        assert counted == planned, collective
    volumes = {volume.name: volume for volume in plan.volumes}
    for report in reports:
        sent = report["payloads"].get("hidden states", 0) - volumes["PP hidden states"].payload_bytes
        assert 0 <= sent <= volumes["PP embedding for MTP"].payload_bytes
        assert (sent == 0) == (mesh.pp == 1)
    shards = [4 * report["shard_numbers"] for report in reports]
    assert max(shards) == plan.memory["parameters (fp32 shard)"]
    assert min(shards) == max(shards) or mesh.pp > 1


def test_the_plan_of_glm_5_2() -> None:
    plan = make_train_plan(glm_5_2(), "glm-5.2", Mesh.of(512, ep=8), CLUSTERS["h100"], length=4096)
    assert plan.fits
    assert plan.tokens_per_step == 512 * 4096
    assert plan.memory["parameters (fp32 shard)"] == -(-753_329_921_024 // 512) * 4
    # 8 experts a token, 6,144 numbers of 2 bytes, there and back, forward, again and backward, in 76 layers
    volumes = {volume.name: volume for volume in plan.volumes}
    assert volumes["EP all-to-all"].payload_bytes == 4096 * 8 * 6144 * 2 * 6 * 76
    assert volumes["EP all-to-all"].sent_bytes == volumes["EP all-to-all"].payload_bytes * 7 // 8
    assert volumes["CP all-gather"].sent_bytes == 0
    assert not make_train_plan(glm_5_2(), "glm-5.2", Mesh.of(64, ep=8), CLUSTERS["h100"], length=4096).fits


def test_stages_begin_at_full_layers() -> None:
    config = glm_5_2()
    published = (0, 14, 22, 30, 38, 46, 54, 62)  # 14 layers, six times 8, 16: the slime scripts of GLM-5.2
    check_stages(config, published)
    with pytest.raises(ConfigError, match=r"layer 15.*nearest is 14"):
        check_stages(config, (0, 15))
    with pytest.raises(ConfigError, match="ascend"):
        check_stages(config, (3, 6))
    for num_stages in range(1, 22):
        chosen = choose_stages(config, num_stages)
        check_stages(config, chosen)
        assert len(chosen) == num_stages
    lengths = [after - first for first, after in pairwise((*choose_stages(config, 8), 78))]
    assert max(lengths) == 12  # the published cut has a stage of 16
    small = tiny()  # FFSSFS
    for num_stages in (1, 2, 3):
        options = [(0, *rest) for rest in combinations((1, 4), num_stages - 1)]
        best = min(max(after - first for first, after in pairwise((*option, 6))) for option in options)
        found = choose_stages(small, num_stages)
        assert max(after - first for first, after in pairwise((*found, 6))) == best
    with pytest.raises(ConfigError, match="3 full layers"):
        choose_stages(small, 4)


@pytest.mark.timeout(1200)
@pytest.mark.slow  # fifty steps on up to four processes, however few the cores
def test_fifty_steps_on_two_and_four_processes(tmp_path: Path) -> None:
    run({"output": tmp_path / "one", "num_steps": 50})
    meshes = {
        2: MESHES.values(),
        4: ({}, {"ep": 2}, {"cp": 2, "ep": 2}, {"cp": 4}, {"pp": 2}, {"pp": 2, "ep": 2}, {"pp": 2, "cp": 2}),
    }
    for num_ranks, shapes in meshes.items():
        jobs = [
            {"output": tmp_path / f"{num_ranks}-{index}", "num_steps": 50, **shape}
            for index, shape in enumerate(shapes)
        ]
        run_ranks(num_ranks, jobs, seconds=900)
        for job in jobs:
            assert_same_run(job["output"], tmp_path / "one")


@pytest.mark.timeout(600)
@pytest.mark.slow  # four launches of up to four processes
def test_checkpoints_move_between_any_numbers_of_ranks(tmp_path: Path) -> None:
    run({"output": tmp_path / "one", "num_steps": 20})
    for num_ranks, max_steps, mesh in ((4, 6, {"ep": 2}), (2, 11, {"pp": 2}), (1, 16, {}), (4, 20, {"pp": 2, "ep": 2})):
        run_ranks(num_ranks, [{"output": tmp_path / "moved", "num_steps": 20, "max_steps": max_steps, **mesh}])
    assert_same_run(tmp_path / "moved", tmp_path / "one")


def test_a_mesh_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="a multiple of 6 of them with torchrun --nproc-per-node 6 -m indexshare"):
        Mesh.over_all(cp=2, ep=3)
    with pytest.raises(ConfigError, match=r"4 processes do not divide .*: start a multiple of 6"):
        Mesh.of(4, cp=2, ep=3)
    with pytest.raises(ConfigError, match="at least 1, not 1, 0 and 1"):
        Mesh.over_all(cp=0)
