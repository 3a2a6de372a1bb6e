"""Rounds and uploaded megabytes to 97 % under each setting of the wire, into results/wire.csv; goes
on where it was stopped.

    python results/wire.py --data_dir DIR [--seeds 0 1 2] [--iid 1 0] [--only "--quantize 8"]
    python results/wire.py --show                   # the table
    python results/wire.py --figure                 # results/megabytes.png, of seed 0's runs

The 2NN on MNIST, C = 0.1, E = 5, B = 10. The learning rate is one for each partition, the best for
fp32 of a grid on seed 7.
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
SETTINGS = ['', '--quantize 8', '--quantize 4', '--quantize 2', '--quantize 1', '--topk 0.1',
            '--topk 0.1 --error_feedback 0', '--topk 0.01', '--topk 0.01 --error_feedback 0',
            '--topk 0.1 --quantize 4', '--topk 0.01 --quantize 4',
            '--topk 0.01 --quantize 4 --error_feedback 0', '--prune 0.5 --prune_end 10',
            '--prune 0.9 --prune_end 10', '--prune 0.95 --prune_end 10 --topk 0.1 --quantize 4']
DRAWN = ['', '--quantize 8', '--quantize 4', '--topk 0.1', '--topk 0.1 --quantize 4',
         '--topk 0.01 --quantize 4']
LR, ROUNDS, TARGET = {1: 0.1, 0: 0.1}, {1: 100, 0: 300}, 0.97

def measure(words, data_dir, iid, seed):
    """One run's row: rounds and MB to the target, '' for a miss, and the seconds it took; and the
    rows of its log."""
    flags = (f'--compile 1 --iid {iid} --local_ep 5 --lr {LR[iid]} --target {TARGET} '
             f'--epochs {ROUNDS[iid]} --seed {seed} {words}')
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parent / 'fedavg.py'), '--data_dir', data_dir,
                   '--processes', '1', '--gpu', '-1', '--csv', f'{folder}/log', *flags.split()]
        out = subprocess.run(command, capture_output=True, text=True)
        log = read(f'{folder}/log', 1)
    reached = re.findall(r'^rounds to .*: ([\d.]+|not reached)', out.stdout, re.M)
    if not reached:
        sys.exit(f'{flags} failed:\n{out.stdout[-500:]}{out.stderr[-2000:]}')
    megabytes = re.findall(r'([\d.]+) MB uploaded by the target', out.stdout)
    seconds = sum(float(row['seconds']) for row in log)
    return dict(setting=words, iid=iid, seed=seed, rounds=reached[0] if megabytes else '',
                megabytes=megabytes[0] if megabytes else '', seconds=f'{seconds:.0f}'), log

def read(path, skip=0):
    """The rows of a CSV file, none if there is none, from the line `skip` on."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return list(csv.DictReader(f.readlines()[skip:]))

def write(path, row):
    """Adds a row to a CSV file."""
    with open(path, 'a', newline='') as f:
        writer = csv.DictWriter(f, list(row), lineterminator='\n')
        if not f.tell():
            writer.writeheader()
        writer.writerow(row)

def cell(rows, words, iid):
    """(mean megabytes or None, the rounds as text) of a setting's runs."""
    ran = [row for row in rows if row['setting'] == words and row['iid'] == str(iid)]
    reached = [row for row in ran if row['rounds']]
    if len(reached) < max(len(ran), 1):
        missed = len(ran) - len(reached)
        return None, f'{missed} of {len(ran)} missed' if ran else 'not run'
    rounds = [float(row['rounds']) for row in reached]
    megabytes = [float(row['megabytes']) for row in reached]
    spread = f'({min(rounds):.1f} to {max(rounds):.1f})'
    return statistics.mean(megabytes), f'{statistics.mean(rounds):.1f} {spread}'

def table(path):
    """Mean rounds and MB of each setting, and how many times less than fp32's, as Markdown."""
    rows = read(path)
    print('| setting | IID: rounds | MB | less than fp32 | non-IID: rounds | MB | less than fp32 |')
    print('|---' * 7 + '|')
    for words in SETTINGS + sorted({row['setting'] for row in rows} - set(SETTINGS)):
        line = [f'`{words}`' if words else 'fp32']
        for iid in (1, 0):
            megabytes, rounds = cell(rows, words, iid)
            fp32, _ = cell(rows, '', iid)
            less = f'{fp32 / megabytes:.1f}' if megabytes and fp32 else ''
            line += [rounds, f'{megabytes:.2f}' if megabytes else '', less]
        print('| ' + ' | '.join(line) + ' |')

def figure():
    """The best test accuracy so far against uploaded megabytes for the settings DRAWN, seed 0."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit('--figure: needs matplotlib, which is not installed; pip install matplotlib')
    picture = Figure((10, 4), layout='constrained')
    latest = {(row['setting'], row['iid']): row for row in read(HERE / 'wire_curves.csv')}
    for iid, axes in zip((1, 0), picture.subplots(1, 2, sharey=True)):
        for row in latest.values():
            if row['iid'] == str(iid):
                x = itertools.accumulate(int(v) / 1e6 for v in row['up_bytes'].split())
                y = itertools.accumulate((int(v) / 100 for v in row['accuracies'].split()), max)
                axes.plot(list(x), list(y), linewidth=1, label=row['setting'] or 'fp32')
        axes.axhline(100 * TARGET, color='gray', linewidth=0.5)
        axes.set(title='IID' if iid else 'non-IID', xlabel='uploaded MB',
                 ylabel='test accuracy, %' if iid else '', xscale='log', ylim=(80, 98))
        if iid and axes.lines[1:]:
            axes.legend(fontsize='small')
    picture.savefig(HERE / 'megabytes.png', dpi=100)

def parsed():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='./data')
    parser.add_argument('--seeds', nargs='*', type=int, default=[0, 1, 2])
    parser.add_argument('--iid', nargs='*', type=int, default=[1, 0])
    parser.add_argument('--only', nargs='*', default=SETTINGS,
                        help='these settings, each in quotes; all of the table if not given')
    parser.add_argument('--show', action='store_true', help='the table of what has been run')
    parser.add_argument('--figure', action='store_true', help='needs matplotlib')
    return parser.parse_args()

def main():
    """Runs what the command line asks for and has not been run."""
    args, path = parsed(), HERE / 'wire.csv'
    if args.show:
        return table(path)
    if args.figure:
        return figure()
    done = {(row['setting'], row['iid'], row['seed']) for row in read(path)}
    todo = [run for run in itertools.product(args.iid, args.only, args.seeds)
            if (run[1], str(run[0]), str(run[2])) not in done]
    if not todo:
        print('all of it is in results/wire.csv already; --show prints it, and rows deleted there '
              'are run again', file=sys.stderr)
    for i, (iid, words, seed) in enumerate(todo):
        print(f'--- run {i + 1} of {len(todo)}: {words or "fp32"}, iid {iid}, seed {seed}',
              file=sys.stderr, flush=True)
        row, log = measure(words, os.path.abspath(args.data_dir), iid, seed)
        write(path, row)
        if seed == 0 and words in DRAWN:
            accuracies = ' '.join(f'{10000 * float(r["test_acc"]):.0f}' for r in log)
            write(HERE / 'wire_curves.csv', dict(
                setting=words, iid=iid, up_bytes=' '.join(r['up_bytes'] for r in log),
                accuracies=accuracies))
        print(row, flush=True)

if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('interrupted; the runs that ended are in results/wire.csv')
