"""Secure aggregation: the protocol, exact under dropouts, and what a run makes of it."""
import itertools
import json
import math

import numpy as np
import pytest
import torch

import fedavg
from beyond import crypto
from beyond import protocol as protocol_
from beyond.accountant import binomial
from beyond.crypto import PRIME, agree, join, seal, split, unseal
from beyond.privacy import PrivateServer
from beyond.protocol import at_least, neighborhood, ring, share_threshold
from beyond.secure import STEPS, Secure, SecureClient, secure_sum
from beyond.test_wire import server
from beyond.wire import Wire
from test_fedavg import data, final, refused, run, same     # noqa: F401

def test_the_group_is_rfc_3526s():
    def arctan(k, one):         # of 1/k
        total, term, i = 0, one // k, 1
        while term:
            total += term // i if i % 4 == 1 else -(term // i)
            term, i = term // k**2, i + 2
        return total
    one = 1 << 2100
    pi = 4 * (4 * arctan(5, one) - arctan(239, one))
    assert PRIME == 2**2048 - 2**1984 - 1 + 2**64 * ((pi >> (2100 - 1918)) + 124476)

def test_shares_give_the_secret_and_too_few_do_not():
    secret = 2**256 - 12345
    shares = split(secret, [1, 2, 5, 9, 14], 3)
    for xs in ((1, 2, 5), (14, 9, 2), (1, 2, 5, 9, 14)):
        assert join({x: shares[x] for x in xs}) == secret
    assert join({x: shares[x] for x in (1, 2)}) != secret
    sealed = seal(b'k' * 32, b'a share')
    assert unseal(b'k' * 32, sealed) == b'a share' and b'share' not in sealed
    for bad in (sealed[:-1], b'x' + sealed[1:], b''):
        with pytest.raises(ValueError):
            unseal(b'k' * 32, bad)
    for public in (0, 1, PRIME - 1, PRIME):
        with pytest.raises(ValueError):
            agree(5, public)

def total_of(clients, ks):
    """The sum modulo 2^32 of what the clients ks add."""
    return sum(clients[k].x.astype(np.uint64) for k in ks).astype(np.uint32)

def protocol(m, d, lost, threshold, xs=None, graph=None):
    """secure_sum among m clients with random terms, of which those in lost, {k: step}, no longer
    answer from that step on: its result, the clients, and all answers."""
    draw = np.random.default_rng(0)
    terms = {7 * k: draw.integers(2**32, size=d, dtype=np.uint32) if xs is None else xs
             for k in range(m)}
    clients = {k: SecureClient(k, x, graph[1] if graph else threshold) for k, x in terms.items()}
    answers = {step: {} for step in STEPS}
    def ask(k, step, message):
        if k in lost and STEPS.index(step) >= STEPS.index(lost[k]):
            return None
        answers[step][k] = clients[k].answer(step, message)
        return answers[step][k]
    try:
        result = secure_sum(ask, list(clients), threshold, d, graph)
    except ValueError as e:
        result = e
    return result, clients, answers

@pytest.fixture
def quick(monkeypatch):
    """A group that is too small to be secure, for tests with many clients."""
    for module in (protocol_, crypto):
        monkeypatch.setattr(module, 'PRIME', 2**128 - 159)

@pytest.mark.parametrize('lost', [
    {}, {0: 'advertise'}, {7: 'share'}, {14: 'mask'}, {21: 'reveal'},
    {7: 'share', 14: 'mask', 28: 'reveal'}])
def test_the_sum_of_the_survivors_is_exact(lost):
    (total, survivors), clients, answers = protocol(6, 50, lost, 3)
    assert survivors == [k for k in clients if lost.get(k) in (None, 'reveal')]
    assert np.array_equal(total, total_of(clients, survivors))
    shares = {k: json.loads(answer) for k, answer in answers['reveal'].items()}
    for v in answers['share']:      # the server has the seed of a survivor, the key of another
        points = {k + 1: int(theirs[str(v)], 16) for k, theirs in list(shares.items())[:3]}
        assert join(points) == (clients[v].seed if v in survivors else clients[v].masking)
    for k in shares:
        with pytest.raises(ValueError, match='next'):
            clients[k].answer('reveal', json.dumps(survivors).encode())

@pytest.mark.parametrize('step', STEPS)
def test_the_sum_over_a_graph_is_exact_whoever_is_lost(quick, step):
    graph = neighborhood(30, 20)
    assert graph[0] < 20
    lost = {7 * k: step for k in range(0, 30, 3)}
    (total, survivors), clients, answers = protocol(30, 9, lost, 20, graph=graph)
    assert survivors == [k for k in clients if step == 'reveal' or k not in lost]
    assert np.array_equal(total, total_of(clients, survivors))
    sizes = {len(json.loads(answer)) for answer in answers['share'].values()}
    assert sizes == {graph[0]} or step == 'advertise'
    # Too few of a client's neighbours are there, though enough clients are.
    error, _, _ = protocol(30, 9, lost, 20, graph=(2, 3))
    assert 'neighbours have answered' in str(error) or 'have answered' in str(error)

def test_a_ring_is_regular_mutual_and_random():
    ks = list(range(0, 40, 2))
    for degree in (2, 6, 18):
        near = ring(ks, degree)
        assert all(len(near[k]) == degree and k not in near[k] for k in ks)
        assert all(k in near[v] for k in ks for v in near[k])
    assert ring(ks, 6) != ring(ks, 6)
    assert ring(ks, 19) == {k: set(ks) - {k} for k in ks} == ring(ks, 100)

def test_the_neighborhood_is_the_one_that_the_papers_authors_compute():
    # Their tests' degrees and thresholds, of which they take the least, for a server that is
    # curious, with 40 bits of security and 20 of correctness: {(m, corrupt, dropped)}.
    for (m, corrupt, dropped), (degree, t) in {
            (100, 0.05, 0.33): (28, 6), (1000, 0.05, 0.33): (72, 24),
            (10000, 0.05, 0.33): (86, 29), (100, 0.33, 0.33): (68, 34),
            (100, 0.33, 0.05): (34, 29), (1000, 0.33, 0.05): (78, 60)}.items():
        found = neighborhood(m, math.ceil(round((1 - dropped) * m, 9)), corrupt, 40, 20)
        assert found[0] == degree and found[1] >= t == share_threshold(m, degree, corrupt)
    assert neighborhood(4, 3) is None and neighborhood(100, 2) is None

def test_tails_are_those_of_drawing_without_replacement():
    draws = list(itertools.combinations(range(7), 3))
    for t in range(4):
        by_hand = sum(len(set(draw) & {0, 1, 2, 3}) >= t for draw in draws) / len(draws)
        assert at_least(t, 4, 7, 3) == pytest.approx(by_hand)

def test_messages_are_as_long_whatever_the_secrets_are():
    lengths = []
    for _ in range(4):
        _, _, answers = protocol(4, 5, {7: 'mask'}, 2)
        lengths.append({step: {k: len(v) for k, v in of.items()} for step, of in answers.items()})
    assert lengths[0] == lengths[1] == lengths[2] == lengths[3]

@pytest.mark.parametrize('step', STEPS)
def test_under_the_threshold_nothing_is_revealed(step):
    error, _, answers = protocol(6, 5, {0: step, 7: step, 14: step}, 4)
    assert isinstance(error, ValueError) and '4 are needed' in str(error)
    assert step == 'reveal' or not answers['reveal']

@pytest.mark.parametrize('message', [
    b'[0, 7]', b'[0, 7, 9998, 9999]', b'[7, 14, 21, 28]', b'{}', b'junk', b'[[]]'])
def test_a_client_reveals_nothing_to_a_server_that_asks_wrongly(message):
    # All have sent masked vectors; too few, unknown clients, all but itself, no list.
    _, clients, _ = protocol(6, 5, {k: 'reveal' for k in range(0, 42, 7)}, 4)
    with pytest.raises(ValueError):
        clients[0].answer('reveal', message)
    with pytest.raises(ValueError, match='next'):
        clients[0].answer('reveal', b'[0, 7, 14, 21]')
    fresh = SecureClient(0, np.zeros(3, np.uint32), 2)
    with pytest.raises(ValueError, match='next'):
        fresh.answer('mask', b'{}')
    keys = json.loads(fresh.answer('advertise', b''))
    with pytest.raises(ValueError, match='same'):
        fresh.answer('share', json.dumps({0: keys, 1: keys}).encode())
    other = json.loads(SecureClient(1, np.zeros(3, np.uint32), 2).answer('advertise', b''))
    for k in (-1, 2**521 - 2):      # whose share would be the secret itself
        fresh = SecureClient(0, np.zeros(3, np.uint32), 2)
        keys = json.loads(fresh.answer('advertise', b''))
        with pytest.raises(ValueError, match='no such number'):
            fresh.answer('share', json.dumps({0: keys, k: other}).encode())
    fresh = SecureClient(0, np.zeros(3, np.uint32), 2)
    fresh.answer('advertise', b'')
    with pytest.raises(ValueError, match='RecursionError'):
        fresh.answer('share', b'[' * 100000)

def test_answers_that_make_no_sense_are_those_of_lost_clients(quick):
    draw = np.random.default_rng(0)
    junks = (b'junk', b'{}', b'[1]', b'', b'[1, 2]', b'["x", 7]',
             json.dumps({k: 'x' for k in range(5)}).encode(), b'[' * 100000,
             json.dumps({k: 'f' * 131 for k in range(5)}).encode())
    for step, junk in itertools.product(STEPS, junks):
        terms = [draw.integers(2**32, size=5, dtype=np.uint32) for _ in range(5)]
        clients = {k: SecureClient(k, x, 3) for k, x in enumerate(terms)}
        def ask(k, at, message):
            return junk if (k, at) == (2, step) else clients[k].answer(at, message)
        total, survivors = secure_sum(ask, range(5), 3, 5)
        assert np.array_equal(total, total_of(clients, survivors)) and len(survivors) >= 4

def test_false_shares_stop_the_sum_and_those_who_sent_them_are_named():
    clients = {k: SecureClient(k, np.zeros(3, np.uint32), 3) for k in range(4)}
    def ask(k, step, message):
        answer = clients[k].answer(step, message)
        if (k, step) != (2, 'reveal'):
            return answer
        shares = {v: int(y, 16) ^ 1 << 500 for v, y in json.loads(answer).items()}
        return json.dumps({v: f'{y:0131x}' for v, y in shares.items()}).encode()
    with pytest.raises(ValueError, match='client 0 do not .* clients 0, 1, 2 has sent one'):
        secure_sum(ask, range(4), 3, 3)

def test_a_masked_vector_looks_uniform():
    _, clients, answers = protocol(3, 50000, {}, 2, np.zeros(50000, np.uint32))
    for k in clients:
        y = np.frombuffer(answers['mask'][k], '<u4')
        for byte in range(4):
            counts = np.bincount(y >> (8 * byte) & 255, minlength=256)
            chi_squared = ((counts - 50000 / 256) ** 2 / (50000 / 256)).sum()
            assert chi_squared < 360        # 255 degrees of freedom: p < 1e-5

##################################### In a run #####################################

def flat(w):
    return torch.cat([v.flatten() for v in w.values()])

def test_secure_aggregation_gives_the_weighted_mean(run):       # noqa: F811
    words = '--unequal 1 --epochs 2 --frac 0.5'
    for more in ('', '--prune 0.9 --prune_end 1'):
        seen = []
        class Watched:
            def end(self, w, row, r):
                super().end(w, row, r)
                seen.append(flat(w))
        plain = run(f'{words} {more}', Watched)
        secure = run(f'{words} {more} --secagg 1', Watched)
        a, b = seen[1], seen[3]
        assert 0 < (a - b).norm() < 5e-3 * a.norm()
        assert (a == 0).sum() == (b == 0).sum() and ((a == 0).sum() > 170000) == bool(more)
        assert plain[1]['train_loss'] == pytest.approx(secure[1]['train_loss'], rel=1e-3)
        assert secure[0]['up_bytes'] > plain[0]['up_bytes'] and secure[0]['clients'] == 5

def test_a_round_below_the_threshold_leaves_the_weights(run, capsys, tmp_path):     # noqa: F811
    history = run('--secagg 1 --frac 0.8 --drop 0.7 --epochs 4 --seed 3')
    given_up = [row['round'] for row in history if not row['clients']]
    out = capsys.readouterr().out
    assert given_up and max(given_up) > 1
    for t in given_up:
        assert f'round {t}: secure aggregation is given up' in out
        if t > 1:
            assert history[t - 1]['test_loss'] == history[t - 2]['test_loss']
    run('--secagg 1 --frac 0.8 --drop 0.9 --epochs 1 --personal layers --personal_layers fc3 '
        f'--checkpoint {tmp_path}/c.pt')
    assert 'given up' in capsys.readouterr().out
    assert torch.load(tmp_path / 'c.pt', weights_only=True)['PersonalLayers'] == {}

def test_private_and_secure_go_together(run, capsys):       # noqa: F811
    words = '--dp user --clip 0.3 --noise 0.01 --frac 0.9'
    a, b = flat(final(run, words)), flat(final(run, f'{words} --secagg 1'))
    assert 0 < (a - b).norm() < 2e-3 * a.norm()
    assert 'at least 5 clients must stay' in capsys.readouterr().out
    # Of the other 9 clients 4, or 5, with probability 0.9 each, in 3 rounds; 10^-1.1 / 10.
    assert 3 * binomial(9, 0.9, 4) < 0.00794 < 3 * binomial(9, 0.9, 5)

def prepared(w, *rooms, weights=(), **more):
    """A server of the rooms that has checked what it can sum: clients of these weights."""
    class Weights:
        def prepare(self):
            """The weights are there."""
    made = server(w, *rooms, Secure, Wire, Weights, **more)
    made.n_k, made.K = np.array(weights), len(weights)
    made.weight = lambda k: 1 if rooms else int(made.n_k[k])
    made.noise = 1.0
    Secure.prepare(made)
    return made

def test_a_terms_rounding_does_not_lengthen_it_beyond_the_clip():
    w, r = {'v': torch.zeros(1000)}, fedavg.Round(1)
    r.v = flat(w)
    made = prepared(w, PrivateServer, weights=[1] * 4, clip=0.5, quantize=12, dp='user')
    for k in range(4):
        draw = torch.Generator().manual_seed(k)
        u = fedavg.Update(k, {'v': torch.randn(1000, generator=draw)}, 1, 1.0)
        x = made.term(u, r)
        assert 0.4 < np.linalg.norm(x[:-1] * made.level - 0.5) <= 0.5
        assert x[-1] * made.level / 0.5 * 8 == pytest.approx(1.0, abs=0.01)

def test_a_sum_that_could_overflow_is_refused_and_so_is_rounding_longer_than_the_clip(capsys):
    def bits(d=3, n=6, *rooms, **more):
        return prepared({'v': torch.zeros(d)}, *rooms, weights=[n] * 10000,
                        **dict(frac=1.0) | more).bits
    private = dict(clip=1.0, dp='user')
    assert bits() == 16 and bits(n=7) == 15 and bits(n=7, quantize=15) == 15    # 60,000 fit
    assert bits(n=60, frac=0.1) == 16 and bits(n=100, quantize=11) == 11        # m of them
    assert bits(199210, 6, PrivateServer, quantize=11, **private) == 11
    assert '--secagg 1: 11 bits a value, from -1 to 1' in capsys.readouterr().out
    for words, more in (((3, 7), dict(quantize=16)), ((3, 10**6), {}), ((3, 200), {}),
                        ((199210, 6, PrivateServer), dict(quantize=10, **private))):
        with pytest.raises(SystemExit):
            bits(*words, **more)
    err = capsys.readouterr().err
    assert '15 bits a value fit' in err and ' 0 bits a value fit' in err
    assert '11 bits a value fit' in err and 'take 11 or more' in err

def test_the_sum_is_bounded_by_the_largest_clients_that_can_be_asked():
    w = {'v': torch.zeros(3)}
    sizes = [100] * 90 + [6000] * 10        # 10 of 100 are asked: 60,000 of 69,000 examples
    assert prepared(w, weights=sizes).bits == 16
    assert prepared(w, weights=[12000] + sizes[1:]).bits == 15

def test_neighbouring_data_sets_give_no_outcome_that_the_accountant_did_not_count(quick):
    """All outcomes of sampling and losing four clients, with and without a fifth one that stays:
    the sums differ by S at most, but where it decides whether there is a sum."""
    w, stay = {'v': torch.zeros(2)}, 3
    made = prepared(w, PrivateServer, weights=[1] * 5, clip=1.0, quantize=16, dp='user', frac=0.4,
                    drop=0.2)
    made.agreed, made.noise, made.delta = stay, 0.0, 1e-3
    def total(states):              # {k: whether it stays} of the sampled clients
        r = fedavg.Round(1)
        r.S_t, r.lost = dict.fromkeys(states, 1), {k: 1 for k, stays in states.items() if not stays}
        updates = (fedavg.Update(k, {'v': torch.tensor([9.0, k])}, 1, 1.0)
                   for k, stays in states.items() if stays)
        return fedavg.FedAvg(made.noised(made.receive(updates, w, r), w, r))['v'] * 0.4 * 5
    chance = {None: 0.6, False: 0.4 * 0.2, True: 0.4 * 0.8}     # not sampled, lost, stays
    leak, differences = 0, []
    for states in itertools.product(chance, repeat=4):
        others = {k: stays for k, stays in enumerate(states) if stays is not None}
        difference = (total(others | {4: True}) - total(others)).norm().item()
        if sum(others.values()) == stay - 1:
            leak += math.prod(chance[state] for state in states)
            differences.append(difference)
        else:
            assert difference <= 1 + 1e-4
    assert min(differences) > 2         # which is why it is not in S, but in delta
    assert leak == pytest.approx(binomial(4, 0.4 * 0.8, stay - 1))
    assert made.leak(stay) == pytest.approx(made.args.epochs * leak, rel=1e-6)

def test_what_decides_about_a_sum_is_paid_from_delta_or_refused(run, refused, tmp_path):  # noqa
    words = '--dp user --clip 1 --noise 1 --secagg 1'.split()
    for more, said in (('--num_users 100', 'take more clients'), ('--neighbors 4', '--dp user'),
                       ('--num_users 100 --frac 0.9 --drop 0.9', 'less --drop'),
                       ('--speeds lognormal:1 --deadline 1', '--dp user')):
        assert said.lower() in refused([*words, *more.split()]).lower()
    run(f'{" ".join(words)} --frac 0.9 --checkpoint {tmp_path}/c.pt')
    # The threshold stays what it was, so that more rounds cost more than a tenth of delta.
    line = refused([*words, *f'--frac 0.9 --num_users 10 --epochs 300 --resume --checkpoint '
                    f'{tmp_path}/c.pt'.split()])
    assert 'fewer --epochs' in line

@pytest.mark.parametrize('clip', [0.5, 10.0])
@pytest.mark.parametrize('broken', [math.nan, math.inf])
def test_a_client_that_diverges_does_not_decide_whether_there_is_a_private_sum(broken, clip):
    w, r = {'v': torch.zeros(4)}, fedavg.Round(1)
    r.v = flat(w)
    made = prepared(w, PrivateServer, weights=[1] * 4, clip=clip, quantize=12, dp='user')
    u = fedavg.Update(0, {'v': torch.tensor([broken, 1, 2, 3])}, 1, broken)
    *v, loss = made.term(u, r) * made.level - clip
    assert np.abs(v).max() <= made.level and loss == pytest.approx(clip)

def test_a_nan_client_does_not_end_a_secure_run(run, capsys):       # noqa: F811
    class OneNaN:
        def train(self, w, S_t, r):
            for i, u in enumerate(super().train(w, S_t, r)):
                broken = {name: v * math.nan for name, v in u.w.items()}
                yield u._replace(w=broken) if i == 0 else u
    history = run('--secagg 1 --frac 0.5 --epochs 2', OneNaN)
    assert [(row['clients'], row['rejected']) for row in history] == [(4, 1), (4, 1)]
    history = run('--secagg 1 --frac 0.5 --epochs 1 --threshold 1', OneNaN)
    assert history[0]['clients'] == 0 and 'given up: 4 of 4' in capsys.readouterr().out
