"""Processes: several give what one gives, share the work, and end when one of them is gone.

    python -m pytest -q beyond/test_processes.py
"""
import contextlib
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fedavg
import sampling
from beyond import processes
from test_fedavg import HERE, data, near, read_log, refused, run, weights   # noqa: F401

AMONG = '--num_users 10 --frac 0.8 --local_ep 1 --epochs 3 --gpu -1'    # that processes share

def among(words):
    """AMONG; without its clients where each process is one."""
    return AMONG.removeprefix('--num_users 10 ') if '--silo' in words else AMONG

def torchrun(words, data, processes=2, flags='--standalone'):       # noqa: F811
    """The program under torchrun, on small digits and 10 clients, or a silo for each process."""
    command = f'-m torch.distributed.run --nproc_per_node={processes} {flags}'
    program = f'-- {HERE}/fedavg.py {among(words)} --data_dir {data} {words}'
    return subprocess.Popen([sys.executable, *command.split(), *program.split()], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def forkserver():
    """A context whose processes are forked from one that has imported torch, and what an
    optimizer would otherwise import in its first step."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch._dynamo', 'fedavg', 'beyond.test_processes'])
    return context

class Ranks:
    """torchrun's equal without its start: the ranks are forked from a process that has imported
    torch. ranks: the processes; said: the files that hold what they print."""
    def __init__(self, words, data, processes=2, *classes):     # noqa: F811
        words = f'{among(words)} --data_dir {data} {words}'
        server = forkserver()
        self.said, port = [pathlib.Path(tempfile.mkstemp()[1]) for _ in range(2)], free_port()
        self.ranks = [server.Process(target=one_rank,
                                     args=(words.split(), rank, processes, port, self.said,
                                           *classes))
                      for rank in range(processes)]
        for process in self.ranks:
            process.start()

    def communicate(self, timeout):
        """(what the ranks printed, their errors) when they have ended; sets returncode."""
        for process in self.ranks:
            process.join(timeout)
        codes = [process.exitcode for process in self.ranks]
        self.returncode = next((code for code in codes if code != 0), 0)
        for process in self.ranks:
            process.kill()
        texts = [path.read_text() for path in self.said]
        for path in self.said:
            path.unlink()
        return texts

def one_rank(words, rank, processes, port, said, *classes):
    """fedavg.main(words, *classes) as torchrun would start it; what it prints is appended to the
    two files in said."""
    for stream, path in zip((1, 2), said):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    os.environ |= elastic(rank, processes, port)
    torch.set_num_threads(1)
    fedavg.main(words, *classes)

def elastic(rank, processes, port):
    """The environment in which torchrun starts a process."""
    return dict(TORCHELASTIC_RUN_ID='by hand', WORLD_SIZE=str(processes), RANK=str(rank),
                LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))

def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]

def ended(ranks):
    """What processes printed that ended without an error."""
    out, err = ranks.communicate(timeout=100)
    assert ranks.returncode == 0, err
    return out

########################################## Tests ##########################################
def test_shares_are_balanced_by_work():
    cost = {3: 10, 5: 6, 8: 5}.get
    assert processes.shares([3, 5, 8], cost, 2) == [[3], [5, 8]]
    assert processes.shares([3, 5], cost, 3) == [[3], [5], []]
    busiest = []
    for seed in range(200):
        n_k = sampling.sizes(60000, 100, unequal=True, seed=seed)
        S_t = sampling.select(100, 0.16, sampling.rng(seed))
        work = [sum(n_k[k] for k in ks) for ks in processes.shares(S_t, n_k.item, 4)]
        assert sum(work) == n_k[S_t].sum()
        # No share is smaller than the largest client.
        busiest.append(max(work) / max(np.mean(work), n_k[S_t].max()))
    assert np.median(busiest) < 1.05 and np.quantile(busiest, 0.9) < 1.1

LOGGED = 'round', 'clients', 'rejected', 'late', 'up_bytes', 'down_bytes', 'round_time'

def both(data, run, root, words):       # noqa: F811
    """The checkpoints of a run in one process and in two, and what follows 'accuracy on' in what
    the latter print, when the rows of their logs have been compared."""
    two = Ranks(f'{words} --checkpoint {root}/two --csv {root}/two.csv', data)
    history = run(f'{words} --frac 0.8 --checkpoint {root}/one --csv {root}/one.csv')
    out = ended(two)
    assert out.count('round    3/3') == 1 and 'on 2 x cpu' in out
    rows = [read_log(root / f'{name}.csv')[1] for name in ('one', 'two')]
    for one, other in zip(*rows, strict=True):
        assert [one[name] for name in LOGGED] == [other[name] for name in LOGGED]
        assert float(one['train_loss']) == pytest.approx(float(other['train_loss']), rel=1e-4)
    assert len(history) == len(rows[1])
    saved = [torch.load(root / name, weights_only=True) for name in ('one', 'two')]
    return *saved, out.partition('accuracy on')[2]

@pytest.mark.parametrize('words', [
    '--unequal 1 --balance 1 --mu 0.1 --personal layers --personal_layers fc3',
    '--iid 0 --engine loop --model mlp --cut 1 --personal mix --speeds lognormal:1 '
    '--deadline 0.8 --corrupt 0.3'])
def test_two_processes_give_what_one_gives(data, run, tmp_path, capsys, words):     # noqa: F811
    one, two, report = both(data, run, tmp_path, words)
    assert near(one['w'], two['w']) and report
    assert report == capsys.readouterr().out.partition('accuracy on')[2]
    assert [row['test_acc'] for row in one['history']] == [
        row['test_acc'] for row in two['history']]
    if 'layers' in words:
        layers = one['PersonalLayers'], two['PersonalLayers']
        assert len(layers[0]) == 10 and near(*layers)

def test_two_processes_send_what_one_sends_and_know_the_mask_again(data, run, tmp_path):  # noqa
    words = ('--quantize 8 --topk 0.1 --prune 0.5 --prune_end 2 --widths 1,0.5 --unequal 1 '
             '--engine loop')
    one, two, _ = both(data, run, tmp_path, words)
    assert near(one['w'], two['w'], 1e-3) and near(one['Feedback'], two['Feedback'], 0.05)
    assert one['Feedback'].keys() == two['Feedback'].keys() and len(one['Feedback']) == 10
    assert all(v.norm() > 0 for v in one['Feedback'].values())
    assert torch.equal(one['Pruned']['mask'], two['Pruned']['mask'])

def test_a_report_after_the_run_has_ended_knows_the_mask(data, tmp_path):       # noqa: F811
    words = f'--prune 0.9 --prune_end 2 --personal finetune --checkpoint {tmp_path}/c.pt'
    report = ended(Ranks(words, data)).partition('accuracy on')[2]
    again = ended(Ranks(f'{words} --resume', data))
    assert 'after round 3; --epochs is 3; nothing is left to do' in again
    assert again.partition('accuracy on')[2] == report != ''

class Dead:
    """A store whose process has ended."""
    def set(self, name, value):
        raise RuntimeError('connection reset')

class Alive:
    """A store in which all but process 2 have reported."""
    def set(self, name, value):
        assert name == 'alive 0'

    def check(self, names):
        return names != ['alive 2']

def test_the_process_that_is_missing_is_named(monkeypatch):
    group = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 4)
    monkeypatch.setattr(processes, 'dist', group)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    error = RuntimeError('Rank 1 failed to pass\nand more')
    assert processes.missing(error) == 'Rank 1 failed to pass'
    broken = RuntimeError('Connection closed\nand more')
    for store, said in ((Alive(), 'rank 2'), (Dead(), 'rank 0')):
        monkeypatch.setitem(processes.GROUP, 'store', store)
        assert processes.missing(broken) == f'{said} (Connection closed)'

def test_torchruns_report_ends_with_the_error(refused, tmp_path, monkeypatch):   # noqa: F811
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', f'{tmp_path}/error.json')
    line = refused(['--lr', '-1']).strip()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=f'{tmp_path}/error.json')
    report = ChildFailedError('fedavg.py', {0: failure}).format_msg().strip().splitlines()
    assert line in report[-2] and set(report[-1]) == {'='}

class Sleepy:
    """The second process takes its time."""
    def train(self, w, S_t, r):
        if self.rank:
            time.sleep(5)
        return super().train(w, S_t, r)

def test_a_process_that_is_later_than_the_timeout_ends_the_run_in_a_line(data):    # noqa: F811
    late = Ranks('--timeout 0.05', data, 2, Sleepy)
    out, err = late.communicate(timeout=60)
    assert late.returncode == 1 and 'round    1' not in out and 'Traceback' not in err
    assert 'process 0: another process has gone, or is later than --timeout: ' in err
    assert 'Rank 1 failed to pass monitoredBarrier in 3000 ms' in err

def test_only_what_processes_do_together_tells_of_another_one(refused):     # noqa: F811
    with pytest.raises(torch.OutOfMemoryError), processes.together():
        raise torch.OutOfMemoryError('too large')
    assert 'only goes with torchrun' in refused(['--timeout', '5'])

def test_torchrun_knows_how_many_there_are(refused, monkeypatch):       # noqa: F811
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'by hand')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert '--processes 8: torchrun has started 2' in refused(['--processes', '8'])

def pid_of_rank(rank, mark):
    """The process that torchrun started as `rank`, with `mark` in its command line."""
    for process in pathlib.Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):      # one that has ended meanwhile
            environment = (process / 'environ').read_text().split('\0')
            if f'RANK={rank}' in environment and mark in (process / 'cmdline').read_text():
                return int(process.name)

def test_a_killed_process_is_restarted_and_the_run_ends_as_if_undisturbed(
        data, run, tmp_path):       # noqa: F811
    words = (f'--local_ep 10 --epochs 10 --engine loop --checkpoint {tmp_path}/c.pt '
             f'--csv {tmp_path}/l.csv')
    killed = torchrun(f'{words} --resume', data, flags='--standalone --max-restarts=3')
    while not (tmp_path / 'c.pt').exists() and killed.poll() is None:
        time.sleep(0.01)
    os.kill(pid_of_rank(0, str(tmp_path)), signal.SIGKILL)
    run(f'{words} --frac 0.8'.replace('c.pt', 'full.pt').replace('l.csv', 'full.csv'))
    assert ended(killed).count('resumed from') == 1
    assert near(weights(tmp_path / 'full.pt'), weights(tmp_path / 'c.pt'))
    rows = read_log(tmp_path / 'l.csv')[1]
    assert [row['round'] for row in rows] == [str(t) for t in range(1, 11)]
