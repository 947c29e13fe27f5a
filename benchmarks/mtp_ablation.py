"""How many drafts are accepted after each way to train and run the MTP layer: the rows of GLM-5.2's ablation on nano.

    python benchmarks/mtp_ablation.py /tmp/mtp                     # three short runs, then measures; repeats resume
    python benchmarks/mtp_ablation.py /tmp/look --steps 4 --prompts 2

All runs start from the shipped model, train its MTP layer alone, see the same batches and take as many steps:

    single    cross-entropy of the first draft only, as layers for one step are trained
    multi     cross-entropy of TRAINED_STEPS drafts under shared keys and selection
    tv        the first half as multi, the second maximises the expected accepted length

and are measured as in the published table. Drafts of the rows without rejection sampling are the likeliest tokens,
kept with probability p(token). The row without sharing gives later drafts keys of their own and lets them run the
indexer, which the engine does not do: `OwnKeysSession` below does it for this table.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import indexshare
from indexshare.engine.cache import PagedCache, num_pages_for
from indexshare.engine.llm import LLM
from indexshare.engine.sampler import Sampler, SamplingParams, draw
from indexshare.engine.speculative import DraftStatistics, SpeculativeSession
from indexshare.eval.progress import bar
from indexshare.model.weights import load_checkpoint
from indexshare.train.data import load_shard, prepare
from indexshare.train.episodes import Episode, make_retrieval, render_episode
from indexshare.train.export import export_model
from indexshare.train.loop import train
from indexshare.train.phases import Phase, TrainRecipe
from indexshare.train.recipes import phase_batches, phase_loss
from indexshare.train.tokenizer import TextEncoder
from indexshare.train.tool_episodes import make_tool_call

NANO = Path(indexshare.__file__).parent / "models" / "nano"
NUM_DRAFTS, TRAINED_STEPS = 7, 5
LENGTHS = (3, 5, 7)  # drafts for one forward pass
CODE_PROMPT, CODE_TOKENS, CHAT_TOKENS = 200, 96, 64
PUBLISHED = {"baseline": 4.56, "+ shared keys and selection": 5.10, "+ rejection sampling": 5.29, "+ TV loss": 5.47}


class GreedyDrafts(SpeculativeSession):
    """Proposes the likeliest tokens whatever the sampling: a draft stays with probability p(token)."""

    def _draft(self, token_id: int, sampler: Sampler, num_draft_tokens: int) -> tuple[list[int], Tensor]:
        return super()._draft(token_id, Sampler(SamplingParams(temperature=0.0)), num_draft_tokens)


class OwnKeysSession(SpeculativeSession):
    """Without sharing, as before GLM-5.2: each draft writes keys of its own and the next one selects anew.

    Verified tokens overwrite those keys before the next round, as they do in any engine.
    """

    @torch.inference_mode()
    def _draft(self, token_id: int, sampler: Sampler, num_draft_tokens: int) -> tuple[list[int], Tensor]:
        hidden, _ = self._write(self._waiting_hidden(), (token_id,))
        self._waiting, self._waiting_from = self._nothing, self.context_length
        draft_ids: list[int] = []
        rows = torch.zeros(num_draft_tokens, self._model.config.vocab_size, dtype=torch.float64)
        for step in range(num_draft_tokens):
            if step > 0:
                batch = self._batch(draft_ids[-1:], self.context_length - 1 + step)
                hidden, _ = self._model.mtp(hidden, batch.token_ids, batch)
            rows[step, int(self._logits(hidden)[0].argmax())] = 1.0
            draft_ids.append(draw(rows[step], sampler.generator))
        return draft_ids, rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table: the run whose weights it measures, and the session that drafts with them."""

    name: str
    run: str
    session: type[SpeculativeSession]


ROWS = (
    Row(name="as shipped, shared, rejection sampling", run="shipped", session=SpeculativeSession),
    Row(name="baseline", run="single", session=OwnKeysSession),
    Row(name="baseline's weights, shared", run="single", session=GreedyDrafts),
    Row(name="+ shared keys and selection", run="multi", session=GreedyDrafts),
    Row(name="+ rejection sampling", run="multi", session=SpeculativeSession),
    Row(name="+ TV loss", run="tv", session=SpeculativeSession),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Accepted drafts of a row. accepted[j]: share of rounds in which the first j + 1 stayed; spread: standard error of
    the tokens a forward pass gives with NUM_DRAFTS drafts, over prompts."""

    name: str
    kind: str
    temperature: float
    num_rounds: int
    accepted: tuple[float, ...]
    spread: float

    def tokens(self, num_drafts: int) -> float:
        """Tokens for each forward pass of the model: accepted drafts, and the one that it draws itself."""
        return 1.0 + sum(self.accepted[:num_drafts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="runs are kept here; a second call goes on where the first ended")
    parser.add_argument("--data", type=Path, help="shards of an earlier `indexshare train nano` (its data folder)")
    parser.add_argument("--steps", type=int, default=60, help="of each run, 2,048 tokens a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak of Muon; AdamW has half of it")
    parser.add_argument("--prompts", type=int, default=20, help="of code, and as many chats")
    parser.add_argument("--temperatures", default="1.0", help="several with commas")
    options = parser.parse_args()
    data = options.data or options.output / "data"
    if not (data / "held_out.json").is_file():
        prepare(data, tokenizer_directory=NANO)
    models = {"shipped": NANO} | {
        run: trained(run, options.output, data, options.steps, options.rate) for run in ("single", "multi", "tv")
    }
    prompts = held_out_prompts(data, options.prompts)
    results = []
    for row in ROWS:
        llm = indexshare.load(models[row.run], threads=torch.get_num_threads())
        for temperature in map(float, options.temperatures.split(",")):
            for kind, asked in prompts.items():
                results.append(measure(row, llm, kind, asked, temperature))
    (options.output / "results.json").write_text(json.dumps([asdict(each) for each in results], indent=1) + "\n")
    report(results)


def recipe_of(run: str, steps: int, rate: float) -> TrainRecipe:
    """The recipe of a run: the same data, steps and rates for all."""

    def phase(name: str, num_steps: int, mtp_num_steps: int, objective: str) -> Phase:
        return Phase(
            name=name,
            num_steps=num_steps,
            attention="sparse",
            trains="mtp",
            mtp_loss_weight=1.0,
            mtp_num_steps=mtp_num_steps,
            mtp_objective=objective,
            index_loss_weight=1.0,
            index_stride=32,
            index_target="visible",
            sequence_length=1024,
            batch_size=2,
        )

    phases = {
        "single": (phase("single", steps, 1, "cross_entropy"),),
        "multi": (phase("multi", steps, TRAINED_STEPS, "cross_entropy"),),
        "tv": (
            phase("multi", steps // 2, TRAINED_STEPS, "cross_entropy"),
            phase("tv", steps - steps // 2, TRAINED_STEPS, "acceptance"),
        ),
    }[run]
    model, _ = load_checkpoint(NANO, dtype=torch.float32)
    return TrainRecipe(
        name=f"mtp-{run}",
        model=model.config,
        phases=phases,
        seed=7,
        learning_rate_muon=rate,
        learning_rate_adamw=rate / 2,
        warmup_steps=min(10, steps // 2),
        min_lr_ratio=0.1,
        bias_update_rate=0.0,
        precision="bf16",
        checkpoint_every=40,
        log_every=5,
        data={"code": 0.5, "retrieval": 0.2, "repeats": 0.0, "position_skips": 0.0, "max_position": 131_072},
    )


def trained(run: str, output: Path, data: Path, steps: int, rate: float) -> Path:
    """The directory of a run's model, trained now if it is not there."""
    directory = output / run / "model"
    if directory.is_dir():
        return directory
    recipe = recipe_of(run, steps, rate)
    model, _ = load_checkpoint(NANO, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("e_score_correction_bias"))
    # All phases take the batches of one seed: the second phase of `tv` those that `multi` sees at these steps.
    batches = phase_batches(recipe_of("single", steps, rate), data)
    result = train(recipe, output / run, model=model, batches=batches, step_loss=phase_loss())
    if result.stopped != "finished":
        raise SystemExit(f"{run} stopped at step {result.step}: start again to go on")
    print(f"{run}: {result.step} steps in {result.seconds:.0f} s")
    return export_model(model, data, directory)


def held_out_prompts(data: Path, count: int) -> dict[str, list[list[int]]]:
    """Token ids of the beginnings of held-out files, and of chats that no training row holds, up to the reply."""
    encoder = TextEncoder(data)
    files = [file for file in load_shard(data, "held_out", encoder) if len(file.token_ids) > CODE_PROMPT]
    rng = np.random.default_rng([20_260, 11])
    code = []
    for index in range(count):
        tokens = files[index % len(files)].token_ids
        begin = 0 if index < len(files) else int(rng.integers(0, len(tokens) - CODE_PROMPT))
        code.append(tokens[begin : begin + CODE_PROMPT].tolist())
    chats = []
    for index in range(count):
        episode: Episode = make_tool_call(rng) if index % 2 else make_retrieval(rng, files, encoder, 700)
        token_ids, _ = render_episode(episode, encoder)
        role = int(np.flatnonzero(token_ids == encoder.special["<|assistant|>"])[0])
        end = role + 2  # <think>, and where it does not think, </think>
        chats.append(token_ids[: end + int(token_ids[end] == encoder.special["</think>"])].tolist())
    return {"code": code, "chats": chats}


def measure(row: Row, llm: LLM, kind: str, prompts: list[list[int]], temperature: float) -> Measured:
    """Drafts of a row over all prompts, NUM_DRAFTS a round."""
    most = CODE_TOKENS if kind == "code" else CHAT_TOKENS
    stop_ids = llm.stop_ids if kind == "code" else llm.chat_stop_ids
    totals: list[DraftStatistics] = []
    with bar(f"{row.name}, {kind}", "prompts") as advance:
        for index, prompt in enumerate(prompts):
            num_pages = num_pages_for(len(prompt) + most + NUM_DRAFTS, 64)
            cache = PagedCache(llm.config, num_pages=num_pages, page_size=64, dtype=llm.dtype, device=llm.device)
            session = row.session(llm.model, cache, num_draft_tokens=NUM_DRAFTS)
            params = SamplingParams(max_new_tokens=most, temperature=temperature, seed=index)
            for _ in session.stream(prompt, params, stop_ids=stop_ids):
                pass
            totals.append(session.statistics)
            advance(index + 1, len(prompts))
    rounds = [each for each in totals if each.drafted]
    # The last round of a reply drafts fewer: a position counts the rounds that reached it.
    drafted = [sum(each.drafted[j] for each in rounds if j < len(each.drafted)) for j in range(NUM_DRAFTS)]
    accepted = [sum(each.accepted[j] for each in rounds if j < len(each.accepted)) for j in range(NUM_DRAFTS)]
    means = torch.tensor([sum(each.accepted) / each.drafted[0] for each in rounds])
    return Measured(
        name=row.name,
        kind=kind,
        temperature=temperature,
        num_rounds=drafted[0],
        accepted=tuple(stayed / max(1, tried) for stayed, tried in zip(accepted, drafted, strict=True)),
        spread=float(means.std()) / math.sqrt(max(1, len(means))),
    )


def report(results: list[Measured]) -> None:
    """Tokens a forward pass gives, and the share of rounds in which the first j drafts stayed."""
    table = Table(
        "weights and drafting", "what", "temperature", *(f"{n} drafts" for n in LENGTHS), "±", "kept 1, 2, ..."
    )
    for each in results:
        table.add_row(
            each.name,
            each.kind,
            f"{each.temperature:g}",
            *(f"{each.tokens(n):.2f}" for n in LENGTHS),
            f"{each.spread:.2f}",
            " ".join(f"{share:.2f}" for share in each.accepted),
        )
    Console(width=160).print(table)
    published = ", ".join(f"{name} {value}" for name, value in PUBLISHED.items())
    print(f"Published for GLM-5.1's backbone on coding, 7 steps (GLM-5.2 blog): {published}")


if __name__ == "__main__":
    main()
