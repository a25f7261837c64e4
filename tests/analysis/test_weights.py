"""Saved weights of every kind, read into the model they are of, and into no other."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from spectra.analysis.weights import optimizer_of, put_into, read_weights, weights_kept
from spectra.errors import ArgumentError


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    )
    return model.to(dtype).eval()


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def same(model, other):
    mine, its = model.state_dict(), other.state_dict()
    return set(mine) == set(its) and all(torch.equal(mine[name], its[name]) for name in mine)


def saved_as(kind, state, folder):
    """A file or directory of each kind that people's programs write."""
    path = folder / kind.format("weights-0500")
    if kind.endswith(".safetensors"):
        save_file(state, path)
    elif kind.startswith("bare"):
        torch.save(state, path)
    elif kind == "old.pt":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        name = kind.split("_in")[0]
        torch.save({"epoch": 3, name: state, "config": {"lr": 0.1}}, path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        *("{}.safetensors", "bare.pt", "bare.pth", "bare.bin", "old.pt"),
        *("model_in.pt", "state_dict_in.ckpt", "model_state_dict_in.pt", "ema_in.pt"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_weights_go_into_the_model_they_are_of(kind, prefix, tmp_path):
    trained, model = network(seed=1), network(seed=0)
    state = {prefix + name: tensor for name, tensor in trained.state_dict().items()}
    saved = read_weights(saved_as(kind, state, tmp_path))
    assert put_into(model, saved, only_check=True) == ()
    assert not same(model, trained)
    assert put_into(model, saved) == ()
    assert same(model, trained)


@pytest.mark.parametrize("files", ["model.safetensors", "pytorch_model.bin", "parts"])
def test_directories_of_whole_models_are_read(files, tmp_path):
    trained, model = network(seed=1), network(seed=0)
    state = trained.state_dict()
    if files == "parts":
        first = {name: t for name, t in state.items() if name.startswith("0")}
        rest = {name: t for name, t in state.items() if name not in first}
        save_file(first, tmp_path / "a.safetensors")
        save_file(rest, tmp_path / "b.safetensors")
        places = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(rest, "b.safetensors")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    elif files.endswith(".bin"):
        torch.save(state, tmp_path / files)
    else:
        save_file(state, tmp_path / files)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 77}))
    saved = read_weights(tmp_path)
    put_into(model, saved)
    assert same(model, trained)
    assert saved.step == 77
    (tmp_path / "a.safetensors").unlink(missing_ok=True)
    if files == "parts":
        with pytest.raises(ArgumentError, match=r"names the file 'a.safetensors'"):
            read_weights(tmp_path)


def test_an_index_that_leads_out_of_its_directory_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(network().state_dict(), tmp_path / "secret.safetensors")
    index = {"weight_map": {"0.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArgumentError, match="not a file beside it"):
        read_weights(folder)


def test_a_tied_parameter_may_be_saved_once(tmp_path):
    trained, model = Tied(), Tied()
    save_file({"embed.weight": trained.embed.weight.detach()}, tmp_path / "a.safetensors")
    put_into(model, read_weights(tmp_path / "a.safetensors"))
    assert torch.equal(model.head.weight, trained.embed.weight)
    assert model.head.weight is model.embed.weight


def test_what_is_missing_too_much_or_of_another_shape_is_named(tmp_path):
    model, state = network(), network(seed=1).state_dict()

    def refused(content, match):
        torch.save(content, tmp_path / "w.pt")
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ArgumentError, match=match):
            put_into(model, read_weights(tmp_path / "w.pt"))
        assert all(map(torch.equal, before, model.parameters()))

    refused({k: v for k, v in state.items() if k != "3.bias"}, "lack '3.bias'")
    refused({**state, "4.weight": torch.ones(2)}, "have besides '4.weight'")
    refused({**state, "3.bias": torch.ones(5)}, r"'3.bias' in .* has the shape \(5,\)")
    refused({"extra." + k: v for k, v in state.items() if k != "0.weight"}, "lack '0.weight'")
    # A statistic that stays at its initial value gives another Hessian, too.
    refused({k: v for k, v in state.items() if "running_mean" not in k}, "lack '1.running_mean'")


def test_files_that_hold_no_weights_are_refused(tmp_path):
    def refused(match, name="w.pt"):
        with pytest.raises(ArgumentError, match=match):
            read_weights(tmp_path / name)

    refused("no file or directory")
    (tmp_path / "w.npz").write_bytes(b"")
    refused("no file of weights by its name", "w.npz")
    (tmp_path / "w.safetensors").write_bytes(b"123")
    refused("cannot read", "w.safetensors")
    (tmp_path / "empty").mkdir()
    refused("holds no weights", "empty")
    torch.save({"model": {"lr": 0.1}, "note": "none"}, tmp_path / "w.pt")
    refused("holds no weights, but entries 'model', 'note'")
    torch.save([1, 2], tmp_path / "w.pt")
    refused("holds no weights, but no entries")
    state = network().state_dict()
    torch.save({"a": state, "b": state}, tmp_path / "w.pt")
    refused("holds no weights, but entries 'a', 'b'")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_no_code_of_a_file_is_run(tmp_path):
    torch.save(network(), tmp_path / "whole.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("whole.pt", "evil.pt"):
        with pytest.raises(ArgumentError, match="without running code from it"):
            read_weights(tmp_path / name)


def test_weights_of_another_precision_are_converted_and_rounding_is_said(tmp_path):
    torch.save(network(1, torch.float64).state_dict(), tmp_path / "double.pt")
    torch.save(network(1, torch.bfloat16).state_dict(), tmp_path / "half.pt")
    model = network()
    (told,) = put_into(model, read_weights(tmp_path / "double.pt"))
    assert told == "weights saved in float64 were rounded to float32"
    assert put_into(model, read_weights(tmp_path / "half.pt")) == ()
    assert torch.equal(model[0].weight, network(1, torch.bfloat16)[0].weight.float())


def test_weights_are_put_back_to_the_last_bit(tmp_path):
    model = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.save(network(seed=1).state_dict(), tmp_path / "w.pt")

    @weights_kept(model)
    def interrupted():
        put_into(model, read_weights(tmp_path / "w.pt"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("model_0500.pt", 500),
        ("500.pt", 500),
        ("epoch=3-step=1200.ckpt", 1200),
        ("checkpoint-70", 70),
        ("run2_iter30_best.pt", 30),
        ("resnet18.pt", None),
        ("last.pt", None),
        ("weights-v2.safetensors", None),
    ],
)
def test_the_step_is_read_from_the_name(name, step, tmp_path):
    path = tmp_path / name
    state = network().state_dict()
    if not path.suffix:
        path.mkdir()
        save_file(state, path / "model.safetensors")
    elif path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    assert read_weights(path).step == step


def test_the_step_that_was_saved_comes_before_that_of_the_name(tmp_path):
    content = {"state_dict": network().state_dict(), "epoch": 2, "global_step": torch.tensor(40)}
    torch.save(content, tmp_path / "w_7.pt")
    assert read_weights(tmp_path / "w_7.pt").step == 40


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.Adam, {"betas": (0.8, 0.99)}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.RMSprop, {"momentum": 0.3}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_the_threshold_is_that_of_the_optimiser_whose_state_was_saved(kind, options, tmp_path):
    from spectra import stability_threshold

    model = network()
    rates = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.2}]
    optimizer = kind(rates, lr=0.1, **options)
    model(torch.ones(2, 3)).sum().backward()
    for _ in range(3):
        optimizer.step()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "w.pt"
    )
    found = optimizer_of(read_weights(tmp_path / "w.pt").optimizer)
    assert type(found) is kind
    assert stability_threshold(found) == stability_threshold(optimizer)


def test_an_optimiser_that_is_not_known_is_said_to_be(tmp_path):
    model = network()
    for kind, words in ((torch.optim.NAdam, "not among"), (torch.optim.Adam, "Adam or AdamW")):
        state = kind(model.parameters(), lr=0.1, weight_decay=0.1).state_dict()
        if kind is torch.optim.Adam:
            # As before torch 2.7.
            for group in state["param_groups"]:
                group.pop("decoupled_weight_decay", None)
        torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "w.pt")
        assert words in optimizer_of(read_weights(tmp_path / "w.pt").optimizer)
