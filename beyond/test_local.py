"""Other ways to train locally: FedProx's proximal term, AdamW."""
import math

import pytest
import torch
import torch.nn.functional as F

import fedavg
import models
from beyond.local import AdamW, Bf16, Proximal
from test_fedavg import (client_args, data, final, image_toy, run, same, toy,      # noqa: F401
                         watched)

def client(room, **more):
    """A client of toy()'s examples with one room's hooks, and its net."""
    dataset, net = toy()
    Client = type('Client', (room, fedavg.LocalUpdate), {})
    return Client(client_args(**more), dataset, range(12)), net

def test_fedprox_pulls_each_step_towards_the_start():
    proximal, net = client(Proximal, local_bs=math.inf, local_ep=3, mu=0.5)
    w, _ = proximal.train(net)
    by_hand = [p.detach().clone().requires_grad_() for p in net.parameters()]
    start = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        loss = F.cross_entropy(F.linear(proximal.images(slice(None)), *by_hand), proximal.y)
        loss = loss + 0.25 * sum((p - p_0).square().sum() for p, p_0 in zip(by_hand, start))
        for p, g in zip(by_hand, torch.autograd.grad(loss, by_hand)):
            p.data -= 0.1 * g
    for v, p in zip(w.values(), by_hand):
        torch.testing.assert_close(v, p.detach())

@pytest.mark.parametrize('engine', ['loop', 'stacked'])
def test_mu_reaches_the_run(run, engine):       # noqa: F811
    words = f'--epochs 1 --local_ep 2 --engine {engine}'
    plain, near, far = (final(run, f'{words} --mu {mu}') for mu in (0, 0.001, 5))
    w_0 = final(run, '--epochs 1 --lr 1e-30')
    def moved(w):
        return sum((w[name] - v).square().sum() for name, v in w_0.items())
    assert not same(plain, near) and moved(far) < 0.7 * moved(near) < moved(plain)

def test_adamws_first_step_is_lr_in_each_coordinate():
    adamw, net = client(AdamW, local_bs=math.inf)
    w, _ = adamw.train(net, lr=0.02)
    decayed = net.bias * (1 - 0.02 * 0.01)
    torch.testing.assert_close((w['bias'] - decayed).abs(), torch.full((3,), 0.02), rtol=1e-4,
                               atol=0)

def test_adamw_starts_each_round_afresh():
    adamw, net = client(AdamW, local_bs=4)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(adamw.train(net)[0])
    assert same(*results)

@pytest.mark.parametrize('engine', ['loop', 'auto'])
@pytest.mark.parametrize('words', ['--mu 0.1', '--optimizer adamw --lr 0.001',
                                   '--dp example --clip 1 --noise 0.1'])
def test_frozen_parameters_stay(run, words, engine, monkeypatch):       # noqa: F811
    class Frozen(models.TwoNN):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.fc1.requires_grad_(False)
    monkeypatch.setattr(models, 'TwoNN', Frozen)
    Watched, seen = watched()
    run(f'{words} --engine {engine} --epochs 2', Watched)
    stay = [name for name in seen[0] if torch.equal(seen[0][name], seen[1][name])]
    assert stay == ['fc1.weight', 'fc1.bias']

def test_bf16_computes_in_bfloat16_and_keeps_weights_in_fp32():
    dataset, net = image_toy('paper_cnn', 20)
    Client = type('Client', (Bf16, fedavg.LocalUpdate), {})
    client, seen = Client(client_args(), dataset, range(20)), []
    net.conv2.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    torch.manual_seed(0)
    w, loss = client.train(net)
    torch.manual_seed(0)
    plain, loss_fp32 = fedavg.LocalUpdate(client_args(), dataset, range(20)).train(net)
    assert set(seen[:2]) == {torch.bfloat16} and set(seen[2:]) == {torch.float32}
    assert all(v.dtype == torch.float32 for v in w.values())
    assert loss == pytest.approx(loss_fp32, rel=0.05) and not same(w, plain)

def test_bf16_is_the_same_training_in_both_engines_but_for_rounding(run):      # noqa: F811
    loop, stacked, fp32 = (final(run, words) for words in (
        '--bf16 1 --engine loop', '--bf16 1 --engine stacked', ''))
    flat = [torch.cat([v.flatten() for v in w.values()]) for w in (loop, stacked, fp32)]
    assert (flat[0] - flat[1]).norm() < 0.02 * flat[0].norm()
    assert 0 < (flat[1] - flat[2]).norm() < 0.05 * flat[2].norm()
