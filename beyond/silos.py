"""Silos: every process is one client, with data of its own that do not leave it.

    torchrun --nproc_per_node=3 -- fedavg.py --silo 1 --frac 1 --data_dir '/data/silo{rank}'

Nothing in Algorithm 1 is simulated: K is the number of processes, w and the updates are sent as
payloads, and only these, n_k, losses, counts and, with --personal, accuracies leave a silo. The
first process is the server, and a client too; its test set counts.
"""
import os
import struct

import numpy as np
import torch
from torch.utils.data import TensorDataset

from beyond.flat import flat, unflat
from beyond.processes import Torchrun, all_sum, end, receive, send
from compress import decode
from options import fail, typed
from sampling import load

# Flags in which silos may differ: no weights depend on them.
LOCAL = {'data_dir', 'gpu', 'bs', 'csv', 'checkpoint', 'resume', 'plot', 'timeout', 'verbose'}
LOSS = struct.Struct('<d')      # goes before a payload

def flags(add):
    """--silo."""
    add('silo', 0, bool, '1: every process that torchrun starts is one client with its own '
        '--data_dir, in which {rank} is its number; K is the number of processes')

CLASHES = (('silo', 'dataset shakespeare', 'whose clients are the roles of its plays'),)

def check(args):
    """Each silo has its own data. Fills its number into --data_dir."""
    torchrun = 'TORCHELASTIC_RUN_ID' in os.environ
    if args.silo and not torchrun:
        fail('--silo 1: every process is a client; start them with torchrun --nproc_per_node=K -- '
             'fedavg.py --silo 1 ...')
    if '{rank}' in args.data_dir and not args.silo:
        fail(f'--data_dir {args.data_dir}: only silos have numbers; add --silo 1, or name a folder')
    if not args.silo:
        return
    several = os.environ.get('LOCAL_WORLD_SIZE', '1') != '1' and args.dataset != 'synthetic'
    if several and '{rank}' not in args.data_dir:
        fail(f'--data_dir {args.data_dir}: all silos of this machine would have the same data; put '
             '{rank} into it')
    K = int(os.environ['WORLD_SIZE'])
    if args.num_users not in (100, K):      # 100: not given
        fail(f'--num_users {args.num_users}: the clients are the {K} silos; leave the flag out')
    if not args.iid or args.unequal:
        fail('--silo 1: a silo holds the files it has; leave out --iid 0, --alpha and --unequal')
    args.data_dir = args.data_dir.replace('{rank}', os.environ['RANK'])

class Silos(Torchrun):
    """One client in each process."""
    silo = gathers = True
    averaging = False
    least = 3           # clients of a secure sum: the first process knows its own update

    def __init__(self, args):
        super().__init__(args)
        self.K = self.size
        options = {name: v for name, v in vars(args).items() if name != 'device'}
        first = self.from_rank_0(options)
        other = [name for name, v in options.items() if name not in LOCAL and v != first[name]]
        if bool(args.checkpoint) != bool(first['checkpoint']):
            other.append('checkpoint')
        if other:
            fail('--silo 1: the first silo has ' + ', '.join(
                f'--{name} {typed(first[name])}' for name in other) + '; give the same',
                everyone=True)

    def holdings(self):
        """This silo's own files."""
        args = self.args
        train, test = load(args.dataset, args.data_dir, args.seed + self.rank, download=False)
        parts = {self.rank: np.arange(len(train))}
        return train, test, parts, self.counts(parts)

    def counts(self, parts):
        """The silos tell each other how many examples they have."""
        n = torch.from_numpy(super().counts(parts))
        all_sum([n])
        return n.numpy()

    def test_share(self):
        return TensorDataset(*self.test_set[:len(self.test_set) if self.rank == 0 else 0])

    def share(self, S_t):
        return {k: E for k, E in S_t.items() if k == self.rank}

    def post(self, k, payload, r):
        super().post(k, payload, r)
        if k:
            send(payload, k)

    def fetch(self):
        """The next payload that the server has sent this silo."""
        return receive(0)

    def deliver(self, w, S_t, r):
        """w as the server has sent it to this silo, if it is one of S_t."""
        if self.rank not in S_t:
            return w
        v, at = flat(w), self.at(self.rank, r)
        v[at] = decode(self.fetch(), len(v[at]))
        return unflat(v, w)

    def average(self, updates, w, r):
        """Only the first process has updates, and the average."""
        self.averaging = True
        try:
            return super().average(updates, w, r)
        finally:
            self.averaging = False

    def all_sum(self, tensors):
        if not self.averaging:
            super().all_sum(tensors)

    def collect(self, messages, r):
        """The silos' payloads at the first one. What a silo keeps, it keeps itself."""
        if self.rank == 0:
            yield from messages
        mine = [] if self.rank == 0 else list(messages)
        all_sum([])         # all have trained
        for u in mine:
            r.kept[u.k] = u.kept
            send(LOSS.pack(u.loss), 0)
            send(u.w, 0)
        if self.rank:
            send(b'', 0)
            return
        for rank in range(1, self.size):
            while head := receive(rank):
                if len(head) != LOSS.size:
                    end(f'silo {rank} has sent something other than an update; give all silos the '
                        'same version of this program')
                loss, = LOSS.unpack(head)
                yield self.Update(rank, receive(rank), self.weight(rank), loss)

    def ask(self, client, k, step, message):
        """Asks the silo k, in a step of the secure protocol."""
        if not k:
            return super().ask(client, k, step, message)
        send(step.encode(), k)
        send(message, k)
        return receive(k)

    def serve(self, clients, r):
        """A silo's side of the secure protocol: it answers until the server sends nothing more."""
        if not self.rank or self.rank not in r.S_t:
            return
        while step := receive(0).decode():
            message = receive(0)
            send(super().ask(clients.get(self.rank), self.rank, step, message), 0)

    def dismiss(self, r):
        """Ends the secure protocol."""
        for k in r.S_t:
            if k:
                send(b'', k)
