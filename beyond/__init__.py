"""What the paper does not have: a room for each subject, a diff on Algorithm 1.

A room is a module with classes that override steps of fedavg.Server or hooks of
fedavg.LocalUpdate, calling super() where they add to a step and not where they replace it; with
its flags and their checks. This file says which rooms there are, in which order their classes
stand, and which flags ask for them. README.md, beside it, has a section for each.
"""
import importlib
import math
import os

import numpy as np
import torch

from options import fail

ROOMS = ('wire', 'prune', 'engines', 'local', 'privacy', 'secure', 'processes', 'silos',
         'stragglers', 'widths', 'cut', 'distill', 'personal', 'augment', 'records')

class Room:
    """The base of the rooms' server classes: the answers to the questions that rooms ask one
    another, if no room has a better one. Those that refine an answer call super()."""
    size = 1                # processes
    silo = False            # whether each process is one client, with data of its own
    gathers = False         # whether updates go to the first process before they are added up
    keeps = False           # whether clients keep something from round to round
    least = 2               # clients of a secure sum, below which it would reveal an update

    def state(self):
        """What a run needs to go on, {class name: what torch.load(weights_only=True) takes}."""
        return {'w': self.w, 'history': self.history}

    def load(self, state):
        """Goes on from a state(), {} for a new run. Runs before prepare()."""
        if state:
            self.net.load_state_dict(state['w'])
            self.history = list(state['history'])

    def notes(self):
        """What the log's first line holds beside the flags, {name: value}."""
        return {}

    def idle(self):
        """The names of classes that have nothing to do in this run."""
        return set()

    def nets(self):
        """The nets that clients train."""
        return [self.net]

    def kind(self, k):
        """A number that clients have in common if the same values cross for them."""
        return 0

    def crosses(self, k, r):
        """Which values of flat(w) go between the server and client k, (d,) bool. A room narrows
        it: super().crosses(k, r) & its own."""
        return torch.ones(sum(v.numel() for v in self.w.values() if v.is_floating_point()),
                          dtype=torch.bool)

    def transmit(self, payload, x, k, r):
        """What arrives of client k's payload, which encodes x: all of it."""
        return payload

    def keep(self, u, x, payload, r):
        """What client u.k keeps if its update is accepted, {name: tensor}; x is what it meant to
        send, encoded as payload; both are None in a secure sum."""
        return {}

    def post(self, k, payload, r):
        """Hands a payload of the server to client k, and counts it."""
        if self.rank == 0:
            r.tally['down_bytes'] += len(payload)

    def lent(self, k):
        """What client k keeps, for the process that trains it, {name: tensor}."""
        return {}

    def borrow(self, lent):
        """Takes over, for this round, what the first process has lent: {k: lent(k)}."""

    def share(self, S_t):
        """The clients of S_t, {k: E}, that this process trains: all."""
        return S_t

    def collect(self, messages, r):
        """The messages of all clients, as Updates whose w is a payload, at the server."""
        return messages

    def from_rank_0(self, value):
        """The first process's value, in every process."""
        return value

    def counts(self, parts):
        """How many examples each client has in parts, {k: indices}: (K,)."""
        return np.array([len(parts.get(k, ())) for k in range(self.K)])

    def cost(self, k):
        """The examples that client k works through in an epoch."""
        return int(self.n_k[k])

    def sent_by(self, stage):
        """Whether a client that is lost at this stage (stragglers.lose) has sent its update."""
        return False

    def most(self):
        """The most clients whose updates a round can average: m."""
        return max(round(self.args.frac * self.K), 1)

    def quorum(self, asked):
        """How many of the asked clients must stay for their secure sum to be revealed."""
        return max(math.ceil(round(self.args.threshold * asked, 9)), self.least)

    def bound(self):
        """The largest magnitude of a value of w_k - w."""
        return self.args.range or 1.0

    def allows(self, rounding):
        """Whether rounding may lengthen a term of a secure sum by so much."""
        return True

    def bounded(self, v, rounding):
        """v, (d,), bounded as a client may send it; rounding lengthens it by so much at most."""
        return v

def rooms():
    """The rooms' modules."""
    return [importlib.import_module(f'beyond.{name}') for name in ROOMS]

def names(cls, idle=()):
    """The classes that cls is made of, but for idle ones, as text."""
    return ', '.join(base.__name__ for base in cls.__mro__[1:-1]
                     if base is not Room and base.__name__ not in idle)

def of_the_user(server):
    """The names of the user's own classes in a server and its clients. Exits with one line if one
    of them overrides nothing: its methods may be misspelled."""
    base = next(cls for cls in reversed(type(server).__mro__) if 'Client' in vars(cls))
    known = base, base.Client, Room
    steps = {name for cls in known for name in dir(cls) if not name.startswith('__')}
    mine = [cls for made in (type(server), server.Client) for cls in made.__mro__[1:-1]
            if cls not in known and not cls.__module__.startswith('beyond.')]
    for cls in mine:
        heirs = any(issubclass(other, cls) for other in mine if other is not cls)
        if not (heirs or steps & set(dir(cls)) or '__init__' in vars(cls)):
            found = ', '.join(name for name in vars(cls) if not name.startswith('_')) or 'nothing'
            fail(f'{cls.__name__}: it has {found}, and no step of fedavg.Server and no hook of '
                 'fedavg.LocalUpdate; their names are in fedavg.py', everyone=True)
    return [cls.__name__ for cls in mine]

def chosen(args):
    """The classes that the flags ask for, outermost first: ([the outermost of the server], [its
    others], [the clients'])."""
    from beyond import (augment, cut, distill, engines, forked, local, personal, privacy,
                        processes, prune, records, secure, silos, stragglers, widths, wire)
    torchrun = 'TORCHELASTIC_RUN_ID' in os.environ
    servers = (
        (records.Records, True),
        (stragglers.Lossy, args.drop),
        (stragglers.Timed, True),
        (stragglers.Corrupt, args.corrupt),
        (silos.Silos, torchrun and args.silo),
        (processes.Torchrun, torchrun and not args.silo),
        (forked.Forked, not torchrun),
        (personal.Personal, args.personal),
        (personal.PersonalLayers, args.personal == 'layers'),
        (privacy.PrivateServer, args.dp == 'user'),
        (privacy.PrivateExamples, args.dp == 'example'),
        (widths.Widths, args.widths),
        (cut.Cut, args.cut),
        (prune.Pruned, args.prune),
        (secure.Secure, args.secagg),
        (wire.Feedback, args.topk and args.error_feedback),
        (wire.Wire, True),
        (engines.Stacked, engines.wanted(args)),
        (augment.Augmented, args.augment),
        (distill.Distilled, args.teacher),
        (augment.Balanced, args.balance))
    clients = (
        (privacy.PrivateClient, args.dp == 'example'),
        (cut.CutClient, args.cut),
        (prune.PrunedClient, args.prune),
        (local.Proximal, args.mu),
        (local.AdamW, args.optimizer == 'adamw'),
        (local.Bf16, args.bf16),
        (distill.DistilledClient, args.teacher),
        (augment.AugmentedClient, args.augment))
    outermost, *servers = [cls for cls, asked in servers if asked]
    clients = [cls for cls, asked in clients if asked]
    return [outermost], [*servers, Room], clients
