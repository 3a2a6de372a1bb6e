"""Forked: the processes that a run has by itself agree with one, and end together.

    python -m pytest -q beyond/test_forked.py
"""
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import fedavg
from beyond import forked
from beyond.test_processes import forkserver
from test_fedavg import data, near, read_log, refused, run, same, weights      # noqa: F401

pytestmark = pytest.mark.skipif(torch.cuda.is_available(),
                                reason='where there is a GPU, no process is forked')

def test_one_two_and_three_processes_agree_and_each_number_repeats_its_bits(
        run, tmp_path, capsys):     # noqa: F811
    words = '--engine loop --unequal 1 --frac 0.8 --topk 0.3 --personal finetune --csv'
    w, reports = {}, []
    for name in ('1', '2', '3', '3 again'):
        history = run(f'{words} {tmp_path}/{name[0]}.csv --processes {name[0]} '
                      f'--checkpoint {tmp_path}/c.pt')
        w[name] = weights(tmp_path / 'c.pt')
        out = capsys.readouterr().out
        assert len(history) == 3 and f'on {name[0]} x cpu' in out.splitlines()[0]
        assert ('Forked' in out.splitlines()[1]) == (name != '1')
        reports.append(out.partition('accuracy on')[2])
        rows = read_log(tmp_path / f'{name[0]}.csv')[1]
        assert [row['clients'] for row in rows] == ['8'] * 3
    assert near(w['1'], w['2'], 1e-6) and near(w['1'], w['3'], 1e-6)
    assert same(w['3'], w['3 again']) and len(set(reports)) == 1 and reports[0]
    assert not multiprocessing.active_children()

def test_the_first_process_prints_what_the_others_have_to_say(run, capsys):     # noqa: F811
    run('--processes 2 --epochs 1 --frac 1 --engine loop --verbose --corrupt 0.5 --seed 2')
    out = capsys.readouterr().out
    said = re.findall('^ *client +([0-9]+) +(is left out|n_k)', out, re.M)
    assert sorted(int(k) for k, _ in said) == list(range(10))
    assert len({what for _, what in said}) == 2

@pytest.mark.parametrize('words', ['--quantize 8', '--secagg 1 --frac 0.9', '--frac 0.1'])
def test_a_process_without_an_update_has_convolutions_in_the_same_order(
        run, tmp_path, words):      # noqa: F811
    # Its w lies in memory with the channels last; the other process's mean does not.
    for n in '12':
        run(f'--model cnn --engine loop --epochs 2 {words} --processes {n} '
            f'--csv {tmp_path}/{n}.csv --checkpoint {tmp_path}/{n}.pt')
    assert near(weights(tmp_path / '1.pt'), weights(tmp_path / '2.pt'))
    one, two = (read_log(tmp_path / f'{n}.csv')[1] for n in '12')
    assert [row['test_acc'] for row in one] == [row['test_acc'] for row in two]

def test_the_number_is_that_of_the_cores_the_clients_or_the_checkpoint(
        data, tmp_path, capsys, monkeypatch):       # noqa: F811
    monkeypatch.setattr(forked, 'cores', lambda: 2)
    def number(words):
        fedavg.main([*words.split(), '--data_dir', data, '--gpu', '-1', '--num_users', '10'])
        return int(capsys.readouterr().out.split(' x cpu')[0].split()[-1])
    checkpoint = f'--checkpoint {tmp_path}/c.pt --frac 0.5'
    assert number('--epochs 1 --frac 0.5') == 2 and number('--epochs 1 --frac 0.1') == 1
    assert number(f'{checkpoint} --epochs 1 --processes 3') == 3
    assert number(f'{checkpoint} --epochs 2 --resume') == 3
    assert number(f'{checkpoint} --epochs 3 --resume --processes 1') == 1
    assert torch.get_num_threads() == 1     # as the tests have set it

def test_where_there_is_a_gpu_no_process_is_forked(
        run, refused, capsys, tmp_path, monkeypatch):       # noqa: F811
    monkeypatch.setattr(forked, 'cores', lambda: 2)
    run(f'--epochs 1 --processes 2 --checkpoint {tmp_path}/c.pt')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for words in ('--epochs 1', f'--epochs 2 --checkpoint {tmp_path}/c.pt --resume'):
        run(words)
        assert ' on 1 x cpu' in capsys.readouterr().out.split('on 2 x cpu')[-1]
    line = refused(['--processes', '2'])
    assert '--processes 2: ' in line and '--nproc_per_node=2' in line

WORDS = ('--num_users 10 --frac 1 --local_ep 4 --local_bs 1 --epochs 200 --engine loop --gpu -1 '
         '--processes 3')

def children(pid):
    """The processes that process pid has started."""
    path = pathlib.Path(f'/proc/{pid}/task/{pid}/children')
    return [int(word) for word in path.read_text().split()] if path.exists() else []

def alive(pid):
    """Whether a process runs: one that nobody has waited for does not."""
    try:
        return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False

def as_a_program(words, said):
    """fedavg.main(words) in a session of its own; what it prints is appended to the files said."""
    os.setsid()
    for stream, path in zip((1, 2), said):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fedavg.main(words.split())

@pytest.mark.parametrize('who, code', [
    ('child', 3), ('parent', -9), ('Ctrl-C', 130), ('Ctrl-C for the parent', 130)])
def test_if_one_ends_all_end_and_the_checkpoint_is_kept(data, tmp_path, who, code):     # noqa: F811
    said = tmp_path / 'out', tmp_path / 'err'
    words = f'{WORDS} --data_dir {data} --checkpoint {tmp_path}/c.pt'
    process = forkserver().Process(target=as_a_program, args=(words, said))
    process.start()
    while not (tmp_path / 'c.pt').exists() and process.is_alive():
        time.sleep(0.02)
    pids = children(process.pid)
    assert len(pids) == 2
    if who == 'Ctrl-C':
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(pids[-1] if who == 'child' else process.pid,
                signal.SIGINT if 'Ctrl-C' in who else signal.SIGKILL)
    began = time.monotonic()
    process.join(20)
    while any(map(alive, pids)) and time.monotonic() < began + 20:
        time.sleep(0.05)
    assert process.exitcode == code and not any(map(alive, pids))
    out, err = (path.read_text() for path in said)
    assert 'Traceback' not in err and weights(tmp_path / 'c.pt')
    if who == 'child':
        assert err.count('\n') == 1 and 'has ended with exit code -9' in err
    if 'Ctrl-C' in who:
        assert 'interrupted after round' in out and err == ''

def dying(words, said):
    """As as_a_program, but that the children die at once."""
    forked.Forked.child = lambda *_: os._exit(9)
    as_a_program(words, said)

def test_a_child_that_dies_before_it_has_joined_ends_the_run(data, tmp_path):      # noqa: F811
    said = tmp_path / 'out', tmp_path / 'err'
    process = forkserver().Process(target=dying, args=(f'{WORDS} --data_dir {data}', said))
    process.start()
    process.join(100)
    alive, _ = process.is_alive(), process.kill()
    err = said[1].read_text()
    assert not alive and process.exitcode == 1 and err.count('\n') == 1
    assert 'has ended with exit code 9; no round has begun' in err

def test_a_start_that_fails_half_way_leaves_nothing(run, monkeypatch, capsys):      # noqa: F811
    Process = multiprocessing.get_context('fork').Process
    start, before = Process.start, signal.getsignal(signal.SIGINT)
    def second_fails(process):
        if multiprocessing.active_children():
            raise BlockingIOError('no more processes')
        start(process)
    monkeypatch.setattr(Process, 'start', second_fails)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(SystemExit) as e:
            run('--processes 3 --frac 1')
        assert e.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(
            '--processes 3: process 2 could not be started (no more processes); give fewer')
        assert torch.get_num_threads() == 2 and not multiprocessing.active_children()
    finally:
        torch.set_num_threads(threads)
    assert signal.getsignal(signal.SIGINT) is before

def test_a_run_that_is_refused_leaves_torchs_threads(run):       # noqa: F811
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(SystemExit):
            run('--processes 2 --deadline 0.001')       # by a room that prepares later
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)

def test_ctrl_c_is_no_news_of_a_child():
    waiting = SimpleNamespace(died=None, ending=False)
    with pytest.raises(KeyboardInterrupt):
        forked.Forked.interrupted(waiting)
    assert waiting.ending

def test_an_error_in_a_child_ends_all(run, capfd):      # noqa: F811
    class Broken:
        def train(self, w, S_t, r):
            if self.rank == 1:
                raise OSError('the disk of this one is gone')
            return super().train(w, S_t, r)
    with pytest.raises(SystemExit) as e:
        run('--processes 2 --frac 1', Broken)
    err = capfd.readouterr().err
    assert e.value.code == 3 and 'the disk of this one is gone' in err
    assert 'process 1 has ended with exit code 1' in err
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_a_child_that_dies_after_the_last_round_is_a_line(run, capfd, tmp_path):    # noqa: F811
    class Late:     # as --personal, which trains when all rounds are done
        def finish(self, code):
            if self.rank == 1:
                os._exit(9)
            self.all_sum([torch.ones(1)])
            return super().finish(code)
    with pytest.raises(SystemExit) as e:
        run(f'--processes 2 --frac 1 --checkpoint {tmp_path}/c.pt --save_every 9', Late)
    assert e.value.code == 3 and 'exit code 9; all processes end' in capfd.readouterr().err
    assert weights(tmp_path / 'c.pt') and not multiprocessing.active_children()

def test_a_run_that_all_processes_stop_ends_with_its_own_line(run, capsys):     # noqa: F811
    with pytest.raises(SystemExit) as e:
        run('--processes 2 --frac 1 --lr 1e9 --local_ep 5')
    assert e.value.code == 1 and 'lower --lr' in capsys.readouterr().err

def test_main_can_run_in_another_thread(run):       # noqa: F811
    histories = []
    thread = threading.Thread(target=lambda: histories.append(run('--processes 2')))
    thread.start()
    thread.join(100)
    assert len(histories[0]) == 3

def test_no_thread_outlives_a_run(run, monkeypatch):        # noqa: F811
    wait = multiprocessing.connection.wait
    def late(*args):
        ready = wait(*args)
        time.sleep(0.5)
        return ready
    monkeypatch.setattr(multiprocessing.connection, 'wait', late)
    before = threading.enumerate()
    run('--processes 2')
    assert threading.enumerate() == before
