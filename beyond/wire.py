"""The wire: what crosses between the server and its clients, as bytes that are counted.

    python fedavg.py --quantize 8 --topk 0.1

In Algorithm 1, w goes down to S_t and w_k comes up, or, where that can be made smaller, w_k - w:
quantized (Konecny et al. 2016, arXiv 1610.05492, Section 3), or its largest values alone, with
error feedback (Aji and Heafield 2017, arXiv 1704.05021; Stich et al. 2018, arXiv 1809.07599).
compress.py has the bytes. A payload that cannot be read is left out of the average and counted.

Fields of a round: index, {kind(k): where flat(w) crosses}; v, flat(w) of the w that was sent; kept,
{k: {name: tensor}} of the accepted updates.
"""
import numpy as np
import torch

from beyond import Room
from beyond.flat import checked, flat, unflat
from compress import decode, encode
from options import fail, number
from sampling import rng

def flags(add):
    """--quantize, --topk, --error_feedback."""
    add('quantize', None, number(int, 1, 16),
        'bits a value of an uploaded w_k - w, rounded stochastically; fp32 if not given')
    add('topk', None, number(float, 0, 1, above=True),
        'fraction of the values of w_k - w that are uploaded, those of largest magnitude')
    add('error_feedback', 1, bool,
        'with --topk: a client keeps what it did not send and adds it next time')

def check(args):
    """Error feedback needs something that is not sent."""
    if not args.error_feedback and not args.topk:
        fail('--error_feedback 0: without --topk all is sent; add --topk, or leave it out')

class Wire(Room):
    """Sends and receives payloads, and counts their bytes."""
    @property
    def gathers(self):
        return super().gathers or bool(self.args.quantize or self.args.topk)

    def at(self, k, r):
        """Where flat(w) crosses for client k in round t: an index into (d,)."""
        index = vars(r).setdefault('index', {})
        if self.kind(k) not in index:
            mask = self.crosses(k, r)
            index[self.kind(k)] = slice(None) if mask.all() else mask.nonzero().flatten()
        return index[self.kind(k)]

    def send(self, w, S_t, r):
        w = super().send(w, S_t, r)
        if self.silo and self.rank:
            return self.deliver(w, S_t, r)
        v, payloads = flat(w), {}
        for k in S_t:
            kind = self.kind(k)
            if kind not in payloads:
                payloads[kind] = encode(v[self.at(k, r)])
            self.post(k, payloads[kind], r)
        return w

    def receive(self, updates, w, r):
        r.kept, r.v = {}, flat(w)
        messages = self.collect((self.pack(u, w, r) for u in updates), r)
        return super().receive(self.unpacked(messages, w, r), w, r)

    def differs(self):
        """Whether clients encode w_k - w, which is where that makes the payload smaller."""
        return self.args.quantize or self.args.topk

    def pack(self, u, w, r):
        """The client's side: u with a payload for w_k."""
        at = self.at(u.k, r)
        x = flat(u.w)[at]
        x = self.change(x - r.v[at] if self.differs() else x, u.k, r)
        payload = self.encode(x, u.k, r)
        kept = self.keep(u, x, payload, r)
        return u._replace(w=self.transmit(payload, x, u.k, r), kept=kept)

    def change(self, x, k, r):
        """What client k means to send, where x is the change of its weights."""
        return x

    def encode(self, x, k, r):
        """The payload of x, (n,)."""
        draw = self.args.quantize and rng(self.args.seed, 'quantize', r.t, k)
        return encode(x, self.args.quantize, self.args.topk, draw)

    def unpacked(self, messages, w, r):
        """The server's side: the updates whose payloads can be read."""
        for u in messages:
            v, at = r.v.clone(), self.at(u.k, r)
            r.tally.update(sent=1, up_bytes=len(u.w))
            try:
                x = decode(u.w, len(v[at]))
                v[at] = v[at] + x if self.differs() else x
            except ValueError as e:
                r.tally['rejected'] += 1
                print(f'client {u.k} is left out: {e}')
                continue
            if self.args.verbose:
                print(f'    client {u.k:5d}   {len(u.w)} bytes')
            r.kept[u.k] = u.kept
            yield u._replace(w=unflat(v, w))

    def measure(self, w, r):
        if self.failed(r):
            raise self.Stop(f'round {r.t}: every update was left out; the weights stay those of '
                            f'round {r.t - 1}. If they hold NaN or infinity, start again with a '
                            f'lower --lr than {self.args.lr}', 1)
        if not r.tally['clients']:
            print(f'round {r.t}: ' + ('no update arrived' if r.S_t else 'no client was sampled'))
        counts = {name: int(r.tally[name]) for name in ('rejected', 'up_bytes', 'down_bytes')}
        return super().measure(w, r) | counts

    def failed(self, r):
        """Whether clients sent updates and none of them could be used."""
        return 0 < r.tally['sent'] == r.tally['rejected']

    def describe(self, row):
        rejected = f'   {row["rejected"]} rejected' if row['rejected'] else ''
        up, down = row['up_bytes'] / 1e6, row['down_bytes'] / 1e6
        return f'{super().describe(row)}{rejected}   up {up:.3g} MB   down {down:.3g} MB'

    def summary(self):
        sent = np.cumsum([0, *(row['up_bytes'] for row in self.history)])
        payloads = sum(row['clients'] + row['rejected'] for row in self.history)
        fp32 = payloads * len(encode(flat(self.w)))
        times = f' (fp32: {fp32 / 1e6:.2f} MB, {fp32 / max(sent[-1], 1):.1f} times that)'
        line = (f'uploaded {sent[-1] / 1e6:.2f} MB{times * (fp32 > 0)}; downloaded '
                f'{sum(row["down_bytes"] for row in self.history) / 1e6:.2f} MB')
        rounds = self.reached()
        if rounds:
            megabytes = np.interp(rounds, range(len(sent)), sent) / 1e6
            line += f'; {megabytes:.2f} MB uploaded by the target'
        return [*super().summary(), line]

class Feedback(Room):
    """What a client did not send, its residual, it adds next time. Residuals are (d,), whatever
    crosses; zero where nothing has crossed yet."""
    keeps = gathers = True

    def __init__(self, args):
        super().__init__(args)
        self.residuals = {}                     # {k: (d,)}

    def change(self, x, k, r):
        x = super().change(x, k, r)
        return x + self.residuals[k][self.at(k, r)] if k in self.residuals else x

    def keep(self, u, x, payload, r):
        kept, at = super().keep(u, x, payload, r), self.at(u.k, r)
        try:
            unsent = x - decode(payload, len(x))
        except ValueError:      # not finite: the server will refuse it
            return kept
        residual = self.residuals.get(u.k, torch.zeros(len(flat(self.w)))).clone()
        residual[at] = unsent
        return kept | {'residual': residual}

    def lent(self, k):
        residual = {'residual': self.residuals[k]} if k in self.residuals else {}
        return super().lent(k) | residual

    def borrow(self, lent):
        super().borrow(lent)
        self.residuals = {k: kept['residual'] for k, kept in lent.items() if 'residual' in kept}

    def end(self, w, row, r):
        super().end(w, row, r)
        self.residuals = self.residuals | {
            k: kept['residual'] for k, kept in r.kept.items() if 'residual' in kept}

    def state(self):
        return super().state() | {'Feedback': self.residuals}

    def load(self, state):
        super().load(state)
        d = len(flat(self.net.state_dict()))
        self.residuals = checked(state.get('Feedback', {}), d)
