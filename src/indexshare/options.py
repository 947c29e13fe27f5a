"""Options that several commands share, as cyclopts reads them, and loading a model with them.

The docstring under a field is its text in `--help`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from indexshare.errors import ConfigError, IndexShareError, RecipeChangedError
from indexshare.kernels.cache_formats import CacheFormats

if TYPE_CHECKING:
    from indexshare.engine.llm import LLM
    from indexshare.eval.quantization import Quantization

Model = Annotated[str, Parameter(help="A directory, nano, or a hub id.")]
ModelOrRecipe = Annotated[str, Parameter(help="A directory, a hub id, or a recipe: nano, tiny, mid, glm-5.2.")]
File = Annotated[str, Parameter(allow_leading_hyphen=True)]  # - is standard input
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON for a program to read.")]
Dtype = Literal["bfloat16", "float16", "float32"]


class CheckFailedError(IndexShareError):
    """`--check` found a model or an operation that is not to be used."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How caches hold their rows."""

    latent_cache: Literal["int8"] | None = None
    """Hold cached latents in 8 bits; by default they have the precision of the model."""
    index_cache: Literal["int8"] | None = None
    """Hold cached index keys in 8 bits; by default they have the precision of the model."""

    def formats(self) -> CacheFormats:
        """The options as a value."""
        return CacheFormats(latents=self.latent_cache, index_keys=self.index_cache)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How to load a model, but for its caches."""

    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "bfloat16"
    """Precision of weights and caches."""
    index_pattern: str | None = None
    """Full (F) and shared (S) layers, one letter each, in place of the model's own: FFSF..."""
    quant: Literal["int8", "int4", "none"] | None = None
    """Quantise weights while they are read; none widens a quantised checkpoint. By default weights stay as stored."""
    strict: bool = True
    """Refuse unknown keys in config.json; --no-strict warns instead."""
    threads: int | None = None
    """CPU threads; by default all that this process may use."""
    check: Annotated[bool, Parameter(negative="")] = False
    """First check every operation as indexshare doctor does; when one fails, name it and stop with exit code 1."""

    def load(self, model: str) -> LLM:
        """The loaded model; with `check`, only after the doctor. Raises CheckFailedError, and as `engine.llm.load`."""
        from indexshare.engine.llm import load

        arguments = dict(vars(self))
        if arguments.pop("check"):
            self._check(model)
        return load(model, **arguments)

    def _check(self, model: str) -> None:
        from indexshare import runtime
        from indexshare.engine.resolve import resolve_model
        from indexshare.eval.doctor import UnhealthyError, require_healthy

        runtime.set_threads(self.threads)
        try:
            require_healthy(
                resolve_model(model),
                device=self.device,
                dtype=self.dtype,
                index_pattern=self.index_pattern,
                quant=self.quant,
                strict=self.strict,
            )
        except UnhealthyError as error:
            raise CheckFailedError(str(error)) from error


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LoadOptions(ModelOptions, CacheOptions):
    """How to load a model."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How to quantise a model and what to measure."""

    format: Literal["int8", "int4"]
    """int8 has one scale for each output, int4 one for each group of inputs."""
    group: Literal[128, 64, 32] = 128
    """Inputs that share a scale in int4."""
    keep: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    """A shell pattern of tensor names that stay as they are; may be repeated."""
    output: Path | None = None
    """Directory to write, by default MODEL-FORMAT here; nothing is overwritten."""
    report: bool = True
    """Compare both models, which takes memory for both; --no-report only writes."""
    tokens: int | None = None
    """Held-out tokens to compare on; by default all."""
    documents: int = 2
    """Documents of 4,096 and of 16,384 tokens to ask both models about; 0 leaves that out."""
    device: str = "auto"
    """Where to compare: auto, cpu, cuda, ..."""
    threads: int | None = None
    """CPU threads; by default all that this process may use."""

    def quantize(self, model: str) -> Quantization:
        """Write and measure. Raises as `eval.quantization.quantize_model`."""
        from indexshare.eval.quantization import quantize_model
        from indexshare.quant.policy import Policy

        return quantize_model(
            model,
            Policy(format=self.format, group_size=self.group, keep=self.keep),
            output=self.output,
            with_report=self.report,
            max_tokens=self.tokens,
            num_documents=self.documents,
            device=self.device,
            threads=self.threads,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to draw tokens. What is not given is greedy, or in a chat what the model's generation_config.json says."""

    max_new_tokens: int | None = None
    """Stop after this many tokens; by default 64, in a chat 1,024."""
    temperature: float | None = None
    """0 takes the most probable token; the released GLM-5.2 is made for 1.0."""
    top_p: float | None = None
    """Draw from the most probable tokens with this share of the probability."""
    top_k: int | None = None
    """Draw from this many most probable tokens; 0 is all."""
    min_p: float | None = None
    """Leave out tokens less probable than this share of the most probable one."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens of the prompt and the output less likely to come again."""
    presence_penalty: float | None = None
    """Subtracted from the logit of a token that is in the output; -2 to 2."""
    frequency_penalty: float | None = None
    """Subtracted from the logit of a token for each time it is in the output; -2 to 2."""
    seed: int | None = None
    """Seed of the draws; 0 by default, so that the same command gives the same text."""
    stop: Annotated[tuple[str, ...] | None, Parameter(negative="")] = None
    """A text that ends the output; may be repeated."""

    def given(self) -> dict[str, Any]:
        """The options that were given, as keyword arguments of `LLM.generate` and `LLM.chat`."""
        return {name: value for name, value in vars(self).items() if value is not None}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to run a training recipe."""

    output: Path | None = None
    """Directory for data, checkpoints and log; by default runs/ and the recipe's name."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, ..."""
    resume: bool = True
    """Go on from the newest checkpoint; --no-resume refuses a directory that has one."""
    accept_recipe_change: Annotated[bool, Parameter(negative="")] = False
    """Go on from a checkpoint of the same recipe with other numbers."""
    max_minutes: float | None = None
    """Stop after this many minutes of this call."""
    threads: int | None = None
    """CPU threads; by default all that this process may use, under torchrun an equal share."""
    pp: int = 1
    """Of the processes that torchrun started, as many divide the layers (pipeline parallelism)."""
    cp: int = 1
    """As many divide the tokens of the same rows (context parallelism)."""
    ep: int = 1
    """As many divide the experts of each layer (expert parallelism)."""
    show: Annotated[bool, Parameter(negative="")] = False
    """Only print the recipe as JSON, with everything that it leaves open filled in."""

    def train(self, name: str) -> str:
        """Train, and say in a line how it ended; of several processes the main one. Raises as `train.recipes.run`."""
        import msgspec

        from indexshare import runtime
        from indexshare.train.distributed import Mesh, is_main, process_group
        from indexshare.train.recipes import recipe_named, run

        runtime.set_threads(self.threads)
        recipe = recipe_named(name)
        if self.show:
            return msgspec.json.format(msgspec.json.encode(recipe)).decode()
        directory = self.output or Path("runs") / recipe.name
        with process_group(runtime.resolve_device(self.device)) as device:
            try:
                _, result = run(
                    recipe,
                    directory,
                    device=str(device),
                    resume=self.resume,
                    accept_recipe_change=self.accept_recipe_change,
                    max_minutes=self.max_minutes,
                    mesh=Mesh.over_all(pp=self.pp, cp=self.cp, ep=self.ep),
                )
            except RecipeChangedError as error:
                way = "accept the change with --accept-recipe-change (the run is then no longer reproducible)"
                raise ConfigError(f"{error}, or {way}") from error
            if not is_main():
                return ""
        how = "finished" if result.stopped == "finished" else f"stopped ({result.stopped})"
        left = "" if result.stopped == "finished" else "; the same command goes on"
        place = f"step {result.step:,} of {recipe.num_steps:,}, loss {result.lm_loss:.4f}"
        return f"{how} at {place}, model in {directory / 'model'}{left}"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Who may reach the server, and how much it takes on."""

    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs --api-key-file."""
    port: int = 8000
    """Port to listen on."""
    api_key_file: Path | None = None
    """API keys, one a line, as KEY or TENANT:KEY; a file that only its owner can read."""
    allow_host: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    """A host name by which clients reach this server; may be repeated."""
    allow_origin: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    """A web page that may use it, as https://example.org; may be repeated."""
    name: str | None = None
    """What clients call the model; by default the last part of MODEL."""
    cache_tokens: int = 0
    """Tokens in the cache, running and kept; 0 is one full length or 4 GiB, but at most half of the free memory."""
    max_sequences: int = 64
    """Requests that run at once; more wait."""
    max_waiting: int = 256
    """Requests that may wait; more are refused with 429."""
    step_tokens: int = 512
    """Prompt tokens that are read in one step."""
    draft: int | None = None
    """Tokens that the MTP layer guesses ahead at most, fewer where that does not pay; by default 3 if there is one."""
    share_prefixes: Annotated[bool, Parameter(negative="")] = False
    """Let all API keys share cached prefixes; a client can then find out by timing what others have asked."""
    prefix_store: Path | None = None
    """A directory for prefixes that outlive the server; they tell what was asked; indexshare purge removes them."""
    prefix_store_gib: float = 10.0
    """Size of that directory at most."""
    drain_seconds: int = 30
    """How long running replies may go on after SIGTERM."""
    log_format: Literal["text", "json"] = "text"
    """How the log on standard error is written."""

    def serve(self, model: str, load: LoadOptions) -> None:
        """Serve until a signal ends it. Raises ConfigError for unsafe settings, and as `engine.llm.load`."""
        with requires("server"):
            from indexshare import runtime
            from indexshare.engine.engine import EngineOptions
            from indexshare.engine.resolve import resolve_config
            from indexshare.engine.scheduler import Limits
            from indexshare.server.app import ServerSettings
            from indexshare.server.logs import configure_logging
            from indexshare.server.security import load_api_keys
            from indexshare.server.serve import serve_model

        settings = ServerSettings(
            host=self.host,
            port=self.port,
            api_keys=load_api_keys(self.api_key_file) if self.api_key_file is not None else {},
            allowed_hosts=self.allow_host,
            allowed_origins=self.allow_origin,
            drain_seconds=self.drain_seconds,
        )
        limits = Limits(
            max_sequences=self.max_sequences, max_waiting=self.max_waiting, max_step_tokens=self.step_tokens
        )
        options = EngineOptions(
            limits=limits,
            cache_tokens=self.cache_tokens,
            num_drafts=self.draft,
            prefix_store=self.prefix_store,
            prefix_store_bytes=int(self.prefix_store_gib * 2**30),
        )
        configure_logging(self.log_format)
        # What is plainly wrong is an error at once, not after the port is open.
        runtime.resolve_device(load.device)
        resolve_config(model, index_pattern=load.index_pattern, strict=load.strict)
        name = self.name or model.rstrip("/").rpartition("/")[2]
        serve_model(
            lambda: load.load(model),
            options,
            settings,
            model_names=tuple(dict.fromkeys((name, model))),
            shares_prefixes=self.share_prefixes,
        )


@contextmanager
def requires(extra: str) -> Generator[None]:
    """Imports of an extra's packages: a missing one becomes a ConfigError that names what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "indexshare":
            raise
        raise ConfigError(f"{error.name} is missing: run pip install 'indexshare[{extra}]'") from error


DEFAULT_CACHE = CacheOptions()
DEFAULT_LOAD = LoadOptions()
DEFAULT_MODEL = ModelOptions()
DEFAULT_SAMPLING = SamplingOptions()
DEFAULT_SERVE = ServeOptions()
DEFAULT_TRAIN = TrainOptions()
