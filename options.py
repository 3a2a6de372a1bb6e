"""The paper's symbols as command line flags (McMahan et al. 2017, Section 2), and every check on their values.

Nothing else in the project knows argparse. A value that makes no sense ends the program with exit code 2 and one line
that names the flag, the value and what would do, before any data are read. This file needs the standard library only.

    python fedavg.py --help
"""
import argparse
import contextlib
import math
import os
import sys

# What --num_users, --num_channels and --num_classes are held against: training examples, channels, classes.
DATASETS = {'mnist': (60000, 1, 10), 'fmnist': (60000, 1, 10), 'cifar': (50000, 3, 10), 'synthetic': (60000, 1, 10)}

#############################################
#       Values: text in, number out         #
#############################################

def fail(message, everyone=False):
    """Ends the program as every bad input does: one line on stderr, exit code 2; from torchrun's first process, or everyone."""
    if everyone or 'TORCHELASTIC_RUN_ID' not in os.environ or os.environ['RANK'] == '0': print(f'fedavg.py: error: {message}', file=sys.stderr)
    sys.exit(2)

class Parser(argparse.ArgumentParser):
    """argparse without the usage block before an error: the one line is the message."""
    def error(self, message):
        fail(message.removeprefix('argument '))

def number(kind, low, high=math.inf, hint='', above=False, word=None):
    """A flag's type: a finite `kind` in [low, high], in (low, high] if `above`, or the given `word` for infinity."""
    what = 'a whole number' if kind is int else 'a number'
    span = f'{what} {"above" if above else "of at least"} {low}' + (f' and at most {high}' if high < math.inf else '')
    def parse(text):
        if word and text.lower() == word: return math.inf
        try:
            value = kind(text)
            if math.isfinite(value) and low <= value <= high and not (above and value == low): return value
        except (ValueError, OverflowError): pass
        raise argparse.ArgumentTypeError(f'{text!r} will not do; it takes {span}' + (f' or {word}' if word else '')
                                         + (f' ({hint})' if hint else ''))
    return parse

def several(kind):
    """A flag's type: values of the type `kind`, parted by commas, as a tuple."""
    def parse(text):
        try: return tuple(kind(part) for part in text.split(','))
        except argparse.ArgumentTypeError as e: raise argparse.ArgumentTypeError(f'{e}; several are parted by commas, as 1,0.5')
    return parse

def devices(text):
    """--gpu's type: a device's number, or two of different GPUs as a tuple."""
    if ',' not in text: return number(int, -1)(text)
    numbers = several(number(int, -1))(text)
    if len(numbers) > 2 or -1 in numbers or numbers[0] == numbers[1]:
        raise argparse.ArgumentTypeError(f'{text!r} will not do; it takes one device, or two different GPUs, as 0,1')
    return numbers

def lognormal(text):
    """--speeds' type: the S of lognormal:S."""
    if not text.startswith('lognormal:'): raise argparse.ArgumentTypeError(f'{text!r} will not do; it takes lognormal:S, with S the sigma')
    return number(float, 0, 10, hint='as lognormal:1')(text.removeprefix('lognormal:'))

def writable(text):
    """A flag's type: the real path of a file that can be written, beside itself as .tmp, and then renamed."""
    path = os.path.realpath(text)
    if not text or os.path.exists(path) and not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f'{text!r} is not a file; name one')
    try:
        with open(path + '.tmp', 'ab'): pass
        with contextlib.suppress(FileNotFoundError): os.remove(path + '.tmp')      # another process of torchrun was faster
    except OSError as e:
        raise argparse.ArgumentTypeError(f'{text!r} cannot be written ({e.strerror}); name a file in a folder that you may write to')
    return path

#############################################
#                 The flags                 #
#############################################

def args_parser(argv=None):
    """The command line as a Namespace. argv: list of words, None for sys.argv. Exits with code 2 on a senseless value."""
    parser = Parser(prog='fedavg.py', description='Federated averaging: Algorithm 1 of McMahan et al. 2017.', allow_abbrev=False)

    def add(name, default, kind, text, **more):
        text = text if default is None else f'{text} (default {default})'
        parser.add_argument(f'--{name}', default=default, type=kind, help=text, **more)
    def switch(name, default, text):
        add(name, default, number(int, 0, 1), text, nargs='?', const=1)

    add('epochs', 60, number(int, 1), 'rounds t of training')
    add('num_users', 100, number(int, 1), 'K, clients in all; the paper has 100')
    add('frac', 0.1, number(float, 0, 1), 'C, fraction of clients asked per round, m = max(round(C K), 1); the paper has 0 to 1')
    add('local_ep', 1, number(int, 1), 'E, local epochs; the paper has 1 to 20')
    add('local_bs', 10, number(int, 1, word='inf'), "B, local batch size, 'inf' for all of a client's data; the paper has 10, 50 and inf")
    add('lr', 0.1, number(float, 0, 1e9, above=True), 'eta, local learning rate; the paper picks it per cell of a table')
    add('lr_decay', 1.0, number(float, 0, 1, above=True), 'eta is multiplied by this each round; the paper has 0.99 on CIFAR')
    add('momentum', 0.0, number(float, 0, 0.9999), 'momentum of the local SGD; the paper has none')
    add('optimizer', 'sgd', str, 'local optimizer; the paper has SGD', choices=('sgd', 'adamw'))
    switch('all_clients', 0, "1: the sum over all K clients of the paper's 2017 text, a client not asked counts with w_t")

    add('model', '2nn', str, "2nn and paper_cnn are the paper's nets; mlp and cnn those of the layout this project mirrors",
        choices=('2nn', 'paper_cnn', 'mlp', 'cnn'))
    add('dataset', 'mnist', str, 'synthetic is drawn by the program itself and needs no download', choices=tuple(DATASETS))
    add('data_dir', './data', str, "torchvision's root folder; files missing there are downloaded; with --silo 1, {rank} in it is "
        "the process's number")
    add('num_channels', None, number(int, 1), "the images' channels; known from the data")
    add('num_classes', None, number(int, 1), "the labels' classes; known from the data")
    switch('iid', 1, '1: shuffled; 0: sorted by label, two shards per client')
    add('alpha', None, number(float, 0, above=True), 'with --iid 0: a Dirichlet(alpha) split over the labels instead of shards')
    switch('unequal', 0, "1: the clients' sizes n_k differ by a log-normal factor")

    add('engine', 'auto', str, 'loop: one client after the other; stacked: all of S_t at once; auto: the faster one',
        choices=('auto', 'loop', 'stacked'))
    switch('compile', 0, '1: torch.compile the stacked step; takes from seconds to a minute at the start')
    add('quantize', None, number(int, 1, 16), 'bits a value of an uploaded w_k - w_t, rounded stochastically; None: fp32')
    add('topk', None, number(float, 0, 1, above=True), 'fraction of the values of w_k - w_t that are uploaded, the largest')
    switch('error_feedback', 1, 'with --topk: a client keeps what it did not send and adds it next time')
    add('prune', None, number(float, 0, 0.9999, above=True), 'fraction of the weights pruned by magnitude in the end, biases stay')
    add('prune_begin', None, number(int, 0), 'with --prune: the last round without pruning; 0 if not given')
    add('prune_end', None, number(int, 1), 'with --prune: the round from which on all of it is pruned, a cubic between; 30, or the last, if not given')
    switch('separable', 0, '1: the second convolution of --model cnn is depthwise, then pointwise')
    add('bandwidth', 1.0, number(float, 0, above=True), "a client's upload in MB/s, for the time that its uploads would take; the paper has 1")
    add('drop', 0.0, number(float, 0, 1), 'probability with which a client that was asked is lost in a round, at a random stage; with --secagg one lost '
        'after it has sent its update still counts')
    add('dp', None, str, "differential privacy: user, DP-FedAvg of clients; example, DP-SGD within each", choices=('user', 'example'))
    add('clip', None, number(float, 1e-9, 1e9), 'S, with --dp: the L2 norm that an update, or an example\'s gradient, is clipped to')
    add('noise', None, number(float, 0, 1e6), 'z, with --dp: the deviation of the noise on a sum, in units of S')
    add('epsilon', None, number(float, 0, above=True), 'with --dp, for --noise: what may be spent in --epochs rounds; finds z, stops when spent')
    add('delta', None, number(float, 0, 0.9999, above=True), 'with --dp: 1/K for user, 1/n_k for example if not given')
    switch('secagg', 0, '1: secure aggregation; the server sees masked integers and their sum')
    add('threshold', None, number(float, 0, 1, above=True), 'with --secagg: fraction of S_t that must stay for the sum to be had; 2/3 if not given; '
        'half or less is not safe')
    add('range', None, number(float, 1e-9, 1e9), 'with --secagg: values of w_k - w_t are clamped to plus or minus this; 1, or --clip')
    add('widths', None, several(number(float, 0, 1, above=True)), 'fractions of the hidden units that clients have, as 1,0.5,0.25, client k the '
        '(k mod n)-th of the n: HeteroFL; one of them is 1')
    add('cut', None, number(int, 1), 'L: clients train the first L layers and the server the others, on what the clients send it: SplitFed')
    add('teacher', None, str, 'checkpoint of this program whose net teaches --model; only --model travels')
    add('distill', None, number(float, 0, 1), 'a, with --teacher: the loss is (1 - a) cross-entropy + a T^2 KL; 0.5 if not given')
    add('temperature', None, number(float, 0, 1e3, above=True), 'T, with --teacher: both nets\' logits are divided by it; 2 if not given')
    add('personal', None, str, 'a model for each client: finetune, trained on from w in the end; layers, some of its own; mix, finetuned and mixed with w',
        choices=('finetune', 'layers', 'mix'))
    add('personal_ep', None, number(int, 1), 'with --personal finetune or mix: epochs from w, as those of the rounds; 1 if not given')
    add('personal_layers', None, several(str), 'with --personal layers: their names, as fc3 or fc2,fc3')
    add('mix', None, number(float, 0, 1), 'lambda, with --personal mix: each client ends with lambda w + (1 - lambda) its own; 0.5 if not given')
    add('speeds', None, lognormal, 'lognormal:S: a client is exp(S N(0, 1)) as fast as others, for the whole run; all alike if not given')
    add('deadline', None, number(float, 0, above=True), 'a client does the local steps that fit, at least an epoch, or is late; in units of what the '
        'median client takes for all')
    add('overselect', 0.0, number(float, 0, 100), 'r: ceil(m (1 + r)) clients are asked, and the first m that finish are averaged')
    add('corrupt', 0.0, number(float, 0, 1), 'probability with which a client sends NaN, infinity, garbage or too few values, in turn')
    add('mu', 0.0, number(float, 0, 1e9), "FedProx: mu / 2 |w - w_t|^2 is added to each client's loss")
    switch('augment', 0, "1: images turned, sheared, zoomed and shifted at random in training; CIFAR's mirrored too, and paper_cnn's as in the paper")
    switch('balance', 0, '1: small clients and their rare labels get augmented copies; n_k, their weight in the average, stays, as copies say nothing new')
    switch('silo', 0, '1: every process that torchrun starts is one client with its own --data_dir; K is their number')
    add('gpu', 0, devices, 'CUDA device, used when CUDA is present; -1 is the CPU; 0,1 with --cut: the clients\' half and the server\'s')
    add('seed', 1, number(int, 0), 'the one seed of partition, selection, initialisation and shuffling')
    add('bs', 250, number(int, 1), 'batch size of the evaluation, examples')
    add('target', None, number(float, 0, 1, above=True, hint='0.97 is 97 %'), 'stop at this test accuracy and report the rounds it took')
    add('log', None, writable, 'CSV file, one row a round')
    add('checkpoint', None, writable, 'file that the run can be resumed from')
    add('save_every', 1, number(int, 1), 'rounds between checkpoints')
    switch('resume', 0, 'go on from --checkpoint')
    add('plot', None, writable, 'accuracy and loss against rounds, drawn by matplotlib; .png, .pdf or .svg')
    switch('verbose', 0, "1: a line for each client's update too")

    args = parser.parse_args(argv)
    check(args)
    return args

def check(args):
    """What no single flag can see: values that contradict each other or the data. Fills in what follows from the others."""
    n, channels, classes = DATASETS[args.dataset]
    for name, known in (('num_channels', channels), ('num_classes', classes)):
        given = getattr(args, name)
        if given not in (None, known): fail(f'--{name} {given}: {args.dataset} has {known}; leave the flag out')
        setattr(args, name, known)
    if args.num_users > n: fail(f'--num_users {args.num_users}: {args.dataset} has {n} training examples; at most that many')
    if args.alpha and args.iid: fail(f'--alpha {args.alpha}: splits by label, which --iid 1 does not; add --iid 0')
    if args.momentum and args.optimizer != 'sgd':
        fail(f'--momentum {args.momentum}: adamw has its own; leave the flag out, or --optimizer sgd')
    if args.resume and not args.checkpoint: fail('--resume 1: nothing to go on from; name the file with --checkpoint')
    if not args.error_feedback and not args.topk: fail('--error_feedback 0: without --topk all is sent; add --topk, or leave it out')
    if args.separable and args.model != 'cnn': fail(f'--separable 1: {args.model} has no such form; take --model cnn')
    given = [f'--{name} {getattr(args, name)}' for name in ('prune_begin', 'prune_end') if getattr(args, name) is not None]
    if given and not args.prune: fail(f'{given[0]}: nothing is pruned; add --prune, or leave it out')
    if args.prune:
        args.prune_begin, args.prune_end = args.prune_begin or 0, args.prune_end or min(30, args.epochs)
        if not args.prune_begin < args.prune_end <= args.epochs:
            fail(f'--prune_begin {args.prune_begin}, --prune_end {args.prune_end}: the end comes after the beginning and by the last '
                 f'round, --epochs {args.epochs}')
    private(args)
    unequal(args)
    if args.silo and 'TORCHELASTIC_RUN_ID' not in os.environ:
        fail('--silo 1: every process is a client; start them with torchrun --nproc_per_node=K fedavg.py --silo 1 ...')
    if '{rank}' in args.data_dir and not args.silo: fail(f'--data_dir {args.data_dir}: only silos have numbers; add --silo 1, or name a folder')
    if args.silo and '{rank}' not in args.data_dir and args.dataset != 'synthetic' and os.environ.get('LOCAL_WORLD_SIZE', '1') != '1':
        fail(f'--data_dir {args.data_dir}: all silos of this machine would have the same data; put {{rank}} into it')
    if args.silo and (not args.iid or args.unequal):
        fail('--silo 1: a silo holds the files it has; leave out --iid 0, --alpha and --unequal')
    # torchrun starts the same command line the first time and after a failure; by hand, a missing file is a typing error.
    if args.resume and not os.path.isfile(args.checkpoint) and 'TORCHELASTIC_RUN_ID' not in os.environ:
        fail(f'--resume 1: there is no file {args.checkpoint}; leave --resume out for a first run')
    if args.plot and not args.plot.lower().endswith(('.png', '.pdf', '.svg')):
        fail(f'--plot {args.plot}: not a kind of picture; the name ends in .png, .pdf or .svg')
    if args.compile and args.engine == 'loop': fail('--compile 1: compiles the stacked step; leave out --engine loop')
    files = [f for f in (args.log, args.checkpoint, args.plot, args.teacher and os.path.realpath(args.teacher)) if f]
    for f in files:
        if files.count(f) > 1: fail(f'--log, --checkpoint, --plot and --teacher: {f} is named twice; name a file for each')

def private(args):
    """check's part about --dp and --secagg."""
    for name in ('clip', 'noise', 'epsilon', 'delta'):
        value = getattr(args, name)
        if value is not None and not args.dp: fail(f'--{name} {value}: nothing is private; add --dp user or --dp example, or leave it out')
    for name in ('threshold', 'range'):
        value = getattr(args, name)
        if value is not None and not args.secagg: fail(f'--{name} {value}: only for secure aggregation; add --secagg 1, or leave it out')
    if args.dp and args.clip is None: fail(f'--dp {args.dp}: what is not clipped cannot be hidden; add --clip S')
    if args.dp and (args.noise is None) == (args.epsilon is None): fail(f'--dp {args.dp}: give either --noise z or --epsilon')
    if args.dp == 'user' and not args.frac: fail('--dp user: a client is drawn with probability --frac; give one above 0')
    if args.dp == 'user' and args.all_clients: fail('--dp user: has a denominator of its own; leave out --all_clients')
    if args.dp == 'user' and args.range is not None: fail(f'--range {args.range}: with --dp user it is --clip; leave it out')
    if args.dp == 'example' and (args.engine == 'stacked' or args.compile):
        fail('--dp example: each example has its own gradient, which the stacked engine does not know; leave out --engine and --compile')
    if args.secagg and args.topk: fail(f'--topk {args.topk}: the clients keep different values, which masked do not add up; leave out --secagg or --topk')
    if args.secagg and not args.silo and args.dp != 'user' and round(args.frac * args.num_users) < 2:
        fail(f'--secagg 1: a round asks one client (--frac {args.frac}), and the sum of one is its update; ask more')
    if args.secagg:
        args.threshold = args.threshold or 2 / 3
        args.range = args.clip if args.dp == 'user' else args.range or 1.0

def unequal(args):
    """check's part about clients that differ, and models of their own."""
    for name, owner, there in (('distill', '--teacher F', args.teacher), ('temperature', '--teacher F', args.teacher),
                               ('personal_layers', '--personal layers', args.personal == 'layers'),
                               ('personal_ep', '--personal finetune', args.personal in ('finetune', 'mix')),
                               ('mix', '--personal mix', args.personal == 'mix')):
        value = getattr(args, name)
        if value is not None and not there: fail(f'--{name} {shown(value)}: goes with {owner} alone; add that, or leave this out')
    if args.widths and max(args.widths) < 1: fail(f'--widths {shown(args.widths)}: nobody would train all of the net; put a 1 among them')
    if args.teacher is not None and not os.path.isfile(args.teacher): fail(f'--teacher {args.teacher}: there is no such file; name a checkpoint')
    if args.teacher: args.distill, args.temperature = 0.5 if args.distill is None else args.distill, args.temperature or 2.0
    if args.personal == 'layers' and not args.personal_layers: fail('--personal layers: which? name them with --personal_layers, as fc3')
    if args.personal == 'mix' and args.mix is None: args.mix = 0.5
    if args.personal == 'finetune': args.mix = 0.0
    if args.personal in ('finetune', 'mix'): args.personal_ep = args.personal_ep or 1
    if isinstance(args.gpu, tuple):
        if 'TORCHELASTIC_RUN_ID' in os.environ:
            fail(f'--gpu {shown(args.gpu)}: under torchrun a process has one device; name one, and the others take those after it')
        if not args.cut: fail(f'--gpu {shown(args.gpu)}: two devices are for the two halves of a net; add --cut L, or name one')
    asked = math.ceil(round(max(round(args.frac * args.num_users), 1) * (1 + args.overselect), 9))
    if asked > args.num_users: fail(f'--overselect {args.overselect}: asks {asked} of {args.num_users} clients; take less, or a smaller --frac')
    for name, bad, why in CLASHES:
        value, other = getattr(args, name), getattr(args, bad.split()[0])
        if value and (str(other) == bad.split()[1] if ' ' in bad else other):
            fail(f'--{name} {shown(value)}: does not go with --{bad if " " in bad else f"{bad} {shown(other)}"}, {why}; leave one of them out')

def shown(value):
    """A flag's value as it is written on the command line."""
    return ','.join(f'{v:g}' if isinstance(v, float) else str(v) for v in value) if isinstance(value, tuple) else value

# Pairs of flags, or a flag and another's value, that make no sense together, and why.
CLASHES = (('widths', 'all_clients', 'which counts values that a client does not hold'),
           ('overselect', 'secagg', 'whose sum is given up when too many do not answer'),
           ('teacher', 'dp', 'whose epsilon does not know what the teacher has seen'),
           ('widths', 'secagg', 'which adds up values that all clients have'),
           ('widths', 'dp user', 'whose noise is for sums over all clients'),
           ('widths', 'cut', 'which gives the hidden layers to the server'),
           ('widths', 'personal', 'whose report is of whole models'),
           ('cut', 'dp user', 'whose noise the server\'s half would lack'),
           ('cut', 'dp example', 'which does not hide what clients send at each step'),
           ('cut', 'secagg', 'which does not hide what clients send at each step'),
           ('cut', 'silo', 'whose server does not train'),
           ('cut', 'compile', 'as the two halves wait for each other'),
           ('cut', 'engine stacked', 'as the two halves wait for each other'),
           ('cut', 'personal layers', 'as the server has the last ones'),
           ('prune', 'personal layers', 'which the server could not prune'),
           ('overselect', 'dp user', 'which asks each client with probability --frac'),
           ('overselect', 'silo', 'where more can only be asked with --frac'),
           ('corrupt', 'secagg', 'where garbage cannot be told from a masked update'),
           ('balance', 'dp example', 'as a copy shows an example twice'))
