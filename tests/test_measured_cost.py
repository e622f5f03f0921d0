"""A cost that is measured on the parts of a model is that of the whole."""

import pytest
import torch
from conftest import naming
from torch.utils.flop_counter import FlopCounterMode

from tnt_hf.evaluation import measure_cost, measured_cost
from tnt_hf.schedules_tnt import schedule_for


def fake_timed(function, device):
    """A clock on which a call takes as many seconds as it does floating point operations."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, float(counter.get_total_flops())


@pytest.fixture
def fake_clock(monkeypatch):
    monkeypatch.setattr(measured_cost, "timed", fake_timed)


def test_measured_cost_predicts_the_whole_model_from_its_parts(make_model, images, fake_clock):
    model = make_model()
    cost = measure_cost(model, batch_size=2, repeats=1)
    for schedule in (((), ()), ((2,), (0.6,), 8), ((1, 3), (0.7, 0.5), 9), ((5,), (0.5,), 3), ((0,), (0.1,))):
        model.set_schedule(*schedule)
        with torch.inference_mode():
            _, seconds = fake_timed(lambda: model(images), model.device)
        assert cost(model.config) == pytest.approx(seconds / len(images), rel=0.01)


def test_measured_cost_of_another_image_size(make_model, fake_clock):
    model = make_model()
    cost = measure_cost(model, batch_size=1, image_size=(32, 48), repeats=1)
    with pytest.raises(ValueError, match=naming("num_patches=96", "num_patches=64")):
        cost(model.config)
    model.config.image_size = (32, 48)
    with torch.inference_mode():
        _, seconds = fake_timed(lambda: model(torch.zeros(1, 3, 32, 48), interpolate_pos_encoding=True), model.device)
    assert cost(model.config) == pytest.approx(seconds, rel=0.01)


def test_measured_cost_grows_with_the_tokens_whatever_the_clock_says(make_model, monkeypatch):
    noise = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        measured_cost, "timed", lambda function, device: (function(), torch.rand(1, generator=noise).item())
    )
    model = make_model()
    cost = measure_cost(model, batch_size=1, num_counts=5, repeats=3)
    costs = []
    for kept in range(1, 64):
        model.set_schedule([1], [(kept + 0.5) / 64])
        costs.append(cost(model.config))
    assert costs == sorted(costs) and costs[0] > 0


def test_median_of_the_timings_counts_and_the_first_is_dropped(make_model, monkeypatch):
    durations = iter([100.0, 3.0, 5.0, 4.0])
    clock = {"now": 0.0, "part": 0}

    def timed(function, device):
        if clock["part"] == 0:
            clock["now"] = next(durations)
        clock["part"] = (clock["part"] + 1) % (1 + 2 * 5)  # the rest once, five parts at two counts
        return None, clock["now"]

    monkeypatch.setattr(measured_cost, "timed", timed)
    cost = measure_cost(make_model(), batch_size=2, num_counts=2, repeats=3)
    assert cost.other == 2.0 and set(cost.layer) == set(cost.selection) == {2.0}


def test_measuring_leaves_the_model_as_it_is(make_model, fake_clock):
    model = make_model(prune_layers=[4], keep_rates=[0.5], num_similar_tokens=3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    random_state = torch.random.get_rng_state()
    measure_cost(model, batch_size=1, num_counts=2, repeats=1)
    assert model.training and model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_impossible_measurements_and_other_models_are_refused(make_model, fake_clock):
    for name, value in (("batch_size", 0), ("num_counts", 1), ("repeats", 0)):
        with pytest.raises(ValueError, match=naming(f"`{name}`", value + 1, value)):
            measure_cost(make_model(), **{"batch_size": 1, name: value})
    cost = measure_cost(make_model(), batch_size=1, num_counts=2, repeats=1)
    with pytest.raises(ValueError, match=naming("hidden_size=32", "hidden_size=64")):
        cost(make_model(hidden_size=64).config)


@pytest.mark.parametrize("token_reduction", ("drop", "cluster"))
def test_measured_speedup_is_a_budget(make_model, fake_clock, images, token_reduction):
    model = make_model(token_reduction=token_reduction)
    cost = measure_cost(model, batch_size=1, repeats=1)
    full = cost(model.config)
    schedule = model.set_budget(speedup=1.5, cost=cost)
    assert schedule == schedule_for(model.config, speedup=1.5, cost=cost)
    assert 1.5 <= full / cost(model.config) <= 1.5 / 0.99
    with torch.inference_mode():
        _, seconds = fake_timed(lambda: model(images), model.device)
    assert cost(model.config) == pytest.approx(seconds / len(images), rel=0.03)
