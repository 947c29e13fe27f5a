"""What the paper's table measures of one variant: loss, retrieval, several facts, walks, selection, speed."""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
from paper_models import FIRST_SEED, MIXTURE, Plan, Reading, mixture_of

from indexshare.engine.llm import LLM, load
from indexshare.engine.session import Session
from indexshare.eval import documents
from indexshare.eval import measure as measure_module
from indexshare.eval.documents import Document, Library
from indexshare.eval.language import measure_language
from indexshare.eval.measure import Measurement, Variant, measure
from indexshare.eval.retrieval import ANSWER_TOKENS, TALK_TOKENS
from indexshare.model.weights import load_model
from indexshare.share.index_quality import measure_indexers
from indexshare.train import corpus
from indexshare.train.data import PackedBatches
from indexshare.train.episodes import Fact, is_correct
from indexshare.train.words import FIRST_WORDS, SECOND_WORDS

GROUP = 4  # facts of one document that must all be right
HOPS = 3
SHARED_BY = 2  # chains of one document with the same edges; by ten, nano followed none
DECODE_TOKENS = 96  # three times those of the demo, for speed of small models; a session has room for 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How many of how many."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens a second; indexer: its share of the prefill time, None where it was not measured."""

    prefill: float
    decode: float
    indexer: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One variant. nats: a token of held-out files. By length of the documents: retrieval; groups, of GROUP facts all
    right; selected, the needle by some layer when its value is due; speed. walks: of HOPS hops. mass: attention on the
    chosen keys over that on the best choice of as many, mean over layers."""

    pattern: str
    nats: float
    bits_per_byte: float
    retrieval: dict[int, Share]
    groups: dict[int, Share]
    selected: dict[int, Share]
    speed: dict[int, Speed]
    walks: Share
    mass: float | None
    threads: int
    seconds: float
    replies: list[str] = field(default_factory=list)  # of the first document, to look at


def measure_variant(
    plan: Plan,
    seed: int,
    directory: Path,
    *,
    pattern: str | None = None,
    attention: Literal["sparse", "dense"] = "sparse",
) -> Measured:
    """Measure the model in `directory`/model; pattern: other than its own. What it is asked depends on the seed."""
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*index pattern makes their layers shared")
        llm = load(directory / "model", index_pattern=pattern)
    library = Library(directory / "model")
    variant = Variant(name="", llm=llm, attention=attention)
    language = measure_language(llm, paths=corpus.held_out_files()[: plan.held_out_files], attention=attention)
    readings = [each for each in plan.readings if attention == "sparse" or each.num_tokens <= plan.dense_up_to]
    found = {reading.num_tokens: read(variant, library, reading, seed) for reading in readings}
    first = next(iter(found.values()))[0]
    return Measured(
        pattern="".join("F" if llm.config.is_full(layer) else "S" for layer in range(llm.config.num_hidden_layers)),
        nats=language.bits_per_byte * math.log(2) * language.num_bytes / language.num_tokens,
        bits_per_byte=language.bits_per_byte,
        retrieval={length: count(answers(each)) for length, each in found.items()},
        groups={length: count(grouped(each)) for length, each in found.items()},
        selected={length: count(needles(each)) for length, each in found.items() if attention == "sparse"},
        speed={length: speed(each, attention) for length, each in found.items()},
        walks=walk(variant, library, plan, seed),
        mass=None if attention == "dense" else selected_mass(plan, seed, directory, pattern),
        threads=torch.get_num_threads(),
        seconds=time.perf_counter() - begun,
        replies=[answer.reply for answer in first.answers],
    )


def read(variant: Variant, library: Library, reading: Reading, seed: int) -> list[Measurement]:
    """Each document of one length read, a few tokens decoded, its facts asked for."""
    found = []
    for index in range(reading.num_documents):
        rng = np.random.default_rng([FIRST_SEED, seed, reading.num_tokens, index])
        document = library.document(rng, reading.num_tokens - TALK_TOKENS, reading.num_questions)
        with mock.patch.object(measure_module, "DECODE_TOKENS", DECODE_TOKENS):
            found.append(measure(variant, library, document))
    return found


def answers(measurements: Sequence[Measurement]) -> list[bool]:
    """Whether each answer is right."""
    return [answer.is_correct for each in measurements for answer in each.answers]


def grouped(measurements: Sequence[Measurement]) -> list[bool]:
    """Whether all of each GROUP facts of one document are."""
    return [
        all(answer.is_correct for answer in each.answers[begin : begin + GROUP])
        for each in measurements
        for begin in range(0, len(each.answers) - GROUP + 1, GROUP)
    ]


def needles(measurements: Sequence[Measurement]) -> list[bool]:
    """Whether some layer with an indexer had selected the value when it was due."""
    return [any(answer.selected.values()) for each in measurements for answer in each.answers]


def count(outcomes: Sequence[bool]) -> Share:
    return Share(right=sum(outcomes), asked=len(outcomes))


def speed(measurements: Sequence[Measurement], attention: str) -> Speed:
    """Means over documents."""
    shares = [each.indexer_share for each in measurements if each.indexer_share is not None and attention == "sparse"]
    return Speed(
        prefill=float(np.mean([each.prefill_tokens_per_second for each in measurements])),
        decode=float(np.mean([each.decode_tokens_per_second for each in measurements])),
        indexer=float(np.mean(shares)) if shares else None,
    )


def make_chains(rng: np.random.Generator, num_chains: int) -> list[list[Fact]]:
    """Chains of HOPS facts: the value of one is the first word of the next one's subject.

    The second word names the edge; two chains share theirs, so that who has lost the way can end in the other one. No
    first word stands in two places: facts are the edges of a graph, first words its nodes.
    """
    nodes = rng.permutation(len(FIRST_WORDS))[: num_chains * (HOPS + 1)].reshape(num_chains, HOPS + 1)
    edges = rng.permutation(len(SECOND_WORDS))
    return [
        [
            Fact(
                subject=f"{FIRST_WORDS[here]}-{SECOND_WORDS[edges[number // SHARED_BY * HOPS + hop]]}",
                value=FIRST_WORDS[there],
            )
            for hop, (here, there) in enumerate(itertools.pairwise(chain))
        ]
        for number, chain in enumerate(nodes)
    ]


def stated_value(subject: str, reply: str) -> str:
    """What a reply says about a subject; empty when it does not speak of it."""
    _, found, rest = reply.strip().rpartition(f"access code of {subject} is ")
    return rest.removesuffix(".") if found else ""


def walk(variant: Variant, library: Library, plan: Plan, seed: int) -> Share:
    """Walks over chains hidden in documents: each hop starts from the model's own answer to the one before."""
    outcomes: list[bool] = []
    for index in range(plan.walk_documents):
        rng = np.random.default_rng([FIRST_SEED, seed, index])
        chains = make_chains(rng, plan.walks)
        facts = [fact for chain in chains for fact in chain]
        with mock.patch.object(documents, "make_facts", return_value=facts):  # a document makes its own
            document = library.document(rng, plan.compared_at - TALK_TOKENS, len(facts))
        with variant.llm.open_session(plan.compared_at, attention=variant.attention) as session:
            session.prefill(document.token_ids)
            ask = partial(_reply, variant.llm, session, document)
            outcomes += [follow(chain, ask) for chain in chains]
    return count(outcomes)


def _reply(llm: LLM, session: Session, document: Document, subject: str) -> str:
    """The model's words on a subject; the session is left with the document alone."""
    reply = llm.chat(
        document.messages(Fact(subject=subject, value="")),
        enable_thinking=False,
        session=session,
        max_new_tokens=ANSWER_TOKENS,
        temperature=0.0,
    )
    session.truncate(len(document.token_ids))
    return reply.content


def follow(chain: Sequence[Fact], ask: Callable[[str], str]) -> bool:
    """Whether the last answer of a walk along `chain` is right, by the replies of ask(subject).

    A reply about something else ends the walk.
    """
    node, reply = chain[0].subject.partition("-")[0], ""
    for fact in chain:
        subject = f"{node}-{fact.subject.partition('-')[2]}"
        reply = ask(subject)
        node = stated_value(subject, reply)
        if not node:
            return False
    return is_correct(chain[-1], reply)


def selected_mass(plan: Plan, seed: int, directory: Path, pattern: str | None) -> float:
    """Mean over layers, on rows of documents with questions that nothing was trained on, as far as facts go."""
    model = load_model(directory / "model", dtype=torch.float32, index_pattern=pattern)
    data = directory if (directory / "data").is_dir() else directory.parent / "base"
    source = PackedBatches(
        data / "data",
        sequence_length=plan.compared_at,
        batch_size=1,
        seed=FIRST_SEED + 300 + seed,
        mixture=mixture_of(MIXTURE | {"code": 0.0, "retrieval": 1.0, "repeats": 0.0}),
    )
    quality = measure_indexers(model, [source.batch(index) for index in range(plan.mass_rows)], stride=64)
    return float(np.mean([layer.recall for layer in quality.layers]))
