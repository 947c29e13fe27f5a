"""llama.cpp from the llama-cpp-python source package: found in the cache directory, or fetched and built there.

As a program (`llama_build.py LLAMA_CPP MODEL_DIRECTORY FILE.gguf f32|bf16`) it runs llama.cpp's convert_hf_to_gguf.py.
A random checkpoint has no tokenizer, and engines get token ids; its llama-server wants one all the same: what
serving_model.py puts beside the weights.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Sequence
from pathlib import Path

VERSION = "0.3.36"
PACKAGE = f"llama_cpp_python-{VERSION}"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TOOLS = ("scikit-build-core", "cmake", "ninja")  # the first one lets pip read the package's metadata
FLAGS = (
    *("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_CURL=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF"),
)
SERVER_FLAGS = (
    *("-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"),  # its page would be fetched
    "-DLLAMA_OPENSSL=OFF",
)
GGUF_TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_K_M"}
"""Our formats and llama.cpp's of the same width."""


def cache_directory() -> Path:
    """INDEXSHARE_PEERS, or a directory in the user's cache."""
    default = Path.home() / ".cache" / "indexshare" / "peers"
    return Path(os.environ.get("INDEXSHARE_PEERS", default)).resolve()


def source_directory() -> Path:
    return cache_directory() / PACKAGE


def library_directory() -> Path:
    return cache_directory() / f"build-{VERSION}" / "bin"


def ensure_built() -> None:
    """Fetch, check, unpack and build what is not there yet: a few minutes, once."""
    if (library_directory() / "llama-quantize").is_file():
        return
    cache = cache_directory()
    _say(f"llama.cpp is not in {cache}: fetching and building it, once")
    tools = _ensure_tools()
    archive = cache / f"{PACKAGE}.tar.gz"
    if not archive.is_file():
        options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python")
        _run(tools / "bin" / "pip", "download", *options, "--dest", cache, f"llama-cpp-python=={VERSION}")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{archive} is not the file this benchmark was written for: remove it and start again")
    if not source_directory().is_dir():
        with tarfile.open(archive) as package:
            package.extractall(cache, filter="data")
    _build(tools, FLAGS, "llama", "llama-quantize")


def server_program() -> Path:
    return library_directory() / "llama-server"


def ensure_server_built() -> Path:
    """llama.cpp's own HTTP server, built from the same source into the same directory; its path."""
    if not server_program().is_file():
        ensure_built()
        _say("building llama-server, once")
        _build(_ensure_tools(), (*FLAGS, *SERVER_FLAGS), "llama-server")
    return server_program()


def _ensure_tools() -> Path:
    """The environment with cmake and ninja."""
    tools = cache_directory() / "tools"
    if not (tools / "bin" / "ninja").is_file():
        tools.mkdir(parents=True, exist_ok=True)
        venv.create(tools, with_pip=True)
        _run(tools / "bin" / "pip", "install", "--quiet", *TOOLS)
    return tools


def _build(tools: Path, flags: Sequence[str], *targets: str) -> None:
    build, source = library_directory().parent, source_directory() / "vendor" / "llama.cpp"
    environment = os.environ | {"PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    _run(tools / "bin" / "cmake", "-S", source, "-B", build, *flags, environment=environment)
    _run(tools / "bin" / "cmake", "--build", build, "--target", *targets, environment=environment)


def ensure_gguf(checkpoint: Path, gguf_type: str) -> Path:
    """The checkpoint as a GGUF file beside it: F32 and BF16 by the converter, others quantised from BF16."""
    target = checkpoint.parent / f"{checkpoint.name}-{gguf_type}.gguf"
    if target.is_file():
        return target
    partial = target.with_suffix(".partial")
    if gguf_type in ("F32", "BF16"):
        source = source_directory() / "vendor" / "llama.cpp"
        _run(sys.executable, __file__, source, checkpoint, partial, gguf_type.lower())
    else:
        _run(library_directory() / "llama-quantize", ensure_gguf(checkpoint, "BF16"), partial, gguf_type)
    partial.rename(target)
    return target


def describe() -> dict[str, str]:
    """What was built, and by which compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or "unknown"
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return {
        "llama.cpp": f"vendored in llama-cpp-python {VERSION}, {' '.join(FLAGS[2:5])}",
        "compiler": answer.partition("\n")[0],
    }


def _run(*command: str | Path, environment: dict[str, str] | None = None) -> None:
    """Run quietly; say what went wrong."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{(done.stdout + done.stderr)[-3000:]}")


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _convert(source: str, checkpoint: str, target: str, output_type: str) -> None:
    sys.path.insert(0, source)
    import convert_hf_to_gguf
    from conversion.glm import GlmMoeDsaModel

    if (Path(checkpoint) / "tokenizer.json").is_file():
        # Its table knows tokenizers by what they make of a text. Only ids are sent, so that any answer will do.
        GlmMoeDsaModel.get_vocab_base_pre = lambda self, tokenizer: "glm4"
        GlmMoeDsaModel.set_vocab = GlmMoeDsaModel._set_vocab_gpt2  # the family's own wants its control tokens
    else:
        GlmMoeDsaModel.set_vocab = GlmMoeDsaModel._set_vocab_none
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", target, "--outtype", output_type]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    _convert(*sys.argv[1:5])
