"""Stragglers: who is lost, late or corrupt, and that the others are averaged.

    python -m pytest -q beyond/test_stragglers.py
"""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import beyond
import compress
import fedavg
import sampling
from beyond.stragglers import Corrupt, corrupted, durations, in_time, lose
from beyond.wire import Wire
from test_fedavg import client_args, data, final, near, refused, run, same, toy     # noqa: F401

def test_lost_clients_come_at_random_and_are_left_out(run):     # noqa: F811
    lost = [lose(range(100), 0.3, sampling.rng(0, t)) for t in range(50)]
    assert np.mean([len(them) for them in lost]) == pytest.approx(30, rel=0.1)
    assert {stage for them in lost for stage in them.values()} == {0, 1, 2}
    history = run('--drop 0.5 --frac 1')
    assert all(row['clients'] + row['lost'] == 10 for row in history)
    assert sum(row['lost'] for row in history) > 5
    assert [row['up_bytes'] / row['clients'] for row in history] == [26 + 4 * 199210] * 3

def test_a_round_that_loses_all_clients_leaves_the_weights(run, capsys):        # noqa: F811
    rows = run('--drop 1 --epochs 2')
    assert [row['clients'] for row in rows] == [0, 0] and rows[0]['train_loss'] == ''
    assert rows[0]['test_loss'] == rows[1]['test_loss']
    out = capsys.readouterr().out
    assert 'round 1: no update arrived' in out and out.count('3 lost') == 2

class NotFinite:
    """Clients whose updates hold what `bad` says, {k: value}."""
    bad = {}

    def train(self, w, S_t, r):
        for u in super().train(w, S_t, r):
            value = self.bad.get(u.k)
            w_k = u.w if value is None else {
                name: torch.full_like(v, value) for name, v in u.w.items()}
            yield u._replace(w=w_k)

def test_lost_clients_are_renormalised_and_those_that_diverged_counted(run, capsys):    # noqa: F811
    """The average is over the survivors: as if only they had been sampled."""
    S_t = sampling.select(10, 0.4, sampling.rng(1, 'select', 1)).tolist()
    bad = type('Bad', (NotFinite,), {'bad': {S_t[0]: math.nan, S_t[1]: math.inf}})
    class Survivors:
        """The sample without the clients that diverge."""
        def select(self, r):
            return {k: E for k, E in super().select(r).items() if k not in bad.bad}
    words, ends = '--frac 0.4 --epochs 1 --unequal 1 --engine loop', []
    class Kept:
        """Notes the weights."""
        def end(self, w, row, r):
            super().end(w, row, r)
            ends.append((w, row))
    for mine in (bad, Survivors):
        run(words, Kept, mine)
    (w, row), (expected, alone) = ends
    assert same(w, expected) and row['train_loss'] == alone['train_loss']
    assert [row['clients'], row['rejected'], alone['clients']] == [2, 2, 2]
    out = capsys.readouterr().out
    assert all(f'client {k} is left out: it holds NaN' in out for k in bad.bad)
    bad.bad = dict.fromkeys(range(10), math.nan)
    with pytest.raises(SystemExit) as e:
        run(words, bad)
    assert e.value.code == 1 and 'lower --lr' in capsys.readouterr().err

def test_who_is_late_and_what_the_others_do_in_time():
    seconds = {1: 0.5, 2: 2.0, 5: 4.0, 7: 9.0}
    def timed(S_t, E, m, deadline=math.inf):
        return in_time({k: seconds[k] for k in S_t}, E, m, deadline, sampling.rng(0))
    assert timed([1, 2, 5, 7], 4, 4) == ({1: 4, 2: 4, 5: 4, 7: 4}, 9)
    assert timed([1, 2, 5, 7], 4, 4, deadline=3.0) == ({1: 4, 2: 4, 5: 3.0, 7: 4 / 3}, 3)
    # Client 7 would do 4/9 of an epoch.
    assert timed([1, 2, 5, 7], 4, 4, deadline=1.0) == ({1: 4, 2: 2, 5: 1}, 1)
    assert timed([1, 5, 7], 1, 2) == ({1: 1, 5: 1}, 4)              # the first two
    assert timed([1], 1, 2, deadline=3.0) == ({1: 1}, 3)            # it waits in vain for another
    assert timed([], 1, 2) == ({}, 0)

def test_clients_that_finish_at_once_count_by_turns():
    draw, alike = sampling.rng(0), dict.fromkeys(range(10), 1.0)
    first = [k for _ in range(300) for k in in_time(alike, 1, 5, math.inf, draw)[0]]
    assert len(first) == 1500 and min(first.count(k) for k in range(10)) > 100

def test_durations_are_examples_over_a_log_normal_speed():
    assert durations([10, 20, 40], 0).tolist() == [0.5, 1, 2]
    speeds = np.log(durations(np.ones(20000), 0.7))
    assert abs(speeds.std() - 0.7) < 0.02
    assert (durations([1, 1, 1], 1, 0) != durations([1, 1, 1], 1, 1)).any()

def test_a_fraction_of_an_epoch_is_whole_batches():
    client = fedavg.LocalUpdate(client_args(), toy()[0], range(12))
    for n_k, E, B, steps in ((25, 1.5, 10, 4), (25, 3, math.inf, 3), (3, 2, 10, 2),
                             (30, 1.7, 10, 5), (30, 5 / 3, 10, 5)):
        batches = client.batches(n_k, E, B)
        assert len(batches) == steps
        seen = torch.cat(batches)
        assert sorted(seen[:n_k].tolist()) == list(range(n_k))

def test_a_deadline_far_away_changes_nothing_and_a_close_one_does(run, capsys):     # noqa: F811
    words = '--local_ep 2 --frac 0.5 --seed 2 --speeds lognormal:1 --deadline'
    none = final(run, words.partition('--speeds')[0])
    assert same(none, final(run, f'{words} 1e9'))
    close = final(run, f'{words} 0.7')
    assert not same(none, close) and 'simulated time 2.1' in capsys.readouterr().out
    assert near(close, final(run, f'{words} 0.7 --engine loop'))
    duration = durations([30] * 10, 1.0, 2)
    history = run(f'{words} 0.7')
    for row in history:
        S_t = sampling.select(10, 0.5, sampling.rng(2, 'select', row['round']))
        assert row['late'] == sum(duration[k] > 1.4 for k in S_t) == 5 - row['clients']
        assert row['round_time'] == 0.7
    assert sum(row['late'] for row in history)

def test_the_first_m_of_more_are_averaged(run):     # noqa: F811
    history = run('--speeds lognormal:1 --overselect 0.5 --frac 0.4')
    duration = durations([30] * 10, 1.0, 1)
    for row in history:
        S_t = sampling.select(10, 0.4, sampling.rng(1, 'select', row['round']), 0.5)
        assert len(S_t) == 6 and row['clients'] == 4 and row['late'] == 2
        assert row['round_time'] == sorted(duration[S_t])[3]
        assert row['down_bytes'] == 6 / 4 * row['up_bytes']

class Still:
    """A server that does not train."""
    def __init__(self, args):
        self.args = args

@pytest.mark.parametrize('quantize, topk', [(None, None), (4, 0.5)])
def test_each_kind_of_damage_is_refused_by_decode(quantize, topk):
    server = type('Server', (Corrupt, Wire, beyond.Room, Still), {})(
        SimpleNamespace(quantize=quantize, topk=topk, seed=1))
    r, x = fedavg.Round(1), torch.arange(5.0)
    r.corrupt = {k: k for k in range(4)}
    payload = server.encode(x, 9, r)
    assert server.transmit(payload, x, 9, r) == payload         # an honest client's
    for k, reason in enumerate(('NaN', 'NaN', 'not an encoded update', 'values')):
        with pytest.raises(ValueError, match=reason):
            compress.decode(server.transmit(payload, x, k, r), 5)

def test_corrupt_updates_are_refused_in_turn_and_the_others_averaged(run, capsys):      # noqa: F811
    kinds = [*corrupted(range(6), 1.0, sampling.rng(0)).values()]
    assert {*kinds} == {0, 1, 2, 3} and all((b - a) % 4 == 1 for a, b in zip(kinds, kinds[1:]))
    hits = [len(corrupted(range(10), 0.3, sampling.rng(t))) for t in range(2000)]
    assert np.mean(hits) == pytest.approx(3, abs=0.1)
    history = run('--corrupt 0.4 --frac 1 --epochs 4')
    said = capsys.readouterr().out
    assert all(row['rejected'] + row['clients'] == 10 for row in history)
    assert said.count('is left out') == sum(row['rejected'] for row in history) > 8
    # All are corrupt, on purpose: the run goes on.
    assert [row['clients'] for row in run('--corrupt 1 --frac 0.1 --epochs 2')] == [0, 0]

def test_a_corrupt_client_keeps_what_it_had(run):       # noqa: F811
    """Its residual is that of the round before."""
    before, kept = {}, []
    class Watched:
        """Compares the residuals of two rounds."""
        def end(self, w, row, r):
            super().end(w, row, r)
            for k, v in self.residuals.items():
                if k in r.corrupt and k in before:
                    kept.append(torch.equal(v, before[k]))
            assert not set(self.residuals) & set(r.corrupt) - set(before)
            before.update(self.residuals)
    run('--corrupt 0.4 --frac 1 --topk 0.1', Watched)
    assert kept and all(kept)

def test_what_cannot_straggle_is_refused(refused, monkeypatch):     # noqa: F811
    assert 'take 1.0 or more' in refused(['--deadline', '0.9'])
    monkeypatch.setattr(sampling, 'load', lambda *_: pytest.fail('data were read'))
    for words, said in (
            ('--drop 1.1', '--drop'), ('--corrupt 2', '--corrupt'), ('--speeds 1', 'lognormal:'),
            ('--speeds lognormal', "'lognormal' is invalid"),
            ('--speeds lognormal:x', 'as lognormal:1'), ('--deadline 0', '--deadline'),
            ('--overselect -1', '--overselect'), ('--overselect 10', '110 of 100'),
            ('--overselect 1 --secagg 1', 'given up'), ('--corrupt 0.1 --secagg 1', 'garbage')):
        assert said in refused(words.split())
