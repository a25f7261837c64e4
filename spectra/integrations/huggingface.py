"""What is the loss of a Hugging Face language model on a text? Read from local files only."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectra.errors import ArgumentError, TargetError
from spectra.objective import losses

__all__ = ["causal_lm"]

# Characters read for every token that is wanted. English has about four to a token; text of which
# 64 characters make less than one token is not language.
_CHARACTERS_PER_TOKEN = 64
_OWN_LOSS = (
    "To analyse it with a loss of your own, give a TARGET: a function that returns "
    "(model, loss, data)"
)


def causal_lm(
    model_dir: str | Path,
    text_path: str | Path,
    *,
    tokens_per_sequence: int = 128,
    sequences_per_batch: int = 4,
    max_tokens: int = 2048,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, losses.CausalLM, list[dict[str, Tensor]]]:
    """A causal language model and a text: model, loss and data to analyse.

    Nothing is downloaded, no pickle is read and no code from the checkpoint is run.

    Parameters
    ----------
    model_dir
        A directory with `config.json`, `*.safetensors` and the tokenizer's files, as
        `save_pretrained` writes it; or with one GGUF file; or that file itself.
    text_path
        Plain text in UTF-8.
    tokens_per_sequence
        The text is cut into sequences of this length, without overlap. Each begins with the
        beginning-of-sequence token where the tokenizer puts one before a text. A shorter last
        sequence is padded, and the padding does not count.
    sequences_per_batch
        Sequences in a batch: memory, not the result, depends on it.
    max_tokens
        Most tokens of the text to use, from its beginning.
    dtype, device
        Of the model.

    Returns
    -------
    tuple
        `(model, loss, data)` as `HessianOperator` takes them: the model in evaluation mode,
        `losses.causal_lm()`, and batches with `input_ids` and `attention_mask`.

    Raises
    ------
    TargetError
        A file or package is missing, or the checkpoint is not one of a causal language model.
    ArgumentError
        A length is impossible for this model.
    """
    if tokens_per_sequence < 2 or sequences_per_batch < 1 or max_tokens < 2:
        msg = (
            f"tokens_per_sequence={tokens_per_sequence}, sequences_per_batch={sequences_per_batch},"
            f" max_tokens={max_tokens}; expected at least 2, 1 and 2"
        )
        raise ArgumentError(msg)
    directory, options = _locate(Path(model_dir))
    text = _read(Path(text_path), _CHARACTERS_PER_TOKEN * max_tokens)
    _require_packages(gguf="gguf_file" in options)
    start, tokens = _tokenize(directory, options, text)
    sequences = _cut(start, tokens[:max_tokens], tokens_per_sequence)
    if not sequences:
        msg = f"{str(text_path)!r} holds {len(tokens)} tokens; a prediction takes at least 2"
        raise TargetError(msg)
    model = _load(directory, options, dtype)
    _check_fits(model, directory, sequences)
    _check_causal(model, directory, sequences[0])
    data = [
        _batch(sequences[i : i + sequences_per_batch])
        for i in range(0, len(sequences), sequences_per_batch)
    ]
    return _moved(model, device), losses.causal_lm(), data


def _locate(path: Path) -> tuple[Path, dict[str, str]]:
    """The directory to load from, and the options that name a GGUF file in it."""
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name}
    if not path.is_dir():
        msg = (
            f"no model directory {str(path)!r}. Nothing is downloaded here; get one first, for "
            "example with: hf download ORGANISATION/MODEL --local-dir DIRECTORY"
        )
        raise TargetError(msg)
    configured = (path / "config.json").is_file()
    if configured and any(path.glob("*.safetensors")):
        return path, {}
    packed = sorted(file.name for file in path.glob("*.gguf"))
    if len(packed) == 1:
        return path, {"gguf_file": packed[0]}
    if packed:
        msg = (
            f"{str(path)!r} holds {len(packed)} GGUF files ({', '.join(packed)}); name one of "
            f"them, such as {str(path / packed[0])!r}"
        )
    elif not configured:
        msg = f"{str(path)!r} holds neither a config.json nor a GGUF file, so no model"
    elif any([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]):
        msg = (
            f"{str(path)!r} holds its weights only as a pickle, which can run code when it is "
            "read; convert them to safetensors where you trust them, with model.save_pretrained()"
        )
    else:
        msg = f"{str(path)!r} holds a config.json but no weights (*.safetensors or *.gguf)"
    raise TargetError(msg)


def _read(path: Path, characters: int) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(characters)
    except UnicodeDecodeError as error:
        msg = f"{str(path)!r} is not text in UTF-8: {error}"
        raise TargetError(msg) from error
    except OSError as error:
        msg = f"cannot read the text {str(path)!r}: {error.strerror}"
        raise TargetError(msg) from error
    if not text.strip():
        msg = f"the text {str(path)!r} is empty; give one with at least a sentence"
        raise TargetError(msg)
    return text


def _require_packages(*, gguf: bool) -> None:
    needed = ["transformers", *(["gguf", "accelerate"] if gguf else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        what = "a GGUF file" if gguf else "a Hugging Face model"
        msg = f"{what} needs {' and '.join(missing)}: pip install 'hessian-spectra[hf]'"
        raise TargetError(msg)


def _tokenize(directory: Path, options: dict[str, str], text: str) -> tuple[list[int], list[int]]:
    """The token that begins every sequence, if any, and the tokens of the text."""
    import transformers

    try:
        with _quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(directory), **options, local_files_only=True, trust_remote_code=False
            )
            first: list[int] = tokenizer("a")["input_ids"][:1]
            # verbose: a text longer than the model's context is what is cut up here.
            encoded = tokenizer(text, add_special_tokens=False, verbose=False)
            tokens: list[int] = encoded["input_ids"]
    except Exception as error:
        msg = f"no tokenizer could be loaded from {str(directory)!r}: {_in_short(error)}"
        raise TargetError(msg) from error
    if not tokens:
        # Where no file of a tokenizer is found, transformers makes one that knows nothing.
        msg = (
            f"the tokenizer in {str(directory)!r} makes no tokens of the text; its files, such as "
            "tokenizer.json, are probably missing"
        )
        raise TargetError(msg)
    return (first if first == [tokenizer.bos_token_id] else []), tokens


def _load(directory: Path, options: dict[str, str], dtype: torch.dtype) -> nn.Module:
    import transformers

    try:
        with _quiet_transformers():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(directory),
                **options,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=dtype,
                output_loading_info=True,
            )
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            msg = f"{str(directory)!r} holds a model without a causal language-modelling loss. "
            raise TargetError(msg + _OWN_LOSS) from error
        msg = f"transformers could not load {str(directory)!r}: {_in_short(error)}"
        raise TargetError(msg) from error
    if missing := sorted(info["missing_keys"]):
        # transformers fills the gaps with random numbers, whose Hessian nobody asked for.
        msg = (
            f"the checkpoint in {str(directory)!r} has no language-modelling head, so no loss (or "
            f"is not whole): {type(model).__name__} has {len(missing)} weights that are not in it, "
            f"such as {missing[0]}. {_OWN_LOSS}"
        )
        raise TargetError(msg)
    network: nn.Module = model.eval()
    return network


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # Its progress bars appear in pipes too. What matters comes as exceptions and loading info.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _cut(start: list[int], tokens: list[int], length: int) -> list[list[int]]:
    step = length - len(start)
    sequences = [start + tokens[i : i + step] for i in range(0, len(tokens), step)]
    # One token alone predicts nothing.
    return [sequence for sequence in sequences if len(sequence) > 1]


def _check_fits(model: Any, directory: Path, sequences: list[list[int]]) -> None:
    longest = max(map(len, sequences))
    context = getattr(model.config, "max_position_embeddings", None)
    if isinstance(context, int) and longest > context:
        msg = (
            f"sequences of {longest} tokens are longer than the {context} that the model in "
            f"{str(directory)!r} takes; cut the text into shorter ones"
        )
        raise ArgumentError(msg)
    vocabulary = len(model.get_input_embeddings().weight)
    largest = max(map(max, sequences))
    if largest >= vocabulary:
        msg = (
            f"the tokenizer in {str(directory)!r} made token {largest}, but the model has only "
            f"{vocabulary}: they do not belong together"
        )
        raise TargetError(msg)


def _check_causal(model: Any, directory: Path, sequence: list[int]) -> None:
    """A masked language model loads as well, but sees the tokens that it is to predict."""
    tokens = torch.tensor([sequence[:8]])
    changed = tokens.clone()
    changed[0, 1:] = (changed[0, 1:] + 1) % len(model.get_input_embeddings().weight)
    with torch.no_grad():
        before, after = (model(input_ids=t).logits[0, 0] for t in (tokens, changed))
    # Rounding may depend on the other tokens, in a mixture of experts for one.
    rounding = 32 * torch.finfo(before.dtype).eps * before.abs().max()
    if bool((after - before).abs().max() > rounding):
        msg = (
            f"the model in {str(directory)!r} is not causal: what it predicts depends on later "
            f"tokens, as in a masked language model. {_OWN_LOSS}"
        )
        raise TargetError(msg)


def _batch(sequences: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, sequences))
    tokens = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def _moved(model: nn.Module, device: str | torch.device) -> nn.Module:
    try:
        return model.to(device)
    # PyTorch built without a back end raises AssertionError.
    except (RuntimeError, AssertionError) as error:
        msg = f"the model cannot be moved to device {str(device)!r}: {_in_short(error)}"
        raise TargetError(msg) from error


def _in_short(error: Exception) -> str:
    """Kind and first words of an exception, on one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}{'…' if len(words) > 300 else ''}"
