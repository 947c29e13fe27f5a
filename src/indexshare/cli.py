"""The command line: thin functions over the package, which is imported only when a command runs."""

from __future__ import annotations

import collections
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from indexshare import __version__, runtime
from indexshare.errors import IndexShareError, RequestError
from indexshare.options import (
    DEFAULT_LOAD,
    DEFAULT_SAMPLING,
    DEFAULT_SERVE,
    DEFAULT_TRAIN,
    AsJson,
    CheckFailedError,
    Dtype,
    File,
    LoadOptions,
    Model,
    ModelOrRecipe,
    QuantizeOptions,
    SamplingOptions,
    ServeOptions,
    TrainOptions,
)

EXIT_FAILED, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130
DEFAULT_LENGTHS = (4096, 16_384, 65_536, 131_072)

app = App(
    name="indexshare",
    help="GLM-5.2 with IndexShare sparse attention: run it, look into it, train it, check it.",
    help_epilogue=(
        "MODEL is a directory, nano (the model in this package), or a hub id such as zai-org/GLM-5.2.\n\n"
        "Environment: INDEXSHARE_DEVICE is what --device auto means, INDEXSHARE_THREADS how many CPU threads run, "
        "INDEXSHARE_WORKSPACE_MIB the MiB of temporary buffers (256), INDEXSHARE_ISA the C++ kernels' instruction set "
        "(avx512, avx2, scalar), INDEXSHARE_CACHE where they are kept.\n\n"
        "Start with: indexshare demo"
    ),
    help_format="plaintext",
    version=__version__,
    suppress_keyboard_interrupt=False,  # `run` says so and chooses the exit code
)


@app.command(
    help_epilogue="Examples:\n\n"
    '    indexshare generate nano --prompt "def read_lines(path):"\n'
    "    cat report.txt | indexshare generate nano --prompt-file -"
)
def generate(
    model: Model,
    /,
    *,
    prompt: str | None = None,
    prompt_file: File | None = None,
    draft: int = 0,
    logprobs: int | None = None,
    as_json: AsJson = False,
    sampling: SamplingOptions = DEFAULT_SAMPLING,
    load: LoadOptions = DEFAULT_LOAD,
) -> None:
    """Continue a text; the completion is streamed to standard output.

    Args:
        prompt: The text to continue.
        prompt_file: A file with the text to continue; - is standard input.
        draft: Tokens that the MTP layer guesses for each pass of the model; greedy text stays the same.
        logprobs: With --json, the log-probability of each token and of this many most probable ones, 0 to 20.
    """
    if (prompt is None) == (prompt_file is None):
        number = "one of them" if prompt is None else "only one of them"
        raise RequestError(f"give the text as --prompt TEXT or as --prompt-file FILE, {number}")
    if logprobs is not None and not as_json:
        raise RequestError("--logprobs is part of the JSON answer: add --json")
    from indexshare.terminal import print_json, progress_bar, read_text, write_stream

    text = prompt if prompt_file is None else read_text(prompt_file)
    assert text is not None
    llm = load.load(model)
    options: dict[str, Any] = {**sampling.given(), "logprobs": logprobs}
    with (
        progress_bar("reading") as progress,
        llm.generate(text, stream=True, num_draft_tokens=draft, progress=progress, **options) as pieces,
    ):
        if as_json:
            collections.deque(pieces, maxlen=0)  # read to the end
            print_json(pieces.completion)
        else:
            write_stream(pieces)


@app.command(help_epilogue="Example:\n\n    indexshare chat nano")
def chat(
    model: Model,
    /,
    *,
    system: str | None = None,
    effort: Literal["high", "max", "off"] = "max",
    context: int = 16_384,
    sampling: SamplingOptions = DEFAULT_SAMPLING,
    load: LoadOptions = DEFAULT_LOAD,
) -> None:
    """Talk with a model. /reset forgets, /save FILE writes the conversation, /effort high|max|off, /quit ends.

    Args:
        system: A system message.
        effort: How much the model reasons before it answers.
        context: Tokens of conversation to keep room for.
    """
    from indexshare.terminal import Conversation

    llm = load.load(model)
    with llm.open_session(context) as session:
        Conversation(llm, session, system=system, effort=effort, sampling=sampling.given(), context=context).run()


@app.command(
    help_epilogue="Example:\n\n"
    "    echo '[5, 17, 301, 12]' > tokens.json\n"
    "    indexshare score nano --tokens tokens.json --json --dtype float32"
)
def score(
    model: Model,
    /,
    *,
    tokens: File,
    as_json: AsJson = False,
    load: LoadOptions = DEFAULT_LOAD,
) -> None:
    """Log-probability of each token of a given sequence after the tokens before it.

    Args:
        tokens: A file with a JSON array of T token ids; - is standard input. T-1 numbers come out.
    """
    from indexshare.terminal import print_json, progress_bar, read_token_ids

    token_ids = read_token_ids(tokens)
    llm = load.load(model)
    with progress_bar("reading") as progress:
        logprobs = [float(value) for value in llm.logprobs(token_ids, progress=progress)]
    if as_json:
        print_json(logprobs)
        return
    for position, (token, logprob) in enumerate(zip(token_ids[1:], logprobs, strict=True), start=1):
        print(f"{position:>9}  {token:>7}  {logprob:12.6f}")
    print(f"mean {sum(logprobs) / len(logprobs):.6f} nats over {len(logprobs):,} tokens")


@app.command(help_epilogue="Examples:\n\n    indexshare inspect glm-5.2\n    indexshare inspect nano --json")
def inspect(
    model: ModelOrRecipe,
    /,
    *,
    index_pattern: str | None = None,
    strict: bool = True,
    as_json: AsJson = False,
) -> None:
    """Layers, parameters, cache bytes and work per token of a model, from its configuration alone.

    Args:
        index_pattern: Full (F) and shared (S) layers in place of the model's own.
        strict: Refuse unknown keys in config.json; --no-strict warns instead.
    """
    from indexshare.engine.resolve import resolve_config
    from indexshare.model.inspect import inspect_model, render
    from indexshare.terminal import show

    inspection = inspect_model(resolve_config(model, index_pattern=index_pattern, strict=strict), model)
    show(inspection, render(inspection), as_json)


@app.command(help_epilogue="Examples:\n\n    indexshare kernels\n    indexshare kernels --device cpu --json")
def kernels(*, device: str | None = None, as_json: AsJson = False) -> None:
    """Which implementation of each operation runs on which device, and why.

    Args:
        device: A device of this machine such as cpu or cuda; by default all kinds that it has.
    """
    from indexshare.kernels.registry import describe
    from indexshare.model import native
    from indexshare.runtime import resolve_device
    from indexshare.terminal import show, table

    kinds = (resolve_device(name).type for name in ((device,) if device else ("cpu", "auto")))
    devices = tuple(dict.fromkeys(kinds))
    if "cpu" in devices:
        native.enable()
    choices = describe(devices)
    rows = [(choice.operation, choice.device, choice.twin, choice.reason) for choice in choices]
    show(choices, table(("operation", "device", "runs", "because"), rows), as_json)


@app.command(
    help_epilogue="Example:\n\n    indexshare quantize nano --format int4 --keep lm_head.weight --output small"
)
def quantize(model: Model, /, *, options: QuantizeOptions, as_json: AsJson = False) -> None:
    """Write a copy of a model with smaller weights, and measure what that cost.

    Experts and projections become int8 or int4; embeddings, norms, routers and kv_b_proj stay, the head and the MTP
    layer become int8. The copy is in the compressed-tensors layout, with sizes and quality in quantization.json.
    """
    from indexshare.eval.quantization import render
    from indexshare.terminal import show

    result = options.quantize(model)
    show(result, render(result), as_json)


@app.command(
    help_epilogue="Examples:\n\n"
    "    indexshare train tiny --output runs/tiny --max-minutes 1\n"
    "    indexshare train chats.toml --output runs/chats\n"
    "    torchrun --nproc-per-node 2 -m indexshare train text.toml"
)
def train(
    recipe: Annotated[
        str,
        Parameter(
            help="A recipe file in TOML, or tiny (a minute), nano (two hours), nano-long and nano-longest (after it)."
        ),
    ],
    /,
    *,
    options: TrainOptions = DEFAULT_TRAIN,
) -> None:
    """Train a model; a run that was stopped goes on where it was, with the same numbers."""
    if outcome := options.train(recipe):
        print(outcome)


@app.command(
    help_epilogue="Examples:\n\n"
    "    indexshare serve\n"
    "    indexshare serve zai-org/GLM-5.2-FP8 --host 0.0.0.0 --api-key-file keys.txt"
)
def serve(model: Model = "nano", /, *, options: ServeOptions = DEFAULT_SERVE, load: LoadOptions = DEFAULT_LOAD) -> None:
    """Serve a model to OpenAI and Anthropic clients, with a page to talk to it at http://127.0.0.1:8000/."""
    options.serve(model, load)


@app.command(help_epilogue="Example:\n\n    indexshare purge prefixes")
def purge(directory: Path, /) -> None:
    """Remove the cached prefixes that `serve --prefix-store DIRECTORY` has left, and nothing else."""
    from indexshare.engine.prefix_store import purge as remove

    print(f"{remove(directory):,} pages removed")


@app.command(help_epilogue="Examples:\n\n    indexshare doctor nano\n    indexshare doctor nano --device cuda --json")
def doctor(model: Model, /, *, device: str = "auto", dtype: Dtype = "bfloat16", as_json: AsJson = False) -> int:
    """Check the operations of a model on a device against 64-bit arithmetic on the CPU; exit code 1 when one fails.

    Args:
        device: The device to check: auto, cpu, cuda, ...
        dtype: Precision of weights and cache to check.
    """
    from indexshare.engine.resolve import resolve_model
    from indexshare.eval.doctor import diagnose, render
    from indexshare.terminal import show

    report = diagnose(resolve_model(model), device=device, dtype=dtype)
    show(report, render(report), as_json)
    return 0 if report.ok else EXIT_FAILED


@app.command(name="eval", help_epilogue="Example:\n\n    indexshare eval nano --lengths 4096 16384 --questions 100")
def evaluate(
    model: Model,
    /,
    *,
    lengths: Annotated[list[int] | None, Parameter(consume_multiple=True, negative="")] = None,
    questions: int = 100,
    dense_up_to: int = 16_384,
    seed: int = 0,
    as_json: AsJson = False,
    load: LoadOptions = DEFAULT_LOAD,
) -> None:
    """Exact retrieval through the chat template at several lengths, and bits per byte of held-out modules.

    Args:
        lengths: Document lengths in tokens; by default 4096 16384 65536 131072.
        questions: Questions for each length.
        dense_up_to: Longest document that is also read with attention to all keys, which grows with its square.
        seed: Of documents, facts and depths.
    """
    from indexshare.eval.evaluation import evaluate_model, render
    from indexshare.terminal import show

    llm = load.load(model)
    evaluation = evaluate_model(
        llm, lengths=lengths or DEFAULT_LENGTHS, num_questions=questions, dense_up_to=dense_up_to, seed=seed
    )
    show(evaluation, render(evaluation), as_json)


@app.command(help_epilogue="Examples:\n\n    indexshare demo\n    indexshare demo --tokens 65536 --html demo.html")
def demo(
    model: Model = "nano",
    /,
    *,
    tokens: int = 131_072,
    questions: int = 5,
    seed: int = 0,
    html: Path | None = None,
    pictures: Path | None = None,
    as_json: AsJson = False,
    load: LoadOptions = DEFAULT_LOAD,
) -> None:
    """Read a long document made of this machine's Python library once, ask about it, and compare the attentions.

    Args:
        tokens: Length of the document, up to 1,048,576 tokens.
        questions: Facts to hide and to ask for.
        seed: Of the document, the facts and their depths.
        html: Also write the result as one page with pictures.
        pictures: Also write the pictures time.svg and needles.svg into this directory.
    """
    from indexshare.eval.demo import run_demo
    from indexshare.eval.report import render
    from indexshare.terminal import show

    llm = load.load(model)
    result = run_demo(
        llm,
        num_tokens=tokens,
        num_questions=questions,
        html=html,
        pictures=pictures,
        seed=seed,
        on_stderr=as_json,
    )
    show(result, render(result), as_json)


app.command("indexshare.commands.data:app", name="data", help="From files to tokens that training reads.")
app.command("indexshare.commands.plan:app", name="plan", help="Does a model fit, to run it or to train it.")
app.command("indexshare.commands.share:app", name="share", help="Which layers may share an indexer's choice.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check failed, 2 an error (one line), 130 interrupted."""
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGINT, runtime.interrupt)
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        result = app(arguments, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return EXIT_ERROR  # cyclopts has printed what is wrong with the arguments
    except IndexShareError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED if isinstance(error, CheckFailedError) else EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader of our output has gone; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return result if isinstance(result, int) else 0


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object, **more: object
) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
