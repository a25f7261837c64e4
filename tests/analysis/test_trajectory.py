"""Measurements and their trajectory, beside dense Hessians in float64."""

import json
import math

import numpy as np
import pytest
import torch

import spectra
from spectra.analysis.measurement import measure
from spectra.errors import ArgumentError, ArgumentTypeError


def problem(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    data = [
        (torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,))),
        (torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 3, (7,))),
    ]
    loss = spectra.losses.supervised(torch.nn.CrossEntropyLoss())
    return model.eval(), loss, data


def dense(H):
    return np.linalg.eigh(H.to_dense().numpy())


def matrix(values, seed=0):
    """A symmetric matrix with these eigenvalues, and its eigenvectors."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))
    return basis @ np.diag(values) @ basis.T, basis


@pytest.mark.parametrize(("which", "k"), [("LA", 3), ("SA", 2), ("BE", 4), ("LM", 2)])
def test_eigenvalues_of_the_asked_ends_are_those_of_the_dense_matrix(which, k):
    H = spectra.HessianOperator(*problem())
    values, _ = dense(H)
    ends = {"LA": values[-k:], "SA": values[:k], "BE": np.r_[values[: k // 2], values[-k // 2 :]]}
    expected = np.sort(ends.get(which, values[np.argsort(-np.abs(values))[:k]]))[::-1]
    m = measure(H, 0, k=k, which=which, tol=1e-6)
    assert all(m.converged)
    np.testing.assert_allclose(m.eigenvalues, expected, atol=max(m.residuals) + 1e-12)


def test_the_sharpness_is_the_largest_eigenvalue_and_unknown_where_it_was_not_searched():
    A, _ = matrix([5.0, 2.0, 1.0, 0.5, -1.0, -9.0, 0.1, 0.2])
    sharpness = {
        which: measure(A, 0, k=k, which=which, record=(), tol=1e-6).sharpness
        for which, k in (("LA", 1), ("BE", 2), ("LM", 2), ("SA", 1))
    }
    assert [sharpness[w] for w in ("LA", "BE", "LM")] == pytest.approx([5.0] * 3)
    assert math.isnan(sharpness["SA"])
    # The largest in magnitude is negative: nothing is known of the largest.
    alone = measure(A, 0, which="LM", record=())
    assert math.isnan(alone.sharpness)
    assert math.isnan(alone.sharpness_residual)
    assert alone.sharpness_converged is None


def test_loss_gradient_and_its_share_in_the_top_subspace_are_those_of_the_dense_matrix():
    model, loss, data = problem()
    H = spectra.HessianOperator(model, loss, data)
    m = measure(H, 0, k=2, tol=1e-8)
    gradient = torch.zeros(H.shape[0], dtype=torch.float64)
    losses = 0.0
    for batch in data:
        value = loss(model, batch)
        share = len(batch[1]) / 27
        losses += share * value.item()
        parts = torch.autograd.grad(value, list(model.parameters()))
        gradient += share * torch.cat([p.flatten() for p in parts])
    _, vectors = dense(H)
    inside = np.sum((vectors[:, -2:].T @ gradient.numpy()) ** 2)
    assert m.loss == pytest.approx(losses, rel=1e-12)
    assert m.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-12)
    assert m.alignment == pytest.approx(inside / gradient.norm().item() ** 2, abs=1e-9)
    assert m.alignment_error < 1e-6


def test_the_overlap_is_the_share_of_the_subspace_that_stayed():
    values = np.array([9.0, 7.0, 1.0, 0.5, 0.3, 0.2, 0.1, -1.0])
    A, basis = matrix(values)
    angle = 0.3
    turned = basis.copy()
    turned[:, 1] = math.cos(angle) * basis[:, 1] + math.sin(angle) * basis[:, 4]
    turned[:, 4] = math.cos(angle) * basis[:, 4] - math.sin(angle) * basis[:, 1]
    B = turned @ np.diag(values) @ turned.T
    first = measure(A, 0, k=2, record=("rotation",), tol=1e-8)
    second = measure(B, 1, k=2, record=("rotation",), tol=1e-8, previous=first)
    assert math.isnan(first.overlap)
    assert second.overlap == pytest.approx((1 + math.cos(angle) ** 2) / 2, abs=1e-7)
    assert second.overlap_error < 1e-6


def test_the_error_of_the_subspace_bounds_its_angle_also_where_it_is_coarse():
    values = np.concatenate([[4.0, 3.0], np.linspace(-1.5, 2.3, 60)])
    A, basis = matrix(values)
    m = measure(A, 0, k=2, record=(), tol=0.02)
    found = m.vectors.numpy()
    sine = np.linalg.norm(found - basis[:, :2] @ (basis[:, :2].T @ found), ord=2)
    assert 1e-4 < sine <= m.subspace_error < 1


def test_without_a_certificate_no_error_of_the_subspace_is_claimed():
    A, _ = matrix(np.linspace(-1, 3, 40))
    m = measure(A, 0, record=(), certify=False)
    assert not m.certified
    assert math.isnan(m.subspace_error)
    assert any("nobody looked for missed eigenvalues" in note for note in m.notes)
    certified = measure(A, 0, record=())
    assert sum(m.matvecs.values()) + 5 <= sum(certified.matvecs.values())


def test_trace_and_preconditioned_sharpness_are_those_of_the_dense_matrix():
    model, loss, data = problem()
    H = spectra.HessianOperator(model, loss, data)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, data[0]).backward()
        optimizer.step()
    m = measure(H, 3, tol=1e-6, record=("trace", "preconditioned"), optimizer=optimizer)
    A = H.to_dense().numpy()
    scale = spectra.preconditioner(optimizer, H).numpy() ** -0.5
    top = np.linalg.eigvalsh(scale[:, None] * A * scale)[-1]
    assert m.preconditioned_sharpness == pytest.approx(top, abs=m.preconditioned_residual)
    assert m.preconditioned_converged
    assert abs(m.trace - np.trace(A)) <= 5 * m.trace_error + 1e-12
    assert m.threshold == pytest.approx(200.0)
    assert m.threshold_preconditioned
    assert m.learning_rate == 0.01
    assert set(m.matvecs) == {"eigenpairs", "trace", "preconditioned"}


def test_the_preconditioner_of_an_optimiser_without_a_step_is_not_made_up():
    model, loss, data = problem()
    H = spectra.HessianOperator(model, loss, data)
    optimizer = torch.optim.Adam(model.parameters())
    m = measure(H, 0, record=("preconditioned",), optimizer=optimizer)
    assert math.isnan(m.preconditioned_sharpness)
    assert m.preconditioned_converged is None
    assert any("taken no step" in note for note in m.notes)


def test_the_sharpness_of_a_batch_is_that_of_its_own_hessian():
    model, loss, data = problem()
    H, part = (spectra.HessianOperator(model, loss, d) for d in (data, data[1:]))
    m = measure(H, 0, tol=1e-6, batch=part)
    assert m.batch_sharpness == pytest.approx(dense(part)[0][-1], abs=m.batch_residual)
    assert m.sharpness == pytest.approx(dense(H)[0][-1], abs=m.sharpness_residual)


def test_what_cannot_be_recorded_is_refused_before_any_product():
    H = spectra.HessianOperator(*problem())
    with pytest.raises(ArgumentError, match="record has 'hessian'; expected a list with any of"):
        measure(H, 0, record=("hessian",))
    with pytest.raises(ArgumentError, match="pass optimizer="):
        measure(H, 0, record=("preconditioned",))
    with pytest.raises(ArgumentError, match="expected 1 <= k <="):
        measure(H, 0, k=1000)
    assert H.matvecs == 0
    with pytest.raises(ArgumentTypeError, match="has no gradient"):
        measure(np.eye(3), 0)


def test_a_subspace_of_another_shape_is_refused():
    A, _ = matrix(np.arange(6.0))
    first = measure(A, 0, k=2, record=())
    with pytest.raises(ArgumentError, match=r"has shape \(6, 2\), this one \(6, 1\)"):
        measure(A, 1, k=1, record=("rotation",), previous=first)


# --- the trajectory -------------------------------------------------------------------------------


def trajectory():
    model, loss, data = problem()
    H = spectra.HessianOperator(model, loss, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    record = ("gradient", "rotation", "trace", "preconditioned")
    run = spectra.Trajectory()
    for step in range(0, 30, 10):
        m = measure(
            H, step, k=4, which="BE", record=record, optimizer=optimizer, previous=run.previous
        )
        run = run.appended(m)
        for _ in range(10):
            optimizer.zero_grad()
            loss(model, data[0]).backward()
            optimizer.step()
    return run.appended(spectra.Measurement(30, error="NonFiniteError: the loss is nan"))


@pytest.fixture(scope="module", name="run")
def one_run():
    return trajectory()


def test_only_the_last_subspace_is_kept(run):
    assert [m.vectors is None for m in run] == [True, True, False, True]
    assert run.previous.step == 20
    assert run.provenance["options"]["k"] == 4


def test_steps_ascend(run):
    for step in (30, 12):
        with pytest.raises(ArgumentError, match=f"step {step} was to follow step 30"):
            run.appended(spectra.Measurement(step))


def test_a_table_fits_into_80_columns_and_prints_every_number_with_its_error(run):
    text = str(run)
    table = text[: text.index("threshold of the")]
    assert max(map(len, table.splitlines())) <= 80
    for m in list(run)[:3]:
        for value, residual in zip(m.eigenvalues, m.residuals, strict=True):
            assert f"{value:.5g} ± {residual:.1g}" in table
        assert f"{m.trace:.5g} ± {m.trace_error:.1g}" in table
    assert "step 30 failed: NonFiniteError: the loss is nan" in text
    assert "2 (1 + momentum) / lr" in text
    assert "nan" not in table.replace("the loss is nan", "")
    names = dict(enumerate(run))
    labelled = spectra.Trajectory(tuple(names.values())[:1])
    assert str(labelled).startswith("1 measurement, steps 0 to 0")


def test_what_did_not_converge_is_marked():
    A, _ = matrix(np.linspace(-1, 1, 50))
    m = measure(A, 7, record=(), tol=1e-2)
    unfinished = spectra.Measurement(
        9, eigenvalues=(1.0,), residuals=(0.5,), converged=(False,), matvecs={"eigenpairs": 3}
    )
    text = str(spectra.Trajectory((m, unfinished)))
    assert "1 ± 0.5*" in text
    assert "* not converged" in text
    assert "* not converged" not in str(spectra.Trajectory((m,)))


def test_saving_and_loading_gives_the_same_trajectory(run, tmp_path):
    run.save(tmp_path / "run")
    again = spectra.load(tmp_path / "run")
    assert isinstance(again, spectra.Trajectory)
    assert str(again) == str(run)
    assert torch.equal(again.previous.vectors, run.previous.vectors)
    assert repr(again.rows()) == repr(run.rows())


def test_rows_hold_plain_numbers_and_strings_only(run):
    rows = run.rows()
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    assert rows[0]["eigenvalue_1"] == rows[0]["sharpness"] == run[0].eigenvalues[0]
    assert rows[0]["matvecs"] == sum(run[0].matvecs.values())
    json.dumps(rows)
    np.testing.assert_array_equal(run.column("loss"), [m.loss for m in run])
    assert math.isnan(run.column("eigenvalue_2")[3])
    with pytest.raises(ArgumentError, match="no column 'sharp'; expected one of alignment"):
        run.column("sharp")


def test_the_figure_shows_the_sharpness_against_the_threshold(run):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    ax = run.plot()
    drawn = ax.get_lines()[0]
    np.testing.assert_array_equal(drawn.get_xdata(), [0, 10, 20, 30])
    np.testing.assert_array_equal(drawn.get_ydata(), run.column("sharpness"))
    dashed = next(line for line in ax.get_lines() if line.get_linestyle() == "--")
    np.testing.assert_allclose(dashed.get_ydata()[:3], 2 * 1.9 / 0.5)
    with pytest.raises(ArgumentError, match="quantity='trace'"):
        run.plot(quantity="trace")
    with pytest.raises(ArgumentError, match="no measurement of the trajectory has a sharpness"):
        spectra.Trajectory((spectra.Measurement(0),)).plot()
    pyplot.close("all")


def test_a_preconditioned_threshold_stands_beside_the_preconditioned_sharpness_only():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    m = spectra.Measurement(
        1,
        eigenvalues=(2.0,),
        residuals=(0.1,),
        converged=(True,),
        preconditioned_sharpness=300.0,
        preconditioned_residual=1.0,
        preconditioned_converged=False,
        threshold=380.0,
        threshold_formula="f",
        threshold_preconditioned=True,
    )
    run = spectra.Trajectory((m,))
    lines = run.plot().get_lines()
    assert lines[0].get_ydata()[0] == 300.0
    assert any(line.get_linestyle() == "--" for line in lines)
    lines = run.plot(quantity="sharpness").get_lines()
    assert lines[0].get_ydata()[0] == 2.0
    assert not any(line.get_linestyle() == "--" for line in lines)
    pyplot.close("all")
