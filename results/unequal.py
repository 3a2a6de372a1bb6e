"""Accuracy after 50 rounds, uploaded bytes and simulated time for clients that differ, into
results/unequal.csv; goes on where it was stopped.

    python fedavg.py --model paper_cnn --epochs 15 --local_bs 20 --seed 7 --checkpoint teacher.pt
    python results/unequal.py --data_dir DIR --teacher teacher.pt [--only "--mu 0.1"]
    python results/unequal.py --show                # the table

The 2NN on MNIST, non-IID, C = 0.1, E = 5, B = 10, eta = 0.1. The first setting is plain FedAvg,
which waits for all clients: speeds and finetuning change nothing in its rounds.
"""
import argparse
import csv
import itertools
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
SETTINGS = ['--speeds lognormal:1 --personal finetune', '--speeds lognormal:1 --deadline 0.5',
            '--speeds lognormal:1 --overselect 0.3', '--widths 1,0.5,0.25', '--teacher TEACHER',
            '--personal layers --personal_layers fc3', '--mu 0.01', '--mu 0.1', '--unequal 1',
            '--unequal 1 --augment 1', '--unequal 1 --balance 1', '--iid 1 --local_ep 1',
            '--iid 1 --local_ep 1 --drop 0.3', '--iid 1 --local_ep 1 --corrupt 0.3',
            '--iid 1 --local_ep 1 --drop 0.3 --corrupt 0.3']
SAME = '--compile 1 --iid 0 --local_ep 5 --epochs 50 --gpu -1'
COLUMNS = ('setting', 'seed', 'accuracy', 'megabytes', 'time', 'own', 'own10', 'own90', 'globals',
           'global10', 'global90')

def measure(words, data_dir, teacher, seed):
    """One run's row, from its log and its last lines. own: accuracies of clients' own models,
    globals: of the global one, with the 10th and 90th percentile beside the mean."""
    flags = f'{SAME} --seed {seed} {words}'.split()
    flags = [word.replace('TEACHER', teacher) for word in flags]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parent / 'fedavg.py'), '--data_dir', data_dir,
                   '--processes', '1', '--csv', f'{folder}/log', *flags]
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode:
            sys.exit(f'{flags} failed:\n{out.stdout[-500:]}{out.stderr[-2000:]}')
        with open(f'{folder}/log') as f:
            rows = list(csv.DictReader(f.readlines()[1:]))
    spread = [re.findall(r'([\d.]+) %', line) for line in out.stdout.splitlines()
              if ' mean ' in line] or [[''] * 3] * 2
    megabytes, time = (sum(float(row[name]) for row in rows) for name in ('up_bytes', 'round_time'))
    values = (words, seed, rows[-1]['test_acc'], f'{megabytes / 1e6:.2f}', f'{time:.1f}',
              *spread[0], *spread[1])
    return dict(zip(COLUMNS, values))

def line(words, ran):
    """A setting's row of the table, as Markdown."""
    if not ran:
        return f'| `{words}` | not run |  |  |  |  |'
    def of(name):
        return [float(row[name]) for row in ran if row[name]]
    own, w = (', '.join(f'{statistics.mean(of(name)):.1f}' for name in names if of(name))
              for names in (COLUMNS[5:8], COLUMNS[8:]))
    accuracy = [100 * v for v in of('accuracy')]
    return (f'| `{words}` | {statistics.mean(accuracy):.1f} ({min(accuracy):.1f} to '
            f'{max(accuracy):.1f}; {len(ran)} seeds) | {statistics.mean(of("megabytes")):.1f} | '
            f'{statistics.mean(of("time")):.1f} | {own} | {w} |')

def table(path):
    """Means over the seeds, with the range of the accuracy, as Markdown."""
    with open(path) as f:
        rows = list(csv.DictReader(f))
    print("| setting | accuracy, % | MB up | simulated time | a client's own model: mean, 10th, "
          '90th % | the global model for it |\n|---|---|---|---|---|---|')
    for words in SETTINGS + sorted({row['setting'] for row in rows} - set(SETTINGS)):
        print(line(words, [row for row in rows if row['setting'] == words]))

def parsed():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='./data')
    parser.add_argument('--teacher', default='teacher.pt')
    parser.add_argument('--seeds', nargs='*', type=int, default=[0, 1, 2])
    parser.add_argument('--only', nargs='*', default=SETTINGS,
                        help='these settings, each in quotes; all of the table if not given')
    parser.add_argument('--show', action='store_true', help='the table of what has been run')
    return parser.parse_args()

def main():
    """Runs what the command line asks for and has not been run."""
    args, path, done = parsed(), HERE / 'unequal.csv', set()
    if args.show:
        return table(path)
    if path.exists():
        with open(path) as f:
            done = {(row['setting'], row['seed']) for row in csv.DictReader(f)}
    todo = [(seed, words) for seed, words in itertools.product(args.seeds, args.only)
            if (words, str(seed)) not in done]
    if not todo:
        print('all of it is in results/unequal.csv already; --show prints it, and rows deleted '
              'there are run again', file=sys.stderr)
    for i, (seed, words) in enumerate(todo):
        print(f'--- run {i + 1} of {len(todo)}: {words}, seed {seed}', file=sys.stderr, flush=True)
        row = measure(words, os.path.abspath(args.data_dir), os.path.abspath(args.teacher), seed)
        with open(path, 'a', newline='') as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
            if not f.tell():
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)

if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('interrupted; the runs that ended are in results/unequal.csv')
