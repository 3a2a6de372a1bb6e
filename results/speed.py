"""Seconds a round of this program beside other implementations, run alternately, and the medians of
their ratios.

    python results/speed.py --data_dir DIR --peers DIR [--peer_python pfl=/venv/bin/python]

The workload is the peers': MNIST, K = 100 IID clients of 600, m = 10, E = 5, B = 10, SGD with lr
0.01. --peers holds scripts called as `python NAME_peer.py NET ROUNDS` (eager and loader: NAME.py)
that print "... S s/round ..."; as theirs, our seconds are without start-up, the first round and
evaluation. Printed too: the round with evaluation, the share of it that is not local training
(evaluation, the wire, waiting for the other process, averaging), and rank 0's peak memory.
"""
import argparse
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEER_NET = {'2nn': 'mlp', 'cnn': 'cnn', 'paper_cnn': 'paper'}
OURS = {'default': '', 'compiled': '--compile 1', 'one process': '--processes 1',
        'bf16': '--bf16 1'}         # its flags; bf16 is slow on CPUs without instructions for it

def inner(words):
    """Runs fedavg.main(words) with clocks around local training and evaluation; prints the medians
    over the rounds."""
    sys.path.insert(0, str(ROOT))
    import fedavg
    from beyond.wire import Wire
    train, evaluation = [], []
    def timed_evaluate(*words, step=fedavg.evaluate):
        began = time.perf_counter()
        result = step(*words)
        evaluation.append(time.perf_counter() - began)
        return result
    def timed_receive(wire, updates, *words, step=Wire.receive):
        train.append(0.0)
        return step(wire, clocked(updates, train), *words)
    fedavg.Server.evaluate, Wire.receive = staticmethod(timed_evaluate), timed_receive
    rounds = [row['seconds'] for row in fedavg.main(words)][1:]
    alone = [s - e for s, e in zip(rounds, evaluation[1:])]
    outside = [1 - x / s for s, x in zip(rounds, train[1:])]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    median = statistics.median
    print(f'OURS {median(alone):.4f} s/round; with evaluation {median(rounds):.4f}, outside local '
          f'training {100 * median(outside):.1f} %, peak {peak:.0f} MB')

def clocked(updates, train):
    """The updates; the time that they take is added to the last of train."""
    updates = iter(updates)
    while True:
        began = time.perf_counter()
        update = next(updates, None)
        train[-1] += time.perf_counter() - began
        if update is None:
            return
        yield update

def seconds(command, env):
    """Runs a command and returns (its s/round, the line that says so)."""
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    line = next((line for line in out.stdout.splitlines() if 's/round' in line), None)
    if not line:
        sys.exit(f'{" ".join(command)} failed:\n{out.stderr[-2000:]}')
    return float(re.search(r'([\d.]+) s/round', line)[1]), line

def commands(args, model):
    """{name: command} of ours and of the peers."""
    me = str(pathlib.Path(__file__).resolve())
    words = (f'--model {model} --local_ep 5 --lr 0.01 --gpu {args.gpu} '
             f'--epochs {args.rounds + 1}').split()
    words = ['--inner', '--data_dir', args.data_dir, *words]
    runs = {name: [sys.executable, me, *words, *OURS[name].split()] for name in args.ours}
    pythons = dict(pair.split('=') for pair in args.peer_python)
    for peer in args.peer:
        script = f'{args.peers}/{peer}{"" if peer in ("eager", "loader") else "_peer"}.py'
        python = pythons.get(peer, sys.executable)
        runs[peer] = [python, script, PEER_NET[model], str(args.rounds)]
    return runs

def compare(args, model, env):
    """Runs all alternately, and prints the ratios."""
    runs = commands(args, model)
    took = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, command in runs.items():
            s, line = seconds(command, env)
            took[name].append(s)
            print(f'{model:10s} {name:10s} {line}', flush=True)
    for peer in args.peer:
        for name in args.ours:
            ratios = [a / b for a, b in zip(took[peer], took[name])]
            print(f'{model:10s} {name:10s} {statistics.median(ratios):.2f} times as fast as {peer} '
                  f'(from {min(ratios):.2f} to {max(ratios):.2f})', flush=True)

def main():
    """The command line."""
    if sys.argv[1:2] == ['--inner']:
        return inner(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', required=True)
    parser.add_argument('--peers', required=True)
    parser.add_argument('--peer', nargs='*', default=['eager', 'pfl'])
    parser.add_argument('--peer_python', nargs='*', default=[],
                        help='NAME=python of its virtual environment')
    parser.add_argument('--ours', nargs='*', default=list(OURS)[:3], choices=OURS,
                        help='the first three if not given')
    parser.add_argument('--gpu', type=int, default=-1, help='as that of fedavg.py, for ours')
    parser.add_argument('--model', nargs='*', default=list(PEER_NET))
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--rounds', type=int, default=4)
    args = parser.parse_args()
    env = dict(os.environ, MNIST_DIR=os.path.abspath(args.data_dir))
    for model in args.model:
        compare(args, model, env)

if __name__ == '__main__':
    main()
