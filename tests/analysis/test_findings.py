"""Every way in which products are known to go wrong in silence, and models that are right."""

import copy
import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import spectra
from spectra import errors
from spectra.analysis.findings import compressed
from spectra.analysis.preflight import check
from spectra.objective.losses import causal_lm, supervised
from tests.cases.networks import StackedGPT, tanh_mlp, wine

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(12, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
MSE = supervised(nn.MSELoss())
DTYPES = [torch.float32, torch.float64]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class NumpyCube(torch.autograd.Function):
    """x³, with a backward pass that autograd takes for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.from_numpy(3 * x.detach().numpy() ** 2)


class HandMadeCheckpoint(torch.autograd.Function):
    """A checkpoint as people write it: its backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, module, x, *parameters):
        ctx.module = module
        ctx.save_for_backward(x, *parameters)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, gradient):
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            output = ctx.module(x)
            return None, *torch.autograd.grad(output, [x, *parameters], gradient.detach())


class Checkpointed(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return HandMadeCheckpoint.apply(self.module, x, *self.module.parameters())


def network(middle, dtype=torch.float64):
    """A module between layers that are innocent."""
    layers = nn.Linear(4, 4), nn.Tanh(), middle, nn.Tanh(), nn.Linear(4, 1)
    return nn.Sequential(*layers).to(dtype)


def checked(model, loss=MSE, dtype=torch.float64, **options):
    data = [(X[:7].to(dtype), Y[:7].to(dtype)), (X[7:].to(dtype), Y[7:].to(dtype))]
    return check(spectra.HessianOperator(model.to(dtype), loss, data, **options))


def finding(found, name):
    (only,) = (f for f in found.findings if f.check == name)
    return only


def problems(found):
    return [f.check for f in found.problems]


# --- wrong derivatives ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_pass_in_numpy_is_found_with_the_parameters_before_it(dtype):
    found = checked(network(Function(NumpyCube.apply)), dtype=dtype)
    wrong = finding(found, "gradient differences")
    assert (wrong.level, wrong.where) == ("warning", ("0.weight", "0.bias"))
    assert wrong.measured > 0.5
    assert "the custom function NumpyCube" in wrong.remedy
    # The gradient itself is right.
    assert finding(found, "gradient of the loss").level == "ok"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_that_cannot_be_differentiated_is_found(dtype):
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    found = checked(network(Checkpointed(block)), dtype=dtype)
    assert "gradient differences" in problems(found)
    wrong = finding(found, "gradient differences")
    assert set(wrong.where) >= {"2.module.*.weight", "2.module.*.bias"}
    assert "HandMadeCheckpoint" in wrong.remedy


def test_a_swallowed_derivative_is_an_error_that_names_the_parameter():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x + NumpyCube.apply(self.shift)

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Shifted())
    found = checked(model, loss=lambda m, batch: m(batch[0]).mean())
    wrong = finding(found, "gradient differences")
    assert (wrong.level, wrong.where) == ("error", ("2.shift",))
    assert "rows of zeros in H, but a gradient that is not constant" in wrong.message
    # What has neither is no parameter that enters linearly.
    assert finding(found, "parameters").level == "ok"


def test_a_saturated_probability_is_found():
    # d²/dz² of -log σ(z) at z = -20 is 2e-9; PyTorch says -1e-3.
    model = nn.Linear(4, 1)
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias, -20.0)

    def loss(model, batch):
        return functional.binary_cross_entropy(model(batch[0]).sigmoid(), torch.ones_like(batch[1]))

    wrong = finding(checked(model, loss), "gradient differences")
    assert (wrong.level, wrong.where) == ("warning", ("weight", "bias"))
    assert "binary_cross_entropy_with_logits" in wrong.remedy

    def of_logits(model, batch):
        targets = torch.ones_like(batch[1])
        return functional.binary_cross_entropy_with_logits(model(batch[0]), targets)

    assert checked(model, of_logits).ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hook_on_a_tensor_that_changes_gradients_is_found(dtype):
    class Doubling(nn.Module):
        def forward(self, x):
            y = x * 1.0
            if y.requires_grad:
                y.register_hook(lambda gradient: 2 * gradient)
            return y

    wrong = finding(checked(network(Doubling()), dtype=dtype), "gradient of the loss")
    assert wrong.level == "warning"
    assert "hooks on tensors" in wrong.remedy


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_hook_on_a_module_does_not_run_and_does_no_harm(dtype):
    model = network(nn.Linear(4, 4))
    model[2].register_full_backward_hook(lambda module, inputs, _: tuple(g / 2 for g in inputs))
    assert checked(model, dtype=dtype).ok


@pytest.mark.parametrize(
    "function", [lambda x: x * x.detach(), lambda x: x + (x.round() - x).detach()]
)
def test_a_detached_value_is_found_in_the_gradient_and_in_its_derivative(function):
    found = checked(network(Function(function)))
    assert {"gradient of the loss", "gradient differences"} <= set(problems(found))
    assert "a value is detached" in finding(found, "gradient differences").remedy
    assert "straight-through" in finding(found, "gradient of the loss").remedy


def test_a_target_that_is_detached_is_said_to_move_in_differences():
    def loss(model, batch):
        return ((model(batch[0]) - model(batch[0]).detach()) ** 2).mean()

    wrong = finding(checked(network(nn.Linear(4, 4)), loss), "gradient differences")
    assert wrong.level == "warning"
    assert "moves in a difference and not in a derivative" in wrong.remedy


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_that_get_no_gradient_though_the_loss_depends_on_them_are_an_error(dtype):
    found = checked(network(Function(torch.detach)), dtype=dtype)
    assert problems(found) == ["parameters"]
    wrong = finding(found, "parameters")
    assert (wrong.level, wrong.where) == ("error", ("0.weight", "0.bias"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unused_parameters_and_those_that_enter_linearly_are_noted_by_name(dtype):
    model = network(nn.Linear(4, 4))
    model[2].unused = nn.Linear(2, 2)
    found = checked(model, supervised(nn.L1Loss()), dtype)
    assert found.ok
    notes = {f.where: f for f in found.findings if f.check == "parameters"}
    assert set(notes) == {("2.unused.weight", "2.unused.bias"), ("4.bias",)}
    assert all(note.level == "note" for note in notes.values())
    assert "no influence" in notes["2.unused.weight", "2.unused.bias"].message
    assert "linearly" in notes["4.bias",].message


def test_a_gradient_that_is_zero_at_the_end_of_a_path_is_an_answer():
    # Rises on either side of zero, but no derivative is missing.
    H = spectra.HessianOperator.from_function(
        lambda x, y: (x.abs() ** 3).sum() + (y**2).sum(),
        [torch.zeros(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)],
    )
    found = check(H)
    assert found.ok
    assert finding(found, "parameters").where == ("tensor0",)


def test_parameters_that_an_evaluation_changes_are_an_error():
    class Shrinking(nn.Linear):
        def forward(self, x):
            self.weight.data.mul_(0.99)
            return super().forward(x)

    wrong = finding(checked(network(Shrinking(4, 4))), "weights")
    assert (wrong.level, wrong.where) == ("error", ("2.weight",))


# --- the function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_that_changes_from_call_to_call_is_found(dtype):
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * (1 + 0.1 * self.calls)

    # Products refuse it by themselves: the loss over the data is looked at in every pass.
    with pytest.raises(errors.DataError, match="in an earlier pass"):
        checked(network(Counting()), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_changes_from_call_to_call_is_found(dtype):
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            # The same value, and another derivative.
            return x.detach() + (x - x.detach()) * (1 + 0.1 * self.calls)

    found = checked(network(Counting()), dtype=dtype)
    # Of what changes by itself nothing else is said.
    assert problems(found) == ["determinism"]
    assert "a counter" in finding(found, "determinism").remedy


def test_a_state_that_passes_from_batch_to_batch_is_found():
    class Remembering(nn.Module):
        state = 0.0

        def forward(self, x):
            output = x + self.state
            # Forgotten after the last batch of a pass, in the order in which they are.
            self.state = 0.0 if len(x) == 5 else 0.5
            return output

    wrong = finding(checked(network(Remembering())), "batch order")
    assert wrong.level == "warning"
    assert "no sum over batches" in wrong.message


def test_batches_are_read_in_reverse_with_the_masks_that_they_had():
    model = network(nn.Dropout(0.5)).train()
    found = checked(model, allow_training_mode=True)
    assert finding(found, "batch order").level == "ok"


def test_one_batch_has_no_order():
    found = check(spectra.HessianOperator(network(nn.Tanh()), MSE, [(X, Y)]))
    assert "batch order" not in {f.check for f in found.findings}


def test_data_too_large_to_be_held_are_not_reversed(monkeypatch):
    class Loader:
        def __iter__(self):
            return iter([(X[:7], Y[:7]), (X[7:], Y[7:])])

    H = spectra.HessianOperator(network(nn.Tanh()), MSE, Loader())
    assert finding(check(H), "batch order").level == "ok"
    monkeypatch.setattr("spectra.objective.batches.free_bytes", lambda _: 100)
    order = finding(check(H), "batch order")
    assert order.level == "note"
    assert "more than half of the free memory" in order.message


def test_frozen_dropout_and_batch_statistics_are_noted_with_what_they_mean():
    model = network(nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(4))).train()
    found = checked(model, allow_training_mode=True)
    assert found.ok
    note = finding(found, "dropout, batch norm")
    assert (note.level, note.where) == ("note", ("2.*",))
    assert "H is that of this draw" in note.message
    assert "depends on the batches" in note.message


def test_half_precision_is_told_by_its_noise():
    model = StackedGPT(2).bfloat16().eval()
    data = [{"input_ids": torch.randint(0, 7, (2, 8))}]
    found = check(spectra.HessianOperator(model, causal_lm(), data))
    assert problems(found) == ["precision"]
    assert "compute_dtype=torch.float32" in finding(found, "precision").remedy
    casted = spectra.HessianOperator(model, causal_lm(), data, compute_dtype=torch.float32)
    assert check(casted).ok


# --- other operators ------------------------------------------------------------------------------


def operator_of(matvec, n=50):
    return LinearOperator((n, n), matvec=matvec, dtype=np.float64)


MATRIX = np.random.default_rng(0).standard_normal((50, 50))
SYMMETRIC = MATRIX + MATRIX.T


def test_an_operator_that_is_not_symmetric_is_an_error():
    found = check(operator_of(lambda x: MATRIX @ x))
    assert [(f.check, f.level) for f in found.problems] == [("symmetry", "error")]


def test_an_operator_that_is_not_linear_is_an_error():
    found = check(operator_of(lambda x: SYMMETRIC @ np.abs(x)))
    assert ("linearity", "error") in [(f.check, f.level) for f in found.problems]


def test_products_that_are_random_are_found():
    rng = np.random.default_rng(0)
    found = check(operator_of(lambda x: SYMMETRIC @ x + 3e-3 * rng.standard_normal(50)))
    assert {"determinism", "precision"} <= set(problems(found))


def test_finite_differences_of_few_digits_are_told_by_their_noise():
    exact = spectra.HessianOperator.from_function(lambda x: (x**4).sum(), torch.arange(1.0, 51.0))

    def difference(x):
        d = torch.from_numpy(x).float()
        up, down = (exact.value_and_gradient_at(s * 1e-4 * d)[1] for s in (1, -1))
        return ((up - down) / 2e-4).double().numpy()

    assert problems(check(operator_of(difference))) == ["precision"]


@pytest.mark.parametrize(
    "matrix", [np.diag([1.0, 2.0]), torch.eye(3), operator_of(lambda x: 2 * x)]
)
def test_symmetric_matrices_pass(matrix):
    found = check(matrix)
    assert found.ok
    assert {f.check for f in found.findings} == {
        "symmetry",
        "linearity",
        "precision",
        "determinism",
        "finite values",
    }
    assert (found.matvecs, found.gradients) == (4, 0)


# --- what is right --------------------------------------------------------------------------------


def cnn(dtype):
    layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3)
    head = nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)
    data = [(torch.randn(64, 1, 14, 14, dtype=dtype), torch.randint(0, 5, (64,)))]
    return nn.Sequential(*layers, *head).to(dtype).eval(), supervised(nn.CrossEntropyLoss()), data


def perceptron(dtype):
    x, y = wine(dtype)
    return tanh_mlp(dtype=dtype), supervised(nn.CrossEntropyLoss()), [(x[:100], y[:100])]


def gpt(dtype):
    data = [{"input_ids": torch.randint(0, 7, (2, 8))} for _ in range(2)]
    return StackedGPT(2).to(dtype).eval(), causal_lm(), data


def regression(dtype):
    data = [(torch.randn(4000, 4, dtype=dtype), torch.randn(4000, 1, dtype=dtype))]
    return network(nn.ReLU(), dtype), supervised(nn.L1Loss()), data


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [perceptron, cnn, gpt, regression])
def test_right_models_pass(make, dtype):
    model, loss, data = make(dtype)
    found = check(spectra.HessianOperator(model, loss, data))
    assert found.ok, str(found)
    assert finding(found, "gradient differences").level == "ok"
    assert found.gradients <= 16


def test_kinks_that_single_precision_steps_over_are_resolved_in_double():
    found = check(spectra.HessianOperator(*cnn(torch.float32)))
    assert "in float64" in finding(found, "gradient differences").message
    # Where the model cannot be evaluated in it, the warning names them.
    model, loss, data = cnn(torch.float32)
    model.insert(4, Function(lambda x: x.float()))
    kinked = finding(check(spectra.HessianOperator(model, loss, data)), "gradient differences")
    assert kinked.level == "warning"
    assert "ReluBackward0" in kinked.remedy


class Reentrant(nn.Linear):
    """Its inputs require no gradient, which makes PyTorch's own lose that of the weights."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


def test_models_that_recompute_by_themselves_pass():
    model = network(nn.Tanh())
    model[0] = Reentrant(4, 4)
    found = checked(model)
    assert [f.level for f in found.findings] == ["ok"] * len(found.findings)


def test_a_checkpoint_out_of_reach_that_loses_gradients_is_found():
    # In a closure, where it is not replaced.
    hidden = checkpoint

    class OutOfReach(nn.Linear):
        def forward(self, x):
            with warnings.catch_warnings():
                # PyTorch says so, too.
                warnings.simplefilter("ignore")
                return hidden(super().forward, x, use_reentrant=True)

    model = network(nn.Tanh())
    model[0] = OutOfReach(4, 4)
    wrong = finding(checked(model), "parameters")
    assert (wrong.level, wrong.where) == ("error", ("0.weight", "0.bias"))
    assert "reentrant checkpoint" in wrong.remedy


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hugging_face_models_pass(kind, attention):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 13, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            **sizes, n_positions=8, n_embd=8, bos_token_id=0, eos_token_id=0
        )
    else:
        config = transformers.LlamaConfig(**sizes, hidden_size=8, intermediate_size=12)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation(attention)
    data = [{"input_ids": torch.randint(0, 13, (2, 6)), "labels": torch.randint(0, 13, (2, 6))}]
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"compute_dtype": torch.float32})):
        found = check(spectra.HessianOperator(model.to(dtype), causal_lm(), data, **options))
        assert found.ok, str(found)


def test_an_adapter_at_its_beginning_is_an_answer():
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    with warnings.catch_warnings():
        # Of peft's own, about names and shapes.
        warnings.simplefilter("ignore")
        adapter = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), adapter).double().eval()
    data = [{"input_ids": torch.randint(0, 13, (2, 6))}]
    H = spectra.HessianOperator(model, causal_lm(), data)
    assert check(H).ok
    # B = 0: neither gradient nor curvature by A alone.
    alone = check(H.block("*lora_A*"))
    assert alone.ok
    assert "no influence" in finding(alone, "parameters").message


# --- what is left behind --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_is_left_as_it_was_to_the_last_bit(dtype):
    model, loss, data = cnn(dtype)
    model.train()
    before = copy.deepcopy(model.state_dict())
    addresses = [p.data_ptr() for p in model.parameters()]
    version = [p._version for p in model.parameters()]
    state = torch.get_rng_state()
    H = spectra.HessianOperator(model, loss, data, allow_training_mode=True)
    check(H)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert [p._version for p in model.parameters()] == version
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_come_back_when_an_evaluation_beside_them_fails():
    model = network(nn.Tanh())
    before = copy.deepcopy(model.state_dict())
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return MSE(model, batch)

    with pytest.raises(KeyboardInterrupt):
        checked(model, loss)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_kept_graphs_outlive_the_checks():
    H = spectra.HessianOperator(network(nn.Tanh()), MSE, [(X, Y)], graph="retained")
    check(H)
    kept = list(H._oracle._graphs._kept.values())
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert list(H._oracle._graphs._kept.values()) == kept


def test_names_are_compressed_only_where_all_of_them_are_meant():
    names = [f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    assert compressed(names, names) == ("layers.*.weight", "layers.*.bias")
    assert compressed(names[1:], names) == ("layers.*.bias", "layers.1.weight", "layers.2.weight")
    assert compressed(["layers2.weight"], ["layers2.weight"]) == ("layers2.weight",)


@pytest.mark.parametrize("declared", [None, "mean", "sum"])
@pytest.mark.parametrize("reduced", ["mean", "sum"])
def test_a_loss_that_is_taken_for_another_reduction_is_found(declared, reduced):
    x = torch.randn(12, 3, dtype=torch.float64)
    y = torch.randn(12, 1, dtype=torch.float64)

    def loss(model, batch):
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1], reduction=reduced)

    model = torch.nn.Linear(3, 1).double()
    H = spectra.HessianOperator(model, loss, [(x[:5], y[:5]), (x[5:], y[5:])], reduction=declared)
    found = next(f for f in spectra.check(H).findings if f.check == "reduction")
    if (declared or "mean") == reduced:
        assert found.level == "ok"
        assert f"the {reduced} of those of its halves" in found.message
    else:
        assert found.level == "warning"
        assert f"the {reduced} of those of its halves, and is taken for a" in found.message


def test_a_loss_that_compares_samples_is_neither_mean_nor_sum():
    def contrastive(model, batch):
        outputs = model(batch)
        return torch.logsumexp(outputs @ outputs.T, dim=1).mean()

    model = torch.nn.Linear(3, 2).double()
    H = spectra.HessianOperator(model, contrastive, [torch.randn(8, 3, dtype=torch.float64)])
    found = next(f for f in spectra.check(H).findings if f.check == "reduction")
    assert (found.level, found.message[:32]) == ("ok", "the loss of a batch is neither t")
