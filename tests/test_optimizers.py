from collections import Counter

import pytest
import torch
from ignite.engine import Engine
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bundle.errors import InputError
from bundle.networks import MultiScaleResidualNet
from bundle.optimizers import GradientClipping, layerwise_parameters, moving_average


def rates(network, lr=1e-3, **kwargs):
    """Learning rate of every parameter, by name."""
    names = {id(p): name for name, p in network.named_parameters()}
    return {names[id(p)]: group["lr"] for group in layerwise_parameters(network, lr, **kwargs) for p in group["params"]}


def assert_each_once(network, expected):
    counts = Counter(id(p) for group in layerwise_parameters(network, 1e-3) for p in group["params"])
    assert counts == Counter(id(p) for p in expected)


@pytest.fixture(scope="module")
def paper_network():
    return MultiScaleResidualNet()


def test_every_parameter_appears_once(paper_network):
    assert_each_once(paper_network, paper_network.parameters())


def test_optimizer_accepts_the_groups(paper_network):
    optimizer = torch.optim.Adam(layerwise_parameters(paper_network, 1e-3))
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 7_362_068


@pytest.mark.parametrize(
    "layer, fan_in",
    [
        ("extract.0", 9),
        ("extract.2", 1152),
        ("mapping.0.first.0", 1152),
        ("mapping.3.second.2", 1152),
        ("mapping.1.branch5", 3200),
        ("mapping.2.branch7", 6272),
        ("reconstruct.0", 1152),
    ],
)
@pytest.mark.parametrize("lr", [1e-3, 2.0])
def test_rate_falls_with_the_fan_in(paper_network, layer, fan_in, lr):
    found = rates(paper_network, lr)
    assert found[f"{layer}.weight"] == pytest.approx(lr * min(1, 256 / fan_in))
    assert found[f"{layer}.bias"] == found[f"{layer}.weight"]


def test_slopes_learn_at_the_base_rate(paper_network):
    slopes = [name for name, p in paper_network.named_parameters() if p.shape == (1,) and name.endswith("weight")]
    assert len(slopes) == 19
    assert {rates(paper_network, 1e-3)[name] for name in slopes} == {1e-3}


@pytest.mark.parametrize("reference, expected", [(1, 1 / 72), (36, 0.5), (72, 1.0), (1000, 1.0)])
def test_reference_fan_in_sets_where_the_rate_starts_to_fall(reference, expected):
    assert rates(nn.Conv2d(8, 4, 3), 1.0, reference_fan_in=reference)["weight"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "layer, fan_in",
    [
        (nn.Linear(512, 3), 512),
        (nn.Conv2d(64, 64, 3, groups=2), 288),
        (nn.ConvTranspose2d(56, 1, 9, padding=4), 56 * 81),
        (nn.ConvTranspose2d(64, 64, 3, padding=1, groups=2), 288),
    ],
    ids=["linear", "grouped", "transposed", "transposed and grouped"],
)
def test_fan_in_is_the_number_of_values_an_output_sums(layer, fan_in):
    assert rates(layer, 1.0)["weight"] == pytest.approx(256 / fan_in)


def test_groups_come_with_the_highest_rate_first(paper_network):
    found = [group["lr"] for group in layerwise_parameters(paper_network, 1e-3)]
    assert found == pytest.approx([1e-3, 1e-3 * 256 / 1152, 1e-3 * 256 / 3200, 1e-3 * 256 / 6272])


def test_shared_module_counts_once():
    layer = nn.Conv2d(4, 4, 3)
    network = nn.Sequential(layer, nn.Sequential(layer, nn.PReLU()), layer)
    assert_each_once(network, [layer.weight, layer.bias, network[1][1].weight])


def test_shared_weight_counts_once():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False))
    network[1].weight = network[0].weight
    assert_each_once(network, [network[0].weight])


def test_frozen_parameters_are_left_out():
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    network[0].requires_grad_(False)
    network[1].bias.requires_grad_(False)
    assert_each_once(network, [network[1].weight])


def test_a_frozen_network_is_refused():
    with pytest.raises(InputError, match="Conv2d has no weights to train"):
        layerwise_parameters(nn.Conv2d(4, 4, 3).requires_grad_(False), 1e-3)


def test_the_average_follows_a_short_training_too():
    """The weights go from 0 to 1 in the first step and stay there."""
    network = nn.Linear(1, 1, bias=False)
    averages = []
    for decay in (0.999, 0.5):
        nn.init.zeros_(network.weight)
        average = AveragedModel(network, multi_avg_fn=moving_average(decay))
        average.update_parameters(network)  # the first call copies
        nn.init.ones_(network.weight)
        for _ in range(100):
            average.update_parameters(network)
        averages.append(float(average.module.weight))
    expected = 1.0
    for n in range(1, 101):
        expected *= (1 + n) / (10 + n)
    assert averages[0] == pytest.approx(1 - expected)
    assert averages[1] == pytest.approx(1)


def test_gradients_are_clipped_before_the_step():
    network = torch.nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    GradientClipping(network, optimizer, 0.5).attach(Engine(lambda engine, batch: None))
    before = network.weight.detach().clone()
    (100 * network(torch.ones(1, 3)).sum()).backward()
    optimizer.step()
    assert float((network.weight - before).norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("largest", [0, -1])
def test_a_bound_that_is_none_is_refused(largest):
    network = torch.nn.Linear(3, 1)
    with pytest.raises(InputError, match="largest_gradient must be positive"):
        GradientClipping(network, torch.optim.SGD(network.parameters(), lr=1.0), largest)
