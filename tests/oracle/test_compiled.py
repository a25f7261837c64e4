import importlib
import shutil
import warnings

import pytest
import torch
from torch import nn

from spectra import HessianOperator, analyze
from spectra.errors import ArgumentError
from spectra.objective.losses import causal_lm, supervised
from spectra.oracle import compiled
from spectra.oracle.compiled import CompiledProduct
from tests.cases.chunks import chunks_of
from tests.cases.networks import StackedGPT, TinyGPT, tanh_mlp, wine

LOSS = supervised(nn.CrossEntropyLoss())

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler"
)


def batches(dtype=torch.float64, size=89):
    x, y = wine(dtype)
    return list(zip(x.split(size), y.split(size), strict=True))


def vector(operator, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(operator.shape[0], generator=g, dtype=torch.float64).to(operator.space.dtype)


@pytest.fixture(autouse=True, scope="module")
def inductor():
    # Importing it warns of PyTorch's own deprecations.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._inductor.compile_fx")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(compiled, "_PATIENCE", 0.0)


@pytest.fixture
def compiled_is_faster(monkeypatch):
    """What is faster depends on the machine; here it is always the compiled product."""
    monkeypatch.setattr(
        compiled, "_seconds", lambda f, vectors: 1.0 if isinstance(f, CompiledProduct) else 2.0
    )


@pytest.fixture
def no_compiler(monkeypatch, compiled_is_faster):
    """The traced function as it is: everything but inductor."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, inputs: module)


# --- right ---------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_products_are_those_of_the_graph(dtype, compiled_is_faster):
    model, data = tanh_mlp().to(dtype), batches(dtype)
    exact = HessianOperator(model, LOSS, data)
    operator = HessianOperator(model, LOSS, data, compile=True)
    for seed in range(3):
        v = vector(operator, seed)
        # The first pass builds the graphs, the second compiles, the third runs what was compiled.
        tolerance = 1e-13 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(operator @ v, exact @ v, rtol=tolerance, atol=tolerance)
    said = operator.describe()["compiled"]
    assert said["parts"] == 2
    assert "refused" not in said
    assert all(graph.product is not None for graph in operator._oracle._graphs._kept.values())


def test_batches_of_one_shape_share_their_code(no_compiler, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx",
        lambda module, inputs: calls.append(module) or module,
    )
    operator = HessianOperator(tanh_mlp(), LOSS, batches(size=60), compile=True)
    for _ in range(3):
        operator @ vector(operator)
    assert operator.describe()["compiled"]["parts"] == 3
    # Batches of 60, 60 and 58.
    assert len(calls) == 2


def test_only_what_depends_on_the_vector_is_left(no_compiler):
    modules = []

    def keep(module, inputs):
        modules.append(module)
        return module

    operator = HessianOperator(tanh_mlp(), LOSS, batches(size=178), compile=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.compile_fx", keep)
        for _ in range(2):
            operator @ vector(operator)
    (flat,) = modules
    count = len(operator.space.names)
    vectors = [node for node in flat.graph.nodes if node.op == "placeholder"][:count]
    dependent = set(vectors)
    for node in flat.graph.nodes:
        assert node.op != "get_attr"
        if node.op == "call_function":
            assert any(n in dependent for n in node.all_input_nodes)
            dependent.add(node)


def test_parameters_without_influence_stay_zero(no_compiler):
    operator = HessianOperator(
        _Partial().double(), lambda model, x: model(x).sum(), [torch.ones(2, dtype=torch.float64)]
    )
    traced = HessianOperator(
        operator.objective.model,
        lambda model, x: model(x).sum(),
        [torch.ones(2, dtype=torch.float64)],
        compile=True,
    )
    for _ in range(3):
        v = vector(traced)
        torch.testing.assert_close(traced @ v, operator @ v)
    assert traced.describe()["compiled"]["parts"] == 1


class _Partial(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.linear = nn.Parameter(torch.tensor([1.0]))
        self.unused = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x):
        return self.used**3 * x + self.linear


def test_trained_weights_get_their_own_products(no_compiler):
    model = tanh_mlp()
    operator = HessianOperator(model, LOSS, batches(), compile=True)
    for _ in range(3):
        operator @ vector(operator)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    for _ in range(3):
        v = vector(operator)
        torch.testing.assert_close(operator @ v, HessianOperator(model, LOSS, batches()) @ v)


# --- not compiled, and why -----------------------------------------------------------------------


def products_and_reasons(operator):
    exact = HessianOperator(operator.objective.model, LOSS, batches())
    for seed in range(3):
        v = vector(operator, seed)
        assert torch.equal(operator @ v, exact @ v)
    said = operator.describe()["compiled"]
    assert said["parts"] == 0
    return said["refused"]


def test_a_compiler_that_fails_is_said_once(monkeypatch):
    def fail(module, inputs):
        msg = "no compiler here\nand more"
        raise OSError(msg)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    operator = HessianOperator(tanh_mlp(), LOSS, batches(), compile=True)
    assert products_and_reasons(operator) == ["OSError: no compiler here"]


def test_wrong_code_is_not_used(monkeypatch, compiled_is_faster):
    def wrong(module, inputs):
        return lambda *inputs: [1.01 * term for term in module(*inputs)]

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", wrong)
    operator = HessianOperator(tanh_mlp(), LOSS, batches(), compile=True)
    assert products_and_reasons(operator) == ["the compiled product is 0.01 off"]


def test_code_that_is_no_faster_is_not_used(monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, inputs: module)
    monkeypatch.setattr(
        compiled, "_seconds", lambda f, vectors: 3.0 if isinstance(f, CompiledProduct) else 2.0
    )
    operator = HessianOperator(tanh_mlp(), LOSS, batches(), compile=True)
    assert products_and_reasons(operator) == ["the compiled product takes 1.50 times as long"]


def test_memory_for_no_graph_leaves_nothing_to_compile():
    model = tanh_mlp()
    operator = HessianOperator(model, LOSS, batches(), compile=True, memory_budget=0)
    exact = HessianOperator(model, LOSS, batches())
    for _ in range(3):
        torch.testing.assert_close(operator @ vector(operator), exact @ vector(exact))
    assert operator.describe()["compiled"] == {"parts": 0, "seconds": 0.0}


def test_results_say_what_was_compiled(no_compiler):
    operator = HessianOperator(tanh_mlp(), LOSS, batches(), compile=True)
    found = analyze(operator, k=2, steps=5, probes=2)
    assert found.eigenpairs.provenance["operator"]["compiled"]["parts"] == 2


def test_short_runs_do_not_compile_and_say_so(no_compiler, monkeypatch):
    monkeypatch.setattr(compiled, "_PATIENCE", 30.0)
    operator = HessianOperator(tanh_mlp(), LOSS, batches(), compile=True)
    for _ in range(3):
        operator @ vector(operator)
    said = operator.describe()["compiled"]
    assert (said["parts"], said["seconds"]) == (0, 0.0)
    assert "compiling begins after 30 s of them" in said["waits"]
    # Two passes over two batches on kept graphs have taken something.
    assert 0 < operator._oracle._compiler._waited < 30
    monkeypatch.setattr(compiled, "_PATIENCE", operator._oracle._compiler._waited)
    operator @ vector(operator)
    assert operator.describe()["compiled"]["parts"] == 2
    assert "waits" not in operator.describe()["compiled"]


def test_compiling_what_is_not_kept_is_refused():
    with pytest.raises(ArgumentError, match="compile=True compiles products on kept graphs"):
        HessianOperator(tanh_mlp(), LOSS, batches(), graph="fresh", compile=True)


def test_a_block_is_compiled_as_the_whole(no_compiler):
    model = tanh_mlp()
    block = HessianOperator(model, LOSS, batches(), compile=True).block("0.*")
    exact = HessianOperator(model, LOSS, batches(), "0.*")
    for _ in range(3):
        torch.testing.assert_close(block @ vector(block), exact @ vector(exact))
    assert block.describe()["compiled"]["parts"] == 2


def test_a_cross_entropy_in_chunks_is_not_compiled(compiled_is_faster):
    model, data = TinyGPT(), [{"input_ids": torch.arange(14).view(2, 7) % 7}]
    with chunks_of(5):
        expected = HessianOperator(model, causal_lm(), data)
        hessian = HessianOperator(model, causal_lm(), data, compile=True)
        for seed in range(3):
            v = vector(hessian, seed)
            assert torch.equal(hessian @ v, expected @ v)
    described = hessian.describe()["compiled"]
    assert described["parts"] == 0
    assert "a cross-entropy in chunks is not compiled" in described["refused"][0]


@pytest.mark.parametrize("options", [{"recompute": "blocks.*"}, {"compute_dtype": torch.float64}])
def test_what_is_recomputed_is_not_compiled(options, compiled_is_faster):
    model = StackedGPT(2).double().eval()
    data = [{"input_ids": torch.arange(14).view(2, 7) % 7}]
    expected = HessianOperator(model, causal_lm(), data, recompute="none")
    hessian = HessianOperator(model, causal_lm(), data, compile=True, **options)
    for seed in range(3):
        v = vector(hessian, seed)
        torch.testing.assert_close(hessian @ v, expected @ v, rtol=1e-10, atol=1e-12)
    described = hessian.describe()["compiled"]
    assert described["parts"] == 0
    assert "is not compiled, because what it computes again" in described["refused"][0]
