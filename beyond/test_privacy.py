"""Differential privacy: the accountant against independent ones, DP-FedAvg and DP-SGD by hand."""
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fedavg
import sampling
from beyond.accountant import ORDERS, largest, least_noise, renyi
from beyond.privacy import PrivateClient, PrivateServer, clip, epsilon, poisson
from beyond.test_wire import server
from beyond.wire import Wire
from test_fedavg import client_args, data, final, refused, run, toy     # noqa: F401

# {(q, noise, steps, delta): epsilon by dp-accounting 0.6's RdpAccountant}
ACCOUNTED = {
    (0.01, 4, 10000, 1e-5): 1.03549, (256 / 60000, 1.1, 14040, 1e-5): 2.594363,
    (0.1, 0.5, 10, 1e-5): 14.418327, (1, 5, 50, 1e-5): 7.077392,
    (0.001, 0.8, 100000, 1e-6): 3.187805, (0.02, 10, 1000, 1e-8): 0.342466,
    (0.1, 1, 200, 1e-3): 8.254141}

@pytest.mark.parametrize('case', ACCOUNTED)
def test_epsilon_is_what_an_independent_accountant_says(case):
    assert epsilon(*case) == pytest.approx(ACCOUNTED[case], rel=0.01)

@pytest.mark.parametrize('q, noise', [(0.1, 1.0), (0.5, 2.0), (0.01, 0.7), (0.9, 5.0)])
def test_renyi_divergences_are_those_of_the_integral(q, noise):
    x = np.linspace(-40 * noise, 40 * noise + 40, 2_000_001)
    # of N(0) mixed with N(1) to N(0)
    ratio = np.logaddexp(math.log(1 - q), math.log(q) + (2 * x - 1) / (2 * noise**2))
    computed = renyi(q, noise)
    for i in (0, 5, 19, 56, 95):            # orders 1.5, 2, 3.4, 7.1 and 11
        a = ORDERS[i]
        log_density = a * ratio - x**2 / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
        top = log_density.max()
        integral = np.exp(log_density - top).sum() * (x[1] - x[0])
        assert computed[i] == pytest.approx((top + math.log(integral)) / (a - 1), rel=1e-5)

def test_epsilon_of_extremes_is_a_number_or_an_error():
    for q in (0, 1e-300, 1e-9, 0.5, 1 - 1e-12, 1):
        for noise in (0, 1e-200, 1e-3, 0.1, 1e3, 1e100, 1e200):
            found = [epsilon(q, noise, steps, 1e-5) for steps in (0, 1, 1000, 10**6)]
            assert found == sorted(found) and found[0] == 0
            assert (found[3] < math.inf) == (q == 0 or noise > 1e-200), (q, noise, found)
    for bad in ((-0.1, 1, 1, 0.1), (1.1, 1, 1, 0.1), (0.1, -1, 1, 0.1), (0.1, 1, -1, 0.1),
                (0.1, 1, 1, 0), (0.1, 1, 1, 1), (math.nan, 1, 1, 0.1), (0.1, math.nan, 1, 0.1),
                (0.1, math.inf, 1, 0.1)):
        with pytest.raises(ValueError):
            epsilon(*bad)

def test_the_least_noise_spends_what_is_planned_and_no_more():
    def cost(noise):
        return epsilon(0.1, noise, 50, 1e-3)
    noise = least_noise(cost, 3.0)
    assert cost(noise) <= 3 < cost(noise * 0.995)
    with pytest.raises(ValueError, match='no noise'):
        least_noise(lambda noise: 1, 0.5)

def test_clipping_shortens_what_is_longer():
    v = torch.tensor([3.0, 4.0])
    assert clip(v, 1).tolist() == pytest.approx([0.6, 0.8]) and clip(v, 6).tolist() == [3, 4]
    assert clip(torch.zeros(3), 1).tolist() == [0, 0, 0]

##################################### DP-FedAvg #####################################

def averaged(w, updates, noise, S=1.0):
    """DP-FedAvg's average of the updates, {k: w_k}, over C K = 4 with noise on their sum."""
    class Average:
        def average(self, updates, w, r):
            return fedavg.FedAvg(updates)
    made = server(w, PrivateServer, Wire, Average, clip=S, frac=0.4)
    made.noise, r = noise, fedavg.Round(1)
    r.kept = {}
    terms = (fedavg.Update(k, w_k, 1, 0.0) for k, w_k in updates.items())
    return made.average(made.receive(terms, w, r), w, r)['v']

def test_dp_fedavg_is_a_clipped_noised_sum_over_a_fixed_denominator():
    w = {'v': torch.tensor([1.0, 1.0])}
    updates = {0: {'v': torch.tensor([4.0, 5.0])}, 1: {'v': torch.tensor([1.0, 0.5])}}
    by_hand = torch.tensor([1 + 0.6 / 4, 1 + (0.8 - 0.5) / 4])
    torch.testing.assert_close(averaged(w, updates, 0.0), by_hand)
    w = {'v': torch.zeros(100000)}
    for updates in ({}, {k: w for k in range(9)}):      # the noise is there without updates too
        assert averaged(w, updates, 3.0).std().item() == pytest.approx(3 / 4, rel=0.02)

def test_poisson_sampling_draws_each_client_on_its_own():
    drawn = [poisson(20, 0.1, sampling.rng(0, t)) for t in range(2000)]
    sizes = np.bincount([len(S_t) for S_t in drawn]) / 2000
    assert np.mean([len(S_t) for S_t in drawn]) == pytest.approx(2, rel=0.05)
    assert sizes[0] == pytest.approx(0.9**20, rel=0.15)
    together = np.mean([{3, 4} <= set(S_t.tolist()) for S_t in drawn])
    assert together == pytest.approx(0.01, abs=0.006)

def test_dp_adds_noise_of_z_times_s_to_what_is_not_pruned(run):     # noqa: F811
    words = ('--dp user --clip 0.5 --lr 1e-9 --epochs 1 --frac 0.4 --prune 0.5 --prune_begin 0 '
             '--prune_end 1 --noise')
    a, b = (torch.cat([v.flatten() for v in final(run, f'{words} {noise}').values()])
            for noise in (0, 3))
    assert ((a - b) == 0).sum() == 99400 == (b == 0).sum()
    assert (a - b)[a != 0].std().item() == pytest.approx(3 * 0.5 / 4, rel=0.02)     # z S / (C K)

def test_dp_runs_log_what_they_cost_and_stop_when_it_is_spent(run, capsys, tmp_path):   # noqa: F811
    history = run('--dp user --clip 0.5 --noise 0.8 --frac 0.1 --epochs 12')
    delta = 10 ** -1.1
    assert [row['epsilon'] for row in history] == [
        epsilon(0.1, 0.8, t, delta) for t in range(1, 13)]
    out = capsys.readouterr().out
    assert 'epsilon 0.346 at delta 0.079' in out and ' at delta 0.0794 (user' in out
    assert any(row['clients'] == 0 for row in history)
    assert len({row['test_loss'] for row in history}) == 12
    words = f'--dp user --clip 0.5 --epsilon 4 --checkpoint {tmp_path}/c.pt'
    run(words)
    noise = float(re.search(r'noise ([\d.]+) for 3 rounds', capsys.readouterr().out)[1])
    assert epsilon(0.3, noise, 3, delta) <= 4 < epsilon(0.3, noise, 4, delta)
    assert len(run(f'{words} --epochs 6 --resume')) == 3
    assert '--epsilon 4.0 is spent after round 3' in capsys.readouterr().out

def test_dp_sgd_costs_what_it_costs_the_client_that_is_sampled_most(run):      # noqa: F811
    history = run('--dp example --clip 1 --noise 2 --unequal 1')
    n_k, costs = sampling.sizes(300, 10, unequal=True, seed=1).tolist(), []
    delta = max(n_k) ** -1.1
    times = np.zeros(10, int)
    for t in (1, 2, 3):
        times[sampling.select(10, 0.3, sampling.rng(1, 'select', t))] += 1
        costs.append(max(epsilon(min(10 / n, 1), 2, rounds * math.ceil(n / 10), delta)
                         for n, rounds in zip(n_k, times.tolist())))
    assert [row['epsilon'] for row in history] == costs
    whole = run('--dp example --clip 1 --noise 2 --local_bs inf --frac 1')      # no sampling
    assert [row['epsilon'] for row in whole] == [
        epsilon(1, 2, t, 30 ** -1.1) for t in (1, 2, 3)]

def test_the_largest_epsilon_is_that_of_all_cases():
    draw = np.random.default_rng(0)
    for noise in (0.4, 1.0, 30.0):
        n = draw.integers(1, 3000, 12)
        cases = [(min(10 / v, 1), int(steps)) for v, steps in zip(n, draw.integers(0, 400, 12))]
        assert largest(cases, noise, 1e-4) == max(epsilon(q, noise, steps, 1e-4)
                                                  for q, steps in cases)
    # The second costs more at the first order that is tried, the first at its best one.
    for noise, cases in ((0.6, [(0.5, 2), (0.001, 100000)]), (1.0, [(0.9, 1), (0.02, 1000)])):
        assert largest(cases, noise, 1e-4) == epsilon(cases[0][0], noise, cases[0][1], 1e-4)
    assert largest([(0.1, 0), (0, 5)], 1.0, 1e-4) == 0

def test_a_delta_that_publishing_someone_meets_is_refused(refused, run):        # noqa: F811
    for words, said in (
            ('--dp user --num_users 9', 'for 9 clients'),
            ('--dp user --num_users 20 --delta 0.06', 'take 1/20 or less'),
            ('--dp example --num_users 60', 'for 5 examples'),
            ('--dp example --num_users 10 --delta 0.04', 'take 1/30 or less')):
        assert said in refused(f'--clip 1 --noise 1 {words}'.split())
    assert len(run('--dp user --num_users 9 --clip 1 --noise 1 --delta 0.01')) == 3

def test_a_class_that_would_void_epsilon_is_refused_in_a_line(run, capsys):     # noqa: F811
    class Adds:                 # to what the room does
        def adjust(self, parameters, start):
            super().adjust(parameters, start)
        def average(self, updates, w, r):
            return super().average(updates, w, r)
    class Averages:
        def average(self, updates, w, r):
            return fedavg.FedAvg(updates) or w
    with pytest.raises(SystemExit):
        run('--dp user --clip 1 --noise 1 --epochs 1 --frac 1', Averages)
    assert 'averages the updates without clipping and noise' in capsys.readouterr().err
    for words, names in (('user', ('weight', 'select')),
                         ('example', ('gradient', 'batches', 'train'))):
        words = f'--dp {words} --clip 1 --noise 1 --epochs 1 --frac 1'
        for name in names:
            with pytest.raises(SystemExit):
                # train is also a step of the server, so that a class of clients says which it is.
                run(words, type('Own', (fedavg.LocalUpdate,) * (name == 'train'),
                                {name: lambda *_: 1, '__module__': 'mine'}))
            assert f'Own has a {name} of its own' in capsys.readouterr().err
        run(words, Adds)

def test_what_a_class_makes_of_an_update_is_clipped(run):      # noqa: F811
    class Louder:
        def receive(self, updates, w, r):
            for u in super().receive(updates, w, r):
                yield u._replace(w={name: 9 * v for name, v in u.w.items()})
    before = run('--dp user --clip 1e-6 --noise 0 --epochs 2 --frac 1', Louder)
    assert before[0]['test_loss'] == pytest.approx(before[1]['test_loss'], abs=1e-4)

class Frozen(nn.Module):
    """A linear net whose first layer does not train."""
    def __init__(self, args):
        super().__init__()
        self.first, self.last = nn.Linear(784, 20), nn.Linear(20, 10)
        self.first.requires_grad_(False)

    def forward(self, x):
        return self.last(self.first(x.flatten(1)))

class Normed(Frozen):
    """One with batch norm."""
    def __init__(self, args):
        super().__init__(args)
        self.last = nn.Sequential(nn.BatchNorm1d(20), self.last)

def test_dp_adds_no_noise_to_frozen_layers_and_takes_no_running_statistics(
        run, capsys):       # noqa: F811
    words = '--dp user --clip 1 --lr 1e-9 --frac 1 --epochs 1 --model beyond.test_privacy:'
    a, b = (final(run, f'{words}Frozen --noise {noise}') for noise in (0, 2))
    assert torch.equal(a['first.weight'], b['first.weight'])
    assert (a['last.weight'] - b['last.weight']).std().item() == pytest.approx(0.2, rel=0.2)
    with pytest.raises(SystemExit):
        run(f'{words}Normed --noise 2')
    assert 'Normed has buffers' in capsys.readouterr().err

######################################## DP-SGD ########################################

def client(**more):
    """A client of toy()'s 12 examples that trains by DP-SGD with B = 8."""
    Client = type('Client', (PrivateClient, fedavg.LocalUpdate), {})
    args = client_args(**dict(local_bs=8, clip=1.0, noise=0.0) | more)
    return Client(args, toy()[0], range(12))

@pytest.mark.parametrize('S', [1e6, 0.3])
def test_dp_sgd_clips_each_examples_gradient(S):
    dataset, net = toy()
    x, y = dataset.tensors
    by_hand = [torch.zeros_like(p) for p in net.parameters()]
    for i in range(12):
        loss = F.cross_entropy(net(x[i:i + 1]), y[i:i + 1])
        gradient = torch.autograd.grad(loss, list(net.parameters()))
        norm = torch.cat([v.flatten() for v in gradient]).norm().item()
        for v, u in zip(by_hand, gradient):
            v += min(1, S / norm) * u / 8
    loss = client(clip=S).gradient(net, x, y)
    for v, p in zip(by_hand, net.parameters()):
        torch.testing.assert_close(p.grad, v)
    assert loss.item() == pytest.approx(F.cross_entropy(net(x), y).item())
    noised = []
    for n in (0, 12):       # the noise does not depend on the number of examples
        torch.manual_seed(0)
        client(clip=S, noise=2 / S).gradient(net, x[:n], y[:n])
        noised.append(net.weight.grad.clone())
    torch.testing.assert_close(noised[1] - noised[0], by_hand[0], rtol=1e-3, atol=1e-5)
    big = nn.Linear(5, 3000)
    client(clip=S, noise=2 / S).gradient(big, x[:0], y[:0])
    assert big.weight.grad.std().item() == pytest.approx(2 / 8, rel=0.05)

def test_dp_sgds_batches_are_poisson_samples():
    torch.manual_seed(0)
    batches = list(client().batches(25, 200, 10))
    lengths = [len(b) for b in batches]
    assert len(batches) == 600 and np.mean(lengths) == pytest.approx(10, rel=0.03)
    assert len(set(lengths)) > 8 and np.bincount(torch.cat(batches)).min() > 180
    dataset, net = toy()
    net.weight.data[0, 0] = math.inf        # gradients that are not finite do not count
    client(noise=1.0).gradient(net, *dataset.tensors)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())

def test_a_clients_training_is_dp_sgd():
    net, more = nn.Linear(5, 3000), dict(local_bs=4, local_ep=3, clip=0.01)
    moved = client(noise=40.0, **more).train(net)[0]['weight'] - net.weight
    deviation = 0.1 * 40 * 0.01 / 4 * 9 ** 0.5                      # lr z S / B, in nine steps
    assert moved.std().item() == pytest.approx(deviation, rel=0.05)
    w, _ = client(**more).train(net)
    far = sum((w[name] - v).square().sum() for name, v in net.state_dict().items()).sqrt()
    assert 0 < far < 0.1 * 0.01 / 4 * 60                            # 60 examples at most
