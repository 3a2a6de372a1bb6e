"""Rounds and uploaded megabytes to 97 % under each setting of the wire, into results/wire.csv; goes on where it was stopped.

    python results/wire.py --data_dir DIR [--seeds 0 1 2] [--iid 1 0] [--only "--quantize 8"] [--show]
    python results/wire.py --figure                         # accuracy against uploaded MB, results/megabytes.png, of seed 0's runs

The 2NN on MNIST, C = 0.1, E = 5, B = 10. The learning rate is one for each partition, the best for fp32 of a grid on seed 7.
"""
import argparse
import csv
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
SETTINGS = ['', '--quantize 8', '--quantize 4', '--quantize 2', '--quantize 1', '--topk 0.1', '--topk 0.1 --error_feedback 0', '--topk 0.01',
            '--topk 0.01 --error_feedback 0', '--topk 0.1 --quantize 4', '--topk 0.01 --quantize 4', '--topk 0.01 --quantize 4 --error_feedback 0',
            '--prune 0.5 --prune_end 10', '--prune 0.9 --prune_end 10', '--prune 0.95 --prune_end 10 --topk 0.1 --quantize 4']
DRAWN = ['', '--quantize 8', '--quantize 4', '--topk 0.1', '--topk 0.1 --quantize 4', '--topk 0.01 --quantize 4']
LR, ROUNDS, TARGET = {1: 0.1, 0: 0.1}, {1: 100, 0: 300}, 0.97

def measure(words, data_dir, iid, seed):
    """One run's row: rounds and MB to the target as the program reports them, '' for a miss, and the seconds it took; and its log's rows."""
    flags = f'--compile 1 --iid {iid} --local_ep 5 --lr {LR[iid]} --target {TARGET} --epochs {ROUNDS[iid]} --seed {seed} {words}'
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parent / 'fedavg.py'), '--data_dir', data_dir, '--gpu', '-1', '--log', f'{folder}/log', *flags.split()]
        out = subprocess.run(command, capture_output=True, text=True)
        log = read(f'{folder}/log', 1)
    lines = out.stdout.splitlines()
    if not lines or not lines[-1].startswith('rounds to'): sys.exit(f'{flags} failed:\n{out.stdout[-500:]}{out.stderr[-2000:]}')
    missed, last = 'not reached' in lines[-1], lines[-1].replace(',', '').split()              # rounds to 97.00 %: 17.1, with 135.84 MB uploaded
    seconds = next(line for line in lines if ' rounds in ' in line).split()[3]               # 18 rounds in 26 s: ...
    return dict(setting=words, iid=iid, seed=seed, rounds='' if missed else last[4], megabytes='' if missed else last[6], seconds=seconds), log

def read(path, skip=0):
    if not os.path.exists(path): return []
    with open(path) as f: return list(csv.DictReader(f.readlines()[skip:]))

def write(path, row):
    with open(path, 'a', newline='') as f:
        writer = csv.DictWriter(f, list(row), lineterminator='\n')
        if not f.tell(): writer.writeheader()
        writer.writerow(row)

def table(path):
    """Mean rounds and MB of each setting, and how many times less than fp32's, as Markdown."""
    rows = read(path)
    print('| setting | IID: rounds | MB | less than fp32 | non-IID: rounds | MB | less than fp32 |\n|---|---|---|---|---|---|---|')
    def cell(words, iid):
        ran = [r for r in rows if r['setting'] == words and r['iid'] == str(iid)]
        reached = [r for r in ran if r['rounds']]
        if len(reached) < max(len(ran), 1): return None, f'{len(ran) - len(reached)} of {len(ran)} missed' if ran else 'not run'
        rounds, megabytes = ([float(r[name]) for r in reached] for name in ('rounds', 'megabytes'))
        return statistics.mean(megabytes), f'{statistics.mean(rounds):.1f} ({min(rounds):.1f} to {max(rounds):.1f})'
    for words in SETTINGS + sorted({r['setting'] for r in rows} - set(SETTINGS)):
        line = [f'`{words}`' if words else 'fp32']
        for iid in (1, 0):
            megabytes, rounds = cell(words, iid)
            fp32 = cell('', iid)[0]
            line += [rounds, f'{megabytes:.2f}' if megabytes else '', f'{fp32 / megabytes:.1f}' if megabytes and fp32 else '']
        print('| ' + ' | '.join(line) + ' |')

def figure():
    """The best test accuracy so far against uploaded megabytes for the settings DRAWN, seed 0."""
    try: from matplotlib.figure import Figure
    except ImportError: sys.exit('--figure: needs matplotlib, which is not installed; pip install matplotlib')
    picture = Figure((10, 4), layout='constrained')
    for iid, axes in zip((1, 0), picture.subplots(1, 2, sharey=True)):
        for row in {(row['setting'], row['iid']): row for row in read(HERE / 'wire_curves.csv')}.values():      # the latest of each
            if row['iid'] != str(iid): continue
            sent, y = ([int(v) for v in row[name].split()] for name in ('up_bytes', 'accuracies'))
            axes.plot([v / 1e6 for v in itertools.accumulate(sent)], [v / 100 for v in itertools.accumulate(y, max)], linewidth=1, label=row['setting'] or 'fp32')
        axes.axhline(100 * TARGET, color='gray', linewidth=0.5)
        axes.set(title='IID' if iid else 'non-IID', xlabel='uploaded MB', ylabel='test accuracy, %' if iid else '', xscale='log', ylim=(80, 98))
        if iid and axes.lines[1:]: axes.legend(fontsize='small')
    picture.savefig(HERE / 'megabytes.png', dpi=100)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='./data')
    parser.add_argument('--seeds', nargs='*', type=int, default=[0, 1, 2])
    parser.add_argument('--iid', nargs='*', type=int, default=[1, 0])
    parser.add_argument('--only', nargs='*', default=SETTINGS, help='these settings, each in quotes; all of the table if not given')
    parser.add_argument('--show', action='store_true', help='the table of what has been run')
    parser.add_argument('--figure', action='store_true', help='needs matplotlib')
    args = parser.parse_args()
    path = HERE / 'wire.csv'
    if args.show: return table(path)
    if args.figure: return figure()
    done = {(r['setting'], r['iid'], r['seed']) for r in read(path)}
    todo = [run for run in itertools.product(args.iid, args.only, args.seeds) if (run[1], str(run[0]), str(run[2])) not in done]
    if not todo: print('all of it is in results/wire.csv already; --show prints it, and rows deleted there are run anew', file=sys.stderr)
    for i, (iid, words, seed) in enumerate(todo):
        print(f'--- run {i + 1} of {len(todo)}: {words or "fp32"}, iid {iid}, seed {seed}', file=sys.stderr, flush=True)
        row, log = measure(words, os.path.abspath(args.data_dir), iid, seed)
        write(path, row)
        if seed == 0 and words in DRAWN:
            write(HERE / 'wire_curves.csv', dict(setting=words, iid=iid, up_bytes=' '.join(r['up_bytes'] for r in log),
                                                 accuracies=' '.join(f'{10000 * float(r["test_acc"]):.0f}' for r in log)))
        print(row, flush=True)

if __name__ == '__main__':
    try: main()
    except KeyboardInterrupt: sys.exit('interrupted; the runs that came to their end are in results/wire.csv')
