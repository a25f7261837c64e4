import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spectra import ParameterSpace
from spectra.errors import ArgumentError, ArgumentTypeError, ParameterSelectionError
from spectra.objective.parameters import layer_of, select_parameters
from tests.cases.networks import TinyGPT


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.head = nn.Linear(2, 1)
        self.scale = nn.Parameter(torch.ones(()))


def names(params, model=None):
    return list(select_parameters(model or Net(), params))


def refused(params, model=None, match="", kind=ParameterSelectionError):
    with pytest.raises(kind, match=match):
        select_parameters(model or Net(), params)


# --- selection -----------------------------------------------------------------------------------


def test_without_a_selection_all_that_require_a_gradient_are_taken():
    model = Net()
    model.head.weight.requires_grad_(False)
    assert names(None, model) == [n for n, p in model.named_parameters() if p.requires_grad]
    assert "head.weight" not in names(None, model)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("head.*", ["head.weight", "head.bias"]),
        ("*.bias", ["body.0.bias", "body.2.bias", "head.bias"]),
        ("scale", ["scale"]),
        (["head.bias", "body.0.*"], ["body.0.weight", "body.0.bias", "head.bias"]),
        (("scale", "scale", "s*"), ["scale"]),
        (lambda name, p: p.dim() == 2 and "body" in name, ["body.0.weight", "body.2.weight"]),
        ("body.[02].weight", ["body.0.weight", "body.2.weight"]),
    ],
)
def test_globs_lists_and_functions_select_in_the_models_order(params, expected):
    model = Net()
    order = [n for n, _ in model.named_parameters()]
    assert names(params, model) == sorted(expected, key=order.index)


def test_frozen_parameters_are_analysed_when_selected_explicitly():
    model = Net().requires_grad_(False)
    assert names("head.*", model) == ["head.weight", "head.bias"]
    assert len(names("*", model)) == 7


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_a_tied_tensor_counts_once_and_matches_under_either_name(name):
    model = TinyGPT()
    selected = select_parameters(model, name)
    assert list(selected) == ["embedding.weight"]
    assert selected["embedding.weight"] is model.head.weight
    assert names(lambda n, _: n == name, model) == ["embedding.weight"]
    total = sum(p.numel() for p in model.parameters())
    assert ParameterSpace(select_parameters(model)).n == total


def test_a_glob_without_a_match_shows_near_ones():
    refused("body.0.wieght", match=r"no parameter matches 'body\.0\.wieght'.*'body\.0\.weight'")
    refused("Head.*", match="no parameter matches")
    refused(["head.*", "nothing"], match="no parameter matches 'nothing'.*there are 7")


def test_the_name_of_a_module_leads_to_its_parameters():
    refused("body.0", match=r"Near matches: 'body\.0\.\*'")


def test_an_empty_selection_is_refused():
    refused([], match="empty list")
    refused(lambda _name, _p: False, match="selected none of 7")
    refused(None, Net().requires_grad_(False), match=r"none of the 7.*requires a gradient.*params=")
    refused(None, nn.Tanh(), match="Tanh has no parameters at all")
    refused("*", nn.Identity(), match="no parameters at all")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (5, "params is a int"),
        (nn.Linear(2, 2), "params is a Linear"),
        (torch.ones(2), "params is a Tensor"),
        ([nn.Parameter(torch.ones(2))], "params holds a Parameter"),
        (["head.*", 3], "params holds a int"),
    ],
)
def test_a_selection_of_the_wrong_type_is_refused(params, message):
    refused(params, match=message, kind=ArgumentTypeError)


def sparse():
    return nn.Parameter(torch.eye(2).to_sparse())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False), "int64"),
        (lambda: nn.Parameter(torch.ones(2, dtype=torch.complex64)), "complex"),
        (lambda: nn.Parameter(torch.ones(2, device="meta")), "meta device.*load the weights"),
        (sparse, "sparse_coo"),
    ],
)
def test_parameters_without_real_derivatives_are_named(make, message):
    model = Net()
    model.odd = make()
    refused("*", model, match=f"parameter 'odd' .*{message}.*leave it out")
    assert names("head.*", model) == ["head.weight", "head.bias"]


@pytest.mark.parametrize("params", [None, "*", "1.*"])
def test_lazy_modules_are_refused_until_they_ran(params):
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    refused(params, model, match=r"parameter '0\.weight' is not initialised yet; run the model")
    model(torch.ones(1, 3))
    assert names("0.*", model) == ["0.weight", "0.bias"]


def test_parameters_made_under_inference_mode_are_refused():
    # PyTorch would silently leave them out of the graph.
    with torch.inference_mode():
        model = nn.Linear(2, 1)
    refused(None, model, match="'weight' was created under torch.inference_mode")


# --- the flat layout -----------------------------------------------------------------------------


@given(shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=5))
def test_flatten_and_unflatten_are_inverse(shapes):
    tensors = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    space = ParameterSpace(tensors)
    flat = space.flatten(tensors)
    assert flat.shape == (space.n,)
    assert space.n == sum(t.numel() for t in tensors.values())
    for name, tensor in space.unflatten(flat).items():
        assert torch.equal(tensor, tensors[name])
        assert torch.equal(flat[space.slices[name]], tensors[name].reshape(-1))
    assert torch.equal(space.flatten(list(tensors.values())), flat)
    assert torch.equal(space.flatten(dict(reversed(tensors.items()))), flat)


def test_flatten_takes_tensors_that_are_not_contiguous():
    tensor = torch.arange(6.0).reshape(2, 3).T
    assert ParameterSpace({"t": tensor}).flatten([tensor]).tolist() == [0, 3, 1, 4, 2, 5]


def test_unflatten_gives_views_and_flatten_a_copy():
    space = ParameterSpace({"a": torch.zeros(2, 2), "b": torch.zeros(1)})
    flat = space.zeros()
    space.unflatten(flat)["a"][0, 1] = 7.0
    assert flat.tolist() == [0, 7, 0, 0, 0]
    original = torch.ones(2, 2, requires_grad=True)
    copy = space.flatten([original, torch.zeros(1)])
    copy += 1
    assert original[0, 0] == 1
    assert not copy.requires_grad


def test_modules_gives_the_places_of_each_owner():
    space = ParameterSpace(select_parameters(Net()))
    owned = {
        "": ["scale"],
        "body.0": ["body.0.weight", "body.0.bias"],
        "body.2": ["body.2.weight", "body.2.bias"],
        "head": ["head.weight", "head.bias"],
    }
    modules = space.modules()
    assert list(modules) == list(owned)
    indices = torch.arange(space.n)
    for module, names in owned.items():
        own = torch.cat([indices[space.slices[name]] for name in names])
        assert torch.equal(torch.cat([indices[place] for place in modules[module]]), own)
        assert len(modules[module]) == 1


def test_the_places_of_a_module_that_is_interrupted_are_not_joined():
    tensors = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(3), "a.bias": torch.zeros(1)}
    places = {"a": (slice(0, 2), slice(5, 6)), "b": (slice(2, 5),)}
    assert ParameterSpace(tensors).modules() == places


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("model.layers.10", "model.layers.10"),
        ("model.embed_tokens", "model.embed_tokens"),
        ("encoder.pooler.dense", "encoder.pooler"),
        ("lm_head", "lm_head"),
        ("layer1.0.conv2", "layer1.0"),
        ("0", "0"),
        ("blocks.2.experts.7.up", "blocks.2"),
        ("vision.tower.deep.layers.4.mlp", "vision.tower.deep.layers.4"),
        ("", ""),
    ],
)
def test_a_layer_is_a_module_up_to_its_first_number_or_its_first_two_parts(module, layer):
    assert layer_of(module) == layer


def test_the_space_says_what_it_holds():
    assert repr(ParameterSpace({"a": torch.zeros(1500)})) == (
        "ParameterSpace(n=1,500 in 1 tensor, float32, cpu)"
    )
    assert "in 7 tensors" in repr(ParameterSpace(select_parameters(Net())))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32], torch.float32),
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float64], torch.float64),
        ([torch.bfloat16, torch.float64, torch.float32], torch.float64),
    ],
)
def test_vectors_are_float64_only_if_a_parameter_is(dtypes, expected):
    tensors = {str(i): torch.ones(1, dtype=dtype) for i, dtype in enumerate(dtypes)}
    assert ParameterSpace(tensors).dtype == expected
    assert ParameterSpace(tensors).flatten(tensors).dtype == expected
    assert ParameterSpace(tensors, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, "float64"])
def test_vectors_of_other_dtypes_are_refused(dtype):
    with pytest.raises(ArgumentTypeError, match="float32 or float64"):
        ParameterSpace({"a": torch.ones(1)}, dtype)


def test_tensors_that_do_not_fit_the_layout_are_refused():
    space = ParameterSpace({"a": torch.zeros(2, 2), "b": torch.zeros(1)})
    with pytest.raises(ArgumentError, match=r"expected 2 tensors.*got 1"):
        space.flatten([torch.zeros(2, 2)])
    with pytest.raises(ArgumentError, match=r"'a' has shape \(2, 2\), got a tensor of \(4,\)"):
        space.flatten([torch.zeros(4), torch.zeros(1)])
    with pytest.raises(ArgumentError, match="check 'b'"):
        space.flatten({"a": torch.zeros(2, 2)})
    with pytest.raises(ArgumentError, match=r"shape \(5,\), got \(4,\)"):
        space.unflatten(torch.zeros(4))
