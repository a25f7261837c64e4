import contextlib
import random
import sqlite3
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

from spectra import HessianOperator
from spectra.errors import DataError
from spectra.objective import reading
from spectra.objective.losses import supervised
from spectra.objective.reading import Reader, is_slow
from tests.cases.networks import tanh_mlp, wine

LOSS = supervised(nn.CrossEntropyLoss())
MAIN = threading.main_thread().ident


class Batches:
    """Batches, with the threads that asked for them."""

    def __init__(self, draw=lambda: 0.0, fail=lambda place: None):
        x, y = wine(torch.float64)
        self.batches = list(zip(x.split(30), y.split(30), strict=True))
        self.draw, self.fail = draw, fail
        self.threads = []

    def __iter__(self):
        for place, (x, y) in enumerate(self.batches):
            self.threads.append(threading.get_ident())
            self.fail(place)
            yield x + self.draw(), y


@pytest.fixture
def _always_slow(monkeypatch):
    monkeypatch.setattr(reading, "is_slow", lambda *_: True)


def operator(data, **options):
    torch.manual_seed(0)
    return HessianOperator(tanh_mlp(), LOSS, data, graph="fresh", **options)


def passes(data, count=3, **options):
    H = operator(data, **options)
    v = torch.ones(H.shape[0], dtype=torch.float64)
    return H, [H.apply(v) for _ in range(count)]


def left():
    return [t for t in threading.enumerate() if t.name.startswith("spectra-reading")]


@pytest.mark.usefixtures("_always_slow")
def test_the_next_batch_is_read_in_a_thread_after_two_passes():
    data = Batches()
    H, products = passes(data)
    count = len(data.batches)
    assert set(data.threads[: 2 * count + 1]) == {MAIN}
    assert MAIN not in data.threads[2 * count + 1 : 3 * count]
    assert H.describe()["data_read"] == "ahead, in a thread"
    _, (expected, *_) = passes(data.batches)
    for product in products:
        assert torch.equal(product, expected)
    assert not left()


@pytest.mark.usefixtures("_always_slow")
@pytest.mark.parametrize("own", [False, True])
def test_shuffled_loaders_give_the_same_batches_ahead(own):
    x, y = wine(torch.float64)

    def loader():
        generator = torch.Generator().manual_seed(3) if own else None
        return DataLoader(
            TensorDataset(x, y), 30, shuffle=True, drop_last=True, generator=generator
        )

    H, products = passes(loader(), 4)
    assert "data_read" in H.describe()
    H._oracle.objective._reader.ahead = False
    v = torch.ones(H.shape[0], dtype=torch.float64)
    for product in products:
        assert torch.equal(product, H.apply(v))


@pytest.mark.usefixtures("_always_slow")
@pytest.mark.parametrize(
    "draw",
    [
        lambda: 0.01 * torch.rand(()).double(),
        lambda: 0.01 * random.random(),
        lambda: 0.01 * np.random.rand(),  # noqa: NPY002 - as augmentations do
    ],
)
def test_loaders_that_draw_for_every_batch_are_read_in_turn(draw):
    data = Batches(draw)
    H = operator(data)
    for _ in range(2):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        try:
            H.apply(torch.ones(H.shape[0], dtype=torch.float64))
        except DataError as error:
            # Of NumPy and Python the state at the beginning of a pass is the caller's.
            assert "in an earlier pass" in str(error)  # noqa: PT017
    assert H._oracle.objective._reader.ahead is False
    assert set(data.threads) == {MAIN}


def test_lists_and_loaders_with_workers_are_left_alone():
    x, y = wine(torch.float64)
    assert Reader([(x, y)]).ahead is False
    assert Reader(DataLoader(TensorDataset(x, y), 30, num_workers=1)).ahead is False
    assert Reader(DataLoader(TensorDataset(x, y), 30)).ahead is None


def test_what_is_slow():
    assert is_slow(reading=1.0, whole=10.0, count=100)
    assert not is_slow(reading=0.1, whole=10.0, count=10)
    assert not is_slow(reading=0.05, whole=0.06, count=100)


def test_loaders_that_are_quick_are_read_in_turn(monkeypatch):
    asked = []
    monkeypatch.setattr(reading, "is_slow", lambda *numbers: asked.append(numbers) or False)
    data = Batches()
    H, _ = passes(data)
    assert set(data.threads) == {MAIN}
    assert "data_read" not in H.describe()
    ((seconds, whole, count),) = asked
    assert 0 < seconds < whole
    assert count == len(data.batches)


class Table(Dataset):
    """Samples in a database whose connection only the thread that opened it may use."""

    def __init__(self):
        self.x, self.y = wine(torch.float64)
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("CREATE TABLE samples (place INTEGER)")
        self.connection.executemany(
            "INSERT INTO samples VALUES (?)", [(i,) for i in range(len(self.x))]
        )

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        query = "SELECT place FROM samples WHERE place = ?"
        (place,) = self.connection.execute(query, (i,)).fetchone()
        return self.x[place], self.y[place]


@pytest.mark.usefixtures("_always_slow")
@pytest.mark.parametrize("shuffle", [False, True])
def test_what_cannot_be_read_from_another_thread_is_read_in_this_one(shuffle):
    H, products = passes(DataLoader(Table(), 30, shuffle=shuffle), 4)
    assert H._oracle.objective._reader.ahead is False
    for product in products:
        assert torch.equal(product, products[0])
    assert not left()


@pytest.mark.usefixtures("_always_slow")
def test_an_error_of_the_loader_comes_in_its_turn_with_its_number():
    broken = []

    def fail(place):
        if broken and place == 3:
            raise OSError("the disk is gone")

    data = Batches(fail=fail)
    H, _ = passes(data)
    broken.append(True)
    v = torch.ones(H.shape[0], dtype=torch.float64)
    with pytest.raises(DataError, match="reading batch 3 of the data raised OSError: the disk"):
        H.apply(v)
    assert not left()
    broken.clear()
    _, (expected, *_) = passes(data.batches)
    assert torch.equal(H.apply(v), expected)


@pytest.mark.usefixtures("_always_slow")
def test_the_thread_ends_where_a_pass_is_given_up():
    seen = []

    def loss(model, batch):
        seen.append(1)
        if len(seen) == 3 * 6 + 2:
            raise KeyboardInterrupt
        return LOSS(model, batch)

    data = Batches()
    assert len(data.batches) == 6
    H = HessianOperator(tanh_mlp(), loss, data, graph="fresh")
    v = torch.ones(H.shape[0], dtype=torch.float64)
    first, second, third = (H.apply(v) for _ in range(3))
    with pytest.raises(KeyboardInterrupt):
        H.apply(v)
    assert not left()
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert torch.equal(H.apply(v), first)


@pytest.mark.usefixtures("_always_slow")
def test_batches_are_made_on_the_default_device_of_the_caller():
    devices = []

    class Made:
        def __iter__(self):
            for batch in Batches().batches:
                devices.append((threading.get_ident(), str(torch.empty(0).device)))
                yield batch

    reader = Reader(Made())
    for _ in range(2):
        list(reader.batches())
    with torch.device("meta"):
        list(reader.batches())
    assert {device for ident, device in devices if ident != MAIN} == {"meta"}


@contextlib.contextmanager
def torch_seeded(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def numpy_seeded(seed):
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    yield
    np.random.set_state(state)  # noqa: NPY002


@contextlib.contextmanager
def python_seeded(seed):
    state = random.getstate()
    random.seed(seed)
    yield
    random.setstate(state)


@pytest.mark.usefixtures("_always_slow")
@pytest.mark.parametrize("seeded", [torch_seeded, numpy_seeded, python_seeded])
def test_loaders_that_seed_a_global_generator_and_put_it_back_are_read_in_turn(seeded):
    draws = {
        torch_seeded: lambda: float(torch.rand(())),
        numpy_seeded: np.random.rand,
        python_seeded: random.random,
    }

    def draw():
        with seeded(7):
            return 0.01 * draws[seeded]()

    data = Batches(draw)
    functions = np.random.seed, np.random.set_state
    H, products = passes(data, 4)
    assert H._oracle.objective._reader.ahead is False
    assert set(data.threads) == {MAIN}
    for product in products:
        assert torch.equal(product, products[0])
    assert (np.random.seed, np.random.set_state) == functions
    assert sys.getprofile() is None


@pytest.mark.usefixtures("_always_slow")
def test_generators_of_the_loaders_own_do_not_keep_it_from_being_read_ahead():
    def draw():
        own = torch.Generator().manual_seed(1)
        return float(torch.rand((), generator=own)) + random.Random(1).random()

    reader = Reader(Batches(draw))
    for _ in range(2):
        list(reader.batches())
    assert reader.ahead is True


@pytest.mark.usefixtures("_always_slow")
def test_a_profiler_of_the_callers_is_left_in_place_and_the_decision_waits():
    def profile(*_):
        pass

    reader = Reader(Batches())
    list(reader.batches())
    sys.setprofile(profile)
    try:
        list(reader.batches())
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert reader.ahead is None
    list(reader.batches())
    assert reader.ahead is True


class Encoded(Batches):
    """Batches that a network has made, in the settings that surround their reading."""

    def __iter__(self):
        torch.manual_seed(1)
        encoder = nn.Linear(self.batches[0][0].shape[1], 4)
        for x, y in super().__iter__():
            yield encoder(x.float()), y


@pytest.mark.usefixtures("_always_slow")
@pytest.mark.parametrize("enabled", [False, True])
def test_batches_are_made_with_gradients_where_the_caller_has_them(enabled):
    data = Encoded()
    reader = Reader(data)
    with torch.set_grad_enabled(enabled):
        for _ in range(2):
            list(reader.batches())
        batches = list(reader.batches())
    assert set(data.threads) != {MAIN}
    assert {x.requires_grad for x, _ in batches} == {enabled}


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("_always_slow")
@pytest.mark.parametrize(
    "surrounding",
    [lambda: torch.autocast("cpu", dtype=torch.bfloat16), Watching, Dispatching],
)
def test_within_settings_that_a_thread_cannot_have_batches_are_read_in_turn(surrounding):
    data = Encoded()
    reader = Reader(data)
    for _ in range(2):
        list(reader.batches())
    assert reader.ahead is True
    with surrounding():
        expected = [x for x, _ in Encoded()]
        batches = list(reader.batches())
    assert set(data.threads) == {MAIN}
    for (x, _), other in zip(batches, expected, strict=True):
        assert torch.equal(x, other)
    list(reader.batches())
    assert set(data.threads) != {MAIN}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.usefixtures("_always_slow")
def test_loaders_that_draw_on_the_gpu_are_read_in_turn():
    reader = Reader(Batches(lambda: float(torch.rand((), device="cuda"))))
    for _ in range(2):
        list(reader.batches())
    assert reader.ahead is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.usefixtures("_always_slow")
def test_batches_are_made_on_the_stream_of_the_caller():
    torch.cuda.init()
    streams = []

    class Made(Batches):
        def __iter__(self):
            for batch in super().__iter__():
                streams.append((threading.get_ident(), torch.cuda.current_stream()))
                yield batch

    reader, stream = Reader(Made()), torch.cuda.Stream()
    for _ in range(2):
        list(reader.batches())
    with torch.cuda.stream(stream):
        list(reader.batches())
    assert {found for ident, found in streams if ident != MAIN} == {stream}
