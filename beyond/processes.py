"""Processes: clients train in several processes, on one machine or more.

    python fedavg.py --processes 2
    torchrun --nproc_per_node=2 -- fedavg.py --dataset mnist --frac 0.1

In Algorithm 1, "for each k in S_t in parallel": every process trains its share of S_t, dealt by
work, and holds the same w; the weighted sums are added up, by gloo on CPUs and nccl on GPUs. They
are those that torchrun starts, each with a main() of its own, or are forked when all is prepared,
by default one for each core. Two processes give what one gives, up to rounding (with dropout or
--augment, with --engine loop). The first process, rank 0, prints, logs and saves.
"""
import contextlib
import datetime
import io
import os
import pickle
import sys
import time

import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

from beyond import Room
from options import fail, number, requires

def flags(add):
    """--processes, --timeout."""
    add('processes', None, number(int, 1), 'processes in which clients train; if not given, one '
        'for each core on Linux, m at most; 1 elsewhere and where there is a GPU; under torchrun, '
        'its number')
    add('timeout', None, number(float, 0, 1e6, above=True), 'under torchrun: minutes that a '
        'process waits for the others; a day if not given')

FREE = {'processes', 'timeout'}

def check(args):
    """Torchrun knows how many processes it has started; only these may have to wait long."""
    torchrun = 'TORCHELASTIC_RUN_ID' in os.environ
    requires(args, 'torchrun', ['timeout'], torchrun)
    started = os.environ.get('WORLD_SIZE')
    if torchrun and (args.processes or 1) > 1 and str(args.processes) != started:   # 1: no forks
        fail(f'--processes {args.processes}: torchrun has started {started}; '
             'leave the flag out, or give that number to --nproc_per_node')

GROUP = {}      # gloo's processes and their store, which know who is missing; none if alone

def join(device, minutes):
    """Joins the processes that torchrun has started, which wait for one another for so long. CPU
    tensors are reduced by gloo, those on GPUs by nccl."""
    cuda = device.type == 'cuda'
    if cuda:
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous('env://'))
    # torchrun keeps one store over its restarts, and keys of dead processes would be taken for
    # those of the living. Machines count their restarts apart, so this helps on one machine only.
    if os.environ.get('GROUP_WORLD_SIZE') == '1':
        store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
    connect('cpu:gloo,cuda:nccl' if cuda else 'gloo', store, rank, size, minutes)

def connect(backend, store, rank, size, minutes=24 * 60):
    """Makes this process one of `size` that find each other by the store."""
    timeout = datetime.timedelta(minutes=minutes)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    GROUP['gloo'] = dist.new_group(backend='gloo', timeout=timeout)
    GROUP.update(store=store, timeout=timeout)

@contextlib.contextmanager
def together():
    """What processes do together: if another has died, or is late by --timeout, this one ends
    too, with a line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:
        GROUP.get('broken', lambda: None)()
        end(f'process {dist.get_rank()}: another process has gone, or is later than --timeout: '
            f'{missing(e)}')

def end(line):
    """Ends this process at once, with a line: an orderly exit would wait for the others."""
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)

def missing(error):
    """Which processes are missing, as text: what the barrier says; or, if a sum broke off for all
    at once, those that do not report within three seconds."""
    line = str(error).splitlines()[0]
    if 'Rank ' in line:
        return line
    try:
        GROUP['store'].set(f'alive {dist.get_rank()}', '')
        time.sleep(3)
        silent = [rank for rank in range(dist.get_world_size())
                  if not GROUP['store'].check([f'alive {rank}'])]
    except RuntimeError:        # the store was in the first process
        silent = [0]
    return f'rank {", ".join(map(str, silent))} ({line})'

def all_sum(tensors):
    """Adds each tensor up over all processes, in place."""
    if not GROUP:
        return
    with together():
        dist.monitored_barrier(GROUP['gloo'], GROUP['timeout'])
        for v in tensors:
            rows = v.contiguous()       # all_reduce adds memory, whatever the strides
            dist.all_reduce(rows)
            v.copy_(rows)

def send(blob, rank):
    """Bytes to another process, which calls receive."""
    with together():
        dist.send(torch.tensor([len(blob)]), rank, group=GROUP['gloo'])
        if blob:
            payload = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
            dist.send(payload, rank, group=GROUP['gloo'])

def receive(rank):
    """The bytes that the process `rank` sends."""
    length = torch.zeros(1, dtype=torch.int64)
    with together():
        dist.recv(length, rank, group=GROUP['gloo'])
        payload = torch.zeros(int(length), dtype=torch.uint8)
        if len(payload):
            dist.recv(payload, rank, group=GROUP['gloo'])
    return payload.numpy().tobytes()

def shares(S_t, cost, size):
    """S_t dealt to `size` processes by work, a list for each: the client with the largest cost(k)
    first, to the process with the least work."""
    dealt, work = [[] for _ in range(size)], [0] * size
    for k in sorted(S_t, key=lambda k: -cost(k)):
        least = work.index(min(work))
        dealt[least].append(k)
        work[least] += cost(k)
    return [sorted(ks) for ks in dealt]

class Processes(Room):
    """Each process trains its share of S_t."""
    def launch(self, algorithm):
        self.test_set = self.test_share()
        return super().launch(algorithm)

    def test_share(self):
        """The part of the test set that this process evaluates."""
        return TensorDataset(*self.test_set[self.rank::self.size])

    def share(self, S_t):
        """This process's clients. What they keep is lent by the first process."""
        if not GROUP:
            return S_t
        dealt = shares(S_t, self.cost, self.size)
        if self.keeps:
            box = [{k: self.lent(k) for k in ks} for ks in dealt] if self.rank == 0 else None
            lent = [None]
            with together():
                dist.scatter_object_list(lent, box, group=GROUP['gloo'])
            if self.rank:
                self.borrow(lent[0])
        return {k: S_t[k] for k in dealt[self.rank]}

    def train(self, w, S_t, r):
        return super().train(w, self.share(S_t), r)

    def collect(self, messages, r):
        """Where updates are gathered, the messages of all processes at the first one."""
        if not self.gathers or not GROUP:
            yield from messages
            return
        if self.rank == 0:
            yield from messages
        mine = [] if self.rank == 0 else list(messages)
        all_sum([])         # all have trained
        for u in mine:
            send(pickle.dumps(tuple(u)), 0)
        if self.rank:
            send(b'', 0)
        for rank in range(1, 1 if self.rank else self.size):
            while blob := receive(rank):
                yield self.Update(*pickle.loads(blob))

    def average(self, updates, w, r):
        """FedAvg over all processes, each of which has a term in the sum, if of weight 0. Adds up
        what was counted in the round; the first process prints what the others had to say."""
        if not GROUP:
            return super().average(updates, w, r)
        with contextlib.redirect_stdout(io.StringIO() if self.rank else sys.stdout) as out:
            w = super().average(self.completed(updates, w), w, r)   # where all else happens, too
        counted = [None] * self.size
        with together():
            mine = dict(r.tally), out.getvalue() if self.rank and not self.silo else ''
            dist.all_gather_object(counted, mine, group=GROUP['gloo'])
        r.tally.clear()
        for tally, lines in counted:
            r.tally.update(tally)
            print(lines, end='')
        return w

    def completed(self, updates, w):
        """The updates, and w with weight 0."""
        yield from updates
        yield self.Update(None, w, 0, 0.0)

    def all_sum(self, tensors):
        all_sum(tensors)

    def from_rank_0(self, value):
        box = [value]
        if GROUP:
            with together():
                dist.broadcast_object_list(box, device=torch.device('cpu'))
        return box[0]

    def finish(self, code):
        code = super().finish(code)
        if code != 130:     # torchrun would end the first process if another left with an error
            all_sum([])
        if dist.is_initialized():
            dist.destroy_process_group()
        GROUP.clear()
        return code

class Torchrun(Processes):
    """The processes that torchrun has started."""
    def __init__(self, args):
        join(args.device, args.timeout or 24 * 60)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.rank:
            sys.stdout = open(os.devnull, 'w')
        super().__init__(args)

    def holdings(self):
        """The first process of a machine may have to download what the others then find."""
        first = os.environ.get('LOCAL_RANK', '0') == '0'
        if not first:
            all_sum([])
        holdings = super().holdings()
        if first:
            all_sum([])
        return holdings

